"""The inside of a jail's network: a tap for Firecracker, and a bridge that joins it to the host.

By ioctl(2), for the launcher, which has no time for a netlink library. The host's side is `links`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

#: What Firecracker joins the machine's interface to; the jail's end of the pair of interfaces whose
#: other end is in the host; and what joins the two.
TAP = "tap0"
UPLINK = "uplink0"
_BRIDGE = "bridge0"

_TUN = "/dev/net/tun"
# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# linux/sockios.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFINDEX = 0x8933
_SIOCBRADDBR = 0x89A0
_SIOCBRADDIF = 0x89A2
_IFF_UP = 0x1
_IFREQ = struct.Struct("16si20x")
_IFREQ_FLAGS = struct.Struct("16sH22x")
_IPV6 = Path("/proc/sys/net/ipv6/conf")


def furnish(uid: int, *, has_interface: bool) -> None:
    """In the network namespace that the process is in: `TAP`, which the user `uid` may open, joined
    to `UPLINK`; or nothing. Raises OSError."""
    for each in ("all", "default"):
        setting = _IPV6 / each / "disable_ipv6"
        if setting.exists():  # a kernel without IPv6 has none
            setting.write_text("1")
    if not has_interface:
        return
    _make_tap(uid)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCBRADDBR, _IFREQ.pack(_BRIDGE.encode(), 0))
        for port in (TAP, UPLINK):
            request = _IFREQ.pack(_BRIDGE.encode(), _index(control, port))
            fcntl.ioctl(control, _SIOCBRADDIF, request)
        for link in (_BRIDGE, TAP, UPLINK):
            _bring_up(control, link)


def _make_tap(uid: int) -> None:
    """It stays when it is closed here, and goes with its namespace."""
    descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ_FLAGS.pack(TAP.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETOWNER, uid)
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def _index(control: socket.socket, name: str) -> int:
    reply = fcntl.ioctl(control, _SIOCGIFINDEX, _IFREQ.pack(name.encode(), 0))
    return int(_IFREQ.unpack(reply)[1])


def _bring_up(control: socket.socket, name: str) -> None:
    reply = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name.encode(), 0))
    flags = _IFREQ_FLAGS.unpack(reply)[1] | _IFF_UP
    fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name.encode(), flags))
