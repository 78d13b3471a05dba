"""Which program runs machines, and what is said where it is not there or is not QEMU."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Never

import pytest

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.base.procfs import UNKNOWN, Process
from banger.drivers.base import GuestNetwork, Level, Link, Machine, NetworkAttachment
from banger.drivers.hypervisor.qemu import QemuHypervisor
from banger.drivers.hypervisor.qemu_argv import QEMU
from banger.drivers.hypervisor.qemu_program import QemuProgram

GUEST = GuestNetwork("02:00:00:00:00:01", "10.0.0.2/24", "10.0.0.1", "10.0.0.1")


def program(path: Path, mode: int = 0o755, content: str = "") -> QemuProgram:
    path.write_text(content)
    path.chmod(mode)
    return QemuProgram(str(path))


def hypervisor(qemu: QemuProgram) -> QemuHypervisor:
    return QemuHypervisor("tcg", Path("/nowhere"), qemu)


@pytest.fixture
def machine(short_path: Path) -> Machine:
    return Machine(
        vm_id="0123456789ab",
        vcpu_count=1,
        memory_mib=64,
        kernel=short_path / "kernel",
        initramfs=short_path / "initramfs",
        kernel_parameters=(),
        disks=(),
        console_log=short_path / "console.log",
        hypervisor_log=short_path / "hypervisor.log",
        control_socket=short_path / "control.sock",
        agent_socket=short_path / "agent.sock",
    )


def test_a_path_is_taken_as_it_is_and_a_name_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = program(tmp_path / "emulator")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert there.path() == QemuProgram("emulator").path() == str(tmp_path / "emulator")


def test_debians_own_is_told_of_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "which", lambda _: None)
    with pytest.raises(
        PreconditionFailed, match=r"^qemu-system-x86_64 is not installed$"
    ) as caught:
        QemuProgram().path()
    assert caught.value.hint == "install it with: apt-get install qemu-system-x86"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("{}/missing", "there is no {}/missing"),
        ("{}/file", "{}/file is not a program that may be run"),
        ("{}", "{} is not a program that may be run"),
        ("{}/file/below", "there is no {}/file/below"),
        ("no-such-qemu", "no-such-qemu is not on PATH"),
    ],
)
async def test_one_that_is_configured_and_is_none_is_told_of_with_the_setting(
    tmp_path: Path, machine: Machine, name: str, problem: str
) -> None:
    program(tmp_path / "file", mode=0o644)
    qemu = QemuProgram(name.format(tmp_path))
    (check,) = await hypervisor(qemu).checks()
    assert (check.level, check.detail) == (Level.FAIL, problem.format(tmp_path))
    assert "set qemu_bin" in check.hint
    for refused in (hypervisor(qemu).shape(machine, None), hypervisor(qemu).launch(machine, None)):
        with pytest.raises(PreconditionFailed) as caught:
            await refused
        assert (caught.value.message, caught.value.hint) == (check.detail, check.hint)


async def test_the_doctor_says_where_it_is(tmp_path: Path) -> None:
    found, _ = await hypervisor(program(tmp_path / "emulator")).checks()
    assert (found.level, found.detail) == (Level.OK, str(tmp_path / "emulator"))


async def test_what_was_saved_by_one_is_not_for_another(tmp_path: Path, machine: Machine) -> None:
    one = program(tmp_path / "one", content="one")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    other = program(tmp_path / "other", content="the other")
    shapes = [await hypervisor(each).shape(machine, None) for each in (one, other)]
    assert len(set(shapes)) == 2
    assert await hypervisor(QemuProgram(str(link))).shape(machine, None) == shapes[0]


async def test_whatever_runs_a_machine_the_machine_is_called_the_same(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that it is known again, also where another program is configured meanwhile."""
    started: list[tuple[object, ...]] = []

    def popen(argv: tuple[str, ...], *, executable: str, **_: object) -> Never:
        started.append((argv[0], executable))
        raise InterruptedError

    monkeypatch.setattr(subprocess, "Popen", popen)
    for name in ("one", "qemu-system-x86_64"):
        with pytest.raises(InterruptedError):
            await hypervisor(program(tmp_path / name)).launch(machine, None)
    assert started == [(QEMU, f"{tmp_path}/one"), (QEMU, f"{tmp_path}/qemu-system-x86_64")]


@pytest.mark.parametrize("number", [errno.ENOEXEC, errno.EACCES, errno.ENOENT])
async def test_what_the_kernel_refuses_to_run_is_an_error_of_ours(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def popen(*_: object, executable: str, **__: object) -> Never:
        raise OSError(number, os.strerror(number), executable)

    monkeypatch.setattr(subprocess, "Popen", popen)
    ours, theirs = os.pipe()
    network = NetworkAttachment(GUEST, fd=ours, link=Link.STREAM)
    qemu = program(tmp_path / "emulator")
    with pytest.raises(PreconditionFailed) as caught:
        await hypervisor(qemu).launch(machine, network)
    os.close(theirs)
    assert caught.value.message == f"{tmp_path}/emulator cannot be run: {os.strerror(number)}"
    assert "set qemu_bin" in caught.value.hint
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)


async def test_a_log_that_cannot_be_written_is_not_the_programs_fault(
    tmp_path: Path, machine: Machine
) -> None:
    nowhere = replace(machine, hypervisor_log=tmp_path / "missing/log")
    with pytest.raises(FileNotFoundError, match="missing/log"):
        await hypervisor(program(tmp_path / "emulator")).launch(nowhere, None)


@pytest.mark.parametrize("argv", [("/bin/sh", "/q"), ("emulator", "-chardev", "{}"), ()])
def test_a_machine_that_would_not_be_known_again_is_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    """Unless it has ended already."""
    socket = f"socket,id=control,path={machine.control_socket},server=on,wait=off"
    process = Process(tuple(word.format(socket) for word in argv))
    monkeypatch.setattr("banger.base.procfs.look_at", lambda _: process)
    check = hypervisor(QemuProgram("/q"))._check_recognised
    if process == UNKNOWN:
        check(1, machine)
        return
    with pytest.raises(PreconditionFailed, match=r"^/q is not QEMU itself") as caught:
        check(1, machine)
    assert "set qemu_bin" in caught.value.hint
