"""From a request to a service and back, over the real socket and fake drivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from errno import EACCES, ECONNREFUSED, ENOENT
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import __version__
from banger.base.errors import (
    BadRequest,
    BangerError,
    Conflict,
    NotFound,
    Unavailable,
    UnknownMethod,
)
from banger.base.model import ImageConfig, Operation, OperationState, Vm, VmState
from banger.base.opid import is_op_id
from banger.daemon import sessions
from banger.daemon.dispatch import Dispatch, Services
from banger.drivers import registry
from banger.guest import requests
from banger.hostops.client import HelperHost
from banger.rpc.client import Client
from banger.rpc.protocol import Exit, FrameType, decode_exit, encode_json, frame
from banger.rpc.server import Server
from banger.services.doctor import Doctor
from banger.services.name_routing import NameRouting
from fakes import failing
from test_requests import fields_of
from world import World, ended, made_world

_TIMEOUT_S = 20.0
DRIVERS = ("hypervisor", "storage", "network")


class Daemon:
    """A world that is served."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stopping = asyncio.Event()
        names = registry.name_server(None, world.addresses, [])
        self.server = Server(
            world.paths.daemon_socket,
            Dispatch(
                Services(
                    paths=world.paths,
                    drivers=world.drivers,
                    operations=world.operations,
                    images=world.images,
                    image_maker=world.image_maker,
                    image_bundles=world.image_bundles,
                    image_pulls=world.image_pulls,
                    image_imports=world.image_imports,
                    image_cache=world.image_cache,
                    kernels=world.kernels,
                    vms=world.vms,
                    creator=world.creator,
                    lifecycle=world.lifecycle,
                    health=world.health,
                    prune=world.prune,
                    ports=world.ports,
                    stats=world.stats,
                    templates=world.templates,
                    standbys=world.standbys,
                    snapshots=world.snapshots,
                    forks=world.forks,
                    suspension=world.suspension,
                    workspaces=world.workspaces,
                    fork_runs=world.fork_runs,
                    results=world.results,
                    ssh=world.ssh,
                    names=names,
                    doctor=Doctor(
                        world.paths,
                        world.drivers,
                        [],
                        NameRouting(HelperHost(Path("/nowhere")), names),
                    ),
                    reasons={each: f"why this {each}" for each in DRIVERS},
                    stop=self.stopping.set,
                )
            ),
        )

    async def use(self, work: Callable[[Client], Any]) -> Any:
        """`work` with a client of its own, in a thread: the client is synchronous."""

        def connected() -> Any:
            with Client.connect(self.world.paths, start=False) as client:
                return work(client)

        return await asyncio.wait_for(asyncio.to_thread(connected), _TIMEOUT_S)

    async def call(self, method: str, params: object = None, result: Any = Any) -> Any:
        return await self.use(lambda client: client.call(method, params or {}, result))


@pytest.fixture
async def daemon(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    async with made_world(short_path, monkeypatch) as world:
        world.paths.runtime_dir.mkdir(mode=0o700)
        made = Daemon(world)
        await made.server.start()
        yield made
        await asyncio.wait_for(made.server.stop(), _TIMEOUT_S)


CREATE = {"name": "box", "image": "base"}
COMMAND = {"argv": ["true"]}


async def test_an_unknown_method_is_named_with_what_to_do(daemon: Daemon) -> None:
    with pytest.raises(UnknownMethod, match=r'unknown method "vm\.fly"') as caught:
        await daemon.call("vm.fly")
    assert "banger daemon restart" in caught.value.hint
    assert is_op_id(caught.value.op_id)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("vm.show", {}),
        ("vm.show", {"vm": 7}),
        ("vm.show", []),
        ("vm.show", "box"),
        ("vm.delete", {"vm": "box", "force": "yes"}),
        ("vm.create.begin", {"vcpu_count": "many"}),
        ("vm.create.begin", {"init": "upstart"}),
        ("vm.exec", {"vm": "box", "command": {"rows": 70000}}),
        ("vm.exec", {"vm": "box", "command": {"rows": -1}}),
    ],
)
async def test_bad_parameters_are_bad_requests_that_name_the_method(
    daemon: Daemon, method: str, params: object
) -> None:
    with pytest.raises(BadRequest, match=f"bad parameters for {method}: "):
        await daemon.use(lambda client: client.call(method, params, Any))


@pytest.mark.parametrize(
    "params", [b'{"vm":"\xff"}', b'{"vm":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"vm":"\\ud800"}']
)
async def test_parameters_that_are_no_text_are_bad_requests(daemon: Daemon, params: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(daemon.world.paths.daemon_socket)
    writer.write(b'{"version":1,"method":"vm.show","params":' + params + b"}\n")
    error = msgspec.json.decode(await asyncio.wait_for(reader.readline(), _TIMEOUT_S))["error"]
    assert error["code"] == "bad_request"
    writer.close()
    await writer.wait_closed()


async def test_unknown_parameters_are_ignored(daemon: Daemon) -> None:
    with pytest.raises(NotFound):
        await daemon.call("vm.show", {"vm": "box", "of_tomorrow": 1})


async def test_the_status_tells_what_is_served(daemon: Daemon) -> None:
    await daemon.world.create("box")
    await daemon.world.create("other")
    await daemon.world.stop("other")
    status = await daemon.call("daemon.status")
    assert (status["version"], status["vms"], status["running_vms"]) == (__version__, 2, 1)
    assert [status[each] for each in DRIVERS] == ["fake", "fake", "user"]
    reasons = [status[f"{each}_reason"] for each in DRIVERS]
    assert reasons == [f"why this {each}" for each in DRIVERS]


async def test_stopping_is_answered_and_then_done(daemon: Daemon) -> None:
    assert await daemon.call("daemon.stop") == {}
    await asyncio.wait_for(daemon.stopping.wait(), _TIMEOUT_S)


async def test_a_creation_begins_is_watched_and_gives_the_vm(daemon: Daemon) -> None:
    def work(client: Client) -> tuple[str, list[Operation], Operation, Operation]:
        events: list[Operation] = []
        begun = client.call("vm.create.begin", CREATE, dict[str, str])["operation_id"]
        done = client.call(
            "operations.watch",
            {"id": begun},
            Operation,
            on_event=lambda raw: events.append(msgspec.json.decode(raw, type=Operation)),
        )
        return begun, events, done, client.call("vm.create.status", {"id": begun}, Operation)

    begun, events, done, status = await daemon.use(work)
    assert is_op_id(begun)
    assert all(not event.done and event.id == begun for event in events)
    assert done == status
    assert done.state is OperationState.COMPLETED
    assert done.vm.name == "box"
    assert [each["id"] for each in await daemon.call("operations.list")] == [begun]
    shown = await daemon.call("vm.show", {"vm": "box"}, Vm)
    assert shown == done.vm
    assert await daemon.call("vm.list", {}, list[Vm]) == [shown]


async def test_a_creation_is_cancelled_from_another_connection(daemon: Daemon) -> None:
    daemon.world.agent.silent = True
    begun = (await daemon.call("vm.create.begin", CREATE))["operation_id"]
    async for state in daemon.world.operations.get(begun).changes():
        if state.stage == "boot":
            break
    state = await daemon.call("vm.create.cancel", {"id": begun}, Operation)
    assert state.state is OperationState.CANCELLED
    await daemon.world.assert_nothing_left()


async def test_only_a_session_can_have_an_ephemeral_vm(daemon: Daemon) -> None:
    with pytest.raises(BadRequest, match="ephemeral"):
        await daemon.call("vm.create.begin", CREATE | {"ephemeral": True})
    for command in (None, {"argv": ["x"], "detach": True}):
        with pytest.raises(BadRequest, match="cannot be detached"):
            await daemon.call(
                "vm.run", {"create": CREATE | {"ephemeral": True}, "command": command}
            )
    await daemon.world.assert_nothing_left()


async def test_vms_are_stopped_and_deleted(daemon: Daemon) -> None:
    await daemon.world.create("box")
    with pytest.raises(Conflict, match="is running"):
        await daemon.call("vm.delete", {"vm": "box"})
    assert (await daemon.call("vm.stop", {"vm": "box"}, Vm)).runtime.state is VmState.STOPPED
    assert (await daemon.call("vm.delete", {"vm": "box"}, Vm)).name == "box"
    await daemon.world.assert_nothing_left()


async def test_images_and_kernels_are_shown_and_deleted(daemon: Daemon) -> None:
    assert [each["name"] for each in await daemon.call("image.list")] == ["base"]
    assert [each["name"] for each in await daemon.call("kernel.list")] == ["debian"]
    assert (await daemon.call("image.show", {"image": "base"}))["name"] == "base"
    assert (await daemon.call("image.delete", {"image": "base"}))["name"] == "base"
    assert await daemon.call("image.list") == []


Ran = tuple[Any, list[tuple[FrameType, bytes]]]


def run_to_the_end(method: str, params: object, send: bytes = b"") -> Callable[[Client], Ran]:
    """(result line, frames) of a switching method."""

    def work(client: Client) -> Ran:
        result = client.call(method, params, Any)
        session = client.session()
        if send:
            session.send_some(bytearray(send))
        frames: list[tuple[FrameType, bytes]] = []
        arrived = session.pending()
        while not frames or frames[-1][0] is not FrameType.EXIT:
            frames += [(kind, bytes(payload)) for kind, payload in arrived]
            if frames and frames[-1][0] is FrameType.EXIT:
                break
            arrived = session.receive()
        return result, frames

    return work


def exit_of(ran: Ran) -> Exit:
    return decode_exit(ran[1][-1][1])


async def test_a_command_in_a_vm_gives_its_output_and_its_exit(daemon: Daemon) -> None:
    await daemon.world.create("box")
    daemon.world.agent.stdout[requests.Exec.KIND] = b"hello"
    daemon.world.agent.exits[requests.Exec.KIND] = b"\0\0\0\0\x07"
    ran = await daemon.use(run_to_the_end("vm.exec", {"vm": "box", "command": COMMAND}))
    assert ran[0]["vm"]["name"] == "box"
    assert ran[1][:-1] == [(FrameType.DATA, b"hello")]
    assert exit_of(ran) == Exit(exit_code=7)


async def test_a_command_in_a_vm_that_does_not_run_is_refused(daemon: Daemon) -> None:
    await daemon.world.create("box")
    await daemon.world.stop("box")
    with pytest.raises(BangerError, match='vm "box" is stopped'):
        await daemon.call("vm.exec", {"vm": "box", "command": COMMAND})


async def test_a_command_whose_machine_is_stopped_is_told_that_it_has_ended(daemon: Daemon) -> None:
    await daemon.world.create("box")
    daemon.world.agent.stdout[requests.Exec.KIND] = b"hello"
    daemon.world.agent.exits[requests.Exec.KIND] = None
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(client: Client) -> Exit:
        client.call("vm.exec", {"vm": "box", "command": COMMAND}, Any)
        session = client.session()
        arrived = session.pending()
        while True:
            for kind, payload in arrived:
                if kind is FrameType.EXIT:
                    return decode_exit(payload)
                loop.call_soon_threadsafe(began.set)
            arrived = session.receive()

    running = asyncio.create_task(daemon.use(work))
    await asyncio.wait_for(began.wait(), _TIMEOUT_S)
    await daemon.world.stop("box")
    error = (await running).error
    assert error is not None
    assert error.message == 'vm "box" has ended, and with it what ran in it'
    assert error.hint == "why: banger vm show box"


REFUSED = b"\2\0\0\0" + bytes([ECONNREFUSED]) + b"Connection refused"


async def test_a_connection_to_a_port_says_why_there_is_none(daemon: Daemon) -> None:
    await daemon.world.create("box")
    daemon.world.agent.exits[requests.Connect.KIND] = REFUSED
    ran = await daemon.use(run_to_the_end("vm.connect", {"vm": "box", "port": 80}))
    error = exit_of(ran).error
    assert error is not None
    assert error.message == 'port 80 of vm "box": Connection refused'
    assert error.hint == "what listens in it: banger vm ports box"
    for bad in (0, 65536, "ssh"):
        with pytest.raises(BadRequest):
            await daemon.call("vm.connect", {"vm": "box", "port": bad})


async def test_a_server_that_speaks_first_is_waited_for(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_GREETING_POLL_S", 0.001)
    await daemon.world.create("box")
    agent, kind = daemon.world.agent, requests.Connect.KIND
    agent.exits[kind] = REFUSED
    params = {"vm": "box", "port": 22, "greeting_timeout_s": 10}
    connecting = asyncio.create_task(daemon.use(run_to_the_end("vm.connect", params)))
    while agent.opened.count(kind) < 3:
        await asyncio.sleep(0.001)
    agent.stdout[kind], agent.exits[kind] = b"SSH-2.0-x", b"\0\0\0\0\0"
    ran = await connecting
    assert ran[1][:-1] == [(FrameType.DATA, b"SSH-2.0-x")]
    assert exit_of(ran) == Exit(exit_code=0)


@pytest.mark.parametrize(
    ("ends", "why"),
    [(REFUSED, "Connection refused"), (None, "it says nothing"), (b"\0\0\0\0\0", "it hangs up")],
)
async def test_a_server_that_never_speaks_is_given_up(
    daemon: Daemon, ends: bytes | None, why: str
) -> None:
    await daemon.world.create("box")
    daemon.world.agent.exits[requests.Connect.KIND] = ends
    params = {"vm": "box", "port": 22, "greeting_timeout_s": 0.3}
    with pytest.raises(Unavailable, match=f'port 22 of vm "box": {why}'):
        await daemon.call("vm.connect", params)


async def test_who_waits_for_a_server_and_goes_leaves_nothing_open(daemon: Daemon) -> None:
    await daemon.world.create("box")
    agent, kind = daemon.world.agent, requests.Connect.KIND
    agent.exits[kind] = None
    _, writer = await asyncio.open_unix_connection(daemon.world.paths.daemon_socket)
    request = b'{"version":1,"method":"vm.connect","params":{"vm":"box","port":22,'
    writer.write(request + b'"greeting_timeout_s":1000}}\n')
    while agent.opened.count(kind) < 1:
        await asyncio.sleep(0.001)
    writer.close()
    await writer.wait_closed()
    while daemon.world.vms._sessions:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("env", ["NOEQUALS", "=x", ""])
async def test_an_environment_that_is_none_is_refused(daemon: Daemon, env: str) -> None:
    await daemon.world.create("box")
    with pytest.raises(BadRequest, match="is not K=V"):
        await daemon.call("vm.exec", {"vm": "box", "command": COMMAND | {"env": [env]}})


@pytest.mark.parametrize("ephemeral", [False, True])
async def test_a_run_creates_runs_and_deletes_only_what_is_its_sessions(
    daemon: Daemon, ephemeral: bool
) -> None:
    daemon.world.agent.exits[requests.Exec.KIND] = b"\1\0\0\0\x09"
    params = {"create": CREATE | {"ephemeral": ephemeral}, "command": COMMAND}
    ran = await daemon.use(run_to_the_end("vm.run", params))
    assert exit_of(ran) == Exit(signal=9)
    if ephemeral:
        await daemon.world.assert_nothing_left()
    else:
        assert (await daemon.world.vms.running("box")).name == "box"


async def test_a_run_without_a_command_makes_the_vm_and_the_connection_goes_on(
    daemon: Daemon,
) -> None:
    def work(client: Client) -> list[str]:
        made = client.call("vm.run", {"create": CREATE}, dict[str, Vm])["vm"]
        return [made.name, *(vm.name for vm in client.call("vm.list", {}, list[Vm]))]

    assert await daemon.use(work) == ["box", "box"]


async def test_a_detached_command_is_answered_without_a_session(daemon: Daemon) -> None:
    params = {"create": CREATE, "command": COMMAND | {"detach": True}}
    assert (await daemon.call("vm.run", params))["vm"]["name"] == "box"
    daemon.world.agent.exits[requests.Exec.KIND] = b"\2\0\0\0\x02no such program"
    with pytest.raises(NotFound, match="no such program") as caught:
        await daemon.call("vm.run", {**params, "create": CREATE | {"name": "two"}})
    assert caught.value.hint == "the VM runs: banger vm delete --force two"
    await daemon.world.configure_image(CONFIG)
    with pytest.raises(NotFound) as caught:
        await daemon.call("vm.run", {**params, "create": CREATE | {"name": "three"}})
    assert "as another user: -u root" in caught.value.hint


CONFIG = ImageConfig(
    env=("A=image", "B=image", "broken"), user="app", working_dir="/srv",
    entrypoint=("serve",), cmd=("80",),
)  # fmt: skip


def programs(daemon: Daemon) -> list[list[bytes]]:
    """The arguments of what was run."""
    return [
        [value for tag, value in fields_of(each) if tag == 1]
        for each in daemon.world.agent.programs
    ]


@pytest.mark.parametrize(
    ("params", "argv"),
    [
        ({"command": COMMAND}, [b"serve", b"true"]),
        ({"command": {}}, [b"serve", b"80"]),
        ({"command": {"detach": True}}, [b"serve", b"80"]),
        ({"command": COMMAND, "entrypoint": ""}, [b"true"]),
        ({"command": COMMAND, "entrypoint": "sh"}, [b"sh", b"true"]),
        ({"command": {}, "entrypoint": ""}, []),
    ],
)
async def test_a_run_gives_its_words_to_the_images_entrypoint(
    daemon: Daemon, params: dict[str, Any], argv: list[bytes]
) -> None:
    await daemon.world.configure_image(CONFIG)
    if params["command"].get("detach"):
        assert "started" not in await daemon.call("vm.run", {"create": CREATE} | params)
    else:
        await daemon.use(run_to_the_end("vm.run", {"create": CREATE} | params))
    assert programs(daemon) == [argv]


async def test_detached_without_any_command_nothing_is_started(daemon: Daemon) -> None:
    for name, entrypoint in (("one", None), ("two", "")):
        params = {"create": CREATE | {"name": name}, "command": {"detach": True}}
        made = await daemon.call("vm.run", params | {"entrypoint": entrypoint})
        assert (made["vm"]["name"], made["started"]) == (name, False)
        await daemon.world.configure_image(CONFIG)
    assert programs(daemon) == []


async def test_every_command_has_what_the_image_says_under_what_it_says_itself(
    daemon: Daemon,
) -> None:
    await daemon.world.configure_image(CONFIG)
    await daemon.world.create("box")
    asked = {"argv": ["ls"], "env": ["B=mine"], "cwd": "/tmp", "user": "root"}
    for command in ({"argv": ["ls"]}, {}, asked):
        await daemon.use(run_to_the_end("vm.exec", {"vm": "box", "command": command}))
    image = [(2, b"A=image"), (2, b"B=image"), (3, b"/srv"), (4, b"app")]
    assert [fields_of(each) for each in daemon.world.agent.programs] == [
        [(5, b"\0\0\0\x08"), *image, (1, b"ls")],
        [(5, b"\0\0\0\x1a"), *image],  # a shell in any case, not the entrypoint
        [(5, bytes(4)), (2, b"A=image"), (2, b"B=mine"), (3, b"/tmp"), (4, b"root"), (1, b"ls")],
    ]


@pytest.mark.parametrize(
    ("command", "error", "hint"),
    [
        ({}, ENOENT, 'its image runs programs as "app"; as another user: -u root'),
        ({}, EACCES, 'its image runs programs as "app"; as another user: -u root'),
        ({"user": "eve"}, ENOENT, ""),
        ({"cwd": "/nowhere"}, ENOENT, ""),
    ],
)
async def test_a_user_whom_only_the_image_knows_is_told_of(
    daemon: Daemon, command: dict[str, Any], error: int, hint: str
) -> None:
    await daemon.world.configure_image(CONFIG)
    await daemon.world.create("box")
    daemon.world.agent.exits[requests.Exec.KIND] = bytes((2, 0, 0, 0, error)) + b"no"
    ran = await daemon.use(run_to_the_end("vm.exec", {"vm": "box", "command": COMMAND | command}))
    told = exit_of(ran).error
    assert told is not None
    assert (told.message, told.hint) == ("no", hint)


async def test_a_run_that_cannot_create_tells_why_and_leaves_nothing(daemon: Daemon) -> None:
    daemon.world.hypervisor.gate.fail = failing("no machine")
    with pytest.raises(BangerError, match="no machine") as caught:
        await daemon.call("vm.run", {"create": CREATE | {"ephemeral": True}, "command": COMMAND})
    assert is_op_id(caught.value.op_id)
    await daemon.world.assert_nothing_left()


@pytest.mark.parametrize("ephemeral", [False, True])
async def test_a_client_that_goes_while_its_vm_is_made_takes_only_its_sessions_vm_along(
    daemon: Daemon, ephemeral: bool
) -> None:
    world = daemon.world
    world.storage.gate.block = True
    params = {"create": CREATE | {"ephemeral": ephemeral}, "command": COMMAND}
    _, writer = await asyncio.open_unix_connection(world.paths.daemon_socket)
    writer.write(encode_json({"version": 1, "method": "vm.run", "params": params}) + b"\n")
    await asyncio.wait_for(world.storage.gate.reached.wait(), _TIMEOUT_S)
    (operation,) = world.operations.all()
    writer.close()
    if ephemeral:
        done = await ended(world.operations.get(operation.id))
        assert done.state is OperationState.CANCELLED
        await world.assert_nothing_left()
    else:
        await asyncio.sleep(0.05)
        assert not world.operations.get(operation.id).record.done
        await world.operations.cancel(operation.id)


async def test_a_client_that_goes_while_its_command_runs_takes_its_sessions_vm_along(
    daemon: Daemon,
) -> None:
    world = daemon.world
    world.agent.exits[requests.Exec.KIND] = None
    params = {"create": CREATE | {"ephemeral": True}, "command": COMMAND}
    reader, writer = await asyncio.open_unix_connection(world.paths.daemon_socket)
    writer.write(encode_json({"version": 1, "method": "vm.run", "params": params}) + b"\n")
    while b'"result"' not in await asyncio.wait_for(reader.readline(), _TIMEOUT_S):
        pass
    writer.close()
    async with asyncio.timeout(_TIMEOUT_S):
        while await world.store.vms() or world.vms.locks._locks:
            await asyncio.sleep(0.005)
    await world.assert_nothing_left()


async def test_the_console_is_sent_to_its_end(daemon: Daemon) -> None:
    daemon.world.hypervisor.console = b"boot\n" * 100_000
    await daemon.world.create("box")
    ran = await daemon.use(run_to_the_end("vm.console", {"vm": "box"}))
    assert b"".join(payload for _, payload in ran[1][:-1]) == b"boot\n" * 100_000
    assert exit_of(ran) == Exit(exit_code=0)


async def test_what_a_client_says_while_a_console_is_sent_does_not_end_it(daemon: Daemon) -> None:
    daemon.world.hypervisor.console = b"boot\n"
    vm = await daemon.world.create("box")
    reader, writer = await asyncio.open_unix_connection(daemon.world.paths.daemon_socket)
    params = {"vm": "box", "follow": True}
    request = encode_json({"version": 1, "method": "vm.console", "params": params}) + b"\n"
    writer.write(request + frame(FrameType.EOF))  # it has no input, and says so at once
    async with asyncio.timeout(_TIMEOUT_S):
        await reader.readline()
        assert await reader.readexactly(10) == frame(FrameType.DATA, b"boot\n")
        with Path(vm.runtime.log_path).open("ab") as file:
            file.write(b"more")
        assert await reader.readexactly(9) == frame(FrameType.DATA, b"more")
    writer.close()
    await writer.wait_closed()


async def test_what_lies_at_a_path_in_the_guest_is_told(daemon: Daemon) -> None:
    await daemon.world.create("box")
    daemon.world.agent.stdout[requests.Stat.KIND] = b"f\0\0\1\xa4" + bytes(7) + b"\x09"
    found = await daemon.call("vm.stat", {"vm": "box", "path": "/x"})
    assert found == {"exists": True, "kind": "file", "mode": 0o644, "size_bytes": 9}
    daemon.world.agent.stdout.clear()
    daemon.world.agent.exits[requests.Stat.KIND] = b"\2\0\0\0\x02no"
    assert not (await daemon.call("vm.stat", {"vm": "box", "path": "/x"}))["exists"]


async def test_templates_are_listed_shown_deleted_and_go_with_their_image(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_world(short_path, monkeypatch, template_limit=3) as world:
        world.paths.runtime_dir.mkdir(mode=0o700)
        daemon = Daemon(world)
        await daemon.server.start()
        try:
            for vcpu_count in (1, 2):
                name = f"box-{vcpu_count}"
                await daemon.call("vm.create", CREATE | {"name": name, "vcpu_count": vcpu_count})
            second, first = await daemon.call("template.list")
            assert (first["vcpu_count"], second["vcpu_count"]) == (1, 2)
            assert await daemon.call("template.show", {"template": first["id"]}) == first
            assert await daemon.call("template.delete", {"template": first["id"]}) == first
            assert await daemon.call("template.prune", {"dry_run": True}) == []
            for name in ("box-1", "box-2"):
                await daemon.call("vm.delete", {"vm": name, "force": True})
            await daemon.call("image.delete", {"image": "base"})
            assert await daemon.call("template.list") == []
        finally:
            await asyncio.wait_for(daemon.server.stop(), _TIMEOUT_S)
