"""What a test session leaves behind: processes, mounts and loop devices that name its directory.

The directory's name is unique, which is the proof that they are ours; nothing else is touched.
Used by `conftest.py` at the end of every session.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_END_S = 10.0


@dataclass(frozen=True)
class Process:
    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid}: {self.command}"


def processes_of(directory: Path) -> list[Process]:
    """Living processes with `directory` in their command line or environment, except this one."""
    return processes_naming(str(directory))


def processes_naming(text: str) -> list[Process]:
    """Living processes with `text` in their command line or environment, except this one."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    commands = {pid: _command(pid, text) for pid in pids if pid != os.getpid()}
    return [Process(pid, command) for pid, command in commands.items() if command is not None]


def _command(pid: int, text: str) -> str | None:
    """The command line of a process that names `text`; None for any other."""
    needle = os.fsencode(text)
    proc = Path(f"/proc/{pid}")
    # It may end while we look, or belong to somebody else. A zombie has neither file.
    with suppress(OSError):
        command = (proc / "cmdline").read_bytes()
        if needle in command or needle in (proc / "environ").read_bytes():
            return command.replace(b"\0", b" ").decode(errors="replace")[:300].strip()
    return None


def end(process: Process, directory: Path) -> None:
    """TERM, then KILL after 10 s, if the pid still is a process that names `directory`."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            # Looked at again with the descriptor open: from here on it cannot be another process.
            if _command(process.pid, str(directory)) is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                if not select.select([descriptor], [], [], _END_S)[0]:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    select.select([descriptor], [], [], _END_S)
        finally:
            os.close(descriptor)


def mounts_and_loops_of(directory: Path) -> Iterator[str]:
    """Mounts at or from `directory`, and loop devices whose file is in it."""
    yield from mounts_of(directory)
    for device, file in loops_of(directory).items():
        yield f"loop device {device}: {file}"


def mounts_of(directory: Path) -> Iterator[str]:
    """Mounts at or from `directory`."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if str(directory) in line:
            yield f"mount {line}"


def loops_of(directory: Path) -> dict[str, str]:
    """The files in `directory` that are loop devices, by the names of these."""
    found = {}
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            file = backing.read_text().strip()
            if file.startswith(str(directory)):
                found[backing.parent.parent.name] = file
    return found


def mappings_over(loops: Collection[str]) -> set[str]:
    """The names of the device-mapper devices that are made of any of these loop devices."""
    found = set()
    for name in Path("/sys/block").glob("dm-*/dm/name"):
        with suppress(OSError):
            if {each.name for each in (name.parent.parent / "slaves").iterdir()} & set(loops):
                found.add(name.read_text().strip())
    return found
