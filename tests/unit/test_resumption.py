"""Machines that are left paused run on: when their hypervisors answer again, and nobody else has
them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import fakes
from banger.base.errors import Unavailable
from banger.base.model import Vm, VmState
from banger.drivers.base import Capture, Level, MachineStatus, Room
from banger.services import disk_room, resumption
from fakes import DiskDevicesMade
from test_snapshots import assert_disks_agree, fork, snapshot, suspend
from world import World, made_world

OPERATIONS = pytest.mark.parametrize("operation", [snapshot, fork, suspend])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(resumption, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(disk_room, "_PATIENCE_S", 0.01)


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


def socket_of(vm: Vm) -> Path:
    return Path(vm.runtime.api_socket)


def is_paused(world: World, vm: Vm) -> bool:
    return world.hypervisor.statuses.get(socket_of(vm)) is MachineStatus.PAUSED


def works(world: World, vm: Vm) -> asyncio.Event:
    """Its machine is paused, and its hypervisor answers nobody until this is set."""
    world.hypervisor.statuses[socket_of(vm)] = MachineStatus.PAUSED
    return world.hypervisor.idle.setdefault(socket_of(vm), asyncio.Event())


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


async def settled(world: World) -> None:
    await until(lambda: not world.resumption._trying)


async def next_daemon(world: World) -> World:
    following = await world.restarted()
    await following.reconcile()
    return following


async def test_what_cannot_be_let_run_on_by_the_next_daemon_is_as_soon_as_it_answers(
    world: World,
) -> None:
    vm, other = await world.create(), await world.create("other")
    world.paths.vm(vm.id).memory.write_bytes(b"half")
    idle = works(world, vm)
    following = await next_daemon(world)
    assert following.resumption.is_due(vm.id)
    assert not following.resumption.is_due(other.id)
    assert following.hypervisor.discarded == [socket_of(other)]
    for _ in range(2):  # however often it is asked in vain
        await until(lambda: following.hypervisor.waiting)
        await until(lambda: not following.hypervisor.waiting)
    assert is_paused(following, vm)
    assert world.paths.vm(vm.id).memory.exists(), "it may be written still"
    idle.set()
    await settled(following)
    assert not is_paused(following, vm)
    assert not world.paths.vm(vm.id).memory.exists()
    assert following.hypervisor.discarded == [socket_of(other), socket_of(vm)]
    assert (await following.vms.show("box")).runtime.state is VmState.RUNNING
    await assert_disks_agree(following)
    await following.close()


async def test_a_daemon_that_starts_waits_for_all_of_them_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "_PATIENCE_S", 20.0)
    monkeypatch.setattr(fakes, "ANSWER_TIMEOUT_S", 20.0)
    vms = [await world.create(f"box-{number}") for number in range(4)]
    events = [works(world, vm) for vm in vms]
    following = await world.restarted()
    starting = asyncio.create_task(following.reconcile())
    await until(lambda: following.hypervisor.waiting == len(vms))
    for event in events:
        event.set()
    await starting
    assert not any(is_paused(following, vm) for vm in vms)
    await following.close()


async def test_a_vm_that_may_be_paused_is_not_said_to_be_well(world: World) -> None:
    vm = await world.create()
    idle = works(world, vm)
    following = await next_daemon(world)

    async def machine() -> tuple[Level, str]:
        (check,) = (
            each for each in (await following.health.check(vm)).checks if each.name == "machine"
        )
        return check.level, check.detail

    level, detail = await machine()
    assert level is Level.FAIL
    assert detail.startswith("paused, and its hypervisor does not answer")
    idle.set()
    await settled(following)
    assert await machine() == (Level.OK, "its vCPUs run")
    await following.close()


@OPERATIONS
async def test_a_copy_that_leaves_it_paused_is_told_of_and_it_runs_on_later(
    world: World, monkeypatch: pytest.MonkeyPatch, operation: Callable[[World], Awaitable[object]]
) -> None:
    vm = await world.create()
    idle: list[asyncio.Event] = []

    async def times_out(
        socket: Path, pid: int, capture: Capture, stages: Callable[[str], None]
    ) -> float:
        capture.memory.write_bytes(b"half")
        idle.append(works(world, vm))
        raise Unavailable("it takes too long")

    whole = world.hypervisor.capture
    monkeypatch.setattr(world.hypervisor, "capture", times_out)
    with pytest.raises(Unavailable, match="it takes too long"):
        await operation(world)
    assert is_paused(world, vm)
    assert world.resumption.is_due(vm.id)
    idle[0].set()
    await settled(world)
    assert not is_paused(world, vm)
    assert world.hypervisor.discarded == [socket_of(vm)]
    assert not world.paths.vm(vm.id).memory.exists()
    assert [each.runtime.state for each in await world.vms.all()] == [VmState.RUNNING]
    await assert_disks_agree(world)
    monkeypatch.setattr(world.hypervisor, "capture", whole)
    await operation(world)


async def test_its_lock_is_others_to_have_until_it_answers_and_it_waits_for_theirs(
    world: World,
) -> None:
    vm = await world.create()
    idle = works(world, vm)
    following = await next_daemon(world)
    await until(lambda: following.hypervisor.waiting)
    async with asyncio.timeout(20), following.vms.locked(vm):  # as whoever copies it has
        idle.set()
        await until(lambda: following.vms.locks._users[vm.id] == 2)
        await asyncio.sleep(0.02)
        assert is_paused(following, vm)
    await settled(following)
    assert not is_paused(following, vm)
    await following.close()


@pytest.mark.parametrize("end", ["stop", "kill", "delete"])
async def test_one_that_is_ended_meanwhile_is_forgotten(world: World, end: str) -> None:
    vm = await world.create()
    works(world, vm)
    following = await next_daemon(world)
    assert following.resumption.is_due(vm.id)
    if end == "delete":
        await following.delete("box", force=True)
    else:
        await getattr(following, end)("box")
    await settled(following)
    assert is_paused(following, vm), "nobody has asked a machine that is gone"
    assert following.vms.locks._locks == {}
    await following.close()


async def test_one_that_runs_by_then_is_left_as_it_is(world: World) -> None:
    vm = await world.create()
    idle = works(world, vm)
    following = await next_daemon(world)
    following.hypervisor.statuses[socket_of(vm)] = MachineStatus.DISK_FULL
    idle.set()
    await settled(following)
    assert following.hypervisor.statuses[socket_of(vm)] is MachineStatus.DISK_FULL
    await following.close()


async def test_trouble_with_what_comes_afterwards_is_told_and_keeps_nothing_paused(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await world.create()
    works(world, vm).set()
    following = await world.restarted()

    async def fails(_: Vm) -> Vm:
        raise Unavailable("disks are not known")

    monkeypatch.setattr(following.layers, "settle", fails)
    await following.reconcile()
    assert not is_paused(following, vm)
    assert not following.resumption.is_due(vm.id)
    assert "disks are not known" in capsys.readouterr().out
    await following.close()


@pytest.mark.parametrize("room", [Room.SHORT, Room.TIGHT, Room.AMPLE])
async def test_one_that_has_no_room_stays_held_however_late_it_answers(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, room: Room
) -> None:
    monkeypatch.setattr(disk_room, "_INTERVAL_S", 0.0)
    async with made_world(
        short_path, monkeypatch, layered=False, devices=DiskDevicesMade()
    ) as world:
        vm = await world.create()
        idle = works(world, vm)
        following = await world.restarted()
        assert following.devices is not None
        following.devices.rooms[vm.id] = room
        async with following.disk_room.running():
            await following.reconcile()
            assert following.resumption.is_due(vm.id)
            idle.set()
            await settled(following)
            await until(lambda: not following.disk_room._watched[vm.id].unknown)
            if room is Room.AMPLE:
                await until(lambda: not is_paused(following, vm))
            assert is_paused(following, vm) == following.disk_room.is_held(vm.id)
            assert is_paused(following, vm) == (room is not Room.AMPLE)
            following.devices.rooms[vm.id] = Room.AMPLE
            await until(lambda: not is_paused(following, vm))
        await following.close()
