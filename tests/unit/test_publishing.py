"""Published ports: of the host, of a VM's record, in a whole daemon over fake drivers.

The sockets of the host are real ones on loopback addresses, with ports that the kernel chose.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from unittest.mock import DEFAULT, patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import (
    Ambiguous,
    BadRequest,
    Conflict,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
)
from banger.base.log import OperationLog
from banger.base.model import PublishedPort, Vm, VmState
from banger.base.ports import format_address
from banger.guest.requests import Connect, Sockets
from banger.services import listeners
from banger.services.guest_sockets import decode_sockets
from banger.services.listeners import bind, explain, holder_of, numbered, open_listener
from banger.services.ports import with_port, without_port
from banger.services.vm_spec import CreateRequest
from loopback import any_port, dial, hang_up, is_reset
from records import a_vm
from world import World, ended, made_world

_TIMEOUT_S = 10.0


# Ports of the host


async def test_the_holder_of_a_port_is_named() -> None:
    port = await any_port()
    with await open_listener(port):
        with pytest.raises(Conflict, match="is in use by") as refused:
            await open_listener(port)
        assert f"(pid {os.getpid()})" in refused.value.message
        assert format_address(port.host, port.host_port) in refused.value.message
        assert f"{port.host_port + 1}:80" in refused.value.hint
        assert f"(pid {os.getpid()})" in holder_of(replaced(port, host="0.0.0.0"))
    assert holder_of(port) == ""


async def test_an_ipv6_address_can_be_listened_at_beside_the_same_port_of_ipv4() -> None:
    port = await any_port(host="::1")
    with await open_listener(port), await open_listener(replaced(port, host="127.0.0.1")):
        assert f"(pid {os.getpid()})" in holder_of(port)


async def test_an_address_that_is_not_this_hosts_is_told_of() -> None:
    asked = PublishedPort(host="192.0.2.1", host_port=8080, guest_port=80)
    with pytest.raises(PreconditionFailed, match=r"192\.0\.2\.1 is not an address of this host"):
        await open_listener(asked)
    with pytest.raises(PreconditionFailed, match=r"192\.0\.2\.1 is not an address of this host"):
        await numbered([replaced(asked, host_port=0)], claimed=())


async def test_a_port_of_roots_is_told_of_with_another_to_take() -> None:
    """What the kernel answers an ordinary user; tests may run as root, who gets the port."""
    port = PublishedPort(host="127.0.0.1", host_port=80, guest_port=80)
    error = await explain(port, PermissionError(errno.EACCES, "Permission denied"))
    assert isinstance(error, PermissionDenied)
    assert error.message == "port 127.0.0.1:80 of this host is for root only"
    assert "8080:80" in error.hint


async def test_free_ports_are_drawn_once_each_and_not_from_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = iter([4001, 4001, 4002, 4003])

    class Bound:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", next(draws)

    monkeypatch.setattr(listeners, "bind", lambda host, port: Bound())
    asked = [PublishedPort(host="127.0.0.1", host_port=0, guest_port=80)] * 2
    claimed = [PublishedPort(host="0.0.0.0", host_port=4002, guest_port=1)]
    chosen = await numbered([*asked, replaced(asked[0], host_port=5000)], claimed)
    assert [each.host_port for each in chosen] == [4001, 4003, 5000]


async def test_when_no_port_is_free_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    port = await any_port()
    everything = [port]
    monkeypatch.setattr(listeners, "overlap", lambda one, other: True)
    with pytest.raises(Conflict, match=r"no port of 127\.0\.0\.1 is free"):
        await numbered([replaced(port, host_port=0)], everything)


def replaced(port: PublishedPort, **fields: Any) -> PublishedPort:
    return msgspec.structs.replace(port, **fields)


# The capability, in a whole daemon


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as world:
        world.agent.stdout[Connect.KIND] = b"hello from the guest"
        world.agent.stdout[Sockets.KIND] = b"[]"
        yield world


async def greeting(port: PublishedPort) -> bytes:
    client = await dial(port)
    said = await client[0].read()
    await hang_up(client)
    return said


async def is_closed(port: PublishedPort) -> bool:
    try:
        await hang_up(await dial(port))
    except ConnectionRefusedError:
        return True
    return False


async def publish(world: World, name: str, port: PublishedPort) -> Vm:
    with OperationLog("vm.publish") as log:
        return await world.ports.publish(name, port, log)


async def unpublish(world: World, name: str, port: PublishedPort, host: str = "") -> Vm:
    with OperationLog("vm.unpublish") as log:
        return await world.ports.unpublish(name, host, port.host_port, log)


async def test_a_port_is_open_from_start_to_stop(world: World) -> None:
    port = await any_port()
    await world.create("web", published_ports=(port,))
    assert await greeting(port) == b"hello from the guest"
    await world.stop("web")
    assert await is_closed(port)
    await world.start("web")
    assert await greeting(port) == b"hello from the guest"
    await world.restart("web")
    assert await greeting(port) == b"hello from the guest"
    await world.delete("web", force=True)
    assert await is_closed(port)
    await world.assert_nothing_left()
    assert world.forwards._vms == {}


async def test_a_machine_that_ends_by_itself_closes_its_ports(world: World) -> None:
    port = await any_port()
    vm = await world.create("web", published_ports=(port,))
    world.processes.end(world.liveness.pid(vm))
    async with asyncio.timeout(_TIMEOUT_S):
        async for _ in world.vms.changes():
            if (await world.store.get_vm(vm.id)).runtime.state is VmState.STOPPED:  # type: ignore[union-attr]
                break
    assert await is_closed(port)


async def test_any_free_port_is_recorded_with_its_number(world: World) -> None:
    asked = PublishedPort(host="127.0.0.1", host_port=0, guest_port=80)
    vm = await world.create("web", published_ports=(asked,))
    (made,) = vm.spec.published_ports
    assert made.host_port > 0
    assert await greeting(made) == b"hello from the guest"
    vm = await publish(world, "web", asked)
    assert vm.spec.published_ports[0] == made
    assert vm.spec.published_ports[1].host_port not in (0, made.host_port)
    assert await greeting(vm.spec.published_ports[1]) == b"hello from the guest"


async def test_a_port_in_use_is_told_of_before_anything_is_made(world: World) -> None:
    ports = [await any_port(), await any_port()]
    with await open_listener(ports[0]), await open_listener(ports[1]):
        request = CreateRequest(name="web", image="base", published_ports=tuple(ports))
        done = await ended(world.begin(request))
    assert done.error is not None
    assert done.error.code == "precondition_failed"
    for port in ports:
        assert f"port 127.0.0.1:{port.host_port} of this host is in use" in done.error.message
    assert f"(pid {os.getpid()})" in done.error.message
    await world.assert_nothing_left()


async def test_a_port_that_is_taken_while_the_guest_boots_leaves_nothing(world: World) -> None:
    port = await any_port()
    taken = []

    def launched(_: object) -> object:
        taken.append(bind(port.host, port.host_port))
        taken[0].listen()
        return DEFAULT

    with patch.object(world.agent, "listen", wraps=world.agent.listen, side_effect=launched):
        request = CreateRequest(name="web", image="base", published_ports=(port,))
        done = await ended(world.begin(request))
    taken[0].close()
    assert done.error is not None
    assert done.error.code == "conflict"
    await world.assert_nothing_left()
    assert world.forwards._vms == {}


async def test_a_running_vm_can_publish_and_unpublish(world: World) -> None:
    await world.create("web")
    port = await any_port()
    assert (await publish(world, "web", port)).spec.published_ports == (port,)
    assert await greeting(port) == b"hello from the guest"
    assert (await publish(world, "web", port)).spec.published_ports == (port,)
    world.agent.exits[Connect.KIND] = None
    client = await dial(port)
    assert await client[0].readexactly(5) == b"hello"
    assert (await unpublish(world, "web", port)).spec.published_ports == ()
    assert await is_reset(client)
    await hang_up(client)
    assert await is_closed(port)
    with pytest.raises(NotFound, match="does not publish port"):
        await unpublish(world, "web", port)


async def test_what_cannot_be_opened_is_not_recorded(world: World) -> None:
    vm = await world.create("web")
    port = await any_port()
    with await open_listener(port), pytest.raises(Conflict, match="in use by"):
        await publish(world, "web", port)
    assert (await world.vms.show(vm.id)).spec.published_ports == ()
    assert await world.ports.show("web") == []


async def test_two_vms_that_run_cannot_publish_the_same_port(world: World) -> None:
    port = await any_port()
    await world.create("one", published_ports=(port,))
    await world.create("two")
    with pytest.raises(Conflict, match='is published by vm "one"') as refused:
        await publish(world, "two", replaced(port, host="0.0.0.0", guest_port=81))
    assert f"banger vm unpublish one 127.0.0.1:{port.host_port}" in refused.value.hint
    await world.change("one", name="first")
    with pytest.raises(Conflict, match='is published by vm "first"'):
        await publish(world, "two", port)
    assert await greeting(port) == b"hello from the guest"


async def test_a_stopped_vms_port_may_be_taken_and_its_start_says_so(world: World) -> None:
    port = await any_port()
    await world.create("one", published_ports=(port,))
    await world.stop("one")
    await world.create("two", published_ports=(port,))
    with pytest.raises(PreconditionFailed, match='is published by vm "two"'):
        await world.start("one")
    await world.stop("two")
    await world.start("one")
    assert await greeting(port) == b"hello from the guest"
    (shown,) = await world.ports.show("two")
    assert shown.published[0].problem == "the VM is stopped"


async def test_a_stopped_vm_publishes_when_it_starts(world: World) -> None:
    port = await any_port()
    await world.create("web")
    await world.stop("web")
    await publish(world, "web", port)
    assert await is_closed(port)
    await world.start("web")
    assert await greeting(port) == b"hello from the guest"


async def test_the_next_daemon_opens_the_ports_again(world: World) -> None:
    ports = [await any_port(), await any_port()]
    await world.create("web", published_ports=tuple(ports))
    following = await world.restarted()
    assert await is_closed(ports[0])
    with await open_listener(ports[0]):
        await following.reconcile()
        assert await greeting(ports[1]) == b"hello from the guest"
        (shown,) = await following.ports.show("web")
        assert "is in use by" in shown.published[0].problem
        assert shown.published[1].problem == ""
        with pytest.raises(Conflict, match="is in use by"):
            await publish(following, "web", ports[0])
    await publish(following, "web", ports[0])
    assert await greeting(ports[0]) == b"hello from the guest"
    (shown,) = await following.ports.show("web")
    assert [each.problem for each in shown.published] == ["", ""]
    await following.close()


async def test_a_daemon_that_ends_closes_the_ports(world: World) -> None:
    port = await any_port()
    await world.create("web", published_ports=(port,))
    await world.forwards.close()
    assert await is_closed(port)


async def test_a_connection_is_a_use_of_the_vm(world: World) -> None:
    port = await any_port()
    vm = await world.create("web", published_ports=(port,))
    before = (await world.vms.show(vm.id)).touched_at
    world.agent.exits[Connect.KIND] = None
    client = await dial(port)
    await client[0].readexactly(5)
    assert world.vms.has_sessions(vm.id)
    async with asyncio.timeout(_TIMEOUT_S):
        while (await world.vms.show(vm.id)).touched_at == before:
            await asyncio.sleep(0.01)
    await hang_up(client)
    await world.stop("web")
    assert not world.vms.has_sessions(vm.id)


@pytest.mark.parametrize("asked", [("127.0.0.1", 99999, 80), ("nowhere", 80, 80), ("::1", 1, 0)])
async def test_a_request_with_no_such_port_is_refused(
    world: World, asked: tuple[str, int, int]
) -> None:
    port = PublishedPort(host=asked[0], host_port=asked[1], guest_port=asked[2])
    with pytest.raises(BadRequest):
        await publish(world, "web", port)
    with pytest.raises(BadRequest):
        world.creator.check(CreateRequest(published_ports=(port,)))


# The record


def publishing_vm(*ports: tuple[str, int]) -> Vm:
    vm = a_vm("web")
    made = tuple(PublishedPort(host=host, host_port=port, guest_port=80) for host, port in ports)
    return msgspec.structs.replace(vm, spec=msgspec.structs.replace(vm.spec, published_ports=made))


def test_a_port_is_published_once() -> None:
    vm = publishing_vm(("127.0.0.1", 8080))
    assert with_port(vm, vm.spec.published_ports[0]) is vm
    with pytest.raises(Conflict, match=r"publishes 127\.0\.0\.1:8080 already, for port 80") as no:
        with_port(vm, PublishedPort(host="0.0.0.0", host_port=8080, guest_port=81))
    assert "banger vm unpublish web 127.0.0.1:8080" in no.value.hint


def test_a_port_at_several_addresses_is_unpublished_by_its_address() -> None:
    vm = publishing_vm(("127.0.0.1", 8080), ("::1", 8080), ("127.0.0.1", 8081))
    with pytest.raises(Ambiguous) as refused:
        without_port(vm, "", 8080)
    assert "127.0.0.1:8080, [::1]:8080" in refused.value.hint
    assert [str(each) for each in without_port(vm, "::1", 8080).spec.published_ports] == [
        "127.0.0.1:8080:80",
        "127.0.0.1:8081:80",
    ]
    assert len(without_port(vm, "", 8081).spec.published_ports) == 2


def test_what_is_not_published_cannot_be_unpublished() -> None:
    vm = publishing_vm(("127.0.0.1", 8080))
    with pytest.raises(NotFound, match="does not publish") as refused:
        without_port(vm, "127.0.0.2", 8080)
    assert refused.value.hint == "it publishes 127.0.0.1:8080"
    with pytest.raises(NotFound) as refused:
        without_port(publishing_vm(), "", 80)
    assert refused.value.hint == "it publishes nothing"


# What listens in a guest


def listening(port: int, address: str = "0.0.0.0", **fields: object) -> dict[str, object]:
    made = {"protocol": "tcp", "address": address, "port": port, "pid": 7, "command": "nginx"}
    return made | fields


def answers(world: World, *sockets: dict[str, object]) -> None:
    world.agent.stdout[Sockets.KIND] = msgspec.json.encode(sockets)


async def test_listening_and_published_ports_are_joined(world: World) -> None:
    ports = [await any_port(guest) for guest in (80, 80, 81, 82)]
    await world.create("web", published_ports=tuple(ports))
    answers(world, listening(80), listening(80, "::"), listening(22), listening(82, "172.16.0.2"))
    shown = {each.guest_port: each for each in await world.ports.show("web")}
    assert list(shown) == [22, 80, 81, 82]
    assert shown[22].published == ()
    assert [each.host_port for each in shown[80].published] == [
        each.host_port for each in ports[:2]
    ]
    assert [each.address for each in shown[80].sockets] == ["0.0.0.0", "::"]
    assert shown[80].problem == shown[22].problem == ""
    assert shown[81].problem == "nothing listens on it in the guest"
    assert shown[82].problem.startswith("it listens on 172.16.0.2 of the guest only")
    assert {each.vm_name for each in shown.values()} == {"web"}


async def test_a_guest_that_cannot_be_asked_does_not_hide_the_others(world: World) -> None:
    port = await any_port()
    await world.create("bad", published_ports=(port,))
    await world.create("off", published_ports=(await any_port(),))
    await world.stop("off")
    world.agent.stdout[Sockets.KIND] = b"nonsense"
    (shown,) = await world.ports.show()
    assert (shown.vm_name, shown.problem) == ("bad", "the guest does not answer")
    assert shown.published[0].host_port == port.host_port
    with pytest.raises(BadRequest, match="answered a SOCKETS with nonsense"):
        await world.ports.show("bad")


def test_a_command_of_a_guest_cannot_command_a_terminal() -> None:
    (found,) = decode_sockets(msgspec.json.encode([listening(80, command="\x1b[2Jx\x9b")]))
    assert found.command == "?[2Jx?"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        b"\xff",
        msgspec.json.encode([listening(0)]),
        msgspec.json.encode([listening(65536)]),
        msgspec.json.encode([listening(80, protocol="udp")]),
        msgspec.json.encode([listening(80, "fe80::1%\x1b[2J")]),
        msgspec.json.encode([listening(80, "nowhere")]),
        msgspec.json.encode([listening(80, pid=-1)]),
        msgspec.json.encode([listening(80, pid=1 << 40)]),
        msgspec.json.encode([listening(80, command="x" * 65)]),
        msgspec.json.encode([listening(80)] * 1025),
        b'[{"protocol":"tcp","address":"::","port":' + b"9" * 5000 + b',"pid":1,"command":""}]',
    ],
)
def test_a_hostile_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(BadRequest, match="answered a SOCKETS with nonsense"):
        decode_sockets(answer)


@given(
    st.binary(max_size=200)
    | st.lists(
        st.fixed_dictionaries(
            {
                "protocol": st.sampled_from(["tcp", "udp"]),
                "address": st.ip_addresses().map(str) | st.text(max_size=70),
                "port": st.integers(-1, 70000),
                "pid": st.integers(),
                "command": st.text(max_size=70),
            }
        ),
        max_size=3,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_answer_is_decoded_or_refused(answer: bytes) -> None:
    with suppress(BadRequest):
        for each in decode_sockets(answer):
            assert 0 < each.port < 65536
            assert each.command.isprintable()
            assert each.address.isprintable()
            assert each.reachable in (True, False)
