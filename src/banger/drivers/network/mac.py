"""MAC addresses of guests."""

from __future__ import annotations

import hashlib

#: Of a machine that is connected to nothing: no VM keeps it.
UNPLUGGED_MAC = "02:62:67:00:00:02"


def mac_address(vm_id: str) -> str:
    """The VM's MAC address: always the same, of the locally administered unicast ones."""
    digest = hashlib.sha256(vm_id.encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x02, *digest[:5]))
