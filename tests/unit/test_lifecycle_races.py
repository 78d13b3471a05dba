"""Calls that meet at the wrong moment: what `test_lifecycle_machine` found, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import Unavailable
from banger.base.log import OperationLog
from banger.base.model import Vm, VmState
from banger.guest.channel import AgentChannel
from banger.services.vm_start import GuestLost
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


async def without_agent(world: World) -> Vm:
    """A VM that runs and whose agent answers no more, nor hangs up when the machine ends."""
    vm = await world.create()
    world.agent.silent = True
    world.processes.on_end.clear()
    await world.agents.drop(vm.id)
    return vm


async def wait_for_attempt(world: World) -> None:
    async with asyncio.timeout(10):
        while not world.agents._attempts:
            await asyncio.sleep(0.001)


async def test_a_kill_ends_a_stop_that_waits_for_an_agent(world: World) -> None:
    vm = await without_agent(world)
    stopping = asyncio.create_task(world.stop("box"))
    await wait_for_attempt(world)
    async with asyncio.timeout(5):
        await world.kill("box")
        await stopping
    assert not world.liveness.vm_alive(vm)


async def test_a_machine_that_ends_by_itself_ends_a_change_that_waits_for_its_agent(
    world: World,
) -> None:
    vm = await without_agent(world)
    renaming = asyncio.create_task(world.change("box", name="crate"))
    await wait_for_attempt(world)
    world.processes.end(world.liveness.pid(vm))
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await renaming
        await world.vms.close()
    (after,) = await world.store.vms()
    assert (after.name, after.runtime.state) == ("box", VmState.STOPPED)


async def test_a_machine_that_ends_between_its_hello_and_its_setup_ends_its_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create(start=False)
    real = world.agents.channel

    async def channel(vm: Vm) -> AgentChannel:
        greeted = await real(vm)
        world.processes.end(world.liveness.pid(vm))
        while not greeted.closed:
            await asyncio.sleep(0)
        return await real(vm)

    monkeypatch.setattr(world.agents, "channel", channel)
    async with asyncio.timeout(10):
        with pytest.raises(GuestLost, match="the machine ended while it booted"):
            await world.start(vm.name)


async def test_a_kill_that_was_cancelled_is_not_why_a_machine_ends_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    asked = asyncio.Event()

    async def hang(control_socket: Path) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(world.hypervisor, "quit", hang)
    killing = asyncio.create_task(world.kill("box"))
    await asyncio.wait_for(asked.wait(), 10)
    killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    assert world.liveness.vm_alive(vm)
    world.processes.end(world.liveness.pid(vm))
    async with asyncio.timeout(10):
        while (after := (await world.store.vms())[0]).runtime.state is not VmState.STOPPED:
            await asyncio.sleep(0.001)
    assert after.runtime.last_error == "the guest powered off or its process ended"


async def test_a_change_that_is_cancelled_while_it_is_recorded_is_taken_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is written all the same, and the guest would never have heard of its name."""
    await world.create()
    real = world.store.update_vm
    changing: asyncio.Task[Vm]

    async def cancelled_meanwhile(vm: Vm) -> None:
        if vm.name == "crate":
            changing.cancel()
        await real(vm)

    monkeypatch.setattr(world.store, "update_vm", cancelled_meanwhile)
    changing = asyncio.create_task(world.change("box", name="crate"))
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert [vm.name for vm in await world.store.vms()] == ["box"]
