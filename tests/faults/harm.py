"""Doing harm: to a daemon that is about to enter a stage, or to what it works with there."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from banger.base.log import FAULT_VARIABLE
from matrix import Cell, Fault
from product import Banger, finish, until
from scene import Scene

#: Within this a stage is reached, and a command has ended: a build takes the longest.
_ENDS_S = 200.0
#: A command that is not back by then waits for room on the disk.
_FULL_S = 20.0
_DIES_S = 10.0


def strike(scene: Scene, cell: Cell, subject: str) -> float:
    """Run the cell's operation and do it its harm when it enters the stage.

    How long it took until the command had ended, in seconds.
    """
    banger = scene.home.banger
    banger.ok("daemon", "stop")
    number = signal.SIGKILL if cell.fault is Fault.DAEMON_KILLED else signal.SIGSTOP
    armed = Banger({**banger.environment, FAULT_VARIABLE: f"{number.name}@{cell.point}"})
    # The command starts the daemon, which so has the variable.
    began = time.monotonic()
    command = armed.start(*cell.operation.command(subject, cell.drivers))
    try:
        if number is signal.SIGSTOP:
            _harm_while_stopped(scene, cell, command)
        said = finish(command, _ENDS_S)[2]
    finally:
        command.kill()
    if cell.fault is Fault.DAEMON_KILLED:
        assert scene.daemons() == [], f"{cell.point} was never reached: {said!r}"
    return time.monotonic() - began


def _harm_while_stopped(scene: Scene, cell: Cell, command: subprocess.Popen[bytes]) -> None:
    home = scene.home
    until(lambda: command.poll() is not None or home.stopped_daemon(), cell.point, _ENDS_S)
    daemon = home.stopped_daemon()
    assert daemon, f"{cell.point} was never reached: {command.communicate()!r}"
    # Even if the harm fails: a stopped daemon could not be ended by the next command.
    with _continued(daemon), _harm(scene, cell):
        os.kill(daemon, signal.SIGCONT)
        if cell.fault is Fault.DISK_FULL:
            with suppress(subprocess.TimeoutExpired):
                command.wait(_FULL_S)
            scene.vms()  # it answers nevertheless


@contextmanager
def _continued(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _harm(scene: Scene, cell: Cell) -> AbstractContextManager[None]:
    """Do it; what can be undone is, at the end of the context."""
    machines = scene.subject_machines()
    assert len(machines) == cell.stage.machine, f"{cell.point}: {machines}"
    match cell.fault:
        case Fault.DISK_FULL:
            return _full(scene.small_disk)
        case Fault.MACHINE_KILLED:
            _kill(machines[0].pid)
        case Fault.MACHINE_HANGS:
            os.kill(machines[0].pid, signal.SIGSTOP)
        case Fault.AGENT_CUT:
            (socket,) = scene.subject_agent_sockets()
            socket.unlink()
    return nullcontext()


def _kill(pid: int) -> None:
    """Returns when it has ended: a parent that is stopped cannot reap it."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        assert select.select([descriptor], [], [], _DIES_S)[0], f"process {pid} does not die"
    finally:
        os.close(descriptor)


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    """Not a byte is free on the file system that is mounted at `disk`."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        size = 0
        while free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize:
            # Somebody else may take of it meanwhile.
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), size, free)
                size += free
    try:
        yield
    finally:
        filler.unlink()
