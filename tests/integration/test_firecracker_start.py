"""A Firecracker that ends as it starts: what it has said of that is in the error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import firecrackers
import suite
from banger.base.errors import Unavailable
from banger.drivers.base import Disk, DiskFormat, Machine
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_place import Direct
from banger.drivers.hypervisor.kvm import KvmProbe

pytestmark = suite.names_its_drivers

_OLD = "an older start's complaint\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """With what an earlier start has left in its logs."""
    made = Machine(
        vm_id="0123456789ab",
        vcpu_count=1,
        memory_mib=128,
        kernel=tmp_path / "kernel",
        initramfs=tmp_path / "initramfs",
        kernel_parameters=(),
        disks=(),
        console_log=tmp_path / "console.log",
        hypervisor_log=tmp_path / "hypervisor.log",
        control_socket=tmp_path / "run/control.sock",
        agent_socket=tmp_path / "run/agent.sock",
    )
    made.control_socket.parent.mkdir()
    made.console_log.write_text(_OLD)
    # Longer than the new one, which is another file.
    made.hypervisor_log.write_text(_OLD * 100)
    return made


async def _said_with(machine: Machine, script: str) -> str:
    """Why the machine does not start where this script is its Firecracker."""
    program = machine.kernel.with_name("firecracker")
    version = 'if [ "$1" = --version ]; then echo Firecracker v1.16.1; exit; fi'
    program.write_text(f"#!/bin/sh\n{version}\n{script}\n")
    program.chmod(0o755)
    return await _said(machine, program)


async def _said(machine: Machine, program: Path) -> str:
    """Why the machine does not start with this program."""

    async def probe() -> KvmProbe:
        raise AssertionError("nobody asks for KVM")

    with pytest.raises(Unavailable) as failed:
        await FirecrackerHypervisor(Direct(str(program)), probe).launch(machine, None)
    return failed.value.message


async def test_what_it_has_logged_and_printed_is_told_with_where_it_stands(
    machine: Machine,
) -> None:
    said = await _said_with(
        machine, 'echo "no seccomp filters" >"$6"; echo "Error: BadArguments" >&2; exit 153'
    )
    assert "; it exited with status 153: no seccomp filters\nError: BadArguments; inspect " in said
    assert said.endswith(f"; inspect {machine.hypervisor_log} and {machine.console_log}")
    assert _OLD.strip() not in said


async def test_of_what_a_guest_may_have_printed_the_end_is_told_as_plain_text(
    machine: Machine,
) -> None:
    script = "head -c 1000000 /dev/zero | tr '\\0' x; printf '\\033[2J\\r\\nEND\\n'"
    said = await _said_with(machine, script)
    assert "x?[2J\nEND; inspect " in said
    assert len(said) < 3000


@firecrackers.needs_description
async def test_one_that_was_ended_with_its_start_is_not_told_to_have_died(
    machine: Machine, tmp_path: Path
) -> None:
    for path in (machine.kernel, machine.initramfs):
        path.touch()
    missing = Disk("system", tmp_path / "nowhere", DiskFormat.RAW)
    said = await _said(replace(machine, disks=(missing,)), firecrackers.stand_in(tmp_path))
    assert "it cannot use a disk" in said
    assert "; it was ended for that" in said
    assert "signal" not in said
