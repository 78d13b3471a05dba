"""The nftables rules of a bridge, as text for ``nft -f``: pure functions.

Two tables of the bridge's name, and nothing outside of them. Their chains look only at what comes
from or goes to the bridge; ``accept`` ends our own chain only, so that what other tables drop stays
dropped.

**The bridge's** (family bridge) believes no frame of a guest's: only IPv4 and ARP pass, from the
tap, the MAC address and the IP address that belong together, an ARP's own words included. What is
no tap of a guest (it waits for one) passes nothing. Frames from one guest to another pass where
both are sociable.

**The host's** (family inet) lets guests reach the outside, as each may, never the link-local
addresses (clouds have a host's credentials there), of the host itself only the resolver and an
answer to a ping, and each other where both are sociable, when it comes by way of the host or (with
br_netfilter) from the bridge. Nobody outside reaches a guest, but in answer, and no process of this
host does but root's and the owner's: user networking of another's machines has the host's sockets.
What goes out has the host's address. What is refused is told so, for whoever waits to go on at once
(TCP by a reset: Linux sends few ICMP errors a second).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from banger.hostops.ops import RESOLVED_S, Bridge, Guest

FAMILIES = ("bridge", "inet")

#: Sets whose elements `guests` replaces; `resolved` is the kernel's own to forget.
_BRIDGE_SETS = ("sociable", "packets", "arps")
_HOST_SETS = ("sociable", "everywhere", "allowed")


def tables(bridge: Bridge, resolver_port: int, owner_uid: int) -> str:
    """Both tables, as they are to be, without a guest or with those that they have.

    One transaction: in place of the rules that are there come these, and no packet passes between.
    """
    name = bridge.name
    anew = "".join(f"table {family} {name}\nflush table {family} {name}\n" for family in FAMILIES)
    return anew + _of_bridge(name) + _of_host(bridge, resolver_port, owner_uid)


def _of_bridge(name: str) -> str:
    return f"""\
table bridge {name} {{
    set sociable {{
        type ifname
    }}
    set packets {{
        typeof iifname . ether saddr . ip saddr
    }}
    set arps {{
        typeof iifname . ether saddr . arp saddr ether . arp saddr ip
    }}
    chain from_guests {{
        type filter hook prerouting priority filter; policy accept;
        iifname "{name}-*" jump honest
    }}
    chain honest {{
        ether type ip iifname . ether saddr . ip saddr @packets accept
        ether type arp iifname . ether saddr . arp saddr ether . arp saddr ip @arps accept
        drop
    }}
    chain between_guests {{
        type filter hook forward priority filter; policy accept;
        iifname @sociable oifname @sociable accept
        iifname "{name}-*" drop
    }}
}}
"""


def _of_host(bridge: Bridge, resolver_port: int, owner_uid: int) -> str:
    name, gateway = bridge.name, bridge.gateway
    return f"""\
table inet {name} {{
    set sociable {{
        type ipv4_addr
    }}
    set everywhere {{
        type ipv4_addr
    }}
    set allowed {{
        type ipv4_addr . ipv4_addr
        flags interval
    }}
    set resolved {{
        type ipv4_addr . ipv4_addr
        flags dynamic, timeout
        timeout {RESOLVED_S}s
    }}
    chain resolver {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{name}" ip daddr {gateway} udp dport 53 dnat ip to {gateway}:{resolver_port}
        iifname "{name}" ip daddr {gateway} tcp dport 53 dnat ip to {gateway}:{resolver_port}
    }}
    chain to_host {{
        type filter hook input priority filter; policy accept;
        iifname "{name}" jump of_host
    }}
    chain of_host {{
        ct state established, related accept
        ip daddr {gateway} icmp type echo-request accept
        ip daddr {gateway} udp dport {resolver_port} accept
        ip daddr {gateway} tcp dport {resolver_port} accept
        goto refused
    }}
    chain by_host {{
        type filter hook output priority filter; policy accept;
        oifname "{name}" meta skuid != {{ 0, {owner_uid} }} goto refused
    }}
    chain through {{
        type filter hook forward priority filter; policy accept;
        iifname "{name}" jump from_guests
        oifname "{name}" jump to_guests
    }}
    chain from_guests {{
        oifname "{name}" ip saddr @sociable ip daddr @sociable accept
        oifname "{name}" goto refused
        ip daddr 169.254.0.0/16 goto refused
        ip saddr @everywhere accept
        ip saddr . ip daddr @allowed accept
        ip saddr . ip daddr @resolved update @resolved {{ ip saddr . ip daddr }} accept
        goto refused
    }}
    chain to_guests {{
        iifname "{name}" accept
        ct state established, related accept
        drop
    }}
    chain refused {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
    chain outwards {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {bridge.network} oifname != "{name}" masquerade
    }}
}}
"""


def no_tables(name: str) -> str:
    """Away with both, whether they are there or not."""
    return "".join(f"table {family} {name}\ndelete table {family} {name}\n" for family in FAMILIES)


def guests(bridge: Bridge, wanted: Sequence[Guest], forget: Iterable[tuple[str, str]]) -> str:
    """These guests in place of those that there are, and `forget` of what names led to."""
    name = bridge.name
    flushes = [f"flush set bridge {name} {each}" for each in _BRIDGE_SETS]
    flushes += [f"flush set inet {name} {each}" for each in _HOST_SETS]
    bridged = {
        "sociable": [f'"{each.tap}"' for each in wanted if each.sociable],
        "packets": [f'"{each.tap}" . {each.mac} . {each.address}' for each in wanted],
        "arps": [f'"{each.tap}" . {each.mac} . {each.mac} . {each.address}' for each in wanted],
    }
    routed = {
        "sociable": [each.address for each in wanted if each.sociable],
        "everywhere": [each.address for each in wanted if each.everywhere],
        "allowed": [f"{each.address} . {net}" for each in wanted for net in each.allow],
    }
    forgotten = {"resolved": [f"{guest} . {address}" for guest, address in forget]}
    lines = [
        *flushes,
        *_elements("add", f"bridge {name}", bridged),
        *_elements("add", f"inet {name}", routed),
        # One that has timed out since it was listed could not be deleted: they are added first.
        *_elements("add", f"inet {name}", forgotten),
        *_elements("delete", f"inet {name}", forgotten),
    ]
    return "".join(f"{line}\n" for line in lines)


def resolved(bridge: Bridge, guest: str, addresses: Iterable[str]) -> str:
    """Let a guest reach these addresses; what is there already stays for as long again."""
    pairs = [f"{guest} . {each}" for each in addresses]
    # One that is there would keep its age: it is added, so that it can be deleted, and is new.
    steps = ("add", "delete", "add")
    lines = [
        line
        for step in steps
        for line in _elements(step, f"inet {bridge.name}", {"resolved": pairs})
    ]
    return "".join(f"{line}\n" for line in lines)


def resolved_pairs(listing: bytes) -> list[tuple[str, str]]:
    """(guest, address) of each element in what ``nft -j list set inet NAME resolved`` prints."""
    found: list[tuple[str, str]] = []
    for entry in json.loads(listing)["nftables"]:
        for element in entry.get("set", {}).get("elem", ()):
            value: Any = element.get("elem", {}).get("val", element)
            guest, address = value["concat"]
            found.append((guest, address))
    return found


def _elements(verb: str, table: str, sets: dict[str, list[str]]) -> list[str]:
    return [
        f"{verb} element {table} {name} {{ {', '.join(elements)} }}"
        for name, elements in sets.items()
        if elements
    ]
