"""How long the CLI takes before it does anything: the whole process, and its imports alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bench.home import BANGER, Home
from bench.measure import Figure, compare, timed

_ROUNDS = 20


def measure(home: Home) -> list[Figure]:  # noqa: ARG001 - they reach no daemon
    return [
        compare(
            "banger version",
            lambda: timed(lambda: _run(BANGER, "version")),
            floor_name="python -c pass",
            floor=lambda: timed(lambda: _run(sys.executable, "-c", "pass")),
            rounds=_ROUNDS,
        ),
        compare(
            "import banger.cli.main",
            lambda: _import_s("banger.cli.main"),
            floor_name="import click",
            floor=lambda: _import_s("click"),
            rounds=_ROUNDS,
        ),
    ]


def _run(*argv: str | Path) -> str:
    """Run to a successful end; what it wrote to stderr."""
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stderr


def _import_s(module: str) -> float:
    """The cumulative time of one import by ``-X importtime``, which counts in microseconds."""
    report = _run(sys.executable, "-X", "importtime", "-c", f"import {module}")
    found = re.search(rf"\| +(\d+) \| +{re.escape(module)}$", report, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {module} in the report of -X importtime")
    return int(found[1]) / 1e6
