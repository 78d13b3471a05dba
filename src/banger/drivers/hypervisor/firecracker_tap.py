"""A tap that we have open, for Firecracker, which opens taps by their names.

A tap goes with its descriptor, so that none is left of a machine that has ended, however it ended.
It can be open once. So it is made to stay for a moment (TUNSETPERSIST, which whoever has it open
may ask for), closed here, opened there, and made to go again, by the descriptor that the other
process has, a copy of which the kernel gives to who may trace that process (pidfd_getfd(2), Linux
5.6). A daemon that dies within the moment leaves a tap, which goes with its bridge.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from banger.base.errors import Unavailable
from banger.base.log import get_logger
from banger.hostops import tun

#: The same on all architectures.
_SYS_PIDFD_GETFD = 438
_LINKS = Path("/sys/class/net")


def lend(tap: int, name: str) -> None:
    """Have a process be able to open the tap `name`, of which `tap` is our descriptor. That is
    closed in any case. Raises Unavailable when it cannot be."""
    try:
        tun.set_owner(tap, os.getuid())
        tun.set_lasting(tap, lasting=True)
    except OSError as error:
        raise Unavailable(f"the tap {name} cannot be handed over: {error.strerror}") from error
    finally:
        os.close(tap)


def let_go(name: str, pid: int) -> None:
    """The process has opened it: have it go with that. Raises Unavailable when it would stay."""
    try:
        _make_transient(_taken(pid, name))
    except OSError as error:
        raise Unavailable(f"the tap {name} would stay behind: {error.strerror}") from error


def take_back(name: str) -> None:
    """Have it go, for nobody has it open any more: the process it was lent to has ended."""
    if not (_LINKS / name).exists():
        return
    try:
        _make_transient(tun.open_tap(name))
    except OSError as error:  # it goes with its bridge
        get_logger().error("a tap stays behind", tap=name, error=error.strerror)


def _make_transient(descriptor: int) -> None:
    try:
        tun.set_lasting(descriptor, lasting=False)
    finally:
        os.close(descriptor)


def _taken(pid: int, name: str) -> int:
    """A copy of the descriptor that the process has of a tap."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry) == tun.DEVICE and _tap_of(pid, entry.name) == name:  # noqa: PTH115
                return _copy_of(pid, int(entry.name))
        except FileNotFoundError:  # closed meanwhile
            continue
    raise FileNotFoundError(None, "it is not among its files")


def _tap_of(pid: int, descriptor: str) -> str:
    """proc_pid_fdinfo(5): a line ``iff:`` with the interface's name."""
    for line in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "iff":
            return value.strip()
    return ""


def _copy_of(pid: int, descriptor: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        copy = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, descriptor, 0))
    finally:
        os.close(pidfd)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copy
