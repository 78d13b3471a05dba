"""What the daemon does by itself: it stops what nobody uses, and lets held machines run on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from banger.base.model import Vm, VmState, now
from banger.daemon import maintenance as module
from banger.daemon.maintenance import Maintenance
from banger.drivers.base import Check, Level, MachineStatus
from banger.guest import requests
from banger.services.machine_logs import LIMIT_BYTES
from banger.services.vm_spec import CreateRequest
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


def maintenance(world: World, stale_after_s: float = 0) -> Maintenance:
    return Maintenance(
        paths=world.paths,
        hypervisor=world.hypervisor,
        vms=world.vms,
        lifecycle=world.lifecycle,
        stale_after_s=stale_after_s,
    )


async def unused(world: World, vm: Vm, hours: float) -> None:
    await world.store.touch_vm(vm.id, now() - timedelta(hours=hours))


async def states(world: World) -> dict[str, str]:
    return {vm.name: vm.runtime.state.value for vm in await world.vms.all()}


async def test_what_nobody_used_for_too_long_is_stopped_with_the_reason(world: World) -> None:
    stale, used = await world.create("stale"), await world.create("used")
    await unused(world, stale, 25)
    await unused(world, used, 23)
    await maintenance(world, 24 * 3600).once()
    assert await states(world) == {"stale": "stopped", "used": "running"}
    assert (await world.vms.show("stale")).runtime.last_error == "nobody used it for 1d"
    assert requests.Shutdown.KIND in world.agent.opened


async def test_a_session_keeps_a_vm_however_long_it_lasts(world: World) -> None:
    vm = await world.create()
    async with world.vms.in_use(vm):
        await unused(world, vm, 100)
        await maintenance(world, 3600).once()
    assert await states(world) == {"box": "running"}


async def test_a_vm_that_is_used_while_its_lock_is_waited_for_runs_on(world: World) -> None:
    """As by a restart, which takes a while: what was decided before it holds no more."""
    vm = await world.create()
    await unused(world, vm, 100)
    async with world.vms.locked(vm):
        round_ = asyncio.create_task(maintenance(world, 3600).once())
        async with asyncio.timeout(10):
            while world.vms.locks._users[vm.id] < 2:
                await asyncio.sleep(0.001)
        await world.vms.touch(vm.id)
    await round_
    assert await states(world) == {"box": "running"}


async def test_by_default_nothing_is_stopped(world: World) -> None:
    vm = await world.create()
    await unused(world, vm, 10_000)
    await maintenance(world).once()
    assert await states(world) == {"box": "running"}


@pytest.mark.parametrize("room", [True, False])
async def test_a_machine_held_by_a_full_disk_runs_on_once_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    vm = await world.create()
    held = Path(vm.runtime.api_socket)
    world.hypervisor.statuses[held] = MachineStatus.DISK_FULL
    level = Level.OK if room else Level.FAIL
    monkeypatch.setattr(module, "check_free_disk", lambda *_: Check("disk space", level, ""))
    await maintenance(world).once()
    assert (held in world.hypervisor.statuses) == (not room)


async def test_a_guest_that_is_held_while_it_boots_boots_on(world: World) -> None:
    world.agent.silent = True
    progress = world.begin(CreateRequest(name="box", image="base"))
    async for state in progress.changes():
        if state.stage == "boot" and state.vm is not None:
            held = Path(state.vm.runtime.api_socket)
            world.hypervisor.statuses[held] = MachineStatus.DISK_FULL
            break
    await maintenance(world).once()
    assert held not in world.hypervisor.statuses
    await world.operations.cancel(progress.record.id)


@pytest.mark.parametrize("name", ["console.log", "hypervisor.log"])
async def test_logs_that_a_guest_has_filled_are_cut_whatever_has_become_of_it(
    world: World, name: str
) -> None:
    running, stopped = await world.create("running"), await world.create("stopped")
    await unused(world, stopped, 25)
    await maintenance(world, 24 * 3600).once()
    logs = [Path(vm.runtime.vm_dir, name) for vm in (running, stopped)]
    for log in logs:
        with log.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, LIMIT_BYTES)
            file.seek(0, os.SEEK_END)
            file.write(b"the end")
    with capture_logs() as told:
        await maintenance(world).once()
    assert [log.stat().st_size for log in logs] == [0, 0]
    assert all(log.with_name(f"{name}.old").read_bytes().endswith(b"the end") for log in logs)
    assert [(each["vm_name"], each["log"]) for each in told if each["event"] == "log cut"] == [
        ("running", name),
        ("stopped", name),
    ]


async def test_a_log_that_cannot_be_cut_keeps_no_other_from_it(world: World) -> None:
    one, two = await world.create("one"), await world.create("two")
    Path(one.runtime.vm_dir, "hypervisor.log").symlink_to("elsewhere")
    log = Path(two.runtime.vm_dir, "hypervisor.log")
    with log.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, LIMIT_BYTES + 4096)
    with capture_logs() as told:
        await maintenance(world).once()
    assert log.stat().st_size == 0
    assert [each["vm_name"] for each in told if each["event"] == "log not cut"] == ["one"]


async def test_what_hypervisors_have_noted_is_bounded_now_and_then_though_nobody_asks(
    world: World,
) -> None:
    vms = [await world.create("one"), await world.create("two")]
    rounds = maintenance(world)
    for _ in range(12):
        await rounds.once()
    assert sorted(world.hypervisor.drained) == sorted(Path(vm.runtime.api_socket) for vm in vms * 2)


async def test_a_machine_that_somebody_paused_stays_paused(world: World) -> None:
    vm = await world.create()
    held = Path(vm.runtime.api_socket)
    world.hypervisor.statuses[held] = MachineStatus.PAUSED
    await maintenance(world).once()
    assert world.hypervisor.statuses[held] is MachineStatus.PAUSED


async def test_while_there_is_room_machines_are_asked_now_and_then_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create()
    asked: list[Path] = []
    status = world.hypervisor.status

    async def counting(socket: Path) -> MachineStatus:
        asked.append(socket)
        return await status(socket)

    monkeypatch.setattr(world.hypervisor, "status", counting)
    rounds = maintenance(world)
    for _ in range(12):
        await rounds.once()
    assert len(asked) == 2


async def test_a_hypervisor_that_does_not_answer_stops_nothing_else(world: World) -> None:
    await world.create("one")
    two = await world.create("two")
    world.hypervisor.can_quit = False
    await unused(world, two, 100)
    await maintenance(world, 3600).once()
    assert await states(world) == {"one": VmState.RUNNING.value, "two": VmState.STOPPED.value}
