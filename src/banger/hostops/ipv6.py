"""IPv6 of network interfaces, which machines and what they are joined to have none of."""

from __future__ import annotations

from pathlib import Path

_SETTINGS = Path("/proc/sys/net/ipv6/conf")


def turn_off(interface: str) -> None:
    """Of an interface in this network namespace; ``all`` of those that are there, ``default`` of
    those to come. Raises OSError."""
    setting = _SETTINGS / interface / "disable_ipv6"
    if setting.exists():  # a kernel without IPv6 has none
        setting.write_text("1")
