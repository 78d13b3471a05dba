"""What VMs use, in words of a few characters, and the columns that a terminal has room for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from banger.base.model import VmState
from banger.base.units import format_age
from banger.base.usage import GuestUsage, Sample, VmStats
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


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{size(value)}/s"


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


def _disk(guest: GuestUsage, mount: str) -> str:
    for each in guest.disks:
        if each.mount == mount:
            return part(each.used_bytes, each.total_bytes)
    return UNKNOWN


def _load(guest: GuestUsage) -> str:
    return f"{guest.load[0]:.2f}" if guest.load[0] < 1000 else f"{guest.load[0]:.3g}"


def _uptime(vm: VmStats) -> str:
    if vm.state is not VmState.RUNNING:
        return vm.state.value
    guest = vm.latest.guest if vm.latest is not None else None
    return UNKNOWN if guest is None else format_age(guest.uptime_s)


def _of_sample(cell: Callable[[Sample], str]) -> Callable[[VmStats], str]:
    return lambda vm: UNKNOWN if vm.latest is None else cell(vm.latest)


def _of_guest(cell: Callable[[GuestUsage], str]) -> Callable[[VmStats], str]:
    def of(vm: VmStats) -> str:
        guest = vm.latest.guest if vm.latest is not None else None
        return UNKNOWN if guest is None else cell(guest)

    return of


@dataclass(frozen=True)
class Column:
    """One figure of each VM."""

    heading: str
    #: Those of the lowest rank are the last to go when a terminal is narrow.
    rank: int
    #: Wide enough for all but extremes, where lines are written one after another.
    width: int
    cell: Callable[[VmStats], str]


#: What `vm stats` shows. Rates are of bytes a second. Ranks 3 and 7 are those of graphs.
COLUMNS = (
    Column("NAME", 0, 16, lambda vm: vm.name),
    Column("CPU", 1, 6, lambda vm: cpu(vm.latest)),
    Column("GUEST CPU", 4, 9, _of_guest(lambda guest: percent(guest.cpu_percent))),
    Column("MEMORY", 2, 9, lambda vm: memory(vm.latest)),
    Column("HOST MEM", 8, 8, _of_sample(lambda sample: size(sample.host.memory_bytes))),
    Column("DISK /", 10, 9, _of_guest(lambda guest: _disk(guest, "/"))),
    Column("DISK /root", 9, 10, _of_guest(lambda guest: _disk(guest, "/root"))),
    Column("HOST DISK", 11, 9, _of_sample(lambda sample: size(sample.host.disk_bytes))),
    Column("NET IN", 5, 6, _of_guest(lambda guest: _rate(guest.rx_bytes_per_s))),
    Column("NET OUT", 6, 7, _of_guest(lambda guest: _rate(guest.tx_bytes_per_s))),
    Column("LOAD", 13, 5, _of_guest(_load)),
    Column("PROCS", 14, 5, _of_guest(lambda guest: str(guest.processes))),
    Column("UP", 12, 7, _uptime),
)


def headings_and_rows(vms: Sequence[VmStats]) -> tuple[list[str], list[list[str]]]:
    """All columns of a table, the cells as they come from the guest."""
    rows = [[column.cell(vm) for column in COLUMNS] for vm in vms]
    return [column.heading for column in COLUMNS], rows


def print_fitting(
    headings: Sequence[str], rows: Sequence[Sequence[str]], ranks: Sequence[int]
) -> None:
    """A table on stdout: all of it for a pipe, for a terminal the columns it has room for."""
    if sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        kept = fitting(widths, ranks, os.get_terminal_size(sys.stdout.fileno()).columns)
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
