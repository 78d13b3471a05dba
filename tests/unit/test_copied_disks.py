"""Snapshots and forks where disks have no layers, and are copied while the machine is paused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.model import VmState
from banger.drivers.base import Capture, MachineStatus
from fakes import Storage
from test_snapshots import ACTIONS, copy, create, fork, paused, snapshot, snapshot_files, suspend
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch, layered=False) as made:
        yield made


async def test_a_running_vm_goes_on_in_its_own_files_and_its_snapshot_has_copies(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await world.create()
    share, at_rest = world.storage.share, []

    async def noted(disk: Path, directory: Path) -> None:
        at_rest.append(paused(world))
        await share(disk, directory)

    monkeypatch.setattr(world.storage, "share", noted)
    made = await snapshot(world)
    assert at_rest == [[Path(before.runtime.api_socket)]] * 2
    after = await world.vms.show("box")
    assert (after.runtime, paused(world)) == (before.runtime, [])
    files = {each.name for each in Path(made.directory).iterdir()}
    assert files == {"memory", "machine-state", made.system_disk, made.work_disk}
    vm = await copy(world)
    assert Path(vm.runtime.work_disk).read_text() == Path(before.runtime.work_disk).read_text()
    assert len(list(Path(vm.runtime.vm_dir).glob("*.qcow2"))) == 2


async def test_a_suspended_vm_has_no_copies_of_its_disks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create()
    seen: list[Capture] = []
    capture = world.hypervisor.capture

    async def noted(*arguments: object) -> float:
        seen.extend(each for each in arguments if isinstance(each, Capture))
        return await capture(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(world.hypervisor, "capture", noted)
    await suspend(world)
    assert [each.at_rest for each in seen] == [None]
    assert (await world.start("box")).runtime.state is VmState.RUNNING


async def test_a_copy_that_fails_lets_the_machine_run_on_and_leaves_nothing(world: World) -> None:
    before = await world.create()
    files = world.files()
    world.storage.share_gate.fail = Unavailable("no room")
    with pytest.raises(Unavailable, match="no room"):
        await snapshot(world)
    assert paused(world) == []
    assert (await world.vms.show("box")).runtime == before.runtime
    assert (world.files(), snapshot_files(world)) == (files, [])


@pytest.mark.parametrize("action", ACTIONS)
async def test_cancelled_at_any_moment_it_is_done_or_never_was(world: World, action: str) -> None:
    await world.create()
    files = world.files()
    steps, finished = 0, 0
    while finished < 2:
        acting = asyncio.ensure_future(ACTIONS[action](world))
        for _ in range(steps):
            await asyncio.sleep(0)
        finished += acting.done()
        acting.cancel()
        (how,) = await asyncio.wait_for(asyncio.gather(acting, return_exceptions=True), 20)
        assert how is None or isinstance(how, asyncio.CancelledError), how
        assert paused(world) == []
        for vm in await world.store.vms():
            if vm.name != "box":
                assert how is None
                await world.delete(vm.name, force=True)
        for each in await world.snapshots.all():
            assert how is None
            await world.snapshots.delete(each.name)
        assert (world.files(), snapshot_files(world)) == (files, [])
        steps = max(steps + 1, steps * 8 // 7)


async def test_there_must_be_room_for_copies_of_the_disks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create()
    await world.stop("box")
    monkeypatch.setattr(world.storage, "room_bytes", lambda disk, source: 1 << 60)
    with pytest.raises(PreconditionFailed, match="are needed"):
        await snapshot(world)
    with pytest.raises(AssertionError, match="are needed"):
        await world.create("other")
    assert (await world.start("box")).runtime.state is VmState.RUNNING


async def test_a_disk_is_no_other_disk_of_the_same_storage(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work disks may be raw where a system disk is a file of changes: a raw one in its place, of
    another storage, would be cut to nothing."""
    await world.create()
    await snapshot(world)
    await world.create("asleep")
    await suspend(world, "asleep")
    await world.create("awake")
    await world.stop("box")

    def file_name(storage: Storage, disk: str) -> str:
        return "system.cow" if disk == "system" else f"work{storage.suffix}"

    monkeypatch.setattr(Storage, "file_name", file_name)
    following = await world.restarted()
    await following.reconcile()
    calls = [
        following.start("box"),
        following.start("asleep"),
        following.start("asleep", cold=True),
        snapshot(following, "again"),
        suspend(following, "awake"),
        fork(following, vm="awake"),
    ]
    for call in calls:
        with pytest.raises(PreconditionFailed, match="was not made by fake storage"):
            await call
    done = await create(following)
    assert done.error is not None
    assert "was not made by fake storage" in done.error.message
    assert "work" not in done.error.message
    await following.close()


async def test_disks_of_another_storage_are_not_opened(world: World) -> None:
    """A guest can write a header of qcow2's, with the host's files in it, to a raw disk."""
    vm = await world.create()
    await snapshot(world)
    await world.stop("box")
    world.storage.suffix = ".other"
    calls = [
        world.start("box"),
        snapshot(world, "again"),
        world.change("box", disk_size_mib=1 << 20),
    ]
    for call in calls:
        with pytest.raises(PreconditionFailed, match="was not made by fake storage") as caught:
            await call
        assert "set storage back" in caught.value.hint
    done = await create(world)
    assert done.error is not None
    assert "was not made by fake storage" in done.error.message
    # One that runs is left to run, and its layers are nobody's business.
    world.storage.suffix = vm.runtime.work_disk[-len(".qcow2") :]
    await world.start("box")
    following = await world.restarted()
    following.storage.suffix, following.storage.layered = ".other", True
    following.hypervisor.statuses[Path(vm.runtime.api_socket)] = MachineStatus.PAUSED
    files = world.files()
    await following.reconcile()
    assert (following.files(), paused(following)) == (files, [])
    assert (await following.vms.show("box")).runtime.state is VmState.RUNNING
    await following.close()
