"""Ports that are open by themselves, in a whole daemon over fake drivers and real loopback sockets.

The guest's agent is a fake that says its line and ends; it is asked again at once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from banger.base.log import OperationLog
from banger.base.model import PublishedPort, Vm
from banger.guest.channel import ExitKind
from banger.guest.requests import Connect, Listeners, Sockets
from banger.services import automatic_ports
from loopback import dial, hang_up
from world import World, made_world

_TIMEOUT_S = 10.0
FIRST, SECOND = 18080, 18081


def listening(*where: tuple[str, int]) -> bytes:
    return json.dumps(
        [
            {"protocol": "tcp", "address": address, "port": port, "pid": 0, "command": ""}
            for address, port in where
        ]
    ).encode()


def tell(world: World, *where: tuple[str, int]) -> None:
    """What listens in all guests from now on."""
    world.agent.stdout[Sockets.KIND] = listening(*where)
    world.agent.stdout[Listeners.KIND] = listening(*where) + b"\n"


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name in ("_DELAY_S", "_DELAY_MAX_S", "_PACE_S"):
        monkeypatch.setattr(automatic_ports, name, 0.01)
    async with made_world(short_path, monkeypatch, forward_ports=True) as world:
        world.agent.stdout[Connect.KIND] = b"hello from the guest"
        tell(world)
        yield world


def at(vm: Vm, number: int = FIRST) -> PublishedPort:
    return PublishedPort(host=vm.runtime.address, host_port=number, guest_port=number)


async def greeting(port: PublishedPort) -> bytes:
    """Empty when nothing listens."""
    try:
        client = await dial(port)
    except ConnectionRefusedError:
        return b""
    said = await client[0].read()
    await hang_up(client)
    return said


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not await holds():
            await asyncio.sleep(0.01)


async def opens(port: PublishedPort) -> None:
    await until(lambda: greeting(port))


async def closes(port: PublishedPort) -> None:
    async def closed() -> bool:
        return not await greeting(port)

    await until(closed)


async def problem(world: World, vm: Vm, number: int = FIRST) -> str:
    (found,) = [each for each in await world.ports.show(vm.name) if each.guest_port == number]
    assert found.automatic is not None
    assert (found.automatic.host, found.automatic.host_port) == (vm.runtime.address, number)
    return found.automatic.problem


async def test_what_listens_is_open_at_the_vms_address_for_as_long_as_it_does(
    world: World,
) -> None:
    tell(world, ("0.0.0.0", FIRST), ("::", SECOND), ("10.0.0.1", 18082), ("0.0.0.0", 1023))
    web, db = await world.create("web"), await world.create("db")
    for vm in (web, db):
        await opens(at(vm))
        await opens(at(vm, SECOND))
        assert await greeting(at(vm, 18082)) == await greeting(at(vm, 1023)) == b""
    assert await problem(world, web) == ""
    listed = {each.guest_port: each.automatic for each in await world.ports.show("web")}
    assert listed[1023] is listed[18082] is None
    tell(world, ("::", SECOND))
    await closes(at(web))
    assert await greeting(at(web, SECOND))
    await world.stop("web")
    assert await greeting(at(web, SECOND)) == b""
    assert await greeting(at(db, SECOND))
    await world.delete("db", force=True)
    assert await greeting(at(db, SECOND)) == b""
    assert world.forwards._vms == {}
    assert world.automatic_ports._watches == {}


async def test_the_next_daemon_opens_them_again(world: World) -> None:
    tell(world, ("127.0.0.1", FIRST))
    vm = await world.create("web")
    await opens(at(vm))
    following = await world.restarted()
    assert await greeting(at(vm)) == b""
    await following.reconcile()
    await opens(at(vm))
    await following.delete("web", force=True)
    await following.close()


async def test_a_guest_has_so_many_ports_and_keeps_those_that_are_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic_ports, "VM_PORTS_MAX", 3)
    tell(world, *(("0.0.0.0", 18100 + number) for number in range(3)))
    vm = await world.create("web")
    await opens(at(vm, 18102))
    tell(world, *(("0.0.0.0", 18090 + number) for number in range(100)))
    await asyncio.sleep(0.1)
    assert {each.host_port for each in world.forwards.automatic(vm.id)} == {18100, 18101, 18102}
    assert "3 ports of this VM are open by themselves" in await problem(world, vm, 18090)
    assert await problem(world, vm, 18100) == ""
    monkeypatch.setattr(automatic_ports, "PORTS_MAX", 3)
    other = await world.create("other")
    await asyncio.sleep(0.1)
    assert "3 ports of VMs are open by themselves" in await problem(world, other, 18100)


async def test_a_port_that_the_host_has_taken_is_told_of_and_opened_when_it_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic_ports, "_TRY_AGAIN_S", 0.05)
    world.agent.exits[Listeners.KIND] = None
    vm = await world.create("web")
    taken = await asyncio.start_server(lambda _, __: None, vm.runtime.address, FIRST)
    await world.stop("web")
    tell(world, ("0.0.0.0", FIRST))
    await world.start("web")

    async def told() -> bool:
        return "is in use by" in await problem(world, vm)

    await until(told)
    taken.close()
    await taken.wait_closed()
    await opens(at(vm))


async def test_what_somebody_publishes_goes_before_what_is_open_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic_ports, "_TRY_AGAIN_S", 0.05)
    tell(world, ("0.0.0.0", FIRST))
    web, db = await world.create("web"), await world.create("db")
    await opens(at(web))
    await opens(at(db))
    everywhere = PublishedPort(host="0.0.0.0", host_port=FIRST, guest_port=FIRST)
    with OperationLog("vm.publish") as log:
        await world.ports.publish("db", everywhere, log)
    assert await greeting(at(web))  # it leads to the other one now

    async def told() -> bool:
        return 'is published by vm "db"' in await problem(world, web)

    await until(told)
    assert await problem(world, db) == ""
    with OperationLog("vm.unpublish") as log:
        await world.ports.unpublish("db", "", FIRST, log)
    await opens(at(web))
    await opens(at(db))


async def test_a_start_does_not_fail_over_an_automatic_port(world: World) -> None:
    tell(world, ("0.0.0.0", FIRST))
    await opens(at(await world.create("web")))
    everywhere = PublishedPort(host="0.0.0.0", host_port=FIRST, guest_port=80)
    await world.create("db", published_ports=(everywhere,))


async def test_an_agent_of_an_older_banger_is_asked_once(world: World) -> None:
    failed = struct.pack(">BI", ExitKind.FAILED, errno.EINVAL) + b"unknown kind of request: 13"
    world.agent.exits[Listeners.KIND] = failed
    world.agent.stdout[Sockets.KIND] = listening(("0.0.0.0", FIRST))
    world.agent.stdout[Listeners.KIND] = b""
    vm = await world.create("web")

    async def told() -> bool:
        return "restart the VM" in await problem(world, vm)

    await until(told)
    await asyncio.sleep(0.1)
    assert world.agent.opened.count(Listeners.KIND) == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        b"nonsense\n",
        b"[]\n" * 1000 + b"{}\n",
        listening(*(("0.0.0.0", 20000 + number) for number in range(2000))) + b"\n",
    ],
)
async def test_what_a_hostile_guest_tells_opens_nothing_and_stops_nothing(
    world: World, nonsense: bytes
) -> None:
    tell(world, ("0.0.0.0", FIRST))
    world.agent.stdout[Listeners.KIND] = nonsense
    vm = await world.create("web")

    async def told() -> bool:
        return await problem(world, vm) not in ("", "it is about to open")

    await until(told)
    assert list(world.forwards.automatic(vm.id)) == []
    tell(world, ("0.0.0.0", FIRST))
    await opens(at(vm))


async def test_asking_for_its_name_has_the_guest_look(world: World) -> None:
    world.agent.exits[Listeners.KIND] = None
    vm = await world.create("web")

    async def followed() -> bool:
        return world.automatic_ports._watches[vm.id].stream is not None

    await until(followed)
    world.addresses.address_of("web")
    wish = world.automatic_ports._watches[vm.id].wish
    assert wish is not None
    world.addresses.address_of("web")
    assert world.automatic_ports._watches[vm.id].wish is wish


async def test_turned_off_nothing_is_open(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch) as world:
        tell(world, ("0.0.0.0", FIRST))
        await world.create("web")
        (listed,) = await world.ports.show("web")
        assert listed.automatic is None
        assert world.automatic_ports._watches == {}
