"""Sizes and durations as people write them, and as people read them."""

from __future__ import annotations

import re

from banger.base.errors import BadRequest

# No more digits than any size has: int() refuses thousands of them with an error of its own.
_SIZE = re.compile(r"([0-9]{1,18})\s*(?:([kmgt])(?:i?b)?)?", re.IGNORECASE)
_FACTORS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MIB = 1 << 20

_DURATION = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,3})?(?:ms|[smhd]))+")
_DURATION_PART = re.compile(r"([0-9.]+)(ms|[smhd])")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}

#: The widest size taken anywhere (16 TiB): what ext4 and qcow2 hold with 4 KiB blocks.
SIZE_MAX_MIB = 16 << 20


def parse_size_mib(text: str) -> int:
    """``8G``, ``512M``, ``512MiB`` or a plain number of MiB; powers of 1024. Whole MiB only."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadRequest(f'"{text}" is not a size', hint="write it like 512M or 8G")
    number, unit = int(match[1]), (match[2] or "").lower()
    total = number * _FACTORS.get(unit, _MIB)
    size_mib, rest = divmod(total, _MIB)
    if rest or not 0 < size_mib <= SIZE_MAX_MIB:
        raise BadRequest(f'"{text}" is not a whole number of MiB from 1 MiB to 16 TiB')
    return size_mib


def parse_duration_s(text: str) -> float:
    """``24h``, ``2h30m``, ``1.5s``, ``500ms``, ``0``: seconds. A number needs its unit, but 0."""
    text = text.strip().lower()
    if text == "0":
        return 0.0
    if _DURATION.fullmatch(text) is None:
        raise BadRequest(f'"{text}" is not a duration', hint="write it like 30s, 2h30m or 7d")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def format_size(size_bytes: int) -> str:
    """``1.5 GiB``, ``512 MiB``, ``79 KiB``, ``12 B``."""
    value = float(size_bytes)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.0f} {units[0]}" if value >= 100 else f"{value:.3g} {units[0]}"


def format_age(seconds: float) -> str:
    """``3s``, ``12m``, ``5h``, ``2d``: one unit, the largest that fits."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"
