"""Forks of a running machine: how long one and many take, how long the source is held for them, and
what each costs in memory, beside the same number of machines that boot.

Every fork must run a command; one that does not is an error of the benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from bench.home import Home
from bench.measure import Figure, timed

_COUNTS = (1, 10, 50)
#: Booting fifty machines says no more than booting ten, five times as slowly.
_COLD_COUNT_MAX = 10
_SOURCE = "bench-source"
_MEMORY = "512M"
_AT_ONCE = 4


def measure(home: Home) -> list[Figure]:
    image, _ = home.image()
    create = ("vm", "create", "--quiet", "--image", image.name, "--memory", _MEMORY, "--vcpu", "1")
    home.banger(*create, "--name", _SOURCE)
    figures = []
    try:
        for count in _COUNTS:
            seen = home.paths.daemon_log.stat().st_size
            took_s, names = _forks(home, count)
            try:
                pause_s = _pause_s(home.paths.daemon_log, seen)
                resident, unique = _memory_mib(home, names)
            finally:
                home.banger("vm", "delete", "--force", *names)
            cold_s = _cold(home, create, min(count, _COLD_COUNT_MAX)) * max(
                1.0, count / _COLD_COUNT_MAX
            )
            memory = f"{resident:.0f} MiB resident, {unique:.0f} unique each"
            figures += [
                Figure(f"fork --count {count} ({memory})", "as many boots", (took_s,), (cold_s,)),
                Figure(f"pause of the source, {count}", "the whole fork", (pause_s,), (took_s,)),
            ]
    finally:
        home.delete_vms()
    return figures


def _forks(home: Home, count: int) -> tuple[float, list[str]]:
    """Seconds until all have been made, and their names; each of them answers."""
    begin = time.perf_counter()
    names = home.banger("vm", "fork", "--quiet", _SOURCE, "--count", str(count)).split()
    took_s = time.perf_counter() - begin
    assert len(names) == count, names
    with ThreadPoolExecutor(_AT_ONCE) as clients:
        answers = list(clients.map(lambda name: _hostname(home, name), names))
    assert answers == names, "a fork does not know who it is"
    return took_s, names


def _hostname(home: Home, name: str) -> str:
    return home.banger("vm", "exec", name, "--", "hostname").strip()


def _cold(home: Home, create: tuple[str, ...], count: int) -> float:
    names = [f"bench-cold-{number}" for number in range(count)]

    def boot(name: str) -> str:
        return home.banger(*create, "--cold", "--name", name)

    def boot_all() -> None:
        with ThreadPoolExecutor(_AT_ONCE) as clients:
            list(clients.map(boot, names))

    work: Callable[[], None] = boot_all
    try:
        return timed(work)
    finally:
        home.banger("vm", "delete", "--force", *names)


def _pause_s(log: Path, seen: int) -> float:
    """How long the source was held, by the daemon's log from `seen` on."""
    with log.open("rb") as lines:
        lines.seek(seen)
        records = [msgspec.json.decode(line) for line in lines]
    return float(next(each["paused_ms"] for each in records if "paused_ms" in each)) / 1000


def _memory_mib(home: Home, names: list[str]) -> tuple[float, float]:
    """Of each fork's hypervisor on average: resident, and what no other process shares."""
    resident = unique = 0
    for name in names:
        vm = msgspec.json.decode(home.banger("vm", "show", name, "--json"))
        handles = msgspec.json.decode((Path(vm["runtime"]["vm_dir"]) / "handles.json").read_bytes())
        for line in Path(f"/proc/{handles['pid']}/smaps_rollup").read_text().splitlines()[1:]:
            field, value, *_ = line.split()
            resident += int(value) if field == "Rss:" else 0
            unique += int(value) if field in ("Private_Clean:", "Private_Dirty:") else 0
    return resident / 1024 / len(names), unique / 1024 / len(names)
