"""The fault matrix: its cells as parameters, its scenes, and what was found in each, for its page.

What is found is a property of its test: so it comes to whoever writes the page from whichever of
pytest-xdist's workers it was found by.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import matrix
import suite
from homes import Home, new_home
from matrix import SMALL, Cell
from product import IMAGE
from reliability import Finding, write_page
from scenes import Scenes

_DOCS = Path(__file__).parents[2] / "docs"
_FINDING = "finding"


class _Findings:
    """A plugin of pytest's: writes the page when there is a finding for every cell of it."""

    def __init__(self, drivers: matrix.Drivers) -> None:
        self._drivers = drivers
        self._cells = {cell.id: cell for cell in matrix.cells(drivers)}
        self._found: dict[Cell, Finding] = {}
        self._began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, said in report.user_properties:
            if name == _FINDING:
                cell_id, finding = msgspec.json.decode(str(said), type=tuple[str, Finding])
                if cell := self._cells.get(cell_id):
                    self._found[cell] = finding

    def pytest_sessionfinish(self) -> None:
        if len(self._found) == len(self._cells):
            write_page(_DOCS, self._drivers, self._found, time.monotonic() - self._began)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker's reports go to the process that began it
        config.pluginmanager.register(_Findings(_drivers(config)))


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
    drivers = {each.name: each for each in (*matrix.DRIVERS, *matrix.ON_GUEST_HOSTS)}
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
def seed(private_home: object, pytestconfig: pytest.Config) -> Iterator[Home]:
    """The home whose image the others have copies of: one of `--images`, or it was built for a
    first VM there."""
    home = new_home(Path(os.environ["HOME"]) / "seed")
    if images := pytestconfig.getoption("--images"):
        suite.have_image(home.banger, IMAGE, images)
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


@pytest.fixture
def has_found(
    record_property: Callable[[str, object], None],
) -> Callable[[Cell, Finding], None]:
    """To be told what was found in a cell."""

    def tell(cell: Cell, finding: Finding) -> None:
        record_property(_FINDING, msgspec.json.encode((cell.id, finding)).decode())

    return tell
