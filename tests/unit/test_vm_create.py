"""Making a VM: it succeeds, or whatever fails or is cancelled leaves nothing, or the guest is
kept to be looked into."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import (
    BadRequest,
    BangerError,
    Cancelled,
    Conflict,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from banger.base.model import InitMode, NetworkMode, Operation, OperationState, VmState
from banger.drivers.base import MachineStatus
from banger.guest import requests
from banger.services import vm_create
from banger.services.guest_wait import console_tail
from banger.services.operations import raise_failure
from banger.services.vm_spec import CreateRequest
from fakes import Gate, failed_check, failing
from world import World, ended, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


REQUEST = CreateRequest(name="box", image="base")


async def create(world: World, request: CreateRequest = REQUEST) -> Operation:
    return await ended(world.begin(request))


def failure(operation: Operation) -> BangerError:
    with pytest.raises(BangerError) as caught:
        raise_failure(operation)
    return caught.value


async def test_a_work_disk_smaller_than_the_images_seed_is_refused(world: World) -> None:
    """It would be as large as the seed, whatever the record says."""
    os.truncate((await world.images.get("base")).work_seed_path, (99 << 20) + 1)
    operation = await create(world, CreateRequest(image="base", disk_size_mib=99))
    assert "work disk: 99 MiB is less than the 100 MiB" in failure(operation).message
    assert "at least 100M" in failure(operation).hint
    assert await world.vms.all() == []
    operation = await create(world, CreateRequest(image="base", disk_size_mib=100))
    assert operation.state is OperationState.COMPLETED


async def test_a_vm_that_was_made_runs_and_has_its_identity(world: World) -> None:
    vm = await world.create("box", vcpu_count=3, memory_mib=256, disk_size_mib=99)
    assert vm.runtime.state is VmState.RUNNING
    assert vm.runtime.guest_ip == "172.16.0.2"
    assert vm.started_at is not None
    assert (vm.spec.vcpu_count, vm.spec.memory_mib, vm.spec.disk_size_mib) == (3, 256, 99)
    assert vm.spec.init is InitMode.MINIMAL  # what the image says
    assert world.liveness.vm_alive(vm)
    assert await world.vms.all() == [vm]
    assert world.agent.opened == [requests.Setup.KIND]
    (machine,) = world.hypervisor.machines
    assert machine.kernel_parameters == ("banger.init=minimal",)
    assert [(disk.name, disk.read_only) for disk in machine.disks] == [
        ("system", False),
        ("work", False),
        ("modules", True),
    ]
    assert Path(vm.runtime.work_disk).read_text().endswith(" 99")
    handles = world.handles.get(vm.id)
    assert world.processes.alive(handles.pid)
    assert all(world.processes.alive(each.pid) for each in handles.network)


async def test_what_the_request_does_not_say_is_the_configurations(world: World) -> None:
    vm = (await create(world, CreateRequest(image="base"))).vm
    assert vm is not None
    assert (vm.spec.vcpu_count, vm.spec.memory_mib, vm.spec.disk_size_mib) == (2, 2048, 8192)
    assert vm.name.count("-") == 1


async def test_a_vm_without_a_network_has_none(world: World) -> None:
    vm = await world.create(network=NetworkMode.NONE)
    assert vm.runtime.guest_ip == ""
    assert world.handles.get(vm.id).network == ()
    assert [argv[0] for argv in world.processes.argv.values()] == ["machine"]


async def test_the_stages_are_told_in_order(world: World) -> None:
    stages: list[str] = []
    async for state in world.begin(REQUEST).changes():
        if state.stage and state.stage not in stages:
            stages.append(state.stage)
    assert stages == ["preflight", "disks", "prepare", "launch", "boot", "setup"]


@pytest.mark.parametrize(
    "request_",
    [
        CreateRequest(name="Bad"),
        CreateRequest(vcpu_count=0),
        CreateRequest(vcpu_count=65),
        CreateRequest(memory_mib=127),
        CreateRequest(memory_mib=-1),
        CreateRequest(memory_mib=(16 << 20) + 1),
        CreateRequest(disk_size_mib=0),
        CreateRequest(disk_size_mib=(16 << 20) + 1),
        CreateRequest(boot_timeout_s=0),
        CreateRequest(boot_timeout_s=1e9),
        CreateRequest(boot_timeout_s=float("nan")),
        CreateRequest(image="../x"),
    ],
)
async def test_an_impossible_request_leaves_nothing(world: World, request_: CreateRequest) -> None:
    assert isinstance(failure(await create(world, request_)), BadRequest)
    await world.assert_nothing_left()


async def test_more_vcpus_than_the_hypervisor_takes_are_refused_before_anything_else(
    world: World,
) -> None:
    """An image that is missing might be built for it."""
    world.hypervisor.limit_vcpus(32)
    request = CreateRequest(image="none", vcpu_count=33)
    error = failure(await create(world, request))
    assert isinstance(error, BadRequest)
    assert error.message == "33 vCPUs are not possible with fake (1 to 32)"
    assert error.hint == "give it fewer, by --vcpu or vm_defaults.vcpu"
    with pytest.raises(BadRequest, match="33 vCPUs are not possible with fake"):
        world.creator.check(request)
    await world.assert_nothing_left()
    assert (await world.create(vcpu_count=32)).spec.vcpu_count == 32


async def test_vcpus_of_new_vms_that_the_hypervisor_does_not_take_are_told_of(
    world: World,
) -> None:
    world.hypervisor.limit_vcpus(1)
    error = failure(await create(world))
    assert isinstance(error, BadRequest)
    assert "vm_defaults.vcpu" in error.hint
    # What a snapshot has is not looked at yet.
    world.creator.check(CreateRequest(name="copy", from_snapshot="snap"))


async def test_an_unknown_image_is_not_found(world: World) -> None:
    error = failure(await create(world, CreateRequest(image="none")))
    assert isinstance(error, NotFound)
    assert error.message == 'image "none" not found'
    await world.assert_nothing_left()


async def test_all_that_is_missing_is_told_at_once_and_nothing_is_made(world: World) -> None:
    world.hypervisor.found = [failed_check("qemu", "install qemu")]
    world.network.found = [failed_check("passt", "install passt")]
    image = await world.images.get("base")
    Path(image.rootfs_path).write_bytes(b"")
    error = failure(await create(world))
    assert isinstance(error, PreconditionFailed)
    for part in ("qemu is missing", "passt is missing", "not an ext4"):
        assert part in error.message
    for part in ("install qemu", "install passt"):
        assert part in error.hint
    await world.assert_nothing_left()


async def test_a_name_that_is_taken_is_a_conflict_and_the_first_one_lives(world: World) -> None:
    vm = await world.create("box")
    error = failure(await create(world))
    assert isinstance(error, Conflict)
    assert error.message == 'vm "box" already exists'
    assert await world.vms.all() == [vm]
    assert world.liveness.vm_alive(vm)


async def test_many_at_once_all_get_a_name_and_run(world: World) -> None:
    done = await asyncio.gather(*(create(world, CreateRequest(image="base")) for _ in range(10)))
    vms = [operation.vm for operation in done if operation.vm is not None]
    assert len({vm.name for vm in vms}) == 10
    assert all(world.liveness.vm_alive(vm) for vm in vms)


async def test_a_name_that_another_drew_at_the_same_time_is_drawn_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["calm-owl", "calm-owl", "calm-owl", "bold-fox"])
    monkeypatch.setattr(vm_create, "generate_name", lambda _: next(names))
    done = [await create(world, CreateRequest(image="base")) for _ in range(2)]
    assert [operation.vm.name for operation in done if operation.vm] == ["calm-owl", "bold-fox"]


def gates(world: World) -> dict[str, Gate]:
    return {
        "system disk": world.storage.gate,
        "work disk": world.storage.work_gate,
        "network": world.network.gate,
        "launch": world.hypervisor.gate,
    }


@pytest.mark.parametrize("stage", ["system disk", "work disk", "network", "launch"])
async def test_a_failure_before_the_guest_runs_leaves_nothing(world: World, stage: str) -> None:
    gates(world)[stage].fail = failing("broken")
    error = failure(await create(world))
    assert error.message == "broken"
    await world.assert_nothing_left()
    gates(world)[stage].fail = None
    assert (await create(world)).error is None


async def test_a_disk_that_fails_waits_for_the_other_before_all_is_removed(world: World) -> None:
    """Else the other one would write into a directory that is being removed."""
    order: list[str] = []

    async def slow(self: Gate = world.storage.work_gate) -> None:
        await asyncio.sleep(0.05)
        order.append("work disk made")

    world.storage.gate.fail = failing()
    world.storage.work_gate.passed = slow  # type: ignore[method-assign]
    await create(world)
    order.append("over")
    assert order == ["work disk made", "over"]
    await world.assert_nothing_left()


async def test_a_crash_is_internal_and_leaves_nothing(world: World) -> None:
    world.storage.gate.fail = ZeroDivisionError("x")
    error = failure(await create(world))
    assert error.code == "internal"
    assert error.message == "internal error: ZeroDivisionError"
    await world.assert_nothing_left()


async def cancel(world: World, op_id: str) -> None:
    state = await asyncio.wait_for(world.operations.cancel(op_id), 20)
    assert state.state is OperationState.CANCELLED
    assert isinstance(failure(state), Cancelled)


@pytest.mark.parametrize("stage", ["system disk", "work disk", "network", "launch"])
async def test_cancelled_before_the_guest_runs_it_leaves_nothing(world: World, stage: str) -> None:
    gate = gates(world)[stage]
    gate.block = True
    progress = world.begin(REQUEST)
    await asyncio.wait_for(gate.reached.wait(), 10)
    await cancel(world, progress.record.id)
    await world.assert_nothing_left()


@pytest.mark.parametrize("stage", ["preflight", "disks", "launch", "boot", "setup"])
async def test_cancelled_at_any_stage_it_leaves_nothing(world: World, stage: str) -> None:
    if stage == "boot":
        world.agent.silent = True
    if stage == "setup":
        world.agent.exits[requests.Setup.KIND] = None
    progress = world.begin(REQUEST)
    async for state in progress.changes():
        if state.stage == stage:
            break
    await cancel(world, progress.record.id)
    await world.assert_nothing_left()


async def test_cancelled_at_any_moment_it_leaves_nothing_or_a_vm_that_runs(world: World) -> None:
    """From no step of the event loop to more than a creation takes."""
    steps, completed = 0, 0
    while completed < 2:
        progress = world.begin(REQUEST)
        for _ in range(steps):
            await asyncio.sleep(0)
        state = await asyncio.wait_for(world.operations.cancel(progress.record.id), 20)
        if state.state is OperationState.COMPLETED:
            completed += 1
            assert state.vm is not None
            assert world.liveness.vm_alive(state.vm)
            await world.delete("box", force=True)
        else:
            assert state.state is OperationState.CANCELLED
        await world.assert_nothing_left()
        steps = max(steps + 1, steps * 8 // 7)


async def test_two_cancels_at_once_both_wait_for_the_clean_up(world: World) -> None:
    world.agent.silent = True
    world.hypervisor.can_quit = False
    progress = world.begin(REQUEST)
    async for state in progress.changes():
        if state.stage == "boot":
            break
    await asyncio.gather(*(cancel(world, progress.record.id) for _ in range(3)))
    await world.assert_nothing_left()


async def test_a_guest_that_never_answers_is_kept_with_the_end_of_its_console(
    world: World,
) -> None:
    world.agent.silent = True
    world.hypervisor.console = b"line\n" * 50 + b"Kernel panic \x1b[31m- not syncing\r\n"
    error = failure(await create(world, CreateRequest(name="box", image="base", boot_timeout_s=1)))
    assert error.code == "timeout"
    assert 'the guest of vm "box" did not come up: no answer within 1 s' in error.message
    assert "Kernel panic ?[31m- not syncing" in error.message
    assert "\x1b" not in error.message
    (vm,) = await world.vms.all()
    assert error.message.endswith(f"; inspect {vm.runtime.log_path}")
    assert "banger vm logs box" in error.hint
    assert vm.runtime.state is VmState.ERROR
    assert "no answer within 1 s" in vm.runtime.last_error
    assert Path(vm.runtime.log_path).exists()
    assert not world.processes.argv  # a guest that is lost does not run on
    await world.delete("box")
    await world.assert_nothing_left()


async def test_a_guest_that_is_held_by_a_full_disk_while_it_boots_is_told_as_that(
    world: World,
) -> None:
    world.agent.silent = True
    progress = world.begin(CreateRequest(name="box", image="base", boot_timeout_s=1))
    async for state in progress.changes():
        if state.stage == "boot" and state.vm is not None:
            world.hypervisor.statuses[Path(state.vm.runtime.api_socket)] = MachineStatus.DISK_FULL
    message = failure(progress.record).message
    assert "no answer within 1 s: its machine is held, for the host's disk is full" in message


async def test_a_machine_that_ends_while_it_boots_ends_the_wait(world: World) -> None:
    world.agent.silent = True
    world.hypervisor.boots = False
    error = failure(await create(world))
    assert isinstance(error, Unavailable)
    assert "the machine ended while it booted" in error.message
    assert (await world.vms.show("box")).runtime.state is VmState.ERROR


async def test_a_guest_that_refuses_its_identity_is_kept(world: World) -> None:
    world.agent.exits[requests.Setup.KIND] = b"\x02\0\0\0\x0dno clock"
    error = failure(await create(world))
    assert "no clock" in error.message
    assert (await world.vms.show("box")).runtime.state is VmState.ERROR
    assert not world.processes.argv


async def test_an_image_is_not_deleted_under_a_vm_that_is_being_made(world: World) -> None:
    world.storage.gate.block = True
    progress = world.begin(REQUEST)
    await asyncio.wait_for(world.storage.gate.reached.wait(), 10)
    with pytest.raises(Conflict, match='image "base" is used by box'):
        await world.images.delete("base")
    await cancel(world, progress.record.id)
    await world.images.delete("base")


async def test_a_path_too_long_for_its_sockets_is_told_before_anything_is_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(path: Path) -> None:
        raise failing(f"socket path {path} is longer")

    monkeypatch.setattr(vm_create, "check_socket_path", too_long)
    assert "socket path" in failure(await create(world)).message
    await world.assert_nothing_left()


@pytest.mark.parametrize(
    ("content", "tail"),
    [
        (b"", ""),
        (b"one\ntwo\n", "one\ntwo"),
        (b"\x1b]0;title\x07\x9b31m\xc2\x9bred \xff\n", "?]0;title?\ufffd31m?red \ufffd"),
        (b"a\rb\r\n", "a\nb"),
        (b"\n".join(b"%d" % n for n in range(100)), "\n".join(map(str, range(92, 100)))),
    ],
)
def test_the_tail_of_a_console_is_its_last_lines_without_control_characters(
    tmp_path: Path, content: bytes, tail: str
) -> None:
    (tmp_path / "console.log").write_bytes(content)
    assert console_tail(tmp_path / "console.log", 0) == tail


@pytest.mark.parametrize(
    ("begin", "tail"), [(0, "old\nnew"), (4, "new"), (7, ""), (99, "old\nnew")]
)
def test_the_tail_of_a_console_begins_with_this_start(
    tmp_path: Path, begin: int, tail: str
) -> None:
    """And with the log when that was cut meanwhile."""
    (tmp_path / "console.log").write_bytes(b"old\nnew")
    assert console_tail(tmp_path / "console.log", begin) == tail


def test_a_console_of_one_endless_line_has_a_short_tail(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_bytes(b"x" * (1 << 20))
    assert len(console_tail(tmp_path / "console.log", 0)) <= 8192
    assert console_tail(tmp_path / "none", 0) == ""
