"""The product as its users have it: the command line, a daemon of the session, real guests."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import suite
from homes import Home, copy_artifacts, new_home
from product import Banger

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def drivers(private_home: object, pytestconfig: pytest.Config) -> None:
    """Have what comes from here on run by those of `--drivers`."""
    if name := pytestconfig.getoption("--drivers"):
        suite.begin(suite.parse(name))
        home = Home(Path(os.environ["HOME"]))
        home.banger.ok("daemon", "stop")  # it may serve tests of another folder
        home.configure("")
        suite.prepare(home.runtime)


@pytest.fixture
def make_vm(
    banger: Banger, image: str, keep_guest: Callable[[], bool]
) -> Iterator[Callable[..., str]]:
    """Make running VMs that are deleted after the test: ``make_vm("--memory", "512M")``."""
    made: list[str] = []

    def make(*options: str) -> str:
        chosen = () if "--image" in options else ("--image", image)
        name = banger.ok("vm", "run", "--detach", "--quiet", *chosen, *options).strip()
        made.append(name)
        return name

    yield make
    if not keep_guest():
        for name in made:
            banger.run("vm", "delete", "--force", name)


@pytest.fixture(scope="module")
def vm(banger: Banger, image: str) -> Iterator[str]:
    """One running VM that the tests of a module share and leave as they found it."""
    name = banger.ok("vm", "run", "--detach", "--quiet", "--image", image).strip()
    yield name
    banger.run("vm", "delete", "--force", name)


@pytest.fixture
def bare_home(private_home: object) -> Iterator[Home]:
    """A home without images, whose daemon a test may do anything to."""
    # Numbered, not named for the test: sockets go below it.
    home = new_home(Path(os.environ["HOME"]) / f"h{next(_numbers)}")
    yield home
    home.close()
    shutil.rmtree(home.directory)


@pytest.fixture
def home(bare_home: Home, image: str) -> Home:
    """A home with a copy of the session's image, whose daemon a test may do anything to."""
    copy_artifacts(Path(os.environ["HOME"]), bare_home)
    return bare_home
