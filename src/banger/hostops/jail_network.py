"""The inside of a jail's network: a tap for Firecracker, and a bridge that joins it to the host.

By ioctl(2) and one message of rtnetlink(7), for the launcher, which has no time for a library. The
host's side is `links`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from banger.base.jail import TAP
from banger.hostops import ipv6, tun

#: The jail's end of the pair of interfaces whose other end is in the host, and what joins it to
#: the tap.
UPLINK = "uplink0"
_BRIDGE = "bridge0"

# linux/sockios.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFINDEX = 0x8933
_SIOCBRADDIF = 0x89A2
_IFF_UP = 0x1
_IFREQ = struct.Struct("16si20x")
_IFREQ_FLAGS = struct.Struct("16sH22x")
# linux/rtnetlink.h, linux/if_link.h
_RTM_NEWLINK = 16
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_IFLA_IFNAME, _IFLA_LINKINFO = 3, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_BR_AGEING_TIME, _IFLA_BR_MCAST_SNOOPING = 4, 23
_NLMSGHDR = struct.Struct("=IHHII")
_NLMSGERR = struct.Struct("=16xi")
_IFINFOMSG_BYTES = 16
_ATTRIBUTE = struct.Struct("=HH")


def furnish(uid: int, *, has_interface: bool) -> None:
    """In the network namespace that the process is in: `TAP`, which the user `uid` may open, joined
    to `UPLINK`; or nothing. Raises OSError."""
    for each in ("all", "default"):
        ipv6.turn_off(each)
    if not has_interface:
        return
    _make_tap(uid)
    make_bridge()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for port in (TAP, UPLINK):
            request = _IFREQ.pack(_BRIDGE.encode(), _index(control, port))
            fcntl.ioctl(control, _SIOCBRADDIF, request)
        for link in (_BRIDGE, TAP, UPLINK):
            _bring_up(control, link)


def make_bridge() -> None:
    """It learns nothing: what a guest sends would be kept, without a bound (br_fdb_update). With
    two ports each frame goes to the other one anyway. Raises OSError."""
    settings = _attribute(_IFLA_BR_AGEING_TIME, struct.pack("=I", 0))
    settings += _attribute(_IFLA_BR_MCAST_SNOOPING, struct.pack("=B", 0))
    kind = _attribute(_IFLA_INFO_KIND, b"bridge") + _attribute(_IFLA_INFO_DATA, settings)
    body = bytes(_IFINFOMSG_BYTES) + _attribute(_IFLA_IFNAME, _BRIDGE.encode() + b"\0")
    body += _attribute(_IFLA_LINKINFO, kind)
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_EXCL | _NLM_F_CREATE
    header = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _RTM_NEWLINK, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.sendto(header + body, (0, 0))
        (number,) = _NLMSGERR.unpack_from(netlink.recv(4096))
    if number < 0:
        raise OSError(-number, os.strerror(-number), _BRIDGE)


def _attribute(kind: int, value: bytes) -> bytes:
    whole = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return whole + bytes(-len(whole) % 4)


def _make_tap(uid: int) -> None:
    """It stays when it is closed here, and goes with its namespace."""
    tap = tun.open_tap(TAP)
    try:
        tun.set_owner(tap, uid)
        tun.set_lasting(tap, lasting=True)
    finally:
        os.close(tap)


def _index(control: socket.socket, name: str) -> int:
    reply = fcntl.ioctl(control, _SIOCGIFINDEX, _IFREQ.pack(name.encode(), 0))
    return int(_IFREQ.unpack(reply)[1])


def _bring_up(control: socket.socket, name: str) -> None:
    reply = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name.encode(), 0))
    flags = _IFREQ_FLAGS.unpack(reply)[1] | _IFF_UP
    fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name.encode(), flags))
