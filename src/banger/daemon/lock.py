"""That there is one daemon: by two locks, which the kernel drops with the process that held them.

One is beside its socket, where clients and who installs banger look for it. The other is in the
home that it serves, which may be used with another runtime directory, too: of two daemons each
would take the other's machines for what was left behind, and end them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from banger.base.errors import Cancelled, Conflict
from banger.base.paths import Paths, way_to

#: A daemon that stops takes back what it was doing: a build has gigabytes to remove.
LOCK_TIMEOUT_S = 60.0
_LOCK_INTERVAL_S = 0.05
#: A pid, a space and a path.
_NOTE_MAX_BYTES = 32 + os.pathconf("/", "PC_PATH_MAX")


class _Holder(NamedTuple):
    """Who has the lock of a home."""

    pid: int
    runtime_dir: Path


@asynccontextmanager
async def only_daemon(paths: Paths, stopping: asyncio.Event) -> AsyncIterator[None]:
    """No other daemon has this runtime directory, or this home, while the block runs.

    One that is stopping has its locks until all its work is taken back: that is waited for. Raises
    Conflict when another answers, or keeps a lock; Cancelled when told to stop meanwhile.
    """
    until = asyncio.get_running_loop().time() + LOCK_TIMEOUT_S
    with ExitStack() as held:
        beside = _opened(paths.daemon_lock, held)
        while not _locked(beside):
            if _is_past(until) or _answers(paths.daemon_socket):
                raise Conflict(
                    "another bangerd of this user is running", hint="see: banger daemon status"
                )
            await _pause(stopping)
        home = _opened(paths.home_lock, held)
        while not _locked(home):
            holder = _holder(home)
            socket_there = holder and holder.runtime_dir / paths.daemon_socket.name
            if _is_past(until) or (socket_there and _answers(socket_there)):
                raise _refusal(paths, holder)
            await _pause(stopping)
        _note(home, _Holder(os.getpid(), paths.runtime_dir))
        yield


def _opened(path: Path, held: ExitStack) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    held.callback(os.close, descriptor)
    return descriptor


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _pause(stopping: asyncio.Event) -> None:
    """flock(2) cannot be awaited, and a thread that waits in it cannot be stopped."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), _LOCK_INTERVAL_S)
        raise Cancelled("bangerd was told to stop before it had begun")


def _is_past(moment_s: float) -> bool:
    return asyncio.get_running_loop().time() > moment_s


def _answers(path: Path) -> bool:
    """Whether a daemon accepts connections there; one that is stopping does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            return connection.connect_ex(os.fspath(path)) == 0
        except OSError:  # it is too long: nobody can listen there
            return False


def _note(home: int, holder: _Holder) -> None:
    """Say who has the lock, for whoever is refused because of that."""
    with suppress(OSError):  # no room: it is locked all the same
        os.ftruncate(home, 0)
        os.pwrite(home, b"%d %s" % (holder.pid, os.fsencode(holder.runtime_dir)), 0)


def _holder(home: int) -> _Holder | None:
    """None while that is not written, or was not."""
    pid, _, runtime_dir = os.pread(home, _NOTE_MAX_BYTES, 0).partition(b" ")
    if not (pid.isdigit() and runtime_dir.startswith(b"/")):
        return None
    return _Holder(int(pid), Path(os.fsdecode(runtime_dir)))


def _refusal(paths: Paths, holder: _Holder | None) -> Conflict:
    what = f"another bangerd serves {paths.state_dir}"
    if holder is None:
        return Conflict(what, hint="see: banger daemon logs")
    what = f"{what}, with its sockets in {holder.runtime_dir} (pid {holder.pid})"
    if holder.runtime_dir == paths.runtime_dir:
        # Somebody has removed the directory: nobody can connect to that daemon any more.
        return Conflict(what, hint=f"it is not to be reached: kill {holder.pid}; machines run on")
    return Conflict(what, hint=way_to(holder.runtime_dir))
