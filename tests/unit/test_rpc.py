"""The daemon's socket, both ends of it, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from banger import __version__
from banger.base.errors import (
    BadRequest,
    Conflict,
    Internal,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from banger.base.opid import current_op_id, is_op_id
from banger.base.paths import Paths
from banger.rpc.client import Client
from banger.rpc.protocol import (
    FRAME_HEADER,
    LINE_MAX_BYTES,
    REQUEST_MAX_BYTES,
    Exit,
    FrameType,
    Request,
    encode_json,
    frame,
)
from banger.rpc.server import Connection, Server

_TIMEOUT_S = 10.0
OP_ID = "op-0123456789ab"


class Methods:
    """A dispatcher of a few methods, each for a claim."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.disconnected = asyncio.Event()
        self.frames: list[tuple[FrameType, bytes] | None] = []

    async def __call__(self, request: Request, connection: Connection) -> None:
        method: Callable[[Request, Connection], Awaitable[None]] = getattr(self, request.method)
        await method(request, connection)

    async def echo(self, request: Request, connection: Connection) -> None:
        await connection.result({"params": request.params, "op_id": current_op_id.get()})

    async def count(self, request: Request, connection: Connection) -> None:
        for number in range(3):
            await connection.event({"number": number})
        await connection.result("done")

    async def conflict(self, request: Request, connection: Connection) -> None:
        raise Conflict("it is there", hint="use another")

    async def crash(self, request: Request, connection: Connection) -> None:
        raise ZeroDivisionError("secret detail")

    async def wait(self, request: Request, connection: Connection) -> None:
        self.started.set()
        await asyncio.Event().wait()

    async def leave(self, request: Request, connection: Connection) -> None:
        self.started.set()
        await connection.wait_disconnect()
        self.disconnected.set()

    async def peek(self, request: Request, connection: Connection) -> None:
        """Look for a disconnect for a while, as `vm.run` does, then answer without a switch."""
        leaving = asyncio.create_task(connection.wait_disconnect())
        self.started.set()
        await asyncio.wait({leaving}, timeout=0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await connection.result("peeked")

    async def session(self, request: Request, connection: Connection) -> None:
        await connection.switch({"switched": True})
        while received := await connection.read_frame():
            self.frames.append(received)
            if received[0] is FrameType.EOF:
                await connection.send_exit(Exit(exit_code=7))
                return
        self.frames.append(None)

    async def session_conflict(self, request: Request, connection: Connection) -> None:
        await connection.switch({})
        raise Conflict("late")

    async def flood(self, request: Request, connection: Connection) -> None:
        await connection.switch({})
        self.started.set()
        while True:
            await connection.send_frame(FrameType.DATA, bytes(100_000))


@pytest.fixture
def methods() -> Methods:
    return Methods()


@pytest.fixture
async def server(tmp_path: Path, methods: Methods) -> AsyncIterator[Path]:
    path = tmp_path / "bangerd.sock"
    made = Server(path, methods)
    await made.start()
    yield path
    await asyncio.wait_for(made.stop(), _TIMEOUT_S)


class Raw:
    """A client that says exactly what a test tells it to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def line(self) -> dict[str, Any]:
        async with asyncio.timeout(_TIMEOUT_S):
            read: dict[str, Any] = msgspec.json.decode(await self.reader.readline())
        return read

    async def ask(self, method: str, **more: object) -> dict[str, Any]:
        await self.say(request(method, **more))
        return await self.line()

    async def frame(self) -> tuple[FrameType, bytes]:
        async with asyncio.timeout(_TIMEOUT_S):
            kind, length = FRAME_HEADER.unpack(await self.reader.readexactly(FRAME_HEADER.size))
            return FrameType(kind), await self.reader.readexactly(length)

    async def end(self) -> bytes:
        """What still comes until the daemon closes."""
        async with asyncio.timeout(_TIMEOUT_S):
            return await self.reader.read()


def request(method: str, **more: object) -> bytes:
    return msgspec.json.encode({"version": 1, "method": method, **more}) + b"\n"


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(path, limit=4 << 20)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_the_socket_is_its_owners_alone(server: Path) -> None:
    assert server.stat().st_mode & 0o777 == 0o600


async def test_a_request_is_answered_with_its_op_id_or_a_new_one(server: Path) -> None:
    async with connected(server) as client:
        reply = await client.ask("echo", params={"a": [1]}, op_id=OP_ID, of_tomorrow=1)
        assert reply["result"] == {"params": {"a": [1]}, "op_id": OP_ID}
        assert reply["daemon_version"] == __version__
        first = (await client.ask("echo"))["result"]["op_id"]
        second = (await client.ask("echo"))["result"]["op_id"]
        assert is_op_id(first)
        assert is_op_id(second)
        assert len({OP_ID, first, second}) == 3


async def test_several_requests_follow_one_another_even_sent_at_once(server: Path) -> None:
    async with connected(server) as client:
        await client.say(request("echo", params=1) + b"\n  \n" + request("conflict"))
        await client.say(request("echo", params=2))
        assert (await client.line())["result"]["params"] == 1
        assert (await client.line())["error"]["code"] == "conflict"
        assert (await client.line())["result"]["params"] == 2


async def test_events_come_before_the_one_result(server: Path) -> None:
    async with connected(server) as client:
        await client.say(request("count"))
        lines = [await client.line() for _ in range(4)]
    assert [line.get("event") for line in lines[:3]] == [{"number": n} for n in range(3)]
    assert lines[3]["result"] == "done"


async def test_an_error_has_code_message_hint_and_op_id(server: Path) -> None:
    async with connected(server) as client:
        reply = await client.ask("conflict", op_id=OP_ID)
    assert reply["error"] == {
        "code": "conflict",
        "message": "it is there",
        "hint": "use another",
        "op_id": OP_ID,
    }


async def test_a_bug_is_internal_without_its_traceback(server: Path) -> None:
    async with connected(server) as client:
        error = (await client.ask("crash", op_id=OP_ID))["error"]
        assert error["code"] == "internal"
        assert error["op_id"] == OP_ID
        assert "secret detail" not in str(error)
        assert "result" in await client.ask("echo")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "bad_request"),
        (b"[]", "bad_request"),
        (b"null", "bad_request"),
        (b'{"version":1}', "bad_request"),
        (b'{"method":"echo"}', "bad_request"),
        (b'{"version":"1","method":"echo"}', "bad_request"),
        (b'{"version":1,"method":7}', "bad_request"),
        (b'{"version":1,"method":"\xff"}', "bad_request"),
        (b'{"version":1,"method":"echo","op_id":"op-1"}', "bad_request"),
        (b'{"version":1,"method":"echo","op_id":null}', "bad_request"),
        (b'{"version":1,"method":"echo","x":' + b"[" * 9999 + b"]" * 9999 + b"}", "bad_request"),
        (b'{"version":2,"method":"echo"}', "bad_version"),
        (b'{"version":0,"method":"echo"}', "bad_version"),
    ],
)
async def test_an_early_error_has_an_op_id_and_the_connection_lives_on(
    server: Path, line: bytes, code: str
) -> None:
    async with connected(server) as client:
        await client.say(line + b"\n")
        error = (await client.line())["error"]
        assert error["code"] == code
        assert is_op_id(error["op_id"])
        assert "result" in await client.ask("echo")


async def test_a_wrong_version_is_answered_with_the_op_id_it_came_with(server: Path) -> None:
    async with connected(server) as client:
        await client.say(b'{"version":9,"method":"echo","op_id":"%s"}\n' % OP_ID.encode())
        error = (await client.line())["error"]
    assert error["op_id"] == OP_ID
    assert "protocol version 9 is not supported (this is 1)" in error["message"]


async def test_an_oversized_request_is_refused_and_ends_the_connection(server: Path) -> None:
    async with connected(server) as client:
        with contextlib.suppress(ConnectionError):
            await client.say(b" " * (REQUEST_MAX_BYTES + 2) + b"\n")
        error = (await client.line())["error"]
        assert error["code"] == "bad_request"
        assert error["message"] == f"request is longer than {REQUEST_MAX_BYTES} bytes"
        assert is_op_id(error["op_id"])
        with contextlib.suppress(ConnectionError):
            assert await client.end() == b""
    async with connected(server) as client:
        assert "result" in await client.ask("echo")


async def test_the_longest_request_passes(server: Path) -> None:
    async with connected(server) as client:
        padding = "x" * (REQUEST_MAX_BYTES - len(request("echo", params="")) + 1)
        assert len(request("echo", params=padding)) == REQUEST_MAX_BYTES + 1  # and its newline
        reply = await client.ask("echo", params=padding)
    assert reply["result"]["params"] == padding


@given(st.binary(max_size=200))
@example(b"\n")
@example(b"{}\n{}\n")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_get_errors_and_the_server_lives_on(tmp_path: Path, data: bytes) -> None:
    async def attack() -> None:
        server = Server(tmp_path / "s", Methods())
        await server.start()
        async with connected(tmp_path / "s") as client:
            await client.say(data + b"\n")
            client.writer.write_eof()
            for line in (await client.end()).splitlines():
                reply = msgspec.json.decode(line)
                assert is_op_id(reply["error"]["op_id"])
        async with connected(tmp_path / "s") as client:
            assert "result" in await client.ask("echo")
        await server.stop()

    asyncio.run(attack())


async def test_a_foreign_peer_is_refused_before_it_is_heard(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    async with connected(server) as client:
        error = (await client.line())["error"]
        assert error["code"] == "permission_denied"
        assert f"uid {uid}" in error["message"]
        assert is_op_id(error["op_id"])
        with contextlib.suppress(ConnectionError):
            assert await client.end() == b""


async def test_frames_pass_both_ways_after_the_switch(server: Path, methods: Methods) -> None:
    async with connected(server) as client:
        assert (await client.ask("session"))["result"] == {"switched": True}
        await client.say(frame(FrameType.DATA, b"in") + frame(FrameType.EOF))
        kind, payload = await client.frame()
        assert kind is FrameType.EXIT
        assert msgspec.json.decode(payload)["exit_code"] == 7
        assert await client.end() == b""
    assert methods.frames == [(FrameType.DATA, b"in"), (FrameType.EOF, b"")]


async def test_frames_sent_with_the_request_are_not_lost(server: Path, methods: Methods) -> None:
    async with connected(server) as client:
        await client.say(request("session") + frame(FrameType.DATA, b"x") + frame(FrameType.EOF))
        await client.line()
        await client.frame()
    assert methods.frames == [(FrameType.DATA, b"x"), (FrameType.EOF, b"")]


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 9])
async def test_a_client_that_goes_within_a_frame_is_gone(
    server: Path, methods: Methods, cut: int
) -> None:
    async with connected(server) as client:
        await client.ask("session")
        await client.say(frame(FrameType.DATA, b"12345")[:cut])
        client.writer.write_eof()
        assert await client.end() == b""
    assert methods.frames == [None]


async def test_a_bad_frame_is_an_exit_with_an_error(server: Path) -> None:
    async with connected(server) as client:
        await client.ask("session", op_id=OP_ID)
        await client.say(FRAME_HEADER.pack(99, 0))
        kind, payload = await client.frame()
    assert kind is FrameType.EXIT
    error = msgspec.json.decode(payload)["error"]
    assert error["code"] == "bad_request"
    assert error["op_id"] == OP_ID


async def test_an_error_after_the_switch_is_an_exit_frame(server: Path) -> None:
    async with connected(server) as client:
        await client.ask("session_conflict")
        kind, payload = await client.frame()
        assert kind is FrameType.EXIT
        assert msgspec.json.decode(payload)["error"]["code"] == "conflict"
        assert await client.end() == b""


async def test_a_client_that_goes_is_noticed_while_a_method_waits(
    server: Path, methods: Methods
) -> None:
    async with connected(server) as client:
        await client.say(request("leave"))
        await methods.started.wait()
        assert not methods.disconnected.is_set()
    await asyncio.wait_for(methods.disconnected.wait(), _TIMEOUT_S)


async def test_a_request_sent_while_a_method_looks_for_a_disconnect_is_whole(
    server: Path, methods: Methods
) -> None:
    async with connected(server) as client:
        await client.say(request("peek"))
        await methods.started.wait()
        await client.say(request("echo", params=7))
        assert (await client.line())["result"] == "peeked"
        assert (await client.line())["result"]["params"] == 7
        methods.started.clear()
        await client.say(request("peek"))
        await methods.started.wait()
        await client.say(b"\n")
        assert (await client.line())["result"] == "peeked"
        assert "result" in await client.ask("echo")


async def test_stopping_tells_who_waits_and_removes_the_socket(
    tmp_path: Path, methods: Methods
) -> None:
    server = Server(tmp_path / "s", methods)
    await server.start()
    async with connected(tmp_path / "s") as client:
        await client.say(request("wait", op_id=OP_ID))
        await methods.started.wait()
        await server.stop()
        error = (await client.line())["error"]
        assert (error["code"], error["op_id"]) == ("cancelled", OP_ID)
        assert "stopping" in error["message"]
        assert await client.end() == b""
    assert not (tmp_path / "s").exists()


async def test_a_client_that_does_not_read_cannot_keep_the_daemon(
    tmp_path: Path, methods: Methods
) -> None:
    server = Server(tmp_path / "s", methods)
    await server.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        client.sendall(request("flood"))
        await methods.started.wait()
        await asyncio.wait_for(server.stop(), _TIMEOUT_S)


async def test_a_stale_socket_is_replaced(tmp_path: Path, methods: Methods) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = Server(path, methods)
    await server.start()
    async with connected(path) as client:
        assert "result" in await client.ask("echo")
    await server.stop()


async def test_what_is_no_socket_is_not_removed(tmp_path: Path, methods: Methods) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(BadRequest, match="is there and is not a socket"):
        await Server(path, methods).start()
    assert path.read_text() == "mine"


async def test_a_path_too_long_for_a_socket_is_said_to_be(tmp_path: Path, methods: Methods) -> None:
    with pytest.raises(PreconditionFailed, match="longer than 107 bytes"):
        await Server(tmp_path / ("x" * 108), methods).start()


# The client, which is synchronous: in a thread, as the CLI is in another process.


def paths_of(socket_path: Path) -> Paths:
    root = socket_path.parent
    return Paths(root, root, root, root, root)


async def in_thread(path: Path, use: Callable[[Client], Any]) -> Any:
    def work() -> Any:
        with Client.connect(paths_of(path), start=False) as client:
            return use(client)

    return await asyncio.wait_for(asyncio.to_thread(work), _TIMEOUT_S)


async def test_a_call_returns_the_decoded_result_and_shows_events(server: Path) -> None:
    events: list[object] = []

    def use(client: Client) -> str:
        events.append(client.daemon_version)
        result = client.call(
            "count", {}, str, on_event=lambda raw: events.append(msgspec.json.decode(raw))
        )
        events.append(client.daemon_version)
        return result

    assert await in_thread(server, use) == "done"
    assert events == ["", *({"number": n} for n in range(3)), __version__]


async def test_a_call_raises_the_error_it_was_answered_with(server: Path) -> None:
    with pytest.raises(Conflict, match="it is there") as caught:
        await in_thread(server, lambda client: client.call("conflict", {}, str))
    assert caught.value.hint == "use another"
    assert is_op_id(caught.value.op_id)


async def test_a_result_of_another_type_is_not_taken(server: Path) -> None:
    with pytest.raises(Internal, match="answered with something unexpected"):
        await in_thread(server, lambda client: client.call("count", {}, int))


async def test_text_that_is_not_utf8_is_refused_by_name(server: Path) -> None:
    with pytest.raises(BadRequest, match="not valid UTF-8"):
        await in_thread(server, lambda client: client.call("echo", {"a": "\udcff"}, str))


async def test_the_reason_for_refusing_an_endless_request_reaches_the_caller(server: Path) -> None:
    endless = "x" * (16 * REQUEST_MAX_BYTES)
    with pytest.raises(BadRequest, match="request is longer than"):
        await in_thread(server, lambda client: client.call("echo", endless, str))


async def test_the_reason_for_refusing_a_peer_reaches_the_caller(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "peer_uid", lambda _: os.getuid() + 1)
    with pytest.raises(PermissionDenied, match="serves uid"):
        await in_thread(server, lambda client: client.call("echo", {}, str))


async def test_a_socket_in_a_directory_that_others_can_enter_is_not_spoken_to(
    tmp_path: Path, methods: Methods
) -> None:
    """Somebody else may listen there."""
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o755)
    theirs = Server(directory / "bangerd.sock", methods)
    await theirs.start()
    with pytest.raises(PermissionDenied, match="refusing to use"):
        await in_thread(directory / "bangerd.sock", lambda client: client.call("echo", {}, str))
    await theirs.stop()


async def test_without_a_daemon_a_client_that_may_not_start_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="bangerd is not running"):
        Client.connect(paths_of(tmp_path / "bangerd.sock"), start=False)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "bangerd.sock"))
    dead.close()
    with pytest.raises(Unavailable, match="bangerd is not running"):
        Client.connect(paths_of(tmp_path / "bangerd.sock"), start=False)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"", Unavailable, "lost"),
        (b'{"result":', Unavailable, "lost"),
        (b"nonsense\n", Internal, "unexpected"),
        (b"{}\n", Internal, "neither result nor error"),
        (b'{"error":{"code":"of_tomorrow","message":"m"}}\n', Internal, "m"),
        (b'{"error":7}\n', Internal, "unexpected"),
        (b"x" * (LINE_MAX_BYTES + 1), Internal, "more than"),
    ],
)
def test_whatever_answers_a_call_ends_in_an_error_of_ours(
    answer: bytes, error: type[Exception], words: str
) -> None:
    ours, theirs = socket.socketpair()

    def say() -> None:
        with theirs, contextlib.suppress(OSError):
            theirs.sendall(answer)
            theirs.shutdown(socket.SHUT_WR)
            while theirs.recv(1000):
                pass

    with ThreadPoolExecutor(1) as other_end, ours:
        other_end.submit(say)
        with pytest.raises(error, match=words):
            Client(ours).call("m", {}, dict[str, Any])


def test_a_null_result_is_a_result() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(encode_json({"result": None}) + b"\n")
        assert Client(ours).call("m", {}, int | None) is None  # type: ignore[arg-type]
