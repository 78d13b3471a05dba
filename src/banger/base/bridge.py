"""What a bridge of banger's may be called, and what network may be on it."""

from __future__ import annotations

import re
from ipaddress import IPv4Network

from banger.base.errors import BadRequest

#: The nftables tables of a bridge have its name, too. Its taps are ``BRIDGE-`` and 6 hex digits.
_BRIDGE = re.compile(r"banger[0-9]{1,2}")
#: What no host has for itself: RFC 1918, and RFC 6598 for where those are taken.
_PRIVATE = tuple(
    IPv4Network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
_PREFIX_LENGTHS = range(16, 30)


def is_bridge_name(name: str) -> bool:
    return _BRIDGE.fullmatch(name) is not None


def check_bridge_name(name: str) -> str:
    """`name`, if it is one of ours. Raises BadRequest."""
    if not is_bridge_name(name):
        raise BadRequest(
            f"{name!r} is not a bridge of banger's", hint="its name is banger0 to banger99"
        )
    return name


def check_bridge_network(network: IPv4Network) -> IPv4Network:
    """`network`, if a bridge can have it: private, and of a size. Raises BadRequest."""
    if network.prefixlen not in _PREFIX_LENGTHS:
        raise BadRequest(
            f"{network} has not the size of a bridge's network",
            hint=f"use a prefix length from {_PREFIX_LENGTHS[0]} to {_PREFIX_LENGTHS[-1]}",
        )
    if not any(network.subnet_of(each) for each in _PRIVATE):
        raise BadRequest(
            f"{network} is not private: its addresses belong to others",
            hint=f"use one within {', '.join(map(str, _PRIVATE))}",
        )
    return network


def check_bridge_cidr(text: str) -> str:
    """A network as people write it: a.b.c.0/n. Raises BadRequest."""
    try:
        network = IPv4Network(text)
    except ValueError as error:
        raise BadRequest(f'"{text}" is not a network of IPv4: {error}') from None
    return str(check_bridge_network(network))
