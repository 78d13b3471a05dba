"""``banger vm list`` with 1,000 records, beside an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys

from banger.base.model import VmState
from bench.home import Home
from bench.measure import Figure, Target, compare, timed
from bench.records import empty, fill

_RECORDS = 1000
_ROUNDS = 20


def measure(home: Home) -> list[Figure]:  # noqa: ARG001 - a home of its own, without real VMs
    with Home() as own:
        fill(own.paths, [VmState.STOPPED] * _RECORDS)
        assert own.banger("vm", "list").count("\n") == _RECORDS + 1
        figure = compare(
            f"banger vm list, {_RECORDS} records",
            lambda: timed(lambda: own.banger("vm", "list")),
            floor_name="python -c pass",
            floor=lambda: timed(_bare_python),
            rounds=_ROUNDS,
            target=Target(times=8),
        )
        empty(own.paths)
        return [figure]


def _bare_python() -> None:
    subprocess.run([sys.executable, "-c", "pass"], stdin=subprocess.DEVNULL, check=True)
