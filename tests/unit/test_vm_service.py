"""VMs: found by what people type, stopped and deleted as often as one likes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import (
    Ambiguous,
    BadRequest,
    BangerError,
    Conflict,
    NotFound,
    NotRunning,
    Unavailable,
)
from banger.base.model import Vm, VmState
from banger.base.opid import current_op_id, is_op_id
from banger.guest import requests
from banger.services import lifecycle as module
from banger.services import vm as vm_service
from banger.services.agents import Agents
from banger.services.vm import VmService
from records import a_vm
from world import World, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def resolve(world: World, reference: str) -> str:
    return (await world.vms.resolve(reference)).id


async def test_references_follow_the_rules(world: World) -> None:
    for vm_id, name in (("aa11", "web"), ("aa22", "web-two"), ("bb33", "aa11"), ("web9", "other")):
        await world.store.insert_vm(a_vm(name, vm_id=vm_id))
    assert await resolve(world, "aa11") == "aa11"  # an exact id wins over an exact name
    assert await resolve(world, "web") == "aa11"  # an exact name wins over prefixes
    assert await resolve(world, "web-") == "aa22"
    assert await resolve(world, "bb") == "bb33"
    assert await resolve(world, "oth") == "web9"


async def test_references_that_name_nothing_or_too_much_have_these_very_texts(
    world: World,
) -> None:
    await world.store.insert_vm(a_vm("box-a", vm_id="1"))
    await world.store.insert_vm(a_vm("box-b", vm_id="2"))
    with pytest.raises(BadRequest) as empty:
        await world.vms.resolve("")
    assert empty.value.message == "vm id or name is required"
    with pytest.raises(NotFound) as missing:
        await world.vms.resolve("x")
    assert missing.value.message == 'vm "x" not found'
    with pytest.raises(Ambiguous) as ambiguous:
        await world.vms.resolve("box")
    assert ambiguous.value.message == 'multiple VMs match "box"'
    assert ambiguous.value.hint == "they are: box-a, box-b"


async def test_those_that_match_by_their_ids_are_told_with_them(world: World) -> None:
    await world.store.insert_vm(a_vm("4you", vm_id="1"))
    await world.store.insert_vm(a_vm("box", vm_id="42"))
    with pytest.raises(Ambiguous) as ambiguous:
        await world.vms.resolve("4")
    assert ambiguous.value.hint == "they are: 4you, box (42)"


class Records:
    """A store of what a test says."""

    def __init__(self, vms: list[Vm]) -> None:
        self._vms = vms

    async def vms(self) -> list[Vm]:
        return self._vms


_words = st.text("ab", min_size=1, max_size=3)


@given(st.dictionaries(_words, _words, max_size=5), st.text("ab", max_size=3))
def test_any_reference_names_one_vm_or_is_an_error_that_fits(
    names: dict[str, str], reference: str
) -> None:
    vms = [a_vm(name, vm_id=vm_id) for vm_id, name in names.items() if vm_id]
    service = VmService(None, Records(vms), None, None, None, None, None)  # type: ignore[arg-type]
    matching = {vm.id for vm in vms if vm.id.startswith(reference) or vm.name.startswith(reference)}
    exact = {vm.id for vm in vms if reference in (vm.id, vm.name)}
    try:
        found = asyncio.run(service.resolve(reference))
    except BadRequest:
        assert reference == ""
    except NotFound:
        assert not matching
    except Ambiguous:
        assert len(matching) > 1
        assert not exact
    else:
        assert found.id in (exact or matching)
        assert exact or matching == {found.id}


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [(VmState.CREATING, VmState.ERROR), (VmState.STARTING, VmState.STOPPED)],
)
async def test_work_that_failed_with_no_room_to_record_it_is_not_shown_as_going_on(
    world: World, recorded: VmState, shown: VmState
) -> None:
    """A record says that work goes on as long as somebody works: who does has the lock."""
    vm = a_vm("box", state=recorded)
    await world.store.insert_vm(vm)
    async with world.vms.locks.hold(vm.id):
        assert (await world.vms.show("box")).runtime.state is recorded
    for found in (await world.vms.show("box"), *await world.vms.all()):
        assert found.runtime.state is shown
        assert found.runtime.last_error


async def test_a_record_that_work_has_overtaken_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create()
    old = [a_vm("box", vm_id=vm.id, state=VmState.CREATING) for vm in await world.store.vms()]

    async def vms() -> list[Vm]:
        return old

    monkeypatch.setattr(world.store, "vms", vms)
    assert (await world.vms.show("box")).runtime.state is VmState.RUNNING


async def test_no_record_in_creation_is_ever_without_its_lock(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = world.store.insert_vm
    held: list[bool] = []

    async def watched(vm: Vm) -> None:
        held.append(world.vms.locks.held(vm.id))
        await insert(vm)

    monkeypatch.setattr(world.store, "insert_vm", watched)
    await world.create()
    assert held == [True]


async def test_a_stopped_vm_was_powered_off_and_keeps_its_files(world: World) -> None:
    vm = await world.create()
    stopped = await world.stop("box")
    assert stopped.runtime.state is VmState.STOPPED
    assert stopped.runtime.last_error == ""
    assert requests.Shutdown.KIND in world.agent.opened
    assert not world.processes.argv
    assert not world.processes.killed
    assert Path(vm.runtime.work_disk).exists()
    assert not Path(vm.runtime.api_socket).parent.exists()
    assert await world.stop("box") == stopped
    assert (await world.vms.show("box")).runtime == stopped.runtime


async def test_many_stops_at_once_are_one(world: World) -> None:
    await world.create()
    await asyncio.gather(*(world.stop("box") for _ in range(5)))
    assert world.agent.opened.count(requests.Shutdown.KIND) == 1


async def test_a_guest_that_does_not_power_off_is_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.05)
    await world.create()
    world.agent.on_shutdown = lambda: None
    stopped = await world.stop("box")
    assert stopped.runtime.state is VmState.STOPPED
    assert not world.processes.argv


async def test_an_agent_that_refuses_does_not_keep_the_vm(world: World) -> None:
    await world.create()
    world.agent.exits[requests.Shutdown.KIND] = b"\x02\0\0\0\x00no"
    assert (await world.stop("box")).runtime.state is VmState.STOPPED
    assert not world.processes.argv


async def test_a_running_vm_is_deleted_by_force_only(world: World) -> None:
    await world.create()
    with pytest.raises(Conflict) as caught:
        await world.delete("box")
    assert caught.value.message == 'vm "box" is running'
    assert "--force" in caught.value.hint
    assert world.liveness.vm_alive(await world.vms.show("box"))
    await world.delete("box", force=True)
    await world.assert_nothing_left()
    with pytest.raises(NotFound):
        await world.delete("box", force=True)


async def test_many_deletions_at_once_delete_once(world: World) -> None:
    await world.create()
    results = await asyncio.gather(
        *(world.delete("box", force=True) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(result, Vm) for result in results) == 1
    assert sum(isinstance(result, NotFound) for result in results) == 3
    await world.assert_nothing_left()


async def test_a_stopped_vm_is_deleted_without_force(world: World) -> None:
    await world.create()
    await world.stop("box")
    await world.delete("box")
    await world.assert_nothing_left()


async def test_a_vm_that_is_being_created_is_neither_stopped_nor_deleted(world: World) -> None:
    vm = a_vm("box", state=VmState.CREATING)
    await world.store.insert_vm(vm)
    async with world.vms.locks.hold(vm.id):
        for attempt in (world.stop("box"), world.delete("box", force=True)):
            with pytest.raises(Conflict, match="is still being created"):
                await attempt


async def test_files_that_cannot_be_removed_keep_the_record(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    await world.create()
    with monkeypatch.context() as patch:
        patch.setattr(vm_service, "remove_hostile_tree", refuse)
        with pytest.raises(Conflict, match="cannot remove"):
            await world.delete("box", force=True)
    await world.delete("box", force=True)
    assert await world.store.vms() == []


async def state_becomes(world: World, state: VmState) -> Vm:
    async with asyncio.timeout(10):
        while True:
            (vm,) = await world.store.vms()
            if vm.runtime.state is state:
                return vm
            await asyncio.sleep(0.005)


async def test_a_machine_that_ends_by_itself_is_recorded_as_stopped(world: World) -> None:
    vm = await world.create()
    world.processes.end(world.liveness.pid(vm))
    shown = await world.vms.show("box")  # at once, whatever the record says
    assert shown.runtime.state is VmState.STOPPED
    stopped = await state_becomes(world, VmState.STOPPED)
    assert stopped.runtime.last_error == "the guest powered off or its process ended"
    assert world.handles.get(vm.id).pid == 0
    with pytest.raises(NotRunning, match='vm "box" is stopped: the guest powered off'):
        await world.vms.running("box")


async def test_that_it_ended_is_an_event_of_its_own_not_one_of_its_creation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    update = world.store.update_vm

    async def recording(vm: Vm) -> None:
        seen.append(current_op_id.get())
        await update(vm)

    vm = await world.create()
    current_op_id.set("op-0123456789ab")
    world.vms.watch(vm)
    monkeypatch.setattr(world.store, "update_vm", recording)
    world.processes.end(world.liveness.pid(vm))
    await state_becomes(world, VmState.STOPPED)
    (op_id,) = seen
    assert is_op_id(op_id)
    assert op_id != "op-0123456789ab"


async def test_a_guest_that_is_stopped_is_not_said_to_have_ended_by_itself(world: World) -> None:
    await world.create()
    await world.stop("box")
    await asyncio.sleep(0.02)
    (vm,) = await world.store.vms()
    assert vm.runtime.last_error == ""


async def test_an_agent_that_is_gone_is_told_with_where_to_look(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.services.agents.RECONNECT_TIMEOUT_S", 0.05)
    vm = await world.create()
    world.agent.silent = True
    await world.agents.drop(vm.id)
    with pytest.raises(Unavailable) as caught:
        await world.vms.open_stream(vm, requests.Ping())
    assert 'the agent of vm "box" does not answer' in caught.value.message
    assert vm.runtime.log_path in caught.value.hint


async def test_who_connects_to_a_machine_that_goes_is_told_at_once_and_leaves_no_channel(
    world: World,
) -> None:
    vm = await world.create()
    await world.agents.drop(vm.id)
    world.agent.silent = True
    waiting = [asyncio.create_task(world.agents.connect(vm, 60)) for _ in range(3)]
    while not world.agents._attempts:
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await asyncio.gather(world.agents.drop(vm.id), world.agents.drop(vm.id))
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert {(type(each), str(each)) for each in ended} == {
        (Unavailable, "its machine is being stopped")
    }
    assert world.agents._channels == {}
    assert world.agents._attempts == {}
    world.agent.silent = False
    assert not (await world.agents.connect(vm, 5)).closed


async def test_a_channel_made_while_the_machine_goes_is_closed(world: World) -> None:
    vm = await world.create()
    await world.agents.drop(vm.id)
    connecting = asyncio.create_task(world.agents.connect(vm, 60))
    await asyncio.sleep(0)
    await world.agents.drop(vm.id)
    await asyncio.gather(connecting, return_exceptions=True)
    assert world.agents._channels == {}


async def test_a_channel_that_broke_is_made_again_once_for_all_who_ask(
    world: World,
) -> None:
    vm = await world.create()
    first = await world.agents.channel(vm)
    await first.close()
    again = await asyncio.gather(*(world.agents.channel(vm) for _ in range(5)))
    assert len({id(channel) for channel in again}) == 1
    assert again[0] is not first
    assert not again[0].closed


async def test_closing_the_agents_closes_every_channel(world: World) -> None:
    vm = await world.create()
    channel = await world.agents.channel(vm)
    await world.agents.close()
    assert channel.closed
    assert isinstance(world.agents, Agents)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [([b"d"], "d"), ([b"f"], "f"), ([b"l", b"d"], "d"), ([b"l"], "l"), ([], "")],
)
async def test_a_path_in_the_guest_is_what_a_link_leads_to(
    world: World, answers: list[bytes], kind: str
) -> None:
    vm = await world.create()
    paths: list[str] = []

    async def stat(vm: Vm, path: str) -> requests.FileStat | None:
        paths.append(path)
        if len(paths) > len(answers):
            return None
        return requests.FileStat.decode(answers[len(paths) - 1] + b"\0\0\1\xa4" + bytes(8))

    world.vms._stat = stat  # type: ignore[method-assign]
    found = await world.vms.stat(vm, "/x")
    assert (found.type if found else "") == kind
    assert paths == (["/x", "/x/."] if answers[:1] == [b"l"] else ["/x"])


async def test_nothing_there_is_none_and_other_failures_are_errors(world: World) -> None:
    vm = await world.create()
    world.agent.exits[requests.Stat.KIND] = b"\x02\0\0\0\x02no such"
    assert await world.vms.stat(vm, "/x") is None
    world.agent.exits[requests.Stat.KIND] = b"\x02\0\0\0\x0dno"
    with pytest.raises(BangerError, match="no"):
        await world.vms.stat(vm, "/x")


async def test_a_vm_that_is_kept_is_no_longer_of_its_session(world: World) -> None:
    vm = await world.create(ephemeral=True)
    await world.vms.keep(vm)
    (kept,) = await world.store.vms()
    assert not kept.spec.ephemeral
    assert kept.runtime.state is VmState.RUNNING
