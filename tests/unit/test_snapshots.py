"""Snapshots, forks and suspended VMs: all or nothing, at whatever moment they are cut off."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.base.errors import (
    Ambiguous,
    BadRequest,
    Conflict,
    NotFound,
    NotRunning,
    PreconditionFailed,
    Unavailable,
)
from banger.base.model import NetworkMode, Operation, OperationState, Snapshot, Vm, VmState
from banger.base.opid import current_op_id, new_op_id
from banger.drivers.base import Check, Level, MachineLost, MachineStatus
from banger.guest import requests
from banger.services import forks, layers
from banger.services.layers import LAYERS_MAX
from banger.services.operations import Progress, Work, raise_failure
from banger.services.vm_spec import CreateRequest
from fakes import descriptors, failing
from world import World, ended, made_world

_COPIED_TAG = 11


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


def begin(world: World, kind: str, work: Work) -> Progress:
    token = current_op_id.set(new_op_id())
    try:
        return world.operations.begin(kind, "box", work)
    finally:
        current_op_id.reset(token)


async def snapshot(world: World, name: str = "snap", vm: str = "box") -> Snapshot:
    async def work(progress: Progress) -> None:
        await world.snapshots.take(vm, name, progress)

    done = await ended(begin(world, "vm.snapshot", work))
    raise_failure(done)
    assert done.snapshot is not None
    return done.snapshot


async def fork(world: World, count: int = 1, prefix: str = "", vm: str = "box") -> list[Vm]:
    made: list[Vm] = []

    async def work(progress: Progress) -> None:
        made.extend(await world.forks.fork(vm, count, prefix, progress))

    raise_failure(await ended(begin(world, "vm.fork", work)))
    return made


async def suspend(world: World, vm: str = "box") -> Vm:
    made: list[Vm] = []

    async def work(progress: Progress) -> None:
        made.append(await world.suspension.suspend(vm, progress))

    raise_failure(await ended(begin(world, "vm.suspend", work)))
    return made[0]


async def create(world: World, name: str = "copy", **fields: object) -> Operation:
    fields = {"from_snapshot": "snap"} | fields
    return await ended(world.begin(CreateRequest(name=name, **fields)))  # type: ignore[arg-type]


async def copy(world: World, name: str = "copy", **fields: object) -> Vm:
    done = await create(world, name, **fields)
    raise_failure(done)
    assert done.vm is not None
    return done.vm


def paused(world: World) -> list[Path]:
    return [at for at, how in world.hypervisor.statuses.items() if how is MachineStatus.PAUSED]


def snapshot_files(world: World) -> list[str]:
    directory = world.paths.snapshots_dir
    return sorted(each.name for each in directory.rglob("*")) if directory.is_dir() else []


async def assert_disks_agree(world: World) -> None:
    """Every machine writes to what its record says, and has all of its layers and no other."""
    for vm in await world.store.vms():
        disks = {"system": Path(vm.runtime.system_overlay), "work": Path(vm.runtime.work_disk)}
        if world.liveness.vm_alive(vm):
            assert world.hypervisor.tops[Path(vm.runtime.api_socket)] == disks
        needed = {layer for disk in disks.values() for layer in await world.storage.layers(disk)}
        assert set(Path(vm.runtime.vm_dir).glob("*.qcow2")) == needed


# Snapshots.


async def test_a_running_vm_goes_on_in_new_layers_and_its_snapshot_has_the_old(
    world: World,
) -> None:
    before = await world.create()
    made = await snapshot(world)
    after = await world.vms.show("box")
    assert after.runtime.state is VmState.RUNNING
    assert paused(world) == []
    assert after.runtime.system_overlay != before.runtime.system_overlay
    await assert_disks_agree(world)
    assert (made.vm_name, made.has_memory) == ("box", True)
    files = {each.name for each in Path(made.directory).iterdir()}
    assert files == {"memory", "machine-state", "system.qcow2", "work.qcow2"}
    old = Path(before.runtime.system_overlay)
    assert old.samefile(Path(made.directory) / made.system_disk)


async def test_a_stopped_vm_has_no_memory_to_keep(world: World) -> None:
    await world.create()
    await world.stop("box")
    made = await snapshot(world)
    assert not made.has_memory
    assert not (Path(made.directory) / "memory").exists()
    await assert_disks_agree(world)
    assert (await world.start("box")).runtime.state is VmState.RUNNING
    assert (await copy(world)).runtime.state is VmState.RUNNING


async def test_a_vm_from_a_snapshot_is_restored_and_told_that_it_is_a_copy(world: World) -> None:
    source = await world.create()
    made = await snapshot(world)
    vm = await copy(world)
    assert vm.copied_from == "snapshot snap"
    assert (vm.image_id, vm.spec) == (source.image_id, source.spec)
    machine = world.hypervisor.machines[-1]
    assert machine.memory_file is not None
    assert machine.memory_file.path == Path(made.directory) / "memory"
    assert _COPIED_TAG in world.agent.setups[-1]
    assert world.agent.setups[-1][1] == b"copy"
    await assert_disks_agree(world)
    await world.restart("copy")
    assert _COPIED_TAG not in world.agent.setups[-1]


async def test_whoever_goes_first_takes_nothing_of_the_others(world: World) -> None:
    await world.create()
    await snapshot(world)
    first = await copy(world)
    await snapshot(world, "second", "copy")
    await copy(world, "last", from_snapshot="second")
    await world.delete("box", force=True)
    await world.snapshots.delete("snap")
    await world.delete(first.name, force=True)
    await world.snapshots.delete("second")
    await assert_disks_agree(world)
    assert (await world.restart("last")).runtime.state is VmState.RUNNING
    assert snapshot_files(world) == []


@pytest.mark.parametrize("runs", [True, False])
async def test_disks_have_no_more_layers_than_they_may(world: World, runs: bool) -> None:
    await world.create()
    if not runs:
        await world.stop("box")
    for number in range(2 * LAYERS_MAX):
        await snapshot(world, f"snap-{number}")
        vm = await world.vms.show("box")
        for disk in (vm.runtime.system_overlay, vm.runtime.work_disk):
            assert len(await world.storage.layers(Path(disk))) <= LAYERS_MAX
        await assert_disks_agree(world)
    await copy(world, from_snapshot=f"snap-{LAYERS_MAX - 2}")
    await assert_disks_agree(world)


async def with_all_layers(world: World, *, runs: bool) -> Vm:
    """A VM of which each disk has as many layers as it may have."""
    await world.create()
    if not runs:
        await world.stop("box")
    for number in range(LAYERS_MAX - 1):
        await snapshot(world, f"snap-{number}")
    return await world.vms.show("box")


@pytest.mark.parametrize("runs", [True, False])
async def test_there_must_be_room_for_what_layers_hold_before_they_become_one(
    world: World, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """And for the memory that is written next."""
    vm = await with_all_layers(world, runs=runs)
    asked: list[tuple[Path, int, int]] = []
    level = Level.FAIL

    def check(directory: Path, memory_mib: int, disk_bytes: int = 0) -> Check:
        asked.append((directory, memory_mib, disk_bytes))
        return Check("disk space", level, "more bytes are needed")

    async def collapse_bytes(disk: Path) -> int:
        await asyncio.sleep(0)
        return 1000 if disk == Path(vm.runtime.system_overlay) else 50

    monkeypatch.setattr(layers, "check_room_for_memory", check)
    monkeypatch.setattr(world.storage, "collapse_bytes", collapse_bytes)
    files = world.files()
    with pytest.raises(PreconditionFailed, match="more bytes are needed"):
        await snapshot(world, "again")
    assert (world.files(), paused(world)) == (files, [])
    assert await world.vms.show("box") == vm
    level = Level.OK
    await snapshot(world, "again")
    memory_mib = vm.spec.memory_mib if runs else 0
    system = (Path(vm.runtime.vm_dir), memory_mib, 1000)
    assert asked == [system, system, (Path(vm.runtime.vm_dir), memory_mib, 50)]


@pytest.mark.parametrize("runs", [True, False])
async def test_a_collapse_that_fails_on_a_full_disk_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    await with_all_layers(world, runs=runs)
    level = Level.FAIL
    monkeypatch.setattr(
        layers, "check_free_disk", lambda _: Check("disk space", level, "1 B free", "make room")
    )
    gate = world.hypervisor.collapse_gate if runs else world.storage.collapse_gate
    gate.fail = Unavailable("it could not be done")
    with pytest.raises(
        PreconditionFailed,
        match=r"system disk .* for want of room \(1 B free\): it could not be done",
    ) as told:
        await snapshot(world, "again")
    assert told.value.hint == "make room"
    level = Level.OK
    with pytest.raises(Unavailable, match=r"^it could not be done"):
        await snapshot(world, "again")


async def test_a_snapshot_is_found_by_id_name_and_prefix(world: World) -> None:
    await world.create()
    first, second = await snapshot(world, "alpha"), await snapshot(world, "alps")
    assert await world.snapshots.resolve(first.id) == first
    assert await world.snapshots.resolve("alps") == second
    assert await world.snapshots.resolve("alph") == first
    with pytest.raises(Ambiguous):
        await world.snapshots.resolve("al")
    with pytest.raises(NotFound):
        await world.snapshots.resolve("beta")
    with pytest.raises(BadRequest):
        await world.snapshots.resolve("")


async def test_a_name_is_given_once_and_looks_like_one(world: World) -> None:
    await world.create()
    await snapshot(world)
    with pytest.raises(Conflict, match='snapshot "snap" already exists'):
        await snapshot(world)
    with pytest.raises(BadRequest):
        await snapshot(world, "../snap")


async def test_an_image_of_a_snapshot_stays(world: World) -> None:
    await world.create()
    await snapshot(world)
    await world.delete("box", force=True)
    with pytest.raises(Conflict, match="used by snapshot snap"):
        await world.images.delete("base")
    await world.snapshots.delete("snap")
    await world.images.delete("base")


@pytest.mark.parametrize(
    "fields",
    [
        {"vcpu_count": 7},
        {"memory_mib": 4096},
        {"network": NetworkMode.NONE},
        {"image": "other"},
        {"disk_size_mib": 1},
        {"start": False},
    ],
)
async def test_what_cannot_be_with_a_memory_is_refused(
    world: World, fields: dict[str, Any]
) -> None:
    await world.create()
    await snapshot(world)
    done = await create(world, "copy", **fields)
    assert done.error is not None
    assert done.error.code == "bad_request"
    assert len(await world.store.vms()) == 1


async def test_without_its_memory_a_snapshot_is_just_disks(world: World) -> None:
    await world.create()
    await snapshot(world)
    vm = await copy(world, cold=True, vcpu_count=7, memory_mib=4096)
    assert (vm.spec.vcpu_count, vm.spec.memory_mib) == (7, 4096)
    assert world.hypervisor.machines[-1].memory_file is None
    assert _COPIED_TAG in world.agent.setups[-1]


async def test_a_copy_with_more_vcpus_than_the_hypervisor_takes_is_refused(world: World) -> None:
    await world.create(vcpu_count=40)
    await snapshot(world)
    await world.delete("box", force=True)
    world.hypervisor.limit_vcpus(32)
    done = await create(world)
    assert done.error is not None
    assert done.error.message == "40 vCPUs are not possible with fake (1 to 32)"
    assert await world.vms.all() == []
    assert (await copy(world, cold=True, vcpu_count=32)).spec.vcpu_count == 32


async def test_a_larger_disk_is_grown_in_the_copy(world: World) -> None:
    size_mib = (await world.create()).spec.disk_size_mib
    await snapshot(world)
    await copy(world, disk_size_mib=2 * size_mib)
    (work,) = (disk for disk in world.hypervisor.machines[-1].disks if disk.name == "work")
    assert work.size_mib == 2 * size_mib
    cold = await copy(world, "cold", disk_size_mib=3 * size_mib, cold=True)
    assert await world.storage.size_mib(Path(cold.runtime.work_disk)) == 3 * size_mib


async def test_another_hypervisor_cannot_go_on_from_a_memory(world: World) -> None:
    await world.create()
    await snapshot(world)
    world.hypervisor.version = "2"
    done = await create(world)
    assert done.error is not None
    assert done.error.code == "precondition_failed"
    assert "--cold" in done.error.hint
    await copy(world, cold=True)


async def test_a_copy_that_cannot_be_restored_leaves_nothing(world: World) -> None:
    await world.create()
    await snapshot(world)
    before = world.files()
    world.hypervisor.restore_gate.fail = Unavailable("no")
    done = await create(world)
    assert done.error is not None
    assert world.files() == before
    assert [vm.name for vm in await world.store.vms()] == ["box"]


async def test_a_snapshot_in_use_stays(world: World) -> None:
    await world.create()
    await snapshot(world)
    world.hypervisor.restore_gate.block = True
    creation = world.begin(CreateRequest(name="copy", from_snapshot="snap"))
    await world.hypervisor.restore_gate.reached.wait()
    with pytest.raises(Conflict, match="is being made from"):
        await world.snapshots.delete("snap")
    await world.operations.cancel(creation.record.id)
    await world.snapshots.delete("snap")


async def test_a_machine_that_is_held_is_not_copied(world: World) -> None:
    vm = await world.create()
    world.hypervisor.statuses[Path(vm.runtime.api_socket)] = MachineStatus.DISK_FULL
    with pytest.raises(Conflict, match="is held"):
        await snapshot(world)
    with pytest.raises(Conflict, match="is held"):
        await suspend(world)


@pytest.mark.parametrize("error", [Unavailable("no"), OSError(28, "No space left on device")])
async def test_a_capture_that_fails_leaves_the_vm_running_as_it_was(
    world: World, error: Exception
) -> None:
    before = await world.create()
    world.hypervisor.capture_gate.fail = error
    with pytest.raises(Unavailable):
        await snapshot(world)
    after = await world.vms.show("box")
    assert after.runtime == before.runtime
    assert paused(world) == []
    assert snapshot_files(world) == []
    await assert_disks_agree(world)
    with pytest.raises(Unavailable):
        await suspend(world)
    assert (await world.vms.show("box")).runtime == before.runtime
    assert not world.paths.vm(before.id).memory.exists()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("copied", [snapshot, fork, suspend])
async def test_nobody_waits_for_an_agent_whose_vsock_was_reset(
    world: World, copied: Callable[[World], Awaitable[object]], fails: bool
) -> None:
    """Which it was whatever became of the copy."""
    vm = await world.create()
    features = dataclasses.replace(world.hypervisor.features, agent_vsock_port=1023)
    world.hypervisor.features = features
    channel = await world.agents.channel(vm)
    if fails:
        world.hypervisor.capture_gate.fail = Unavailable("no")
        with pytest.raises(Unavailable):
            await copied(world)
        assert await world.agents.channel(vm) is not channel
    else:
        await copied(world)
    assert channel.closed


async def test_a_guest_that_was_held_for_the_room_of_its_memory_runs_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await world.create()
    socket = Path(vm.runtime.api_socket)

    async def full(*_: object) -> float:
        world.hypervisor.statuses[socket] = MachineStatus.DISK_FULL
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(world.hypervisor, "capture", full)
    with pytest.raises(Unavailable):
        await suspend(world)
    assert await world.hypervisor.status(socket) is MachineStatus.RUNNING


async def test_a_stopped_vm_whose_layer_fails_has_its_disks_as_before(world: World) -> None:
    await world.create()
    before = await world.stop("box")
    world.storage.share_gate.fail = failing()
    with pytest.raises(PreconditionFailed):
        await snapshot(world)
    assert (await world.vms.show("box")).runtime == before.runtime
    await assert_disks_agree(world)


# Forks.


async def test_forks_are_as_many_as_asked_for_and_nobodys(world: World) -> None:
    await world.create(published_ports=())
    made = await fork(world, 6)
    assert [vm.name for vm in made] == [f"box-fork-{number}" for number in range(1, 7)]
    assert all(vm.runtime.state is VmState.RUNNING for vm in made)
    assert not any(vm.spec.ephemeral for vm in made)
    assert {vm.copied_from for vm in made} == {"vm box"}
    assert len({vm.runtime.system_overlay for vm in made}) == 6
    assert snapshot_files(world) == []
    assert await world.snapshots.all() == []
    await assert_disks_agree(world)
    assert [vm.name for vm in await fork(world, 2)] == ["box-fork-7", "box-fork-8"]
    assert [vm.name for vm in await fork(world, 1, "other")] == ["other-1"]


async def test_only_what_runs_is_forked(world: World) -> None:
    await world.create()
    await world.stop("box")
    with pytest.raises(NotRunning) as caught:
        await fork(world)
    assert "--from-snapshot" in caught.value.hint
    with pytest.raises(BadRequest):
        await fork(world, 0)
    with pytest.raises(BadRequest):
        await fork(world, forks.FORKS_MAX + 1)


async def test_one_fork_that_fails_takes_all_of_them_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create()
    whole = world.hypervisor.restore
    count = 0

    async def sixth_fails(*arguments: object) -> int:
        nonlocal count
        count += 1
        if count == 6:
            raise Unavailable("the sixth")
        return await whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(world.hypervisor, "restore", sixth_fails)
    with pytest.raises(Unavailable):
        await fork(world, 8)
    assert [vm.name for vm in await world.store.vms()] == ["box"]
    assert snapshot_files(world) == []
    await assert_disks_agree(world)


# Suspended VMs.


async def test_a_suspended_vm_goes_on_once(world: World) -> None:
    before = await world.create()
    vm = await suspend(world)
    assert vm.runtime.state is VmState.SUSPENDED
    assert await suspend(world) == vm
    assert world.processes.argv == {}
    memory = world.paths.vm(vm.id).memory
    assert memory.is_file()
    assert requests.Shutdown.KIND not in world.agent.opened
    started = await world.start("box")
    assert started.runtime.state is VmState.RUNNING
    machine = world.hypervisor.machines[-1]
    assert machine.memory_file is not None
    assert machine.memory_file.path == memory
    assert _COPIED_TAG not in world.agent.setups[-1]
    assert not memory.exists()
    assert started.runtime.system_overlay == before.runtime.system_overlay


async def test_cold_drops_the_memory_and_boots(world: World) -> None:
    await world.create()
    vm = await suspend(world)
    await world.start("box", cold=True)
    assert world.hypervisor.machines[-1].memory_file is None
    assert not world.paths.vm(vm.id).memory.exists()


@pytest.mark.parametrize(
    "error", [Unavailable("no"), BlockingIOError(errno.EAGAIN, "no process can be made now")]
)
async def test_a_memory_that_did_not_go_on_is_kept(world: World, error: Exception) -> None:
    await world.create()
    vm = await suspend(world)
    world.hypervisor.restore_gate.fail = error
    with pytest.raises(type(error)):
        await world.start("box")
    assert (await world.vms.show("box")).runtime.state is VmState.SUSPENDED
    assert world.paths.vm(vm.id).memory.is_file()
    world.hypervisor.restore_gate.fail = None
    assert (await world.start("box")).runtime.state is VmState.RUNNING


@pytest.mark.parametrize("ran", [False, True])
async def test_a_start_that_failed_with_no_room_to_record_it(
    world: World, monkeypatch: pytest.MonkeyPatch, ran: bool
) -> None:
    await world.create()
    vm = await suspend(world)
    save = world.store.update_vm

    async def full(_: Vm) -> None:
        raise Unavailable("the database is full")

    async def fails(*_: object) -> int:
        monkeypatch.setattr(world.store, "update_vm", full)
        raise MachineLost("gone") if ran else Unavailable("no")

    restore = world.hypervisor.restore
    monkeypatch.setattr(world.hypervisor, "restore", fails)
    with pytest.raises(Unavailable):
        await world.start("box")
    assert not world.paths.vm(vm.id).runtime.exists()
    assert world.paths.vm(vm.id).memory.exists() is not ran
    shown = (await world.vms.show("box")).runtime.state
    assert shown is (VmState.STOPPED if ran else VmState.SUSPENDED)
    monkeypatch.setattr(world.store, "update_vm", save)
    monkeypatch.setattr(world.hypervisor, "restore", restore)
    assert (await world.start("box")).runtime.state is VmState.RUNNING
    assert (world.hypervisor.machines[-1].memory_file is None) is ran


async def test_a_memory_is_kept_when_it_cannot_be_handed_over_and_no_tap_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hypervisor was given the descriptor, which a tap goes with."""
    await world.create()
    vm = await suspend(world)

    def full(_: Vm) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(world.vms, "hand_over_memory", full)
    before = descriptors()
    with pytest.raises(OSError, match="No space"):
        await world.start("box")
    assert descriptors() == before
    assert (await world.vms.show("box")).runtime.state is VmState.SUSPENDED
    assert world.paths.vm(vm.id).memory.is_file()


async def test_a_start_of_a_suspended_vm_cancelled_at_any_moment_keeps_its_memory(
    world: World,
) -> None:
    vm = await world.create()
    await suspend(world)
    memory = world.paths.vm(vm.id).memory
    steps, started = 0, 0
    while started < 3:

        async def work(progress: Progress) -> None:
            await world.lifecycle.start("box", progress)

        starting = begin(world, "vm.start", work)
        for _ in range(steps):
            await asyncio.sleep(0)
        done = await world.operations.cancel(starting.record.id)
        found = await world.vms.show("box")
        if found.runtime.state is VmState.RUNNING:
            started += 1
            assert done.state is OperationState.COMPLETED
            assert world.hypervisor.machines[-1].memory_file is not None
            world.hypervisor.statuses.clear()
            await suspend(world)
        else:
            assert done.state is OperationState.CANCELLED
            assert found.runtime.state is VmState.SUSPENDED
        assert memory.is_file()
        steps = max(steps + 1, steps * 8 // 7)


@pytest.mark.parametrize(("part", "step"), [("hypervisor", "restore"), ("vms", "mark_running")])
async def test_it_is_too_late_to_cancel_what_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, part: str, step: str
) -> None:
    await world.create()
    await suspend(world)
    real, reached, go_on = getattr(getattr(world, part), step), asyncio.Event(), asyncio.Event()

    async def waits(*arguments: object) -> object:
        reached.set()
        await go_on.wait()
        return await real(*arguments)

    monkeypatch.setattr(getattr(world, part), step, waits)

    async def work(progress: Progress) -> None:
        await world.lifecycle.start("box", progress)

    starting = begin(world, "vm.start", work)
    await reached.wait()
    cancelling = asyncio.create_task(world.operations.cancel(starting.record.id))
    await asyncio.sleep(0)
    go_on.set()
    assert (await cancelling).state is OperationState.COMPLETED
    assert (await world.vms.show("box")).runtime.state is VmState.RUNNING
    assert world.hypervisor.machines[-1].memory_file is not None


async def test_what_would_lose_a_memory_says_so_and_kill_does_it(world: World) -> None:
    await world.create()
    vm = await suspend(world)
    with pytest.raises(Conflict, match="is suspended"):
        await world.restart("box")
    with pytest.raises(Conflict, match="is suspended"):
        await world.change("box", vcpu_count=3)
    with pytest.raises(Conflict, match="is suspended"):
        await snapshot(world)
    assert (await world.stop("box")).runtime.state is VmState.SUSPENDED
    assert (await world.change("box", name="other")).name == "other"
    assert (await world.kill("other")).runtime.state is VmState.STOPPED
    assert not world.paths.vm(vm.id).memory.exists()
    with pytest.raises(NotRunning):
        await suspend(world, "other")


async def test_a_suspended_vm_is_not_pruned_and_can_be_deleted(world: World) -> None:
    await world.create()
    await suspend(world)

    async def work(progress: Progress) -> None:
        assert await world.prune.run(0, progress, dry_run=False) == []

    raise_failure(await ended(begin(world, "vm.prune", work)))
    await world.delete("box")
    await world.assert_nothing_left()


# Cut off.


ACTIONS: dict[str, Callable[[World], Awaitable[object]]] = {
    "snapshot": lambda world: snapshot_of(world),
    "fork": lambda world: forked(world),
}


async def snapshot_of(world: World) -> None:
    async def work(progress: Progress) -> None:
        await world.snapshots.take("box", "snap", progress)

    await cancellable(world, work)


async def forked(world: World) -> None:
    async def work(progress: Progress) -> None:
        await world.forks.fork("box", 3, "", progress)

    await cancellable(world, work)


async def cancellable(world: World, work: Work) -> None:
    progress = begin(world, "vm.test", work)
    try:
        done = await ended(progress)
        raise_failure(done)
    except asyncio.CancelledError:
        done = await world.operations.cancel(progress.record.id)
        if done.state is not OperationState.COMPLETED:
            raise


@pytest.mark.parametrize("action", ACTIONS)
async def test_cancelled_at_any_moment_it_is_done_or_never_was(world: World, action: str) -> None:
    await world.create()
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
        await assert_disks_agree(world)
        names = [vm.name for vm in await world.store.vms()]
        snapshots = [each.name for each in await world.snapshots.all()]
        if how is None:
            assert len(names) + len(snapshots) > 1
        else:
            assert (names, snapshots) == (["box"], [])
            assert snapshot_files(world) == []
        for name in names:
            if name != "box":
                await world.delete(name, force=True)
        for name in snapshots:
            await world.snapshots.delete(name)
        steps = max(steps + 1, steps * 8 // 7)
    assert world.vms.locks._locks == {}


async def test_a_suspension_cancelled_at_any_moment_is_done_or_never_was(world: World) -> None:
    vm = await world.create()
    steps, finished = 0, 0
    while finished < 2:

        async def work(progress: Progress) -> None:
            await world.suspension.suspend("box", progress)

        acting = asyncio.ensure_future(cancellable(world, work))
        for _ in range(steps):
            await asyncio.sleep(0)
        finished += acting.done()
        acting.cancel()
        await asyncio.wait_for(asyncio.gather(acting, return_exceptions=True), 20)
        found = await world.vms.show("box")
        alive = world.liveness.vm_alive(found)
        memory = world.paths.vm(vm.id).memory.exists()
        if found.runtime.state is VmState.SUSPENDED:
            assert (memory, world.processes.argv) == (True, {})
            world.hypervisor.statuses.clear()
            await world.start("box")
        else:
            assert (found.runtime.state, alive, memory) == (VmState.RUNNING, True, False)
            assert paused(world) == []
        steps = max(steps + 1, steps * 8 // 7)


# The next daemon.


async def test_the_next_daemon_lets_a_paused_machine_run_on(world: World) -> None:
    vm = await world.create()
    socket = Path(vm.runtime.api_socket)
    following = await world.restarted()
    following.hypervisor.statuses[socket] = MachineStatus.PAUSED
    # The record was changed, and the machine not yet told.
    layer = Path(vm.runtime.system_overlay).with_name("system-0123.qcow2")
    await following.storage.add_layer(Path(vm.runtime.system_overlay), layer)
    runtime = msgspec.structs.replace(vm.runtime, system_overlay=str(layer))
    await following.store.update_vm(msgspec.structs.replace(vm, runtime=runtime))
    following.paths.vm(vm.id).memory.write_bytes(b"half")
    staging = following.paths.snapshots_dir / ".staging-0123"
    staging.mkdir(parents=True)
    (staging / ".unrecorded").touch()
    await following.reconcile()
    assert paused(following) == []
    assert (await following.vms.show("box")).runtime.state is VmState.RUNNING
    assert not following.paths.vm(vm.id).memory.exists()
    assert snapshot_files(following) == []
    await assert_disks_agree(following)
    await following.close()


async def test_the_next_daemon_ends_what_was_suspended_but_for_its_process(world: World) -> None:
    vm = await world.create()
    following = await world.restarted()
    paths = following.paths.vm(vm.id)
    paths.memory.write_bytes(b"memory")
    paths.machine_state.write_bytes(b"state")
    shape = await following.snapshots.shape(vm)
    runtime = msgspec.structs.replace(vm.runtime, state=VmState.SUSPENDED, saved_shape=shape)
    await following.store.update_vm(msgspec.structs.replace(vm, runtime=runtime))
    await following.reconcile()
    assert following.processes.argv == {}
    assert (await following.vms.show("box")).runtime.state is VmState.SUSPENDED
    assert (await following.start("box")).runtime.state is VmState.RUNNING
    await following.close()


async def test_until_all_forks_are_there_each_is_one_that_the_next_daemon_removes(
    world: World,
) -> None:
    await world.create()
    world.hypervisor.restore_gate.block = True
    begin(world, "vm.fork", lambda progress: forks_of(world, progress))
    await world.hypervisor.restore_gate.reached.wait()
    made = [vm for vm in await world.store.vms() if vm.name != "box"]
    assert made
    assert all(vm.spec.ephemeral for vm in made)


async def forks_of(world: World, progress: Progress) -> None:
    await world.forks.fork("box", 2, "", progress)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_daemon_that_dies_as_a_vm_goes_on_keeps_a_memory_that_is_good(
    world: World, handed_over: bool
) -> None:
    await world.create()
    vm = await suspend(world)
    # As after SIGKILL in the middle of its start, with no machine (any more).
    await world.vms.save(vm, state=VmState.STARTING)
    if handed_over:
        world.vms.hand_over_memory(vm)
    following = await world.restarted()
    await following.reconcile()
    now = await following.vms.show("box")
    assert now.runtime.state is (VmState.STOPPED if handed_over else VmState.SUSPENDED)
    assert world.paths.vm(vm.id).memory.exists() is not handed_over
    assert (await following.start("box")).runtime.state is VmState.RUNNING
    left = {each.name for each in world.paths.vm(vm.id).directory.iterdir()}
    assert not left & {"memory", "machine-state", "memory-handed-over"}
    await following.close()


async def test_a_machine_that_ran_and_was_lost_loses_its_memory(world: World) -> None:
    await world.create()
    vm = await suspend(world)
    world.hypervisor.restore_gate.fail = MachineLost("it has ended")
    with pytest.raises(MachineLost):
        await world.start("box")
    assert (await world.vms.show("box")).runtime.state is VmState.STOPPED
    assert not world.paths.vm(vm.id).memory.exists()


async def test_two_forks_at_once_have_names_of_their_own(world: World) -> None:
    await world.create()
    first, second = await asyncio.gather(fork(world, 3), fork(world, 3))
    names = {vm.name for vm in (*first, *second)}
    assert names == {f"box-fork-{number}" for number in range(1, 7)}
    assert world.forks._reserved == set()


async def test_a_memory_needs_room_for_all_of_it(world: World) -> None:
    await world.create(memory_mib=10 << 20)
    with pytest.raises(PreconditionFailed, match="are needed"):
        await snapshot(world)
    with pytest.raises(PreconditionFailed, match="are needed"):
        await suspend(world)
    assert (await world.vms.show("box")).runtime.state is VmState.RUNNING
    assert snapshot_files(world) == []


async def test_a_snapshot_whose_deletion_was_cut_off_is_gone_at_the_next_start(
    world: World,
) -> None:
    await world.create()
    taken = await snapshot(world)
    directory = Path(taken.directory)
    directory.rename(directory.with_name(f".deleting-{directory.name}"))
    following = await world.restarted()
    await following.reconcile()
    assert await following.snapshots.all() == []
    assert snapshot_files(following) == []
    await following.close()
