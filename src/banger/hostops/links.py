"""Bridges and taps, by netlink; taps are made by `tun`. All of it blocks for milliseconds.

What is ours is told by two things that must agree: a name of banger's shape, and the bridge's
alias. That says whose it is, by uid and daemon: root's own banger and a user's, and those of a user
with several homes, keep off each other's, unless no machine is on it. And it has what `take_down`
gives back: whether this host forwarded packets before.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from banger.base.bridge import is_bridge_name
from banger.base.errors import Conflict, PreconditionFailed
from banger.hostops import ipv6, jail_kernel, jail_network, tun
from banger.hostops.ops import BRIDGE_MAC, Bridge

_AF_INET = 2

_ALIAS = "banger"
_FORWARDED = "this host forwarded before"
_DID_NOT_FORWARD = "this host did not forward before"
#: A link that is there for nothing but that systemd-resolved is told of it.
NAMES = "banger-names"
_NAMES_MAC = "02:62:67:00:00:02"
#: resolved asks by no link without an address of global scope (`link_relevant` in its source). This
#: one leads nowhere: of a range that is never routed (RFC 3927).
_NAMES_ADDRESS = "169.254.213.53"
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_TAP = re.compile(r"banger[0-9]{1,2}-[0-9a-f]{6}")
#: Kinds of links (ip-link(8)) of those who have this host forward. A higher index is a later link.
_OF_NETWORKS = frozenset({"bridge", "ipvlan", "macvlan", "tun", "veth", "wireguard"})
_MACS = {"bridge": BRIDGE_MAC, "dummy": _NAMES_MAC}


def check_free(bridge: Bridge, owner_uid: int) -> None:
    """Raise Conflict for a link of its name which is not ours, and where its network is in use."""
    with IPRoute() as netlink:
        index = _find_bridge(netlink, bridge.name, owner_uid, bridge.instance)
        _check_free(netlink, bridge, index)


def bring_up(bridge: Bridge, owner_uid: int) -> None:
    """Have the bridge with its address, and let this host forward.

    Raises Conflict for a link of that name which is not ours, and where the network is in use.
    """
    with IPRoute() as netlink:
        index = _find_bridge(netlink, bridge.name, owner_uid, bridge.instance)
        made = index == 0
        _check_free(netlink, bridge, index)
        if made:
            netlink.link(
                "add", ifname=bridge.name, kind="bridge", address=BRIDGE_MAC, br_mcast_snooping=0
            )
            index = _index(netlink, bridge.name)
        try:
            alias = _alias(netlink.get_links(index)[0]) or ""
            if not alias.startswith(_of(owner_uid, bridge.instance)):
                # Of an idle one that was another daemon's, the note stays.
                before = alias.endswith(_FORWARDED) if alias else _forwards()
                note = _FORWARDED if before else _DID_NOT_FORWARD
                alias = f"{_of(owner_uid, bridge.instance)} {note}"
                netlink.link("set", index=index, IFLA_IFALIAS=alias)
            # Guests have no IPv6: this host should not offer them any by it.
            ipv6.turn_off(bridge.name)
            _have_address(netlink, index, bridge)
            netlink.link("set", index=index, state="up")
            _FORWARD.write_text("1")
        except BaseException:
            if made:
                _remove(netlink, bridge.name)
            raise


def take_down(name: str, owner_uid: int, instance: str = "") -> None:
    """Remove the bridge and its taps, and forward no more if this host did not before. Idempotent.

    Raises Conflict for a link of that name which is not ours.
    """
    with IPRoute() as netlink:
        if _find_bridge(netlink, name, owner_uid, instance):
            _remove(netlink, name)


def is_up(name: str, owner_uid: int, instance: str = "") -> bool:
    """Whether our bridge of this name is there."""
    with IPRoute() as netlink:
        return _find_bridge(netlink, name, owner_uid, instance) != 0


def bridges(owner_uid: int) -> list[str]:
    """The names of all that are there."""
    with IPRoute() as netlink:
        return [
            name
            for link in netlink.get_links()
            if is_bridge_name(name := str(link.get_attr("IFLA_IFNAME")))
            and (_alias(link) or "").startswith(_of(owner_uid))
        ]


def bring_up_names() -> None:
    """Have a dummy link for names. Raises Conflict for a link of its name which is not ours."""
    with IPRoute() as netlink:
        if not _find(netlink, NAMES, "dummy"):
            netlink.link("add", ifname=NAMES, kind="dummy", address=_NAMES_MAC)
        ipv6.turn_off(NAMES)
        index = _index(netlink, NAMES)
        netlink.link("set", index=index, IFLA_IFALIAS=_ALIAS, state="up")
        if not list(netlink.get_addr(family=_AF_INET, index=index)):
            netlink.addr("add", index=index, address=_NAMES_ADDRESS, prefixlen=32)


def take_down_names() -> None:
    """Remove the dummy. Idempotent."""
    with IPRoute() as netlink:
        if index := _find(netlink, NAMES, "dummy"):
            netlink.link("del", index=index)


def open_tap(bridge: str, owner_uid: int) -> tuple[str, int]:
    """A new tap on a bridge that is up: name and descriptor, with which it goes."""
    with IPRoute() as netlink:
        master = _find_bridge(netlink, bridge, owner_uid)
        if not master:
            raise PreconditionFailed(f"there is no bridge {bridge}")
        name = f"{bridge}-{secrets.token_hex(3)}"
        try:
            fd = tun.open_tap(name, new=True)
        except OSError as error:
            if error.filename != tun.DEVICE:
                raise
            raise PreconditionFailed(
                f"{tun.DEVICE}: {error.strerror}", hint="load its module: modprobe tun"
            ) from error
        try:
            ipv6.turn_off(name)
            netlink.link("set", index=_index(netlink, name), master=master, state="up")
        except BaseException:
            os.close(fd)
            raise
    return name, fd


def new_namespace() -> int:
    """A descriptor of a new network namespace, which goes with it and whoever enters it."""
    made: list[int | OSError] = []

    def make() -> None:
        # A thread has a network of its own then, and ends: no other is to have it.
        try:
            jail_kernel.unshare(jail_kernel.CLONE_NEWNET)
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def add_uplink(bridge: str, name: str, owner_uid: int, namespace: int) -> None:
    """A port of a bridge that is up, with the name that a tap of it had, whose other end,
    `jail_network.UPLINK`, is in a network namespace, and with which it goes.

    Raises Conflict while the tap is there.
    """
    with IPRoute() as netlink:
        master = _find_bridge(netlink, bridge, owner_uid)
        if not master:
            raise PreconditionFailed(f"there is no bridge {bridge}")
        if _link(netlink, name) is not None:
            raise Conflict(f"the tap {name} is still there")
        other_end = {"ifname": jail_network.UPLINK, "net_ns_fd": namespace}
        netlink.link("add", ifname=name, kind="veth", peer=other_end)
        try:
            ipv6.turn_off(name)
            netlink.link("set", index=_index(netlink, name), master=master, state="up")
        except BaseException:
            netlink.link("del", index=_index(netlink, name))
            raise


def remove_uplink(name: str) -> None:
    """Take back `add_uplink` at once. Idempotent."""
    with IPRoute() as netlink:
        link = _link(netlink, name)
        if link is not None and _kind(link) == "veth":
            netlink.link("del", index=link["index"])


def _remove(netlink: IPRoute, name: str) -> None:
    """The bridge goes last: what was broken off before that is done when it is repeated."""
    index = _index(netlink, name)
    if (_alias(_link(netlink, name)) or "").endswith(_DID_NOT_FORWARD):
        _forward_as_before(netlink, index)
    tap = re.compile(rf"{name}-[0-9a-f]{{6}}")
    for link in netlink.get_links():
        # Whoever holds the descriptor of one can have it outlive that.
        if link.get_attr("IFLA_MASTER") == index and tap.fullmatch(link.get_attr("IFLA_IFNAME")):
            netlink.link("del", index=link["index"])
    netlink.link("del", index=index)


def _forward_as_before(netlink: IPRoute, index: int) -> None:
    """Not at all; but another bridge of ours needs it still, and gives it back in place of this,
    and somebody who came since may rely on it: he had no reason to turn it on himself."""
    links = netlink.get_links()
    for link in links:
        others = link["index"] != index and link.get_attr("IFLA_IFNAME") != NAMES
        alias = _alias(link) or ""
        if others and alias.startswith(_ALIAS):
            heir = alias.replace(_FORWARDED, _DID_NOT_FORWARD)
            netlink.link("set", index=link["index"], IFLA_IFALIAS=heir)
            return
    if not any(link["index"] > index and _may_need_forwarding(link) for link in links):
        _FORWARD.write_text("0")


def _may_need_forwarding(link: Any) -> bool:
    """Whether it is somebody else's, of a kind that containers, machines and VPNs are joined by."""
    ours = _TAP.fullmatch(link.get_attr("IFLA_IFNAME")) or (_alias(link) or "").startswith(_ALIAS)
    return not ours and _kind(link) in _OF_NETWORKS


def _of(owner_uid: int, instance: str = "") -> str:
    """How the alias of a bridge of this user's, or of one daemon of his, begins."""
    return f"{_ALIAS} of uid {owner_uid}:" + (f" {instance}:" if instance else "")


def _forwards() -> bool:
    return _FORWARD.read_text().strip() != "0"


def _find_bridge(netlink: IPRoute, name: str, owner_uid: int, instance: str = "") -> int:
    """The index of this user's bridge, of one daemon's where an instance is given, 0 when there is
    none. Raises Conflict for another's; but another daemon's that nothing is on is free to take."""
    index = _find(netlink, name)
    alias = _alias(netlink.get_links(index)[0]) if index else ""
    if not alias or alias.startswith(_of(owner_uid, instance)):
        return index
    own = alias.startswith(_of(owner_uid))
    ports = any(link.get_attr("IFLA_MASTER") == index for link in netlink.get_links())
    if own and not ports:
        return index
    owner = alias.partition(":")[0].removeprefix(f"{_ALIAS} of ")
    raise Conflict(
        f"the bridge {name} is that of another banger, of {owner}",
        hint="set bridge_name and bridge_cidr to others",
    )


def _find(netlink: IPRoute, name: str, wanted: str = "bridge") -> int:
    """The index of our link of this kind, 0 when there is none. Raises Conflict for another's."""
    link = _link(netlink, name)
    if link is None:
        return 0
    # One without an alias is ours by its address: its maker came no further.
    alias = _alias(link)
    ours = alias.startswith(_ALIAS) if alias else link.get_attr("IFLA_ADDRESS") == _MACS[wanted]
    if _kind(link) != wanted or not ours:
        raise Conflict(
            f"there is a network interface {name}, which is not banger's",
            hint="set bridge_name to another: banger0 to banger99"
            if wanted == "bridge"
            else f"remove it, if nobody needs it: ip link delete {name}",
        )
    return int(link["index"])


def _check_free(netlink: IPRoute, bridge: Bridge, index: int) -> None:
    """Raise Conflict where this host has, or reaches, addresses of the bridge's network, but by
    the link with this index."""
    for route in netlink.get_routes(family=_AF_INET):
        destination = route.get_attr("RTA_DST")
        # The default route leads wherever no other does; VPNs have it in two halves.
        wide = destination is None or route["dst_len"] <= 1
        if wide or (index and route.get_attr("RTA_OIF") == index):
            continue
        network = IPv4Network(f"{destination}/{route['dst_len']}")
        if network.overlaps(bridge.network):
            raise Conflict(
                f"{bridge.network} is not free for machines: this host has a route to {network}",
                hint="set bridge_cidr to another private network",
            )


def _have_address(netlink: IPRoute, index: int, bridge: Bridge) -> None:
    """Exactly the one; another is of an earlier setting."""
    wanted = (str(bridge.gateway), bridge.network.prefixlen)
    there = {
        (each.get_attr("IFA_LOCAL"), each["prefixlen"])
        for each in netlink.get_addr(family=_AF_INET, index=index)
    }
    for address, prefixlen in there - {wanted}:
        netlink.addr("del", index=index, address=address, prefixlen=prefixlen)
    if wanted not in there:
        netlink.addr("add", index=index, address=wanted[0], prefixlen=wanted[1])


def _index(netlink: IPRoute, name: str) -> int:
    return int(netlink.link_lookup(ifname=name)[0])


def _link(netlink: IPRoute, name: str) -> Any:
    found = netlink.link_lookup(ifname=name)
    return netlink.get_links(found[0])[0] if found else None


def _kind(link: Any) -> str:
    """Empty for a device."""
    info = link.get_attr("IFLA_LINKINFO")
    return (info.get_attr("IFLA_INFO_KIND") or "") if info else ""


def _alias(link: Any) -> str | None:
    alias: str | None = link.get_attr("IFLA_IFALIAS")
    return alias
