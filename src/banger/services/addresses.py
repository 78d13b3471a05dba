"""Addresses that VMs have for themselves: the same for as long as they live."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network

from banger.base.errors import Unavailable


def free_address(network: IPv4Network, vm_id: str, taken: Collection[str]) -> str:
    """An address of `network` for a VM: by its id, so that it gets the same again, unless another
    has it. x.y.z.0 and .255 are not given out, which some programs take for networks, nor is the
    gateway's. Raises Unavailable when all are taken."""
    digest = hashlib.sha256(f"banger address {vm_id}".encode()).digest()
    first = int.from_bytes(digest[:8], "big")
    count = network.num_addresses
    for step in range(count):
        address = IPv4Address(int(network.network_address) + (first + step) % count)
        reserved = address in (network[1], network[-1]) or int(address) % 256 in (0, 255)
        if not reserved and str(address) not in taken:
            return str(address)
    raise Unavailable(f"no address of {network} is free", hint="delete VMs that nobody needs")
