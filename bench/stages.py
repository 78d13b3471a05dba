"""Where the time of `vm run --rm -- true` goes, from the command line's start to its end.

Each stage of the daemon's log is a row, and so is what lies before and after them: the process of
the command line. The ratio is the stage's share of the whole.
"""

from __future__ import annotations

import json
from statistics import median

from bench.home import Home
from bench.measure import Figure, timed

_ROUNDS = 20
#: Operations of one run, in order, by which the log is read.
_OPERATIONS = ("vm.create", "vm.run", "vm.delete")


def measure(home: Home) -> list[Figure]:
    image, _ = home.image()
    run = ("vm", "run", "--rm", "--quiet", "--image", image.name, "--", "true")
    home.banger(*run)
    figures = [*_shares(home, run, "standby", wait=True)]
    home.configure("standby_limit = 0\n")
    try:
        figures += _shares(home, run, "no standby", wait=False)
    finally:
        home.configure("")
    return figures


def _shares(home: Home, run: tuple[str, ...], title: str, *, wait: bool) -> list[Figure]:
    stages: dict[str, list[float]] = {}
    wholes = []
    for _ in range(_ROUNDS):
        if wait:
            home.await_standby()
        seen = home.paths.daemon_log.stat().st_size
        whole_s = timed(lambda: home.banger(*run))
        wholes.append(whole_s)
        with home.paths.daemon_log.open("rb") as log:
            log.seek(seen)
            taken = _stages_s([json.loads(line) for line in log])
        taken["command line and RPC"] = whole_s - sum(taken.values())
        for stage, seconds in taken.items():
            stages.setdefault(stage, []).append(seconds)
    return [
        Figure(f"{title}: {stage}", "the whole run", tuple(samples), tuple(wholes))
        for stage, samples in sorted(stages.items(), key=lambda each: -median(each[1]))
    ]


def _stages_s(records: list[dict[str, object]]) -> dict[str, float]:
    """Seconds in each stage: from its record to the next of its operation."""
    taken: dict[str, float] = {}
    for operation in _OPERATIONS:
        stage, began_ms = "", 0.0
        for record in records:
            if record.get("operation") != operation:
                continue
            ended = record["message"] == "operation completed"
            now_ms = record.get("duration_ms" if ended else "since_start_ms")
            if now_ms is None:
                continue
            assert isinstance(now_ms, float | int)
            name = f"{operation} {stage}".strip()
            taken[name] = taken.get(name, 0.0) + (now_ms - began_ms) / 1000
            stage, began_ms = str(record.get("stage", "")), float(now_ms)
    # A run's deletion is part of the run.
    deletion_s = sum(seconds for name, seconds in taken.items() if name.startswith("vm.delete"))
    taken["vm.run"] = taken.get("vm.run", 0.0) - deletion_s
    return taken
