"""From the call that creates a machine to the end of its first successful command: as the field
measures it, one after another, staggered, and twenty at once. The floor is the same with a boot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from banger.rpc.client import Client
from bench.exec_latency import exec_true
from bench.home import Home
from bench.measure import Figure

_SEQUENTIAL = 10
_BURST = 20
_STAGGER_S = 0.2

_numbers = count()


def measure(home: Home) -> list[Figure]:
    image, _ = home.image()
    home.banger("vm", "run", "--rm", "--quiet", "--image", image.name, "--", "true")
    figures = []
    for name, starts_s in (
        ("one after another", None),
        (f"every {_STAGGER_S * 1000:g} ms", [_STAGGER_S * each for each in range(_BURST)]),
        (f"{_BURST} at once", [0.0] * _BURST),
    ):
        cold_s, warm_s = (
            _samples_s(home, image.name, starts_s, cold=cold) for cold in (True, False)
        )
        figures.append(
            Figure(
                name=f"create to first command, {name}",
                floor_name="the same with --cold",
                samples_s=warm_s,
                floor_samples_s=cold_s,
            )
        )
    return figures


def _samples_s(
    home: Home, image: str, starts_s: Sequence[float] | None, *, cold: bool
) -> tuple[float, ...]:
    """How long each took; started one after another, or that many seconds after the first."""
    names = [f"bench-first-{next(_numbers)}" for _ in starts_s or range(_SEQUENTIAL)]
    try:
        if starts_s is None:
            samples_s = []
            for name in names:
                samples_s.append(_first_command_s(home, image, name, 0.0, cold=cold))
                home.banger("vm", "delete", "--force", "--quiet", name)
            return tuple(samples_s)
        with ThreadPoolExecutor(len(names)) as clients:
            return tuple(
                clients.map(
                    lambda name, start_s: _first_command_s(home, image, name, start_s, cold=cold),
                    names,
                    starts_s,
                )
            )
    finally:
        home.delete_vms()


def _first_command_s(home: Home, image: str, name: str, start_s: float, *, cold: bool) -> float:
    time.sleep(start_s)
    begin = time.perf_counter()
    with Client.connect(home.paths, start=False) as client:
        request = {"name": name, "image": image, "memory_mib": 512, "cold": cold}
        client.call("vm.create", request, dict[str, object])
        exec_true(client, name)
    return time.perf_counter() - begin
