"""What is left when a start, a clean-up or the record of it fails, and what the next call does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Conflict, Internal, PreconditionFailed
from banger.base.model import Vm, VmState
from banger.guest import requests
from banger.services.vm_spec import CreateRequest
from banger.services.vm_start import GuestLost
from world import World, ended, made_world

_BUSY = b"\x02\0\0\0\x10busy"


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def test_a_vm_that_was_kept_for_its_failure_outlives_the_daemon_once_it_runs(
    world: World,
) -> None:
    """Its session (``--rm``) ended with the failure; what is done in it since is the user's."""
    world.agent.exits[requests.Setup.KIND] = _BUSY
    await ended(world.begin(CreateRequest(name="box", image="base", ephemeral=True)))
    assert (await world.vms.show("box")).runtime.state is VmState.ERROR
    world.agent.exits.clear()
    await world.start("box")
    following = await world.restarted()
    await following.reconcile()
    assert (await following.vms.show("box")).runtime.state is VmState.RUNNING
    await following.close()


def hold_on(world: World) -> None:
    """Machines that run now cannot be ended, as if their disks hung."""
    world.hypervisor.can_quit = False
    world.processes.immortal |= set(world.processes.argv)


def let_go(world: World) -> None:
    world.hypervisor.can_quit = True
    world.processes.immortal.clear()


def machines(world: World) -> list[tuple[str, ...]]:
    return [argv for argv in world.processes.argv.values() if argv[0] == "machine"]


async def test_a_start_that_cannot_be_cleaned_up_tells_its_own_failure_and_the_next_one_starts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create(start=False)

    async def taken(vm: Vm) -> None:
        hold_on(world)
        raise Conflict("the port is in use")

    with monkeypatch.context() as patch:
        patch.setattr(world.publishing, "post_start", taken)
        with pytest.raises(Conflict, match="the port is in use"):
            await world.start("box")
    assert len(machines(world)) == 1
    let_go(world)
    started = await world.start("box")
    assert started.runtime.state is VmState.RUNNING
    assert len(machines(world)) == 1


@pytest.mark.parametrize("verb", ["start", "restart"])
async def test_a_machine_that_could_not_be_ended_has_no_second_one_beside_it(
    world: World, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    await world.create(start=False)

    async def refuse(vm: Vm, timeout_s: float) -> None:
        hold_on(world)
        raise Internal("no agent")

    with monkeypatch.context() as patch:
        patch.setattr(world.agents, "connect", refuse)
        with pytest.raises(GuestLost):
            await world.start("box")
    assert (await world.vms.show("box")).runtime.state is VmState.ERROR
    with pytest.raises(Internal, match="cannot be killed"):
        await getattr(world, verb)("box")
    assert len(machines(world)) == 1
    let_go(world)
    await getattr(world, verb)("box")
    assert len(machines(world)) == 1
    await world.delete("box", force=True)
    await world.assert_nothing_left()


async def test_a_creation_whose_failure_could_not_be_recorded_can_be_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk fails the guest and then the database."""
    world.agent.exits[requests.Setup.KIND] = _BUSY

    async def full(vm: Vm) -> None:
        raise Internal("the database failed: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "update_vm", full)
        done = await ended(world.begin(CreateRequest(name="box", image="base")))
    assert done.error is not None
    assert "disk is full" in done.error.message
    with pytest.raises(Conflict, match='vm "box" was not created to its end'):
        await world.start("box")
    await world.delete("box")
    await world.assert_nothing_left()


async def test_a_change_that_cannot_be_taken_back_tells_why_it_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes the old name while the guest refuses the new one."""
    await world.create("box")

    async def refuse(before: Vm, after: Vm) -> None:
        if after.name == "crate":
            await world.create("box", start=False)
            raise PreconditionFailed("no")

    monkeypatch.setattr(world.publishing, "apply_config_changes", refuse)
    with pytest.raises(BangerError, match="no"):
        await world.change("box", name="crate")
    assert {vm.name for vm in await world.store.vms()} == {"box", "crate"}


async def test_a_kill_that_is_cancelled_keeps_the_lock_until_its_clean_up_is_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that came between would lose its sockets and its handles to that clean-up."""
    vm = await world.create()
    began, goes_on = asyncio.Event(), asyncio.Event()
    real = world.publishing.cleanup

    async def slow(vm: Vm) -> None:
        began.set()
        await goes_on.wait()
        await real(vm)

    monkeypatch.setattr(world.publishing, "cleanup", slow)
    killing = asyncio.create_task(world.kill("box"))
    async with asyncio.timeout(10):
        await began.wait()
        for _ in range(2):
            killing.cancel()
            await asyncio.sleep(0.01)
            assert world.vms.locks.held(vm.id)
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await killing
        await world.vms.close()
    (after,) = await world.store.vms()
    assert after.runtime.state is VmState.STOPPED
    assert not world.vms.locks.held(vm.id)


async def test_a_clean_up_that_fails_while_its_caller_is_cancelled_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    goes_on = asyncio.Event()

    async def fail() -> None:
        await goes_on.wait()
        raise Conflict("no")

    caller = asyncio.create_task(to_its_end(fail()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert "clean-up failed" in capsys.readouterr().out
