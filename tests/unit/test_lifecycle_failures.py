"""What is left when a start, a clean-up or the record of it fails, and what the next call does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.model import VmState
from banger.guest import requests
from banger.services.vm_spec import CreateRequest
from world import World, ended, made_world

_BUSY = b"\x02\0\0\0\x10busy"


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def test_a_vm_that_was_kept_for_its_failure_outlives_the_daemon_once_it_runs(
    world: World,
) -> None:
    """Its session (``--rm``) ended with the failure; what is done in it since is the user's."""
    world.agent.exits[requests.Setup.KIND] = _BUSY
    await ended(world.begin(CreateRequest(name="box", image="base", ephemeral=True)))
    assert (await world.vms.show("box")).runtime.state is VmState.ERROR
    world.agent.exits.clear()
    await world.start("box")
    following = await world.restarted()
    await following.reconcile()
    assert (await following.vms.show("box")).runtime.state is VmState.RUNNING
    await following.close()
