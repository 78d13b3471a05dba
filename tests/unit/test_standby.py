"""Standbys: ready when they are wanted, somebody's only once, and never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from banger.base.errors import Unavailable
from banger.base.model import OperationState, VmState
from banger.drivers.base import MachineStatus
from banger.guest import requests
from banger.services import standby
from banger.services.standby import MARKER
from banger.services.vm_spec import CreateRequest
from world import World, ended, made_world

_HOSTNAME, _MACHINE_ID, _ENTROPY = 1, 2, 7


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "_DELAY_S", 0.0)


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch, template_limit=4, standby_limit=1) as made:
        yield made


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def ready(world: World) -> str:
    """The id of the one machine that waits, once it does."""
    await until(lambda: world.standbys.count)
    (waiting,) = world.standbys._waiting
    return waiting.vm.id


def status(world: World, vm_id: str) -> MachineStatus | None:
    return world.hypervisor.statuses.get(world.paths.vm(vm_id).control_socket)


async def test_one_is_ready_after_a_start_paused_and_nobodys(world: World) -> None:
    first = await world.create("a")
    waiting = await ready(world)
    assert waiting != first.id
    assert status(world, waiting) is MachineStatus.PAUSED
    assert [vm.id for vm in await world.vms.all()] == [first.id]
    assert (world.paths.vm(waiting).directory / MARKER).is_file()
    # It has been told all but a name, and has run what sessions begin with.
    setup = world.agent.setups[-1]
    assert _HOSTNAME not in setup
    assert setup[_MACHINE_ID] != world.agent.setups[0][_MACHINE_ID]
    assert world.agent.opened[-2:] == [requests.Exec.KIND] * 2


async def test_there_is_none_where_a_machine_does_not_bear_being_held(world: World) -> None:
    features = replace(world.hypervisor.features, holds_well=False)
    world.hypervisor.features = features
    await world.create("a")
    await asyncio.sleep(0.05)
    assert world.standbys._keeper is None
    assert world.standbys.count == 0


async def test_the_next_vm_takes_it_over_and_another_is_made(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    launched = len(world.hypervisor.machines)
    vm = await world.create("b")
    assert vm.id == waiting
    assert vm.runtime.state is VmState.RUNNING
    assert vm.runtime.guest_ip == "172.16.0.2"
    # The one that is made for the next may have been launched by now.
    assert vm.id not in {each.vm_id for each in world.hypervisor.machines[launched:]}
    assert status(world, waiting) is None  # it runs
    assert not (world.paths.vm(waiting).directory / MARKER).exists()
    assert world.liveness.vm_alive(vm)
    handles = world.handles.get(vm.id)
    assert all(world.processes.alive(each.pid) for each in handles.network)
    assert await ready(world) != waiting


async def test_who_takes_it_over_gets_a_name_the_time_and_entropy_of_its_own(world: World) -> None:
    await world.create("a")
    await ready(world)
    before = len(world.agent.setups)
    await world.create("b")
    made, named = world.agent.setups[before - 1 : before + 1]
    assert named[_HOSTNAME] == b"b"
    assert named[_MACHINE_ID] == made[_MACHINE_ID]
    assert named[_ENTROPY] != made[_ENTROPY]


async def test_it_is_deleted_like_any_other(world: World) -> None:
    await world.create("a")
    await ready(world)
    await world.create("b")
    for name in ("a", "b"):
        await world.delete(name, force=True)
    await ready(world)
    await world.standbys.close()
    await world.assert_nothing_left()


async def test_two_at_once_do_not_share_it(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    second, third = await asyncio.gather(world.create("b"), world.create("c"))
    assert second.id != third.id
    assert [vm.id for vm in (second, third)].count(waiting) == 1


@pytest.mark.parametrize(
    "fields",
    [{"vcpu_count": 1}, {"disk_size_mib": 10000}, {"disk_size_mib": 200}, {"cold": True}],
    ids=str,
)
async def test_another_kind_of_machine_does_not_take_it(
    world: World, fields: dict[str, object]
) -> None:
    await world.create("a")
    waiting = await ready(world)
    vm = await world.create("b", **fields)
    assert vm.id != waiting


async def test_the_one_of_another_kind_is_ended_for_the_new_one(world: World) -> None:
    await world.create("a")
    first = await ready(world)
    await world.create("b", vcpu_count=1)
    await until(lambda: first not in str(world.processes.argv))
    assert await ready(world) != first
    await until(lambda: not world.paths.vm(first).directory.exists())


async def test_without_a_limit_there_is_none(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch, template_limit=4) as world:
        await world.create("a")
        await asyncio.sleep(0.1)
        assert world.standbys.count == 0
        assert len(world.hypervisor.machines) == 2


async def test_a_host_without_memory_keeps_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.base.procfs.available_memory_bytes", lambda: 1 << 29)
    await world.create("a")
    await until(lambda: world.standbys._keeper is None)
    assert world.standbys.count == 0


async def test_nobody_wants_it_and_it_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "_KEEP_S", 0.05)
    await world.create("a")
    waiting = await ready(world)
    await until(lambda: not world.paths.vm(waiting).directory.exists())
    assert waiting not in str(world.processes.argv)


async def test_one_that_has_died_is_not_taken(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    world.processes.end(world.hypervisor.pids[world.paths.vm(waiting).control_socket])
    vm = await world.create("b")
    assert vm.id != waiting
    assert vm.runtime.state is VmState.RUNNING
    await until(lambda: not world.paths.vm(waiting).directory.exists())


async def test_one_that_does_not_come_to_life_is_replaced_by_a_restore(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    world.hypervisor.can_quit = False  # its control socket does not answer
    done = await ended(world.begin(CreateRequest(name="b", image="base")))
    assert done.state is OperationState.COMPLETED, done.error
    assert done.vm is not None
    assert done.vm.id == waiting
    assert world.liveness.vm_alive(done.vm)


async def test_a_name_that_is_taken_leaves_nothing_of_it(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    done = await ended(world.begin(CreateRequest(name="a", image="base")))
    assert done.state is OperationState.FAILED
    await until(lambda: not world.paths.vm(waiting).directory.exists())
    assert waiting not in str(world.processes.argv)
    assert world.standbys._taken == {}


async def test_a_standby_that_cannot_be_made_is_nobodys_trouble(world: World) -> None:
    world.hypervisor.pause_gate.fail = Unavailable("no")
    vm = await world.create("a")
    await until(lambda: world.standbys._keeper is None)
    assert world.standbys.count == 0
    assert [entry.name for entry in world.paths.vms_dir.iterdir()] == [vm.id]


async def test_when_its_image_goes_it_goes_and_so_does_one_in_the_making(world: World) -> None:
    vm = await world.create("a")
    world.hypervisor.pause_gate.block = True
    await world.hypervisor.pause_gate.reached.wait()
    await world.standbys.retire_all()
    world.hypervisor.pause_gate.block = False
    assert [entry.name for entry in world.paths.vms_dir.iterdir()] == [vm.id]
    await world.create("b")
    await ready(world)
    await world.standbys.retire_all()
    assert world.standbys.count == 0
    assert len(list(world.paths.vms_dir.iterdir())) == 2


async def test_one_whose_network_has_died_is_not_taken(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    for each in world.handles.get(waiting).network:
        world.processes.end(each.pid)
    assert (await world.create("b")).id != waiting


async def test_a_time_limit_holds_for_it_too(world: World) -> None:
    await world.create("a")
    waiting = await ready(world)
    world.agent.exits[requests.Setup.KIND] = None  # no answer, for a while
    asyncio.get_running_loop().call_later(1.5, world.agent.exits.clear)
    async with asyncio.timeout(10):
        vm = await world.create("b", boot_timeout_s=1)
    assert vm.id == waiting
    assert world.liveness.vm_alive(vm)


async def test_one_that_cannot_be_ended_does_not_keep_the_next_daemon_down(world: World) -> None:
    vm = await world.create("a")
    waiting = await ready(world)
    world.standbys._waiting.clear()
    world.processes.immortal = set(world.hypervisor.pids.values())
    following = await world.restarted()
    following.hypervisor.can_quit = False
    await following.reconcile()
    assert (world.paths.vm(waiting).directory / MARKER).is_file()  # for the one after it
    assert following.liveness.vm_alive(vm)
    world.processes.immortal = set()
    last = await following.restarted()
    await last.reconcile()
    assert [entry.name for entry in world.paths.vms_dir.iterdir()] == [vm.id]
    await last.close()


async def test_the_end_of_the_daemon_ends_it_and_one_in_the_making(world: World) -> None:
    vm = await world.create("a")
    world.hypervisor.pause_gate.block = True
    await world.hypervisor.pause_gate.reached.wait()
    await world.standbys.close()
    assert [entry.name for entry in world.paths.vms_dir.iterdir()] == [vm.id]
    assert world.liveness.vm_alive(vm)


async def test_after_a_killed_daemon_it_is_ended_and_vms_run_on(world: World) -> None:
    vm = await world.create("a")
    waiting = await ready(world)
    # As after SIGKILL: nobody has ended it.
    world.standbys._waiting.clear()
    following = await world.restarted()
    await following.reconcile()
    assert waiting not in str(world.processes.argv)
    assert [entry.name for entry in world.paths.vms_dir.iterdir()] == [vm.id]
    assert following.liveness.vm_alive(vm)
    await following.close()


async def test_a_directory_without_a_record_or_a_marker_is_left_alone(world: World) -> None:
    stranger = world.paths.vms_dir / "0123456789ab"
    stranger.mkdir(parents=True)
    (stranger / "work.qcow2").touch()
    following = await world.restarted()
    await following.reconcile()
    assert [entry.name for entry in stranger.iterdir()] == ["work.qcow2"]
    await following.close()
