"""How VMs are joined to a network: with which address, and with what they may reach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.model import Egress, NetworkMode, Reach, VmState
from banger.services.vm_spec import CreateRequest, ReachRequest
from fakes import failing
from world import World, ended, made_world

NARROW = IPv4Network("10.99.0.0/29")
CLOSED = ReachRequest(egress=Egress.NONE)


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


@pytest.fixture
def narrow(world: World) -> World:
    """A world whose guests have addresses of their own: of a network with five."""
    world.network.guests = NARROW
    world.addresses.networks[NetworkMode.USER] = NARROW
    return world


async def test_every_machine_has_an_address_of_its_own_for_life(narrow: World) -> None:
    vms = [await narrow.create(f"box-{number}") for number in range(3)]
    assert len({vm.runtime.guest_ip for vm in vms}) == 3
    await narrow.stop("box-1")
    others = [await narrow.create(f"other-{number}") for number in range(2)]
    again = await narrow.start("box-1")
    assert again.runtime.guest_ip == vms[1].runtime.guest_ip
    assert len({vm.runtime.guest_ip for vm in (*vms, *others)}) == 5


async def test_machines_that_are_made_at_once_have_different_addresses(narrow: World) -> None:
    requests = [CreateRequest(name=f"box-{number}", image="base") for number in range(5)]
    done = await asyncio.gather(*(ended(narrow.begin(each)) for each in requests))
    assert len({each.vm.runtime.guest_ip for each in done if each.vm}) == 5


async def test_an_address_is_free_again_when_its_machine_is_gone(narrow: World) -> None:
    for number in range(5):
        await narrow.create(f"box-{number}")
    full = await ended(narrow.begin(CreateRequest(name="more", image="base")))
    assert full.error is not None
    assert "no address of 10.99.0.0/29 is free" in full.error.message
    assert "delete" in full.error.hint
    await narrow.delete("box-3", force=True)
    await narrow.create("more")


async def test_an_address_of_another_network_is_not_kept(narrow: World) -> None:
    before = await narrow.create()
    await narrow.stop("box")
    narrow.addresses.networks[NetworkMode.USER] = IPv4Network("10.55.0.0/24")
    after = await narrow.start("box")
    assert before.runtime.guest_ip.startswith("10.99.")
    assert after.runtime.guest_ip.startswith("10.55.")


async def test_what_a_machine_may_reach_holds_from_its_start_and_changes_with_its_record(
    world: World,
) -> None:
    vm = await world.create(reach=CLOSED)
    assert world.network.reaches == {vm.id: Reach(egress=Egress.NONE)}
    await world.change("box", reach=ReachRequest(egress=Egress.ALL))
    assert world.network.reaches == {vm.id: Reach()}
    await world.stop("box")
    assert world.network.reaches == {}
    await world.change("box", reach=CLOSED)
    assert world.network.reaches == {}  # there is nothing to change
    await world.start("box")
    assert world.network.reaches == {vm.id: Reach(egress=Egress.NONE)}


async def test_a_change_that_cannot_be_made_true_is_taken_back(world: World) -> None:
    vm = await world.create()

    async def refused() -> None:
        raise failing()

    world.network.apply_gate.passed = refused  # type: ignore[method-assign]
    with pytest.raises(PreconditionFailed):
        await world.change("box", reach=CLOSED)
    assert (await world.vms.resolve("box")).spec.reach == vm.spec.reach


async def test_what_its_network_cannot_do_is_refused_before_a_machine_is_made(
    world: World,
) -> None:
    allow = ReachRequest(allow=("10.0.0.0/8",))
    done = await ended(world.begin(CreateRequest(name="box", image="base", reach=allow)))
    assert done.error is not None
    assert "not here" in done.error.message
    await world.assert_nothing_left()
    await world.create()
    await world.stop("box")
    for _ in range(2):  # running or not
        with pytest.raises(PreconditionFailed, match="not here"):
            await world.change("box", reach=allow)
        await world.start("box")


async def test_a_daemon_tells_the_network_of_all_that_run_at_once(world: World) -> None:
    first = await world.create("a", reach=CLOSED)
    second = await world.create("b")
    await world.create("c")
    await world.stop("c")
    following = await world.restarted()
    try:
        told: list[set[str]] = []
        resume = following.network.resume

        async def noted(machines: object) -> None:
            await resume(machines)  # type: ignore[arg-type]
            told.append(set(following.network.reaches))

        following.network.resume = noted  # type: ignore[method-assign]
        await following.reconcile()
        assert told == [{first.id, second.id}]
        assert following.network.reaches[first.id].egress is Egress.NONE
    finally:
        await following.close()


async def test_a_network_that_cannot_go_on_stops_no_daemon(world: World) -> None:
    await world.create()
    following = await world.restarted()
    try:

        async def broken(machines: object) -> None:
            raise Unavailable("the helper is gone")

        following.network.resume = broken  # type: ignore[method-assign]
        await following.reconcile()
        assert (await following.vms.resolve("box")).runtime.state is VmState.RUNNING
    finally:
        await following.close()


async def test_a_machine_that_waits_for_a_vm_reaches_nothing_until_it_is_one(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch, template_limit=2, standby_limit=1) as world:
        first = await world.create("first")
        async with asyncio.timeout(10):
            while world.standbys.count == 0:
                await asyncio.sleep(0.01)
        waiting = {
            vm_id: reach for vm_id, reach in world.network.reaches.items() if vm_id != first.id
        }
        assert [reach.egress for reach in waiting.values()] == [Egress.NONE]
        second = await world.create("second")
        assert {second.id} == set(waiting)
        assert world.network.reaches[second.id] == Reach()
