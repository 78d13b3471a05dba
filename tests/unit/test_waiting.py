"""Waiting for a VM, its health, and pruning: what is told, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from banger.base.errors import NotFound, OperationTimeout, PreconditionFailed
from banger.base.log import OperationLog
from banger.base.model import Vm, VmState, now
from banger.drivers.base import MachineStatus
from banger.guest import requests
from banger.services import health as health_module
from banger.services import waiting as module
from banger.services.prune import Pruned
from banger.services.waiting import Goal, wait_for
from fakes import failing
from records import a_vm
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


def waiting(world: World, goal: Goal, timeout_s: float | None = 10) -> asyncio.Task[Vm]:
    return asyncio.create_task(wait_for(world.vms, world.health, "box", goal, timeout_s))


async def test_what_is_so_already_is_not_waited_for(world: World) -> None:
    await world.create()
    assert (await waiting(world, Goal.RUNNING)).name == "box"
    assert (await waiting(world, Goal.HEALTHY)).name == "box"
    await world.stop("box")
    assert (await waiting(world, Goal.STOPPED)).runtime.state is VmState.STOPPED


async def test_who_waits_for_the_end_is_told_of_a_stop_and_of_a_guest_that_ends(
    world: World,
) -> None:
    vm = await world.create()
    task = waiting(world, Goal.STOPPED)
    await asyncio.sleep(0.01)
    assert not task.done()
    world.processes.end(world.liveness.pid(vm))
    assert (await task).runtime.state is VmState.STOPPED
    await world.start("box")
    task = waiting(world, Goal.STOPPED)
    await asyncio.sleep(0.01)
    await world.stop("box")
    await task


async def test_who_waits_for_a_start_is_told_of_it(world: World) -> None:
    await world.create()
    await world.stop("box")
    tasks = [waiting(world, Goal.RUNNING), waiting(world, Goal.HEALTHY)]
    await asyncio.sleep(0.01)
    await world.start("box")
    assert [vm.runtime.state for vm in await asyncio.gather(*tasks)] == [VmState.RUNNING] * 2


async def test_a_vm_that_is_deleted_has_stopped_and_will_not_run(world: World) -> None:
    await world.create()
    await world.stop("box")
    gone, ran = waiting(world, Goal.DELETED), waiting(world, Goal.RUNNING)
    await asyncio.sleep(0.01)
    await world.delete("box")
    assert (await gone).name == "box"
    with pytest.raises(NotFound, match='vm "box" was deleted'):
        await ran
    with pytest.raises(NotFound):
        await waiting(world, Goal.DELETED)


async def test_a_time_limit_says_how_the_vm_is(world: World) -> None:
    await world.create()
    with pytest.raises(OperationTimeout, match=r'vm "box" is running, not stopped, after 0.02 s'):
        await waiting(world, Goal.STOPPED, 0.02)


async def test_a_vm_that_has_failed_will_not_run_by_itself(world: World) -> None:
    await world.store.insert_vm(a_vm("box", state=VmState.ERROR, last_error="no clock"))
    with pytest.raises(PreconditionFailed, match='vm "box" has failed: no clock'):
        await waiting(world, Goal.RUNNING)
    await waiting(world, Goal.STOPPED)


async def test_a_guest_that_is_not_well_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    vm = await world.create()
    world.hypervisor.statuses[Path(vm.runtime.api_socket)] = MachineStatus.PAUSED
    task = waiting(world, Goal.HEALTHY)
    await asyncio.sleep(0.05)
    assert not task.done()
    world.hypervisor.statuses.clear()
    assert (await task).name == "box"


# Health.


async def levels(world: World) -> dict[str, str]:
    report = await world.health.check(await world.vms.show("box"))
    assert report.healthy == ("fail" not in {check.level for check in report.checks})
    assert all(check.hint for check in report.checks if check.level == "fail")
    return {check.name: check.level.value for check in report.checks}


async def test_a_vm_that_is_well(world: World) -> None:
    await world.create()
    assert await levels(world) == dict.fromkeys(("process", "machine", "agent", "disk space"), "ok")


async def test_a_vm_that_does_not_run_is_not_well(world: World) -> None:
    await world.create()
    await world.stop("box")
    assert await levels(world) == {"process": "fail", "disk space": "ok"}


@pytest.mark.parametrize("status", [MachineStatus.PAUSED, MachineStatus.DISK_FULL])
async def test_a_machine_that_is_held_is_not_well(world: World, status: MachineStatus) -> None:
    vm = await world.create()
    world.hypervisor.statuses[Path(vm.runtime.api_socket)] = status
    assert (await levels(world))["machine"] == "fail"


async def test_an_agent_that_does_not_answer_is_told_within_the_limit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "_AGENT_TIMEOUT_S", 0.05)
    await world.create()
    world.agent.exits[requests.Ping.KIND] = None
    assert (await levels(world))["agent"] == "fail"
    world.hypervisor.can_quit = False
    assert (await levels(world))["machine"] == "fail"


# Prune.


async def pruned(world: World, unused_for_s: float = 0, *, dry_run: bool = False) -> list[Pruned]:
    with OperationLog("vm.prune") as log:
        return await world.prune.run(unused_for_s, log, dry_run=dry_run)


async def test_only_what_does_not_run_is_pruned_and_a_dry_run_prunes_nothing(
    world: World,
) -> None:
    for name in ("one", "two", "runs"):
        await world.create(name)
    await world.stop("one")
    await world.stop("two")
    told = await pruned(world, dry_run=True)
    assert [each.vm.name for each in told] == ["one", "two"]
    assert all(each.size_bytes > 0 for each in told)
    assert len(await world.store.vms()) == 3
    assert [each.vm.name for each in await pruned(world)] == ["one", "two"]
    assert [vm.name for vm in await world.vms.all()] == ["runs"]
    assert await pruned(world) == []


async def test_only_those_that_somebody_agreed_to_are_pruned(world: World) -> None:
    """Another may have stopped while the question stood there."""
    shown = await world.create("shown", start=False)
    await world.create("later", start=False)
    with OperationLog("vm.prune") as log:
        gone = await world.prune.run(0, log, dry_run=False, only={shown.id, "no-such"})
    assert [each.vm.name for each in gone] == ["shown"]
    assert [vm.name for vm in await world.vms.all()] == ["later"]


async def test_what_was_used_of_late_is_not_pruned(world: World) -> None:
    for name in ("old", "new", "never"):
        await world.create(name)
        await world.stop(name)
    old = await world.vms.resolve("old")
    await world.store.touch_vm(old.id, now() - timedelta(hours=2))
    assert [each.vm.name for each in await pruned(world, 3600)] == ["old"]


async def test_what_is_used_while_others_are_pruned_stays_with_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        await world.create(name)
        await world.stop(name)
        used = await world.vms.resolve(name)
        await world.store.touch_vm(used.id, now() - timedelta(hours=2))
    delete = world.store.delete_vm

    async def slow(vm_id: str) -> None:
        await world.vms.touch(used.id)
        await delete(vm_id)

    monkeypatch.setattr(world.store, "delete_vm", slow)
    one, two = await pruned(world, 3600)
    assert one.error is None
    assert two.error is not None
    assert two.error.message == 'vm "two" was used meanwhile'
    assert [vm.name for vm in await world.vms.all()] == ["two"]


async def test_one_that_cannot_be_deleted_stays_with_the_reason_and_the_others_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        await world.create(name)
        await world.stop(name)
    stuck = await world.vms.resolve("one")
    delete = world.store.delete_vm

    async def fails(vm_id: str) -> None:
        if vm_id == stuck.id:
            raise failing("no")
        await delete(vm_id)

    monkeypatch.setattr(world.store, "delete_vm", fails)
    one, two = await pruned(world)
    assert one.error is not None
    assert one.error.message == "no"
    assert two.error is None
    assert [vm.name for vm in await world.vms.all()] == ["one"]
