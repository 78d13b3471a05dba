"""The columns of `banger vm stats`: one figure of each machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from banger.base.model import VmState
from banger.base.units import format_age
from banger.base.usage import GuestUsage, Sample, VmStats
from banger.cli.figures import UNKNOWN, cpu, memory, part, percent, size


def _disk(guest: GuestUsage, mount: str) -> str:
    for each in guest.disks:
        if each.mount == mount:
            return part(each.used_bytes, each.total_bytes)
    return UNKNOWN


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{size(value)}/s"


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
    Column("READ", 15, 6, _of_sample(lambda sample: _rate(sample.host.disk_read_bytes_per_s))),
    Column(
        "WRITTEN", 16, 7, _of_sample(lambda sample: _rate(sample.host.disk_written_bytes_per_s))
    ),
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
