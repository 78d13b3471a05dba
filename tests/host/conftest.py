"""Guests as hosts: made once for the session, by the first test that asks for one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.nodes import Node

from guest_host import GuestHost, GuestHosts, make_guest_hosts
from product import Banger

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def guest_hosts(banger: Banger, image: str) -> Iterator[GuestHosts]:
    """The saved machine that all hosts are copies of."""
    hosts = make_guest_hosts(banger, Path(os.environ["HOME"]) / "guest-host")
    yield hosts
    banger.ok("snapshot", "delete", hosts.snapshot)


@pytest.fixture(scope="module")
def host(
    guest_hosts: GuestHosts, request: pytest.FixtureRequest, keeps: Callable[[Node], bool]
) -> Iterator[GuestHost]:
    """A host that the tests of a module share: each leaves it as it found it."""
    made = guest_hosts.new(f"host-{next(_numbers)}")
    yield made
    if not keeps(request.node):
        made.banger.ok("vm", "delete", "--force", made.name)


@pytest.fixture
def own_host(guest_hosts: GuestHosts, keep_guest: Callable[[], bool]) -> Iterator[GuestHost]:
    """A host of the test's own, with which it may do what it likes."""
    made = guest_hosts.new(f"host-{next(_numbers)}")
    yield made
    if not keep_guest():
        made.banger.ok("vm", "delete", "--force", made.name)
