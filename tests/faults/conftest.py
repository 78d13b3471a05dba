"""The fault matrix: its cells as parameters, its scenes, and what was found in each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import matrix
from homes import Home, new_home
from matrix import SMALL, Cell
from reliability import Finding, write_report
from scenes import Scenes

_REPORT = Path(__file__).parents[2] / "docs/reliability.md"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = _cells(metafunc.config)
        metafunc.parametrize("cell", cells, ids=[cell.id for cell in cells])


def _cells(config: pytest.Config) -> tuple[matrix.Cell, ...]:
    if config.getoption("--drivers"):
        return tuple(matrix.cells(_drivers(config)))
    return matrix.ALL if _all_faults(config) else matrix.REDUCED


def _drivers(config: pytest.Config) -> matrix.Drivers:
    """Those of `--drivers`, or the default ones."""
    name = config.getoption("--drivers") or matrix.DEFAULT.name
    drivers = {each.name: each for each in matrix.DRIVERS}
    if name not in drivers:
        raise pytest.UsageError(f"--drivers: {name} is none of {', '.join(drivers)}")
    return drivers[name]


def _all_faults(config: pytest.Config) -> bool:
    return bool(config.getoption("--all-faults"))


@pytest.fixture
def drivers(request: pytest.FixtureRequest) -> matrix.Drivers:
    """What the operations are held to whose stages are looked at."""
    return _drivers(request.config)


@pytest.fixture
def all_faults(request: pytest.FixtureRequest) -> bool:
    """Whether this is the whole matrix, which has time for everything."""
    return _all_faults(request.config)


# Of the module: their bystanders, which count all the while, are in the way of later tests.
@pytest.fixture(scope="module")
def seed(private_home: object) -> Iterator[Home]:
    """The home whose image the others have copies of; it was built for a first VM there."""
    home = new_home(Path(os.environ["HOME"]) / "seed")
    home.banger.ok("vm", "run", "-q", "-d", *SMALL, "--name", "first")
    home.banger.ok("vm", "delete", "--force", "first")
    yield home
    home.close()
    shutil.rmtree(home.directory)


@pytest.fixture(scope="module")
def scenes(seed: Home) -> Iterator[Scenes]:
    made = Scenes(seed, Path(os.environ["HOME"]))
    yield made
    made.close()


@pytest.fixture(scope="session")
def findings(request: pytest.FixtureRequest) -> Iterator[dict[Cell, Finding]]:
    """What was found in each cell. All of them go to docs/reliability.md."""
    found: dict[Cell, Finding] = {}
    began = time.monotonic()
    yield found
    if found.keys() == set(matrix.ALL):
        write_report(_REPORT, found, time.monotonic() - began)
