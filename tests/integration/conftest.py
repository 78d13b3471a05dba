"""The product as its users have it: the command line, a daemon of the session, real guests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from product import IMAGE, Banger


@pytest.fixture(scope="session")
def banger(private_home: object) -> Iterator[Banger]:  # it sets the environment
    """The command, with a daemon that is stopped at the session's end."""
    command = Banger()
    yield command
    command.run("daemon", "stop")


@pytest.fixture(scope="session")
def image(banger: Banger) -> str:
    """The small Debian image, built once for the session."""
    banger.ok("image", "build", IMAGE)
    return IMAGE


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
