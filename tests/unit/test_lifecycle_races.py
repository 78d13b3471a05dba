"""Calls that meet at the wrong moment: what `test_lifecycle_machine` found, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.log import OperationLog
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def test_a_prune_that_is_cancelled_when_a_row_goes_prunes_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is deleted all the same, and that it is gone must not hide the cancellation."""
    for name in ("first", "second"):
        await world.create(name, start=False)
    real = world.store.delete_vm
    pruning: asyncio.Task[object]

    async def cancelled_meanwhile(vm_id: str) -> None:
        pruning.cancel()
        try:
            await real(vm_id)
        finally:
            while await world.store.get_vm(vm_id):
                await asyncio.sleep(0.001)

    monkeypatch.setattr(world.store, "delete_vm", cancelled_meanwhile)
    with OperationLog("vm.prune") as log:
        pruning = asyncio.ensure_future(world.prune.run(0, log, dry_run=False))
        with pytest.raises(asyncio.CancelledError):
            await pruning
    assert [vm.name for vm in await world.store.vms()] == ["second"]
