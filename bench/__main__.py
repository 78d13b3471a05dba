"""``python -m bench [NAME…]``: all benchmarks, or those named; a table, and bench/results.json."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from bench import (
    cli_start,
    cold_run,
    exec_latency,
    first_command,
    forks,
    images,
    network,
    reconcile,
    rpc,
    stages,
    vm_list,
    warm_run,
    workspaces,
)
from bench.home import Home
from bench.measure import Figure, percentile

BENCHMARKS: dict[str, Callable[[Home], list[Figure]]] = {
    "cli_start": cli_start.measure,
    "rpc": rpc.measure,
    "vm_list": vm_list.measure,
    "reconcile": reconcile.measure,
    "exec_latency": exec_latency.measure,
    "cold_run": cold_run.measure,
    "warm_run": warm_run.measure,
    "first_command": first_command.measure,
    "forks": forks.measure,
    "workspaces": workspaces.measure,
    "images": images.measure,
    "network": network.measure,
    "stages": stages.measure,
}

RESULTS = Path(__file__).with_name("results.json")


def main(names: list[str]) -> int:
    """0 when every target is met, 1 when one is missed, 2 for a name that is no benchmark."""
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no such benchmark: {', '.join(unknown)} (there are: {', '.join(BENCHMARKS)})")
        return 2
    figures = []
    print(_line("", "p50", "p95", "floor p50", "ratio", "target", "", "floor"))
    with Home() as home:
        for name in names or BENCHMARKS:
            for figure in BENCHMARKS[name](home):
                figures.append(figure)
                print(_row(figure), flush=True)
    RESULTS.write_text(json.dumps(_report(figures), indent=2) + "\n")
    return 1 if any(figure.met is False for figure in figures) else 0


def _line(*columns: str) -> str:
    name, *numbers, floor = columns
    return f"{name:34}" + "".join(f"{number:>12}" for number in numbers) + f"  {floor}"


def _row(figure: Figure) -> str:
    verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
    return _line(
        figure.name,
        _ms(median(figure.samples_s)),
        _ms(percentile(figure.samples_s, 95)),
        _ms(median(figure.floor_samples_s)),
        f"{figure.ratio:.2f}",
        str(figure.target or "-"),
        verdict,
        figure.floor_name,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _report(figures: list[Figure]) -> dict[str, object]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
        },
        "figures": [
            {
                "name": figure.name,
                "p50_s": median(figure.samples_s),
                "p95_s": percentile(figure.samples_s, 95),
                "floor": figure.floor_name,
                "floor_p50_s": median(figure.floor_samples_s),
                "floor_p95_s": percentile(figure.floor_samples_s, 95),
                "ratio": figure.ratio,
                "target": str(figure.target) if figure.target else None,
                "met": figure.met,
                "samples_s": figure.samples_s,
                "floor_samples_s": figure.floor_samples_s,
            }
            for figure in figures
        ],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
