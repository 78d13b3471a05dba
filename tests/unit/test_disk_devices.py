"""Disks that are devices while a machine runs: when they are there, and who keeps room for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.model import DiskDevices, Vm, VmState
from banger.drivers.base import Level, MachineStatus, Room
from banger.services import disk_room
from banger.services.disk_room import DiskRoom
from fakes import DiskDevicesMade
from test_snapshots import suspend
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch, layered=False, template_limit=2) as made:
        with_devices(made)
        yield made


def with_devices(world: World) -> DiskDevicesMade:
    """Have its storage make devices."""
    made = world.storage.devices = DiskDevicesMade()
    world.disk_room._devices = made
    return made


def devices(world: World) -> DiskDevicesMade:
    assert world.storage.devices is not None
    return world.storage.devices


def base_of(world: World) -> str:
    return str(world.paths.image_dir("id-base") / "rootfs.ext4")


async def test_a_machine_has_its_device_from_before_its_launch_until_it_has_ended(
    world: World,
) -> None:
    vm = await world.create()
    disk = Path(vm.runtime.system_overlay)
    assert devices(world).opened == {vm.id: (Path(base_of(world)), disk)}
    (system,) = (each for each in world.hypervisor.machines[-1].disks if each.name == "system")
    assert (system.path, system.is_device) == (Path("/dev/mapper") / vm.id, True)
    handles = world.handles.load(vm.id)  # what the next daemon reads
    assert handles.pid > 0
    recorded = DiskDevices(
        base=base_of(world), base_loop="loop0", changes_loop="loop1", mapping="m"
    )
    assert handles.disk == recorded
    await world.stop("box")
    assert devices(world).opened == {}
    assert devices(world).closed[-1] == (vm.id, recorded)
    await world.start("box")
    assert list(devices(world).opened) == [vm.id]
    await suspend(world)
    assert devices(world).opened == {}
    await world.delete("box", force=True)


async def test_a_template_has_one_while_it_is_made(world: World) -> None:
    vm = await world.create()
    (template,) = await world.store.templates()
    closed = [vm_id for vm_id, made in devices(world).closed if made.base == base_of(world)]
    assert template.id in closed
    assert list(devices(world).opened) == [vm.id]
    assert not (world.paths.vm(template.id).directory).exists()


async def test_what_cannot_be_opened_fails_the_start_and_is_closed(world: World) -> None:
    vm = await world.create()
    await world.stop("box")
    devices(world).open_gate.fail = PreconditionFailed("the changes are lost")
    with pytest.raises(PreconditionFailed, match="the changes are lost"):
        await world.start("box")
    assert (await world.vms.show("box")).runtime.state is VmState.STOPPED
    assert devices(world).opened == {}
    assert devices(world).closed[-1] == (vm.id, DiskDevices(base=base_of(world)))


async def test_what_cannot_be_closed_is_closed_by_the_next_start(world: World) -> None:
    vm = await world.create()
    devices(world).close_gate.fail = Unavailable("the helper is gone")
    with pytest.raises(Unavailable):
        await world.stop("box")
    assert world.handles.get(vm.id).disk.mapping == "m"
    devices(world).close_gate.fail = None
    await world.start("box")
    assert "m" in [made.mapping for _, made in devices(world).closed]


async def test_the_next_daemon_looks_after_what_runs_and_sweeps_the_rest(world: World) -> None:
    vm = await world.create()
    await world.create("other")
    await world.stop("other")
    following = await world.restarted()
    made = with_devices(following)
    await following.reconcile()
    assert made.swept == [({vm.id}, {Path(base_of(world))})]
    async with following.disk_room.running():
        await until_tended(made, vm)
    assert set(made.tended) == {vm.id}
    await following.close()


async def until_tended(made: DiskDevicesMade, vm: Vm) -> None:
    async with asyncio.timeout(20):
        while made.tended[-2:] != [vm.id] * 2:
            await asyncio.sleep(0)


async def test_a_machine_without_room_is_held_until_there_is_some(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "_INTERVAL_S", 0.0)
    vm = await world.create()
    socket = Path(vm.runtime.api_socket)
    made = devices(world)

    async def health() -> tuple[bool, dict[str, str]]:
        found = await world.health.check(vm)
        return found.healthy, {
            each.name: each.detail for each in found.checks if each.level is Level.FAIL
        }

    async def next_look() -> None:
        made.tended.clear()
        await until_tended(made, vm)

    async with world.disk_room.running():
        made.rooms[vm.id] = Room.TIGHT
        await next_look()
        assert await health() == (True, {})
        made.rooms[vm.id] = Room.SHORT
        await next_look()
        assert await health() == (False, {"machine": "held: the host's disk is full"})
        await world.hypervisor.resume(socket)  # a snapshot has let it run on
        await next_look()
        made.rooms[vm.id] = Room.TIGHT  # some, and not enough
        await next_look()
        assert world.hypervisor.statuses[socket] is MachineStatus.PAUSED
        made.rooms[vm.id] = Room.AMPLE
        await next_look()
        assert socket not in world.hypervisor.statuses
        assert await health() == (True, {})
        made.rooms[vm.id] = Room.LOST
        async with asyncio.timeout(20):
            while world.disk_room.room(vm.id) is not Room.LOST:
                await asyncio.sleep(0)
        made.rooms[vm.id] = Room.AMPLE  # it is not mended by that
        await asyncio.sleep(0.01)
        healthy, failed = await health()
        assert (healthy, list(failed)) == (False, ["system disk"])
        await world.stop("box")
        made.tended.clear()
        await asyncio.sleep(0.01)
        assert made.tended == []
    assert world.disk_room.room(vm.id) is Room.AMPLE


async def test_without_devices_nothing_is_looked_after(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch) as world:
        before = asyncio.all_tasks()
        room = DiskRoom(world.storage, world.hypervisor)
        async with room.running():
            room.watch(await world.create())
            assert not room.is_held("box")
        assert before <= asyncio.all_tasks()
