"""How figures are made: samples of banger and of its floor in turns, so that both meet the same
noise; medians and 95th percentiles of both; and a target that the medians are held against."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

#: One measurement: does the work once and returns how long it took, in seconds.
Sample = Callable[[], float]


@dataclass(frozen=True)
class Target:
    """What is promised of the median, and of the 95th percentile where it says so: at most so many
    times the floor's, or so much above it."""

    times: float = math.inf
    above_floor_s: float = math.inf
    p95: bool = False

    def holds(self, figure_s: float, floor_s: float) -> bool:
        return figure_s <= floor_s * self.times and figure_s - floor_s <= self.above_floor_s

    def __str__(self) -> str:
        parts = []
        if self.times < math.inf:
            parts.append(f"≤ {self.times:g} x floor")
        if self.above_floor_s < math.inf:
            parts.append(f"≤ floor + {self.above_floor_s * 1000:g} ms")
        if self.p95:
            parts.append("p95, too")
        return ", ".join(parts)


@dataclass(frozen=True)
class Figure:
    """Samples of one subject and of its floor, in seconds."""

    name: str
    floor_name: str
    samples_s: tuple[float, ...]
    floor_samples_s: tuple[float, ...]
    target: Target | None = None

    @property
    def ratio(self) -> float:
        return median(self.samples_s) / median(self.floor_samples_s)

    @property
    def met(self) -> bool | None:
        """Whether the target holds; None when there is none."""
        if self.target is None:
            return None
        held = self.target.holds(median(self.samples_s), median(self.floor_samples_s))
        if not self.target.p95:
            return held
        return held and self.target.holds(
            percentile(self.samples_s, 95), percentile(self.floor_samples_s, 95)
        )


def compare(
    name: str,
    sample: Sample,
    *,
    floor_name: str,
    floor: Sample,
    rounds: int,
    target: Target | None = None,
) -> Figure:
    """Floor, subject, floor, subject …, after one of each that is not counted (cold caches)."""
    floor()
    sample()
    pairs = [(floor(), sample()) for _ in range(rounds)]
    return Figure(
        name=name,
        floor_name=floor_name,
        samples_s=tuple(subject for _, subject in pairs),
        floor_samples_s=tuple(lower for lower, _ in pairs),
        target=target,
    )


def timed(work: Callable[[], object]) -> float:
    """How long `work` takes, in seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def percentile(samples: tuple[float, ...], percent: float) -> float:
    """The smallest sample that at least `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
