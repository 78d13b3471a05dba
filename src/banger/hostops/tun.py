"""Taps by ioctl(2) on /dev/net/tun, for whoever makes one, lends one or opens it in a jail.

A tap goes with its last descriptor, unless it was made to stay (`set_lasting`). All of them pass
what a virtio device leaves to the host to do (checksums, segments). All functions raise OSError.
"""

from __future__ import annotations

import fcntl
import os
import struct

#: Whose file name an error has where there are no taps at all.
DEVICE = "/dev/net/tun"
# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
#: Only a new one: a name that is taken is an error.
_IFF_TUN_EXCL = 0x8000
#: struct ifreq: the interface's name, and flags.
_IFREQ = struct.Struct("16sH22x")


def open_tap(name: str, *, new: bool = False) -> int:
    """A descriptor, which does not block, of the tap `name`: a new one where there is none, or
    `new` says that there must not be one."""
    descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_TUN_EXCL if new else 0)
        fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def set_owner(tap: int, uid: int) -> None:
    """Have this user be able to open it, too, by its name."""
    fcntl.ioctl(tap, _TUNSETOWNER, uid)


def set_lasting(tap: int, *, lasting: bool) -> None:
    """Whether it stays when the last who has it open closes it."""
    fcntl.ioctl(tap, _TUNSETPERSIST, int(lasting))
