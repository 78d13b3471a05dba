"""Names and addresses of VMs: which one each gets, who has it, and what the name server sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import Conflict, NotFound, PreconditionFailed
from banger.base.model import NetworkMode, VmState
from banger.services.addresses import LOOPBACK_NETWORK, Addresses, free_address
from banger.services.vm_spec import CreateRequest
from records import a_vm
from world import World, ended, made_world

SMALL = IPv4Network("172.30.0.0/28")


@given(st.text(max_size=20))
def test_an_address_is_one_of_the_network_and_never_one_that_means_all_or_none(vm_id: str) -> None:
    address = free_address(LOOPBACK_NETWORK, vm_id, ())
    assert IPv4Address(address) in LOOPBACK_NETWORK
    assert address.rpartition(".")[2] not in ("0", "255")
    assert free_address(LOOPBACK_NETWORK, vm_id, ()) == address
    assert free_address(LOOPBACK_NETWORK, vm_id, {address}) != address


def test_all_addresses_of_a_network_are_given_out_once_but_for_those_of_the_host() -> None:
    taken: set[str] = set()
    for _ in range(13):
        taken.add(free_address(SMALL, "one", taken))
    assert taken == {f"172.30.0.{number}" for number in range(2, 15)}
    with pytest.raises(PreconditionFailed, match=r"no address of 172\.30\.0\.0/28 is free"):
        free_address(SMALL, "one", taken)


def test_two_vms_that_would_have_one_address_get_two_and_keep_them() -> None:
    addresses = Addresses({NetworkMode.USER: SMALL})
    vms = [addresses.claimed(a_vm(f"vm{number}")) for number in range(13)]
    assert len({vm.runtime.address for vm in vms}) == 13
    assert [addresses.claimed(vm) for vm in vms] == vms
    following = Addresses({NetworkMode.USER: SMALL})
    following.load(reversed(vms))
    assert [following.claimed(vm) for vm in vms] == vms


def test_an_address_is_free_again_when_its_vm_is_gone() -> None:
    addresses = Addresses({NetworkMode.USER: SMALL})
    mine = addresses.claimed(a_vm("box"))
    addresses.note(mine)
    addresses.forget(mine.id)
    addresses.forget(mine.id)
    assert addresses.address_of("box") == addresses.name_of(mine.runtime.address) == ""
    assert addresses.claimed(mine) == mine


def test_of_two_records_with_one_address_the_second_gets_another() -> None:
    addresses = Addresses({NetworkMode.USER: SMALL})
    first = a_vm("first", address="172.30.0.5")
    second = a_vm("second", address="172.30.0.5")
    addresses.load([first, second])
    assert addresses.claimed(first).runtime.address == "172.30.0.5"
    assert addresses.claimed(second).runtime.address != "172.30.0.5"


def test_an_address_of_another_network_is_replaced() -> None:
    addresses = Addresses({NetworkMode.USER: SMALL})
    vm = a_vm("box", address="127.64.3.4")
    addresses.load([vm])
    claimed = addresses.claimed(vm)
    assert IPv4Address(claimed.runtime.address) in SMALL
    assert addresses.name_of("127.64.3.4") == ""
    assert addresses.name_of(claimed.runtime.address) == "box"


def test_a_name_that_another_vm_has_got_meanwhile_stays_that_ones() -> None:
    addresses = Addresses({})
    old = addresses.claimed(a_vm("web"))
    addresses.note(old)
    addresses.note(msgspec.structs.replace(old, name="old"))
    new = addresses.claimed(a_vm("web", vm_id="id-new"))
    addresses.note(new)
    assert addresses.address_of("web") == new.runtime.address
    assert addresses.address_of("old") == old.runtime.address
    addresses.forget(old.id)
    assert addresses.address_of("web") == new.runtime.address


# In a whole daemon


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as world:
        yield world


async def test_a_vm_has_its_name_and_address_for_life(world: World) -> None:
    made = await world.create("web")
    assert made.runtime.dns_name == "web.vm"
    address = made.runtime.address
    assert world.addresses.address_of("web") == address
    assert world.addresses.name_of(address) == "web"
    assert (await world.stop("web")).runtime.address == address
    assert world.addresses.address_of("web") == address
    following = await world.restarted()
    await following.reconcile()
    assert following.addresses.address_of("web") == address
    assert (await following.start("web")).runtime.address == address
    await following.delete("web", force=True)
    assert following.addresses.address_of("web") == following.addresses.name_of(address) == ""
    await following.close()


async def test_a_name_follows_a_rename_and_not_one_that_fails(world: World) -> None:
    web = await world.create("web")
    await world.create("db")
    changed = await world.change("web", name="www")
    assert changed.runtime.dns_name == "www.vm"
    assert changed.runtime.address == web.runtime.address
    assert world.addresses.address_of("web") == ""
    with pytest.raises(Conflict):
        await world.change("www", name="db")
    assert world.addresses.address_of("www") == web.runtime.address
    assert (await world.vms.show("www")).runtime.dns_name == "www.vm"


async def test_creations_at_once_get_an_address_each_and_failed_ones_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(world.addresses.networks, NetworkMode.USER, SMALL)
    requests = [CreateRequest(name=f"vm{number % 9}", image="base") for number in range(12)]
    done = await asyncio.gather(*(ended(world.begin(request)) for request in requests))
    assert sum(each.error is None for each in done) == 9
    vms = await world.store.vms()
    assert len({vm.runtime.address for vm in vms}) == len(vms) == 9
    assert len(world.addresses._by_address) == len(world.addresses._by_name) == 9


async def test_what_is_written_of_a_vm_that_is_gone_claims_nothing(world: World) -> None:
    made = await world.create("web")
    await world.delete("web", force=True)
    with pytest.raises(NotFound):
        await world.vms.save(made)
    assert world.addresses._by_address == {}


async def test_a_record_without_an_address_gets_one_when_found_running_or_started(
    world: World,
) -> None:
    for name in ("runs", "rests"):
        made = await world.create(name)
        old = msgspec.structs.replace(made.runtime, address="", dns_name="")
        await world.store.update_vm(msgspec.structs.replace(made, runtime=old))
    await world.stop("rests")
    stopped = await world.vms.show("rests")
    old = msgspec.structs.replace(stopped.runtime, address="", dns_name="")
    await world.store.update_vm(msgspec.structs.replace(stopped, runtime=old))
    following = await world.restarted()
    await following.reconcile()
    runs, rests = await following.vms.show("runs"), await following.vms.show("rests")
    assert runs.runtime.state is VmState.RUNNING
    assert runs.runtime.dns_name == "runs.vm"
    assert following.addresses.address_of("runs") == runs.runtime.address != ""
    assert rests.runtime.address == ""
    assert (await following.start("rests")).runtime.dns_name == "rests.vm"
    assert following.addresses.address_of("rests") != ""
    await following.close()
