"""What /proc says about processes that are not (or no longer) our children.

A pid alone proves nothing: it is used again. A process is known by its pid with its start time in
one boot of the host, and recognised by its command line. One in a jail may have been taken over,
and says there what it likes: it is recognised by its jail. It is signalled through a pidfd.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from banger.base.jail import jail_uid, jailed_vm, may_be_jailed, pids_in_jails

_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ProcessUsage:
    """What a process takes: CPU time since its start, and memory now."""

    cpu_s: float
    resident_bytes: int


@dataclass(frozen=True)
class Process:
    """What a live process is recognised by: one of the two.

    ``jail`` is the id of the machine that it is, in a jail of this user's. Nothing that such a
    process says of itself is ever in ``argv``, its arguments.
    """

    argv: tuple[str, ...] = ()
    jail: str = ""


#: One that has ended, a zombie, a kernel's, one that /proc does not show, and who is in a jail
#: without being its machine.
UNKNOWN = Process()


def boot_id() -> str:
    """The kernel's random id of this boot."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def total_memory_bytes() -> int:
    """How much memory the host has (MemTotal of /proc/meminfo)."""
    return _meminfo_bytes("MemTotal")


def available_memory_bytes() -> int:
    """How much of it the host could give to new processes (MemAvailable)."""
    return _meminfo_bytes("MemAvailable")


def dirty_bytes() -> int:
    """How much of it is still to be written to disks (Dirty and Writeback)."""
    return _meminfo_bytes("Dirty") + _meminfo_bytes("Writeback")


def _meminfo_bytes(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot (proc(5): stat field 22); 0 if gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def usage(pid: int, expected_start_ticks: int) -> ProcessUsage | None:
    """What the process that started then takes, all its threads; None if it is gone.

    All of it is of one reading, so that it is of this process and of no later one with its pid.
    The CPU time has the kernel's resolution, 10 ms as a rule.
    """
    fields = _stat(pid)
    if not fields or int(fields[19]) != expected_start_ticks:
        return None
    # proc(5): 14 utime, 15 stime (ticks), 24 rss (pages; the same count as in statm).
    ticks = int(fields[11]) + int(fields[12])
    return ProcessUsage(ticks / _TICKS_PER_S, int(fields[21]) * _PAGE_BYTES)


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on; none for a process that is gone."""
    try:
        line = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return []
    # The second field is the command in parentheses and may itself hold any bytes, these too.
    return line.rpartition(b")")[2].split()


def command_line(pid: int) -> tuple[str, ...]:
    """The arguments of a process; empty for one that is gone, a zombie or a kernel thread.

    It may have changed them: `look_at` tells whose are to be believed.
    """
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0")) if raw else ()


def look_at(pid: int) -> Process:
    """What there is to recognise a process by; `UNKNOWN` where there is nothing."""
    try:
        # Of the directory itself: of what is in it root may be the owner (PR_SET_DUMPABLE).
        status = (_PROC / str(pid)).stat()
    except OSError:
        return UNKNOWN
    if not may_be_jailed(status):
        return Process(command_line(pid))
    vm_id = jailed_vm(pid, os.getuid())
    if vm_id and status.st_uid == jail_uid(vm_id) and _is_first(pid):
        return Process(jail=vm_id)
    return UNKNOWN


def _is_first(pid: int) -> bool:
    """Whether a process lives and is the first one of a namespace in ours, with which all others of
    that end: what was started in a jail, and not what that has started."""
    status = _status(pid)
    is_zombie = status.get("State", "").startswith(("Z", "X"))
    return status.get("NSpid", "").split() == [str(pid), "1"] and not is_zombie


def _status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status (proc(5)); none of one that is gone."""
    try:
        lines = (_PROC / str(pid) / "status").read_bytes().split(b"\n")
    except OSError:
        return {}
    # The first is the name, which the process chooses: the kernel escapes nothing in it but \n.
    fields = (line.decode(errors="replace").partition(":") for line in lines[1:])
    return {key: value.strip() for key, _, value in fields}


def own_processes() -> Iterator[tuple[int, Process]]:
    """Every live process of this user, and the machines in his jails, with their pids."""
    uid = os.getuid()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                status = entry.stat()
            except OSError:
                continue
            if status.st_uid == uid or may_be_jailed(status):
                process = look_at(int(entry.name))
                if process != UNKNOWN:
                    yield int(entry.name), process


def hides_others() -> bool:
    """Whether processes of other users cannot be looked at: /proc is mounted with ``hidepid``
    (proc(5)), or is one that a unit has to itself (``ProtectProc`` of systemd.exec(5)).

    What counts is what this process sees, who may be of the group that is excepted. The first
    process stands for all others: it is there, root's, and has privileges that we lack.
    """
    return not _stat(1)


def hidden_machines() -> dict[str, set[int]]:
    """The ids of machines that run in this user's jails and cannot be looked at, with the pids that
    are not shown: `own_processes` lacks them, as it does those that have ended."""
    uid = os.getuid()
    hidden = {
        vm_id: unseen
        for vm_id, pids in pids_in_jails(uid).items()
        if (unseen := {pid for pid in pids if not _stat(pid)})
    }
    still_there = pids_in_jails(uid) if hidden else {}  # others have ended meanwhile
    left = {vm_id: pids & still_there.get(vm_id, set()) for vm_id, pids in hidden.items()}
    return {vm_id: pids for vm_id, pids in left.items() if pids}


def open_pidfd(pid: int, is_it: Callable[[Process], bool]) -> int:
    """A pidfd of this process if it is the expected one, else -1.

    It is looked at after the pidfd is open: what is seen there is then what is signalled.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return -1
    if is_it(look_at(pid)):
        return pidfd
    os.close(pidfd)
    return -1


async def wait_exit(pidfd: int, timeout_s: float) -> bool:
    """Wait until the process has ended; whether it did within `timeout_s` seconds."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


async def kill(pidfd: int, timeout_s: float = 5.0) -> bool:
    """SIGKILL the process and wait until it has ended. Idempotent.

    Raises PermissionError for another user's that runs.
    """
    if select.select([pidfd], [], [], 0)[0]:  # it has ended, whoever's it was
        return True
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return await wait_exit(pidfd, timeout_s)
