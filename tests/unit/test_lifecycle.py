"""The life of a VM: started, stopped, restarted, killed, changed, and cut off at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from banger.base.errors import (
    BadRequest,
    BangerError,
    Conflict,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from banger.base.model import InitMode, NetworkMode, Vm, VmState
from banger.guest import requests
from banger.services import lifecycle as module
from fakes import failed_check, failing
from records import a_vm
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def stopped(world: World, name: str = "box", **fields: object) -> Vm:
    """A VM that was made, ran and was stopped."""
    await world.create(name, **fields)
    return await world.stop(name)


async def recorded(world: World) -> Vm:
    (vm,) = await world.store.vms()
    return vm


async def assert_settled(world: World) -> None:
    """The one record agrees with what runs, and nothing is held."""
    await world.vms.close()
    vm = await recorded(world)
    machines = [argv for argv in world.processes.argv.values() if argv[0] == "machine"]
    if vm.runtime.state is VmState.RUNNING:
        assert world.liveness.vm_alive(vm)
        assert len(machines) == 1
    else:
        assert vm.runtime.state in (VmState.STOPPED, VmState.ERROR)
        assert world.processes.argv == {}
        assert not Path(vm.runtime.api_socket).parent.exists()
        assert not world.paths.vm(vm.id).handles.exists()
    assert world.vms.locks._locks == {}


# Start.


async def test_a_stopped_vm_starts_from_its_own_disks(world: World) -> None:
    vm = await stopped(world)
    Path(vm.runtime.work_disk).write_text("what the guest wrote 8192")
    started = await world.start("box")
    assert started.runtime.state is VmState.RUNNING
    assert started.runtime.last_error == ""
    assert started.started_at is not None
    assert started.started_at > (vm.started_at or started.started_at)
    assert Path(vm.runtime.work_disk).read_text() == "what the guest wrote 8192"
    assert await world.vms.all() == [started]
    await assert_settled(world)


async def test_each_boot_has_the_same_machine_id_and_another_vm_has_another(world: World) -> None:
    await world.create("box")
    await world.restart("box")
    await world.create("other")
    one, again, other = world.agent.setups
    assert one[2] == again[2] != other[2]
    assert len(one[2]) == 32
    assert (one[1], other[1]) == (b"box", b"other")
    assert one[7] != again[7]  # entropy never comes twice


async def test_a_vm_that_runs_is_not_started_again(world: World) -> None:
    vm = await world.create()
    assert await world.start("box") == vm
    assert len(world.hypervisor.machines) == 1


async def test_many_starts_at_once_are_one(world: World) -> None:
    await stopped(world)
    await asyncio.gather(*(world.start("box") for _ in range(5)))
    assert len(world.hypervisor.machines) == 2
    await assert_settled(world)


async def test_a_vm_whose_end_nobody_has_noticed_yet_starts(world: World) -> None:
    vm = await world.create()
    world.liveness.unwatch(vm.id)
    world.processes.end(world.liveness.pid(vm))
    assert (await world.start("box")).runtime.state is VmState.RUNNING
    await assert_settled(world)


async def test_all_that_a_start_lacks_is_told_at_once_and_nothing_changes(world: World) -> None:
    vm = await stopped(world)
    world.hypervisor.found = [failed_check("qemu", "install qemu")]
    Path(vm.runtime.work_disk).unlink()
    with pytest.raises(PreconditionFailed) as caught:
        await world.start("box")
    assert "qemu is missing" in caught.value.message
    assert f'work disk of vm "box": {vm.runtime.work_disk} is missing' in caught.value.message
    assert await recorded(world) == vm


async def test_a_vm_without_its_image_says_so(world: World) -> None:
    vm = await stopped(world)
    await world.store.delete_image(vm.image_id)
    with pytest.raises(PreconditionFailed, match='image "base" of vm "box" is gone'):
        await world.start("box")


@pytest.mark.parametrize("stage", ["network", "launch", "grow"])
async def test_a_start_that_fails_leaves_a_stopped_vm_with_the_reason(
    world: World, stage: str
) -> None:
    await stopped(world)
    gates = {
        "network": world.network.gate,
        "launch": world.hypervisor.gate,
        "grow": world.storage.grow_gate,
    }
    gates[stage].fail = failing("broken")
    with pytest.raises(PreconditionFailed, match="broken"):
        await world.start("box")
    vm = await recorded(world)
    assert vm.runtime.state is VmState.STOPPED
    assert vm.runtime.last_error == "it could not start: broken"
    await assert_settled(world)
    gates[stage].fail = None
    await world.start("box")
    await assert_settled(world)


async def test_a_guest_that_does_not_come_up_is_kept_and_can_be_started_again(
    world: World,
) -> None:
    world.hypervisor.console = b"reboot: Power down\n"
    await stopped(world)
    await world.start("box")
    await world.stop("box")
    world.hypervisor.console = b"no clock here\n"
    world.agent.exits[requests.Setup.KIND] = b"\x02\0\0\0\x0dno clock"
    with pytest.raises(
        BangerError, match='the guest of vm "box" did not come up: no clock'
    ) as caught:
        await world.start("box")
    assert "no clock here" in caught.value.message
    assert "Power down" not in caught.value.message  # of the machine's earlier runs
    assert (await recorded(world)).runtime.state is VmState.ERROR
    await assert_settled(world)
    del world.agent.exits[requests.Setup.KIND]
    await world.start("box")
    await assert_settled(world)


async def test_while_it_starts_the_record_says_so(world: World) -> None:
    await stopped(world)
    world.hypervisor.gate.block = True
    world.hypervisor.gate.reached.clear()
    starting = asyncio.create_task(world.start("box"))
    await asyncio.wait_for(world.hypervisor.gate.reached.wait(), 10)
    assert (await recorded(world)).runtime.state is VmState.STARTING
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    vm = await recorded(world)
    assert (vm.runtime.state, vm.runtime.last_error) == (
        VmState.STOPPED,
        "its start was cancelled",
    )
    await assert_settled(world)


Verb = Callable[[World], Awaitable[Vm]]

VERBS: dict[str, tuple[bool, Verb]] = {
    "start": (False, lambda world: world.start("box")),
    "stop": (True, lambda world: world.stop("box")),
    "restart": (True, lambda world: world.restart("box")),
    "kill": (True, lambda world: world.kill("box")),
    "set": (False, lambda world: world.change("box", disk_size_mib=9999, vcpu_count=4)),
    "rename": (True, lambda world: world.change("box", name="box-2")),
}


@pytest.mark.parametrize("verb", VERBS)
async def test_cancelled_at_any_moment_the_record_says_the_truth(world: World, verb: str) -> None:
    """From no step of the event loop to more than the verb takes."""
    runs, act = VERBS[verb]
    await world.create()
    steps, finished = 0, 0
    while finished < 2:
        await (world.start("box") if runs else world.stop("box"))
        acting = asyncio.ensure_future(act(world))
        for _ in range(steps):
            await asyncio.sleep(0)
        finished += acting.done()
        acting.cancel()
        await asyncio.wait_for(asyncio.gather(acting, return_exceptions=True), 20)
        await world.vms.close()
        await assert_settled(world)
        steps = max(steps + 1, steps * 8 // 7)
    await world.delete("box", force=True)
    await world.assert_nothing_left()


async def test_a_deletion_cancelled_at_any_moment_is_done_or_can_be_done_again(
    world: World,
) -> None:
    steps, finished = 0, 0
    while finished < 2:
        await world.create()
        acting = asyncio.ensure_future(world.delete("box", force=True))
        for _ in range(steps):
            await asyncio.sleep(0)
        finished += acting.done()
        acting.cancel()
        await asyncio.wait_for(asyncio.gather(acting, return_exceptions=True), 20)
        await world.vms.close()
        if await world.store.vms():
            await assert_settled(world)
            await world.delete("box", force=True)
        await world.assert_nothing_left()
        steps = max(steps + 1, steps * 8 // 7)


# Stop, restart, kill.


async def test_the_button_is_pressed_where_systemd_hears_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(module, "BUTTON_TIMEOUT_S", 5)
    await world.create("box", init=InitMode.SYSTEMD)
    world.agent.on_shutdown = lambda: None
    world.hypervisor.hears_button = True
    await world.stop("box")
    assert world.hypervisor.buttons == 1
    assert not world.processes.killed
    await assert_settled(world)


async def test_a_guest_that_hears_nothing_is_killed_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.02)
    monkeypatch.setattr(module, "BUTTON_TIMEOUT_S", 0.02)
    vm = await world.create("box", init=InitMode.SYSTEMD)
    world.agent.on_shutdown = lambda: None
    world.hypervisor.can_quit = False
    pid = world.liveness.pid(vm)
    await world.stop("box")
    assert pid in world.processes.killed
    await assert_settled(world)


async def test_a_restart_has_the_same_disks_and_another_process(world: World) -> None:
    vm = await world.create()
    before = world.liveness.pid(vm)
    after = await world.restart("box")
    assert after.runtime.state is VmState.RUNNING
    assert world.liveness.pid(after) != before
    assert requests.Shutdown.KIND in world.agent.opened
    await assert_settled(world)
    await world.stop("box")
    assert (await world.restart("box")).runtime.state is VmState.RUNNING


async def test_a_vm_that_could_not_start_again_is_not_stopped(world: World) -> None:
    vm = await world.create()
    world.hypervisor.found = [failed_check("qemu")]
    with pytest.raises(PreconditionFailed, match="qemu is missing"):
        await world.restart("box")
    assert world.liveness.vm_alive(vm)
    assert requests.Shutdown.KIND not in world.agent.opened


async def test_a_killed_vm_was_not_asked(world: World) -> None:
    await world.create()
    killed = await world.kill("box")
    assert (killed.runtime.state, killed.runtime.last_error) == (VmState.STOPPED, "killed")
    assert requests.Shutdown.KIND not in world.agent.opened
    await assert_settled(world)
    assert await world.kill("box") == killed


async def test_a_kill_ends_a_stop_that_hangs(world: World) -> None:
    await world.create()
    world.agent.on_shutdown = lambda: None
    stopping = asyncio.create_task(world.stop("box"))
    while requests.Shutdown.KIND not in world.agent.opened:
        await asyncio.sleep(0.001)
    async with asyncio.timeout(5):
        await world.kill("box")
        await stopping
    await assert_settled(world)


async def test_a_kill_ends_a_start_whose_guest_does_not_come_up(world: World) -> None:
    await stopped(world)
    world.agent.silent = True
    starting = asyncio.create_task(world.start("box"))
    while (await recorded(world)).runtime.state is not VmState.STARTING or not world.processes.argv:
        await asyncio.sleep(0.001)
    async with asyncio.timeout(10):
        await world.kill("box")
        with pytest.raises(BangerError, match="the machine ended while it booted"):
            await starting
    await assert_settled(world)


async def test_a_kill_before_there_is_a_machine_ends_the_start_and_no_later_one(
    world: World,
) -> None:
    await stopped(world)
    going = asyncio.Event()

    async def held(self: object = None) -> None:
        await going.wait()

    world.network.gate.passed = held  # type: ignore[method-assign]
    starting = asyncio.create_task(world.start("box"))
    while (await recorded(world)).runtime.state is not VmState.STARTING:
        await asyncio.sleep(0.001)
    killing = asyncio.create_task(world.kill("box"))
    await asyncio.sleep(0.01)
    going.set()
    async with asyncio.timeout(10):
        assert (await killing).runtime.state is VmState.STOPPED
        with pytest.raises(BangerError, match='vm "box" does not start: killed'):
            await starting
    assert len(world.hypervisor.machines) == 1  # the one of before
    await assert_settled(world)
    await world.start("box")
    await assert_settled(world)


async def test_a_machine_that_cannot_be_killed_stays_watched(world: World) -> None:
    vm = await world.create()
    world.hypervisor.can_quit = False
    world.processes.immortal.add(world.liveness.pid(vm))
    with pytest.raises(BangerError, match="cannot be killed"):
        await world.kill("box")
    assert vm.id in world.liveness._watches
    world.processes.immortal.clear()
    await world.kill("box")
    await assert_settled(world)


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "set", "rename"])
async def test_nothing_is_done_to_a_vm_that_is_being_created(world: World, verb: str) -> None:
    vm = a_vm("box", state=VmState.CREATING)
    await world.store.insert_vm(vm)
    async with world.vms.locks.hold(vm.id):
        with pytest.raises(Conflict, match='vm "box" is still being created'):
            await VERBS[verb][1](world)


# Change.


async def test_a_changed_vm_has_its_new_shape_at_its_next_start(world: World) -> None:
    await stopped(world)
    changed = await world.change(
        "box",
        vcpu_count=3,
        memory_mib=333,
        disk_size_mib=10000,
        network=NetworkMode.NONE,
        init=InitMode.SYSTEMD,
    )
    assert await recorded(world) == changed
    assert Path(changed.runtime.work_disk).read_text().endswith(" 10000")
    await world.start("box")
    machine = world.hypervisor.machines[-1]
    assert (machine.vcpu_count, machine.memory_mib) == (3, 333)
    assert "banger.init=systemd" in machine.kernel_parameters
    assert [argv[0] for argv in world.processes.argv.values()] == ["machine"]


async def test_a_running_vm_keeps_its_shape_but_may_be_renamed(world: World) -> None:
    vm = await world.create()
    with pytest.raises(Conflict, match='vm "box" is running') as caught:
        await world.change("box", memory_mib=512)
    assert caught.value.hint == "first: banger vm stop box"
    assert await recorded(world) == vm
    renamed = await world.change("box", name="crate")
    assert world.agent.setups[-1][1] == b"crate"
    assert 2 not in world.agent.setups[-1]  # its machine-id stays
    assert (await world.vms.show("crate")).id == renamed.id == vm.id
    with pytest.raises(NotFound):
        await world.vms.show("box")


async def test_a_name_that_is_taken_stays_taken(world: World) -> None:
    await stopped(world)
    await stopped(world, "other")
    with pytest.raises(Conflict, match='vm "other" already exists'):
        await world.change("box", name="other")
    assert {vm.name for vm in await world.vms.all()} == {"box", "other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vcpu_count": 0}, "0 vCPUs are not possible"),
        ({"memory_mib": 1}, "1 MiB of memory is not possible"),
        ({"disk_size_mib": 1}, "cannot shrink from 8192 MiB to 1 MiB"),
        ({"name": "Bad"}, "is not a valid VM name"),
        ({"init": InitMode.AUTO}, "auto is for new machines"),
    ],
)
async def test_what_is_not_possible_is_refused(
    world: World, change: dict[str, object], message: str
) -> None:
    vm = await stopped(world)
    with pytest.raises(BadRequest, match=message):
        await world.change("box", **change)
    assert await recorded(world) == vm


async def test_more_vcpus_than_the_hypervisor_takes_are_refused(world: World) -> None:
    vm = await stopped(world, vcpu_count=40)
    world.hypervisor.limit_vcpus(32)
    with pytest.raises(BadRequest) as caught:
        await world.change("box", vcpu_count=33)
    assert caught.value.message == "33 vCPUs are not possible with fake (1 to 32)"
    assert caught.value.hint == "give it fewer"
    assert await recorded(world) == vm
    # What it had before is no reason to refuse another change.
    assert (await world.change("box", memory_mib=512)).spec.vcpu_count == 40
    assert (await world.change("box", vcpu_count=32)).spec.vcpu_count == 32


@pytest.mark.parametrize("verb", [World.start, World.restart])
async def test_a_vm_with_more_vcpus_than_the_hypervisor_takes_does_not_start(
    world: World, verb: Callable[[World, str], Awaitable[Vm]]
) -> None:
    vm = await stopped(world, vcpu_count=40)
    world.hypervisor.limit_vcpus(32)
    world.hypervisor.found = [failed_check("kvm", "have KVM")]
    with pytest.raises(PreconditionFailed) as caught:
        await verb(world, "box")
    for part in ("kvm is missing", "vCPUs: 40 vCPUs are not possible with fake (1 to 32)"):
        assert part in caught.value.message
    for part in ("have KVM", "give it fewer: banger vm set box --vcpu 32"):
        assert part in caught.value.hint
    assert await recorded(world) == vm
    await assert_settled(world)


async def test_a_disk_that_cannot_grow_leaves_the_record_as_it_was(world: World) -> None:
    vm = await stopped(world)
    world.storage.grow_gate.fail = failing("no room")
    with pytest.raises(PreconditionFailed, match="no room"):
        await world.change("box", disk_size_mib=20000, memory_mib=4096)
    assert (await recorded(world)).spec == vm.spec


async def test_a_guest_that_does_not_take_its_new_name_keeps_the_old_one(world: World) -> None:
    await world.create()
    world.agent.exits[requests.Setup.KIND] = b"\x02\0\0\0\x0dno"
    with pytest.raises(BangerError):
        await world.change("box", name="crate")
    assert (await recorded(world)).name == "box"


async def test_a_disk_that_a_dead_daemon_did_not_grow_is_grown_by_the_start(world: World) -> None:
    vm = await stopped(world)
    await world.change("box", disk_size_mib=9000)
    disk = Path(vm.runtime.work_disk)
    disk.write_text("seed 8192")  # the record came first
    await world.start("box")
    assert disk.read_text() == "seed 9000"


async def test_no_change_writes_nothing(world: World) -> None:
    vm = await stopped(world)
    assert await world.change("box", vcpu_count=vm.spec.vcpu_count) == vm
    assert await recorded(world) == vm


# Use.


async def test_a_session_is_use_at_its_beginning_and_at_its_end(world: World) -> None:
    vm = await world.create()
    async with world.vms.in_use(vm):
        begun = (await recorded(world)).touched_at
        assert world.vms.has_sessions(vm.id)
        await asyncio.sleep(0.001)
    ended = (await recorded(world)).touched_at
    assert vm.touched_at is not None
    assert begun is not None
    assert ended is not None
    assert vm.touched_at < begun < ended
    assert not world.vms.has_sessions(vm.id)


async def test_a_touch_is_not_lost_to_whoever_replaces_the_record(world: World) -> None:
    vm = await stopped(world)
    world.storage.grow_gate.block = True
    changing = asyncio.create_task(world.change("box", disk_size_mib=9000))
    await asyncio.wait_for(world.storage.grow_gate.reached.wait(), 10)
    moment = await world.vms.touch(vm.id)
    world.storage.grow_gate.fail = Unavailable("no")
    world.storage.grow_gate.block = False
    changing.cancel()
    await asyncio.gather(changing, return_exceptions=True)
    assert (await recorded(world)).touched_at == moment


async def test_a_machine_starts_where_this_daemon_has_its_sockets(world: World) -> None:
    """They were elsewhere last time: with another XDG_RUNTIME_DIR, or before an installation."""
    vm = await stopped(world)
    runtime = msgspec.structs.replace(
        vm.runtime, api_socket="/elsewhere/control.sock", agent_socket="/elsewhere/agent.sock"
    )
    await world.vms.save(msgspec.structs.replace(vm, runtime=runtime))
    started = await world.start("box")
    paths = world.paths.vm(vm.id)
    sockets = (started.runtime.api_socket, started.runtime.agent_socket)
    assert sockets == (str(paths.control_socket), str(paths.agent_socket))
    assert started.runtime.state is VmState.RUNNING
