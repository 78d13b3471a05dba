"""The host's processor, which a saved state depends on."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
#: What in /proc/cpuinfo says which processor it is; a guest under KVM sees all of it.
_CPU_FIELDS = frozenset({"vendor_id", "cpu family", "model", "stepping", "microcode", "flags"})


def processor() -> str:
    """Which processor the host has, as the kernel tells of the first of them."""
    first, _, _ = _CPUINFO.read_text().partition("\n\n")
    return "\n".join(
        line for line in first.splitlines() if line.partition(":")[0].strip() in _CPU_FIELDS
    )
