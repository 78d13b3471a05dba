"""Disks that are devices while a machine runs: when they are there, and who keeps room for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

import fakes
from banger.base.errors import Conflict, PreconditionFailed, Unavailable
from banger.base.model import DiskDevices, Vm, VmState
from banger.drivers.base import Level, Link, Machine, MachineStatus, Room
from banger.services import disk_room
from banger.services.disk_room import DiskRoom
from banger.services.operations import Progress
from fakes import DiskDevicesMade
from test_snapshots import cancellable, fork, snapshot, suspend
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(disk_room, "_INTERVAL_S", 0.0)
    async with made_world(
        short_path, monkeypatch, layered=False, template_limit=2, devices=DiskDevicesMade()
    ) as made:
        yield made


def devices(world: World) -> DiskDevicesMade:
    assert world.devices is not None
    return world.devices


def base_of(world: World) -> str:
    return str(world.paths.image_dir("id-base") / "rootfs.ext4")


def socket_of(vm: Vm) -> Path:
    return Path(vm.runtime.api_socket)


def is_paused(world: World, vm: Vm) -> bool:
    return world.hypervisor.statuses.get(socket_of(vm)) is MachineStatus.PAUSED


async def until_tended(world: World, vm: Vm, times: int = 3) -> None:
    """So often from now on, and what came of it is done but for the last."""
    tended = devices(world).tended
    before = tended.count(vm.id)
    async with asyncio.timeout(20):
        while tended.count(vm.id) < before + times:
            await asyncio.sleep(0)


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
    assert handles.disk == DiskDevices(
        base=base_of(world), base_loop="loop0", changes_loop="loop1", mapping="m"
    )
    await world.stop("box")
    assert devices(world).opened == {}
    assert devices(world).closed[-1] == vm.id
    await world.start("box")
    assert list(devices(world).opened) == [vm.id]
    await suspend(world)
    assert devices(world).opened == {}
    await world.delete("box", force=True)


async def test_a_template_has_one_while_it_is_made(world: World) -> None:
    vm = await world.create()
    (template,) = await world.store.templates()
    assert template.id in devices(world).closed
    assert list(devices(world).opened) == [vm.id]
    assert not (world.paths.vm(template.id).directory).exists()


async def test_a_disk_that_is_none_of_these_is_opened_looked_after_and_closed_by_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices(world), "serves", lambda _: False)
    vm = await world.create()
    (system,) = (each for each in world.hypervisor.machines[-1].disks if each.name == "system")
    assert (system.path, system.is_device) == (Path(vm.runtime.system_overlay), False)
    assert world.disk_room._watched == {}
    await world.stop("box")
    assert (devices(world).opened, devices(world).closed) == ({}, [])


async def test_a_template_is_looked_for_by_the_kind_of_disk_that_its_machines_have(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.Storage, "file_name", lambda _, disk: f"{disk}.cow")
    made = DiskDevicesMade()
    monkeypatch.setattr(made, "serves", lambda disk: disk.suffix == ".cow")
    async with made_world(
        short_path, monkeypatch, layered=False, template_limit=1, devices=made
    ) as world:
        seen: list[Machine] = []
        shape = world.hypervisor.shape

        async def noted(machine: Machine, link: Link | None) -> str:
            seen.append(machine)
            return await shape(machine, link)

        monkeypatch.setattr(world.hypervisor, "shape", noted)
        await world.create()
        assert await world.store.templates()
        assert {
            disk.is_device for each in seen for disk in each.disks if disk.name == "system"
        } == {True}


async def test_what_cannot_be_opened_fails_the_start_and_is_closed(world: World) -> None:
    vm = await world.create()
    await world.stop("box")
    devices(world).open_gate.fail = PreconditionFailed("the changes are lost")
    with pytest.raises(PreconditionFailed, match="the changes are lost"):
        await world.start("box")
    assert (await world.vms.show("box")).runtime.state is VmState.STOPPED
    assert devices(world).opened == {}
    assert devices(world).closed[-1] == vm.id


async def test_what_cannot_be_closed_is_closed_by_the_next_start(world: World) -> None:
    vm = await world.create()
    devices(world).close_gate.fail = Unavailable("the helper is gone")
    with pytest.raises(Unavailable):
        await world.stop("box")
    assert world.handles.get(vm.id).disk.mapping == "m"
    devices(world).close_gate.fail = None
    closed = devices(world).closed.count(vm.id)
    await world.start("box")
    assert devices(world).closed.count(vm.id) > closed


async def test_the_next_daemon_looks_after_what_runs_and_sweeps_the_rest(world: World) -> None:
    vm = await world.create()
    await world.create("other")
    await world.stop("other")
    following = await world.restarted()
    await following.reconcile()
    assert devices(following).swept == [{vm.id}]
    async with following.disk_room.running():
        devices(following).tended.clear()
        await until_tended(following, vm)
    assert set(devices(following).tended) == {vm.id}
    await following.close()


async def test_a_machine_of_a_storage_that_is_configured_no_more_is_looked_after_all_the_same(
    world: World,
) -> None:
    vm = await world.create()
    gone = await world.create("gone")
    following = await world.restarted()
    world.processes.end(world.hypervisor.pids[socket_of(gone)])
    following.storage.suffix = ".raw"
    await following.reconcile()
    assert list(devices(following).opened) == [vm.id]
    assert devices(following).swept == [{vm.id}]
    async with following.disk_room.running():
        await until_tended(following, vm)
        with pytest.raises(PreconditionFailed, match="not made by fake storage"):
            await suspend(following)
        with pytest.raises(PreconditionFailed, match="not made by fake storage"):
            await snapshot(following)
        await following.stop("box")
    assert devices(following).opened == {}
    with pytest.raises(PreconditionFailed, match="not made by fake storage"):
        await following.start("box")
    await following.delete("box")
    await following.close()


async def test_a_machine_without_room_is_held_until_there_is_some(world: World) -> None:
    vm = await world.create()
    made = devices(world)

    async def health() -> tuple[bool, dict[str, str]]:
        found = await world.health.check(vm)
        return found.healthy, {
            each.name: each.detail for each in found.checks if each.level is Level.FAIL
        }

    async with world.disk_room.running():
        made.rooms[vm.id] = Room.TIGHT
        await until_tended(world, vm)
        assert await health() == (True, {})
        made.rooms[vm.id] = Room.SHORT
        await until_tended(world, vm)
        assert await health() == (False, {"machine": "held: the host's disk is full"})
        await world.hypervisor.resume(socket_of(vm))  # somebody has let it run on
        await until_tended(world, vm)
        made.rooms[vm.id] = Room.TIGHT  # some, and not enough
        await until_tended(world, vm)
        assert is_paused(world, vm)
        made.rooms[vm.id] = Room.AMPLE
        await until_tended(world, vm)
        assert not is_paused(world, vm)
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


async def test_one_that_is_lost_while_it_is_held_is_let_go(world: World) -> None:
    """Its guest hears of it; no room that there may be would mend it."""
    vm = await world.create()
    async with world.disk_room.running():
        devices(world).rooms[vm.id] = Room.SHORT
        await until_tended(world, vm)
        assert is_paused(world, vm)
        devices(world).rooms[vm.id] = Room.LOST
        async with asyncio.timeout(20):
            while is_paused(world, vm):
                await asyncio.sleep(0)
    assert not world.disk_room.is_held(vm.id)


async def test_one_that_takes_long_makes_no_other_wait(world: World) -> None:
    slow, quick = await world.create("slow"), await world.create("quick")
    stuck = asyncio.Event()
    tend = devices(world).tend

    async def tended(vm_id: str, disk: Path) -> Room:
        if vm_id == slow.id:
            await stuck.wait()
        return await tend(vm_id, disk)

    devices(world).tend = tended  # type: ignore[method-assign]
    async with world.disk_room.running():
        await until_tended(world, quick)
        stuck.set()
        await until_tended(world, slow)


@pytest.mark.parametrize("room", [Room.SHORT, Room.TIGHT])
async def test_the_next_daemon_lets_nothing_run_on_before_there_is_room(
    world: World, room: Room
) -> None:
    vm = await world.create()
    devices(world).rooms[vm.id] = Room.SHORT
    async with world.disk_room.running():
        await until_tended(world, vm)
    following = await world.restarted()
    devices(following).rooms[vm.id] = room
    async with following.disk_room.running():
        await following.reconcile()
        await until_tended(following, vm)
        assert is_paused(following, vm)
        assert following.disk_room.is_held(vm.id)
        devices(following).rooms[vm.id] = Room.AMPLE
        await until_tended(following, vm)
        assert not is_paused(following, vm)
    await following.close()


async def test_the_next_daemon_holds_one_that_it_cannot_look_after_until_it_can(
    world: World,
) -> None:
    vm = await world.create()
    await world.hypervisor.pause(socket_of(vm))
    following = await world.restarted()
    devices(following).tend_gate.fail = Unavailable("the helper is gone")
    async with following.disk_room.running():
        await following.reconcile()
        await until_tended(following, vm)
        assert is_paused(following, vm)
        devices(following).tend_gate.fail = None
        await until_tended(following, vm)
        assert not is_paused(following, vm)
    await following.close()


async def test_the_next_daemon_lets_run_on_what_was_paused_for_another_reason(
    world: World,
) -> None:
    vm = await world.create()
    await world.hypervisor.pause(socket_of(vm))
    following = await world.restarted()
    await following.reconcile()
    assert not is_paused(following, vm)
    assert not following.disk_room.is_held(vm.id)
    await following.close()


async def test_the_next_daemon_asks_again_whether_one_is_held(world: World) -> None:
    vm = await world.create()
    await world.hypervisor.pause(socket_of(vm))
    following = await world.restarted()
    following.hypervisor.can_quit = False  # nor does it answer to anything
    await following.disk_room.adopt([vm])
    assert following.disk_room.is_held(vm.id)
    following.hypervisor.can_quit = True
    devices(following).rooms[vm.id] = Room.SHORT
    async with following.disk_room.running():
        await until_tended(following, vm)
        assert is_paused(following, vm)
        devices(following).rooms[vm.id] = Room.AMPLE
        await until_runs(following, vm)
    assert not following.disk_room.is_held(vm.id)
    await following.close()


async def test_the_next_daemon_does_not_wait_for_a_hypervisor_that_is_at_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(fakes, "ANSWER_TIMEOUT_S", 60.0)
    vm = await world.create()
    await world.hypervisor.pause(socket_of(vm))
    following = await world.restarted()
    idle = following.hypervisor.idle[socket_of(vm)] = asyncio.Event()
    async with asyncio.timeout(20):
        await following.disk_room.adopt([vm])
    assert following.disk_room.is_held(vm.id)
    idle.set()
    async with following.disk_room.running():
        await until_runs(following, vm)
    await following.close()


@pytest.mark.parametrize(
    "act",
    [
        lambda world, progress: world.snapshots.take("box", "snap", progress),
        lambda world, progress: world.suspension.suspend("box", progress),
    ],
    ids=["snapshot", "suspend"],
)
async def test_whoever_copies_a_machine_has_it_to_himself(
    world: World, act: Callable[[World, Progress], Awaitable[object]]
) -> None:
    """It was held, and has been let run on by somebody; now there is room again."""
    vm = await world.create()
    async with world.disk_room.running():
        devices(world).rooms[vm.id] = Room.SHORT
        await until_tended(world, vm)
        watched = world.disk_room._watched[vm.id]
        devices(world).rooms[vm.id] = Room.TIGHT
        await world.hypervisor.resume(socket_of(vm))
        world.hypervisor.capture_gate.block = True

        async def work(progress: Progress) -> None:
            await act(world, progress)

        acting = asyncio.ensure_future(cancellable(world, work))
        await world.hypervisor.capture_gate.reached.wait()
        for room in (Room.AMPLE, Room.SHORT):
            devices(world).rooms[vm.id] = room
            await until_tended(world, vm)  # its room is kept all the while
            assert is_paused(world, vm)
            assert watched.held
        devices(world).rooms[vm.id] = Room.AMPLE
        acting.cancel()
        with suppress(asyncio.CancelledError):
            await acting
        await until_tended(world, vm)
        assert not is_paused(world, vm)
        assert not world.disk_room.is_held(vm.id)


async def test_what_is_under_way_is_waited_for_by_who_wants_it_left_alone(world: World) -> None:
    vm = await world.create()
    world.hypervisor.pause_gate.block = True
    async with world.disk_room.running():
        devices(world).rooms[vm.id] = Room.SHORT
        await world.hypervisor.pause_gate.reached.wait()
        waiting = [
            asyncio.ensure_future(each)
            for each in (alone(world.disk_room, vm), world.disk_room.forget(vm.id))
        ]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in waiting)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_who_is_cancelled_at_forgetting_a_machine_can_forget_it_again(world: World) -> None:
    vm = await world.create()
    tended, go_on = devices(world).tended, asyncio.Event()
    tend = devices(world).tend

    async def slow(vm_id: str, disk: Path) -> Room:
        room = await tend(vm_id, disk)
        await go_on.wait()
        return room

    devices(world).tend = slow  # type: ignore[method-assign]
    async with world.disk_room.running():
        await until_tended(world, vm, 1)
        forgetting = asyncio.ensure_future(world.disk_room.forget(vm.id))
        await asyncio.sleep(0.01)
        forgetting.cancel()
        go_on.set()
        await until_tended(world, vm)
        await world.disk_room.forget(vm.id)
        tended.clear()
        await asyncio.sleep(0.01)
        assert tended == []


async def test_a_pause_that_nobody_heard_of_does_not_stay(world: World) -> None:
    vm = await world.create()
    pause = world.hypervisor.pause

    async def unheard(control_socket: Path) -> None:
        await pause(control_socket)
        raise Unavailable("no answer in time")

    world.hypervisor.pause = unheard  # type: ignore[method-assign]
    async with world.disk_room.running():
        devices(world).rooms[vm.id] = Room.SHORT
        await until_tended(world, vm)
        assert is_paused(world, vm)
        devices(world).rooms[vm.id] = Room.AMPLE
        await until_tended(world, vm)
        assert not is_paused(world, vm)


async def until_runs(world: World, vm: Vm) -> None:
    async with asyncio.timeout(20):
        while is_paused(world, vm):
            await asyncio.sleep(0)


async def test_one_that_is_lost_while_it_is_left_alone_is_let_go_then(world: World) -> None:
    vm = await world.create()
    async with world.disk_room.running():
        devices(world).rooms[vm.id] = Room.SHORT
        await until_tended(world, vm)
        async with world.disk_room.left_alone(vm.id):
            devices(world).rooms[vm.id] = Room.LOST
            assert await world.disk_room.looked_at(vm.id) is Room.LOST
            assert is_paused(world, vm)
        await until_runs(world, vm)


async def alone(room: DiskRoom, vm: Vm) -> None:
    async with room.left_alone(vm.id):
        pass


async def test_one_that_powers_off_is_not_held(world: World) -> None:
    """What it has yet to write may fit."""
    vm = await world.create()
    seen: list[bool] = []

    def shut_down() -> None:
        devices(world).rooms[vm.id] = Room.SHORT

        async def look() -> None:
            await until_tended(world, vm)
            seen.append(is_paused(world, vm))
            world.processes.end(world.hypervisor.pids[socket_of(vm)])

        looking.append(asyncio.ensure_future(look()))

    looking: list[asyncio.Future[None]] = []
    world.agent.on_shutdown = shut_down
    async with world.disk_room.running():
        await world.stop("box")
        await asyncio.gather(*looking)
    assert seen == [False]


@pytest.mark.parametrize("room", [Room.AMPLE, Room.TIGHT, Room.LOST])
async def test_one_that_is_held_can_power_off_when_there_is_room(world: World, room: Room) -> None:
    vm = await world.create()
    looking: list[asyncio.Future[None]] = []

    async def powers_off() -> None:
        devices(world).rooms[vm.id] = room
        await until_runs(world, vm)
        world.processes.end(world.hypervisor.pids[socket_of(vm)])

    world.agent.on_shutdown = lambda: looking.append(asyncio.ensure_future(powers_off()))
    async with world.disk_room.running():
        devices(world).rooms[vm.id] = Room.SHORT
        await until_tended(world, vm)
        assert is_paused(world, vm)
        await world.stop("box")
        await asyncio.gather(*looking)
    assert len(looking) == 1


@pytest.mark.parametrize("rooms", [[Room.LOST], [Room.AMPLE, Room.LOST]], ids=["before", "after"])
@pytest.mark.parametrize("act", [snapshot, suspend, fork])
async def test_a_memory_of_a_disk_that_is_lost_is_not_kept(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[World], Awaitable[object]],
    rooms: list[Room],
) -> None:
    """It believes in what was never written."""
    vm = await world.create()
    found = iter(rooms)

    async def tended(_vm_id: str, _disk: Path) -> Room:
        await asyncio.sleep(0)
        return next(found)

    monkeypatch.setattr(devices(world), "tend", tended)
    with pytest.raises(Conflict, match="had no room for what") as refused:
        await act(world)
    assert "banger vm restart box" in refused.value.hint
    assert (await world.vms.show("box")).runtime.state is VmState.RUNNING
    assert not is_paused(world, vm)
    assert not world.paths.vm(vm.id).memory.exists()
    assert await world.snapshots.all() == []
    assert len(await world.store.vms()) == 1


@pytest.mark.parametrize("looks", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("fails", ["tend", "is_lost"])
@pytest.mark.parametrize("act", [snapshot, suspend, fork])
async def test_no_memory_is_kept_while_nobody_can_tell_whether_its_disk_is_lost(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[World], Awaitable[object]],
    fails: str,
    looks: int,
) -> None:
    vm = await world.create()
    look, asked = getattr(devices(world), fails), []

    async def answered(*arguments: object) -> object:
        asked.append(arguments)
        if len(asked) > looks:
            raise Unavailable("the helper is gone")
        return await look(*arguments)

    monkeypatch.setattr(devices(world), fails, answered)
    with pytest.raises(Unavailable, match=r"nobody can tell whether .*: the helper is gone"):
        await act(world)
    assert len(asked) == looks + 1
    assert (await world.vms.show("box")).runtime.state is VmState.RUNNING
    assert not is_paused(world, vm)
    assert not world.paths.vm(vm.id).memory.exists()
    assert await world.snapshots.all() == []
    assert len(await world.store.vms()) == 1


async def test_a_memory_is_not_kept_where_the_kernel_knows_more_than_the_room_says(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()

    async def is_lost(_vm_id: str) -> bool:
        await asyncio.sleep(0)
        return True

    monkeypatch.setattr(devices(world), "is_lost", is_lost)
    with pytest.raises(Conflict, match="had no room for what"):
        await snapshot(world)
    assert world.disk_room.room(vm.id) is Room.LOST


async def test_a_template_is_not_made_while_nobody_can_tell_whether_its_disk_is_lost(
    world: World,
) -> None:
    devices(world).lost_gate.fail = Unavailable("the helper is gone")
    vm = await world.create()
    assert vm.runtime.state is VmState.RUNNING
    assert await world.store.templates() == []


async def test_a_template_is_not_made_of_a_machine_without_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine of a VM that is made from it has its own disk, and may find some."""
    made = devices(world)
    rooms = iter([Room.SHORT, Room.LOST])
    of: dict[str, Room] = {}
    tend = made.tend

    async def tended(vm_id: str, disk: Path) -> Room:
        await tend(vm_id, disk)
        return of.setdefault(vm_id, Room.AMPLE) if "templates" not in disk.parts else short

    monkeypatch.setattr(made, "tend", tended)
    for name in ("a", "b"):
        short = next(rooms)
        async with world.disk_room.running():
            vm = await world.create(name)
        assert vm.runtime.state is VmState.RUNNING
        assert await world.store.templates() == []
        world.templates._refused.clear()


async def test_a_standby_is_not_kept_where_there_is_no_room(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "_INTERVAL_S", 0.0)
    made = DiskDevicesMade()
    async with made_world(
        short_path,
        monkeypatch,
        layered=False,
        template_limit=1,
        standby_limit=1,
        devices=made,
    ) as world:
        vm = await world.create()
        monkeypatch.setattr(made, "tend", lambda vm_id, _: short_of(vm_id, but=vm.id))
        keeper = world.standbys._keeper
        assert keeper is not None
        async with world.disk_room.running():
            await asyncio.wait_for(asyncio.gather(keeper), 60)
        assert world.standbys.count == 0
        assert list(made.opened) == [vm.id]


async def short_of(vm_id: str, *, but: str) -> Room:
    await asyncio.sleep(0)
    return Room.AMPLE if vm_id == but else Room.SHORT


async def test_what_is_busy_keeps_its_files(world: World) -> None:
    await world.create()
    devices(world).close_gate.fail = Conflict("in use")
    with pytest.raises(Conflict):
        await world.delete("box", force=True)
    assert world.files()
    devices(world).close_gate.fail = None
    await world.delete("box", force=True)
    await world.assert_nothing_left()


async def test_without_devices_nothing_is_looked_after(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch) as world:
        before = asyncio.all_tasks()
        room = DiskRoom(None, world.hypervisor)
        async with room.running():
            room.watch(await world.create())
            assert not room.is_held("box")
        assert before <= asyncio.all_tasks()
