"""What VMs use, in words of a few characters, and the columns that a terminal has room for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from banger.base.usage import Sample
from banger.cli.render import print_table

UNKNOWN = "-"
#: Characters between two columns.
GAP = 2


def percent(value: float | None) -> str:
    """``0.5%``, ``12.3%``, ``187%``."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f}%" if value >= 99.95 else f"{value:.1f}%"


def size(value: float | None) -> str:
    """``12B``, ``1.5K``, ``312M``, ``79G``: powers of 1024, two or three digits."""
    if value is None:
        return UNKNOWN
    units = "BKMGTPE"
    at = 0
    while value >= 999.5 and at < len(units) - 1:
        value /= 1024
        at += 1
    digits = f"{value:.1f}" if at and value < 9.95 else f"{value:.0f}"
    return f"{digits}{units[at]}"


def part(used: int, total: int) -> str:
    return f"{size(used)}/{size(total)}"


def cpu(sample: Sample | None) -> str:
    """As the host sees it."""
    return UNKNOWN if sample is None else percent(sample.host.cpu_percent)


def memory(sample: Sample | None) -> str:
    """As the guest sees it."""
    if sample is None or sample.guest is None:
        return UNKNOWN
    return part(sample.guest.memory_used_bytes, sample.guest.memory_total_bytes)


def print_fitting(
    headings: Sequence[str], rows: Sequence[Sequence[str]], ranks: Sequence[int]
) -> None:
    """A table on stdout: all of it for a pipe, for a terminal the columns it has room for."""
    if sys.stdout.isatty():
        from rich.console import Console

        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        kept = fitting(widths, ranks, Console().width)
        headings = [headings[at] for at in kept]
        rows = [[row[at] for at in kept] for row in rows]
    print_table(headings, rows)


def fitting(widths: Sequence[int], ranks: Sequence[int], available: int) -> list[int]:
    """The places of the columns that fit side by side, `GAP` apart, into `available` characters.

    Those of the lowest rank are kept first, and the very first even when nothing fits.
    """
    kept: list[int] = []
    used = -GAP
    for at in sorted(range(len(widths)), key=lambda at: ranks[at]):
        used += GAP + widths[at]
        if kept and used > available:
            break
        kept.append(at)
    return sorted(kept)
