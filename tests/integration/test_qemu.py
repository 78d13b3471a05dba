"""QEMU as a driver: a machine that boots, ends, fails to start; disks; and the KVM probe.

The guests are programs of a few bytes, so no image is needed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

import suite
from banger.base import proc, procfs
from banger.base.errors import BangerError, Unavailable
from banger.base.model import Reach
from banger.drivers.base import Disk, DiskFormat, Link, Machine, MachineStatus, MemoryFile, Plug
from banger.drivers.hypervisor import kvm
from banger.drivers.hypervisor.qemu import QemuHypervisor
from banger.drivers.hypervisor.qemu_argv import QEMU
from banger.drivers.hypervisor.qemu_program import QemuProgram
from banger.drivers.network.user import PasstNetwork
from banger.drivers.storage.qcow2 import Qcow2Storage
from tiny_guest import speaking_guest

pytestmark = suite.names_its_drivers

KEPT_FROM = IPv4Network("10.213.0.0/16")
VM_ID = "vm-0123456789ab"
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, private_home: object) -> Machine:
    # A comma in every path: QEMU's option lists are separated by commas.
    directory = tmp_path / "a,b"
    directory.mkdir()
    kernel = directory / "kernel"
    kernel.write_bytes(speaking_guest(b"hello, host\n"))
    initramfs = directory / "initramfs"
    initramfs.write_bytes(b"")
    return Machine(
        vm_id=VM_ID,
        vcpu_count=1,
        memory_mib=64,
        kernel=kernel,
        initramfs=initramfs,
        kernel_parameters=("banger.init=minimal",),
        disks=(),
        console_log=directory / "console.log",
        hypervisor_log=directory / "hypervisor.log",
        control_socket=directory / "control.sock",
        agent_socket=directory / "agent.sock",
    )


@pytest.fixture
def hypervisor(tmp_path: Path) -> QemuHypervisor:
    return QemuHypervisor("auto", tmp_path / "probes.json", QemuProgram())


async def exit_of(pid: int) -> None:
    """The process ends, and is reaped by the driver, within 5 s."""
    async with asyncio.timeout(5):
        while Path(f"/proc/{pid}").exists():
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            await procfs.wait_exit(pidfd, 5)
            os.close(pidfd)
            await asyncio.sleep(0)


async def console_says(machine: Machine, text: str, times: int = 1) -> None:
    """A file tells nobody that it grows, so this looks again and again."""
    async with asyncio.timeout(20):
        while machine.console_log.read_text().count(text) < times:
            await asyncio.sleep(0.02)


@pytest.mark.guest
async def test_a_machine_boots_answers_and_quits(
    machine: Machine, hypervisor: QemuHypervisor, tmp_path: Path
) -> None:
    base = tmp_path / "base,raw"
    base.write_bytes(bytes(MIB))
    overlay = tmp_path / "over,lay.qcow2"
    await Qcow2Storage().create_overlay(base, overlay, 2)
    machine = replace(
        machine,
        disks=(
            Disk("system", overlay, DiskFormat.QCOW2),
            Disk("modules", base, DiskFormat.RAW, read_only=True),
        ),
    )
    network = await PasstNetwork(KEPT_FROM).attach(Plug(VM_ID, tmp_path / "network.log", Reach()))
    pid = await hypervisor.launch(machine, network)
    try:
        assert hypervisor.control_socket(procfs.look_at(pid)) == machine.control_socket
        await console_says(machine, "hello, host")
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(machine.agent_socket))
    finally:
        await hypervisor.quit(machine.control_socket)
    await exit_of(pid)
    for each in network.pids:
        await exit_of(each)
    with pytest.raises(Unavailable, match="does not answer"):
        await hypervisor.quit(machine.control_socket)


@pytest.mark.guest
async def test_a_machine_that_hangs_is_told_of_with_the_time_that_it_had(
    machine: Machine, hypervisor: QemuHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.drivers.hypervisor.qemu_monitor._QMP_TIMEOUT_S", 0.5)
    pid = await hypervisor.launch(machine, None)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match=r"control\.sock within 0\.5 s$"):
            await hypervisor.status(machine.control_socket)
    finally:
        os.kill(pid, signal.SIGKILL)
    await exit_of(pid)


async def saved(
    machine: Machine, hypervisor: QemuHypervisor, network: PasstNetwork
) -> tuple[Path, Path]:
    """The memory and the state of a machine that has said its line."""
    memory, state = machine.kernel.with_name("mem,ory"), machine.kernel.with_name("sta,te")
    async with network.unplugged() as nowhere:
        pid = await hypervisor.launch(
            replace(machine, memory_file=MemoryFile(memory, private=False)), nowhere
        )
        await console_says(machine, "hello, host")
        await hypervisor.save(machine, state)
    assert await hypervisor.status(machine.control_socket) is MachineStatus.PAUSED
    await hypervisor.quit(machine.control_socket)
    await exit_of(pid)
    return memory, state


@pytest.mark.guest
async def test_machines_are_restored_side_by_side_and_leave_what_was_saved_as_it_is(
    machine: Machine, hypervisor: QemuHypervisor, tmp_path: Path
) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(bytes(MIB))
    await Qcow2Storage().create_overlay(base, overlay, 1)
    system = Disk("system", overlay, DiskFormat.QCOW2)
    network = PasstNetwork(KEPT_FROM)
    memory, state = await saved(replace(machine, disks=(system,)), hypervisor, network)
    before = memory.read_bytes(), state.read_bytes()
    assert b"hello, host" in before[0]  # all of the memory is in its file
    assert len(before[1]) < MIB // 4
    pids, copies = [], []
    for number in range(2):
        disk = tmp_path / f"copy-{number}"
        await Qcow2Storage().copy_overlay(overlay, disk)
        copy = replace(
            machine,
            vm_id=f"vm-{number}",
            disks=(replace(system, path=disk, size_mib=3 * number),),
            control_socket=tmp_path / f"control-{number}",
            agent_socket=tmp_path / f"agent-{number}",
            memory_file=MemoryFile(memory, private=True),
        )
        copies.append(copy)
        attachment = await network.attach(Plug(copy.vm_id, tmp_path / "network.log", Reach()))
        pids.append(await hypervisor.restore(copy, attachment, state))
    for copy in copies:
        assert await hypervisor.status(copy.control_socket) is MachineStatus.RUNNING
        await hypervisor.quit(copy.control_socket)
    for pid in pids:
        await exit_of(pid)
    assert (memory.read_bytes(), state.read_bytes()) == before
    assert machine.console_log.read_text().count("hello, host") == 1  # nobody booted again
    sizes = [await Qcow2Storage().size_mib(copy.disks[0].path) for copy in copies]
    assert sizes == [1, 3]


@pytest.mark.guest
@pytest.mark.parametrize("harm", ["cut", "missing", "of another shape"])
async def test_a_machine_that_cannot_be_restored_says_why_and_leaves_nothing(
    machine: Machine, hypervisor: QemuHypervisor, harm: str
) -> None:
    network = PasstNetwork(KEPT_FROM)
    memory, state = await saved(machine, hypervisor, network)
    copy = replace(machine, memory_file=MemoryFile(memory, private=True))
    if harm == "cut":
        state.write_bytes(state.read_bytes()[:5000])
    elif harm == "missing":
        state.unlink()
    else:
        copy = replace(copy, memory_mib=128)
    async with network.unplugged() as nowhere:
        with pytest.raises((Unavailable, OSError)) as caught:
            await hypervisor.restore(copy, nowhere, state)
    assert harm == "missing" or "inspect" in str(caught.value)
    with pytest.raises(Unavailable):
        await hypervisor.status(machine.control_socket)
    ours = str(machine.control_socket)
    left = [pid for pid, process in procfs.own_processes() if ours in str(process.argv)]
    assert left == []


@pytest.mark.guest
async def test_a_machine_whose_memory_is_its_own_cannot_be_saved_for_others(
    machine: Machine, hypervisor: QemuHypervisor, tmp_path: Path
) -> None:
    """Nothing fails: all of its memory is in the state then, which is what tells."""
    pid = await hypervisor.launch(machine, None)
    await console_says(machine, "hello, host")
    await hypervisor.save(machine, tmp_path / "state")
    assert b"hello, host" in (tmp_path / "state").read_bytes()
    await hypervisor.quit(machine.control_socket)
    await exit_of(pid)


async def test_a_shape_is_of_all_that_a_state_depends_on_and_of_nothing_else(
    machine: Machine, hypervisor: QemuHypervisor, tmp_path: Path
) -> None:
    shape = await hypervisor.shape(machine, None)
    for same in (
        replace(machine, vm_id="vm-other"),
        replace(machine, control_socket=tmp_path / "c", agent_socket=tmp_path / "a"),
        replace(machine, console_log=tmp_path / "log", hypervisor_log=tmp_path / "log"),
        replace(machine, memory_file=MemoryFile(tmp_path / "memory", private=True)),
    ):
        assert await hypervisor.shape(same, None) == shape
    disk = Disk("system", tmp_path / "disk", DiskFormat.QCOW2)
    with_disk = await hypervisor.shape(replace(machine, disks=(disk,)), None)
    elsewhere = replace(machine, disks=(replace(disk, path=tmp_path / "elsewhere"),))
    assert await hypervisor.shape(elsewhere, None) == with_disk
    others = {
        with_disk,
        await hypervisor.shape(machine, Link.STREAM),
        await hypervisor.shape(machine, Link.TAP),
        await hypervisor.shape(replace(machine, vcpu_count=2), None),
        await hypervisor.shape(replace(machine, memory_mib=128), None),
        await hypervisor.shape(replace(machine, kernel_parameters=("banger.init=systemd",)), None),
    }
    assert len(others | {shape}) == 7


@pytest.mark.guest
async def test_the_console_log_keeps_what_was_said_before_a_restart(
    machine: Machine, hypervisor: QemuHypervisor
) -> None:
    for start in (1, 2):
        pid = await hypervisor.launch(machine, None)
        await console_says(machine, "hello, host", times=start)
        await hypervisor.quit(machine.control_socket)
        await exit_of(pid)


@pytest.mark.guest
async def test_kill_9_of_a_machine_leaves_no_network_process_and_no_zombie(
    machine: Machine, hypervisor: QemuHypervisor, tmp_path: Path
) -> None:
    network = await PasstNetwork(KEPT_FROM).attach(Plug(VM_ID, tmp_path / "network.log", Reach()))
    pid = await hypervisor.launch(machine, network)
    os.kill(pid, signal.SIGKILL)
    await exit_of(pid)
    for each in network.pids:
        await exit_of(each)


@pytest.mark.guest
async def test_a_machine_that_cannot_start_says_why_and_where_to_look(
    machine: Machine, hypervisor: QemuHypervisor, tmp_path: Path
) -> None:
    machine.hypervisor_log.write_text("an older start's complaint\n")
    network = await PasstNetwork(KEPT_FROM).attach(Plug(VM_ID, tmp_path / "network.log", Reach()))
    missing = replace(machine, kernel=tmp_path / "nowhere")
    with pytest.raises(Unavailable) as caught:
        await hypervisor.launch(missing, network)
    assert "exited with status 1" in caught.value.message
    assert "nowhere" in caught.value.message
    assert "older" not in caught.value.message
    assert caught.value.message.endswith(f"; inspect {machine.hypervisor_log}")
    for each in network.pids:
        await exit_of(each)


@pytest.mark.guest
async def test_a_program_by_another_name_runs_machines_by_the_usual_one(
    machine: Machine, tmp_path: Path
) -> None:
    """It finds its firmware, too."""
    program = tmp_path / "emulator"
    program.symlink_to(QemuProgram().path())
    hypervisor = QemuHypervisor("tcg", tmp_path, QemuProgram(str(program)))
    pid = await hypervisor.launch(machine, None)
    try:
        assert procfs.command_line(pid)[0] == QEMU
        assert Path(f"/proc/{pid}/comm").read_text() == "emulator\n"
        assert hypervisor.control_socket(procfs.look_at(pid)) == machine.control_socket
        await console_says(machine, "hello, host")
    finally:
        await hypervisor.quit(machine.control_socket)
    await exit_of(pid)


@pytest.mark.guest
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no program\n", "cannot be run: Exec format error"),
        ("#!/nowhere/sh\n", "cannot be run: No such file or directory"),
        ("#!/bin/sh\nexit 3\n", "QEMU exited with status 3; inspect"),
        (f'#!/bin/sh\n{QEMU} "$@"\n', "is not QEMU itself"),
    ],
    ids=["text", "no interpreter", "another program", "QEMU below a script"],
)
async def test_what_is_not_qemu_is_told_with_the_setting_to_mend_and_leaves_nothing(
    machine: Machine, tmp_path: Path, content: str, said: str
) -> None:
    program = tmp_path / "program"
    program.write_text(content)
    program.chmod(0o755)
    hypervisor = QemuHypervisor("tcg", tmp_path, QemuProgram(str(program)))
    with pytest.raises(BangerError) as caught:
        await hypervisor.launch(machine, None)
    assert said in caught.value.message
    assert "qemu_bin" in caught.value.hint
    # By its kernel: commas in what is part of an option are doubled.
    for pid, process in procfs.own_processes():
        if str(machine.kernel) in process.argv:
            await exit_of(pid)


@pytest.mark.guest
async def test_a_cancelled_launch_leaves_no_process(
    machine: Machine, hypervisor: QemuHypervisor
) -> None:
    await hypervisor.choose_accelerator()
    launching = asyncio.create_task(hypervisor.launch(machine, None))
    started: list[int] = []
    while not started:
        await asyncio.sleep(0)
        started = [
            pid
            for pid, process in procfs.own_processes()
            if hypervisor.control_socket(process) == machine.control_socket
        ]
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    await exit_of(started[0])


async def test_an_overlay_names_its_backing_format_and_is_never_smaller(tmp_path: Path) -> None:
    base = tmp_path / "rootfs.ext4"
    base.write_bytes(bytes(3 * MIB))
    overlay = tmp_path / "system.qcow2"
    storage = Qcow2Storage()
    await storage.create_overlay(base, overlay, 1)
    info = (await proc.run(["qemu-img", "info", str(overlay)], timeout_s=10)).stdout.decode()
    assert "backing file format: raw" in info
    assert "virtual size: 3 MiB" in info
    assert 0 < overlay.stat().st_blocks * 512 < MIB
    await storage.create_overlay(base, overlay, 8)
    info = (await proc.run(["qemu-img", "info", str(overlay)], timeout_s=10)).stdout.decode()
    assert "virtual size: 8 MiB" in info
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rootfs.ext4", "system.qcow2"]


async def test_an_overlay_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    base = tmp_path / "rootfs.ext4"
    base.write_bytes(bytes(MIB))
    overlay = tmp_path / "system.qcow2"
    overlay.write_text("as it was")
    with pytest.raises(proc.ProcessFailed):
        # Larger than qcow2 can be.
        await Qcow2Storage().create_overlay(base, overlay, 1 << 60)
    assert overlay.read_text() == "as it was"
    assert len(list(tmp_path.iterdir())) == 2


async def test_the_kvm_probe_is_bounded_and_remembers(tmp_path: Path) -> None:
    cache = tmp_path / "probes.json"
    began = time.monotonic()
    first = await kvm.probe(cache, QemuProgram())
    assert time.monotonic() - began < 15
    assert first.detail
    began = time.monotonic()
    assert await kvm.probe(cache, QemuProgram()) == first
    assert time.monotonic() - began < 0.5


@pytest.mark.guest
async def test_the_kvm_probes_program_runs_to_its_end_on_a_processor_that_works() -> None:
    """The same program, on QEMU's own emulation of a processor."""
    with os.fdopen(os.memfd_create("probe"), "wb") as program:
        program.write(kvm.probe_program())
        program.flush()
        completed = await proc.run(
            kvm.probe_argv(QEMU, program.fileno(), "tcg", "max"),
            timeout_s=60,
            check=False,
            pass_fds=(program.fileno(),),
        )
    assert completed.returncode == kvm.PROBE_PASSED, completed.stderr
