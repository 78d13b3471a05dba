"""The helper and its client over a socket, with a host that only says what it was asked."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from banger.base.errors import (
    BadRequest,
    Conflict,
    Internal,
    PermissionDenied,
    Unavailable,
    UnknownMethod,
)
from banger.base.opid import current_op_id
from banger.hostops import client, helper, wire
from banger.hostops.client import HelperHost
from banger.hostops.helper import Helper
from banger.hostops.ops import URGENT, BridgeDown, Done, LookAtSnapshot, OpenTap, Operation

OP_ID = "op-0123456789ab"
TAP = OpenTap(bridge="banger0")
_TIMEOUT_S = 10.0


class Host:
    """Implements `HostOps`: gives the reading end of a pipe for a tap; waits where it is to."""

    problem = ""
    hint = ""
    installed = True

    def __init__(self) -> None:
        self.asked: list[tuple[Operation, str]] = []
        self.writers: list[int] = []
        self.error: Exception | None = None
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def perform(self, operation: Operation) -> Done:
        operation.check()
        self.asked.append((operation, current_op_id.get()))
        self.begun.set()
        if not isinstance(operation, URGENT):
            await self.go_on.wait()
        if self.error is not None:
            raise self.error
        if isinstance(operation, OpenTap):
            reader, writer = os.pipe()
            self.writers.append(writer)
            return Done(name="banger0-0a0b0c", fd=reader)
        return Done()

    def closed_everywhere(self) -> bool:
        """Whether nobody has the reading end of any pipe any more."""
        closed = True
        for writer in self.writers:
            try:
                os.write(writer, b"x")
                closed = False
            except BrokenPipeError:
                pass
        return closed


class Served:
    """A helper that runs in this loop, and a client of it."""

    def __init__(self, path: Path, owner_uid: int) -> None:
        self.host = Host()
        self.client = HelperHost(path)
        self.stopping = asyncio.Event()
        self.path = path
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(os.fspath(path))
        listener.listen(64)
        self.listener = listener
        self.helper = asyncio.create_task(
            Helper(self.host, owner_uid).serve(listener, self.stopping)
        )

    async def stop(self) -> None:
        self.stopping.set()
        async with asyncio.timeout(_TIMEOUT_S):
            await self.helper
        self.listener.close()
        for writer in self.host.writers:
            os.close(writer)
        self.host.writers.clear()


@asynccontextmanager
async def serving(directory: Path, owner_uid: int | None = None) -> AsyncIterator[Served]:
    served = Served(directory / "s", os.getuid() if owner_uid is None else owner_uid)
    try:
        yield served
    finally:
        await served.stop()


def descriptors_open() -> list[str]:
    return sorted(each.name for each in Path("/proc/self/fd").iterdir())


def calls(logs: list[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [each for each in logs if each["event"].startswith("helper rpc")]


async def test_what_is_asked_is_done_under_the_op_id_it_was_asked_with(short_path: Path) -> None:
    current_op_id.set(OP_ID)
    async with serving(short_path) as served:
        with capture_logs() as logs:
            done = await served.client.perform(TAP)
        assert done.name == "banger0-0a0b0c"
        assert served.host.asked == [(TAP, OP_ID)]
        os.write(served.host.writers[0], b"through")
        assert os.read(done.fd, 10) == b"through"
        os.close(done.fd)
        assert served.host.closed_everywhere()
        assert (await served.client.perform(BridgeDown(bridge="banger0"))) == Done()
    (line,) = calls(logs)
    assert line["event"] == "helper rpc completed"
    assert (line["method"], line["peer_uid"]) == ("open_tap", os.getuid())


async def test_errors_come_back_as_they_were_raised(short_path: Path) -> None:
    current_op_id.set(OP_ID)
    async with serving(short_path) as served:
        served.host.error = Conflict("it is there", hint="use another")
        with capture_logs() as logs, pytest.raises(Conflict, match="it is there") as raised:
            await served.client.perform(TAP)
        assert (raised.value.hint, raised.value.op_id) == ("use another", OP_ID)
        assert calls(logs)[0]["event"] == "helper rpc failed"
        served.host.error = ZeroDivisionError("secret detail")
        with capture_logs() as logs, pytest.raises(Internal) as internal:
            await served.client.perform(TAP)
        assert "secret" not in internal.value.message
        assert [each["event"] for each in logs] == ["a bug of the helper's", "helper rpc failed"]
        served.host.error = None
        assert (await served.client.perform(BridgeDown(bridge="banger0"))) == Done()


async def test_the_client_asks_for_nothing_that_is_refused_unseen(short_path: Path) -> None:
    async with serving(short_path) as served:
        with pytest.raises(BadRequest, match="eth0"):
            await served.client.perform(BridgeDown(bridge="eth0"))
        assert served.host.asked == []


async def test_the_helper_refuses_what_a_client_did_not(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(short_path) as served:
        operation = BridgeDown(bridge="eth0")
        data, _ = wire.encode_request(operation, OP_ID)
        with capture_logs() as logs:
            reply = await asyncio.to_thread(exchange, served.path, wire.framed(data))
    with pytest.raises(BadRequest, match="eth0"):
        wire.decode_reply(reply, ())
    (line,) = calls(logs)
    assert line["event"] == "helper rpc refused"
    assert line["method"] == "bridge_down"


def exchange(path: Path, sent: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(os.fspath(path))
        connection.sendall(sent)
        (length,) = struct.unpack(">I", connection.recv(4, socket.MSG_WAITALL))
        return connection.recv(length, socket.MSG_WAITALL)


@pytest.mark.parametrize("sent", [b"\xff" * 8, struct.pack(">I", 3) + b"abc"])
async def test_garbage_is_refused_with_an_op_id_to_look_for(short_path: Path, sent: bytes) -> None:
    async with serving(short_path) as served:
        with capture_logs() as logs:
            reply = await asyncio.to_thread(exchange, served.path, sent)
        with pytest.raises(BadRequest) as raised:
            wire.decode_reply(reply, ())
        assert raised.value.op_id
        assert [each["event"] for each in logs] == ["helper rpc refused"]
        assert served.host.asked == []


async def test_root_is_served_beside_the_owner(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = 0
    monkeypatch.setattr(helper, "_peer_uid", lambda _connection: uid)
    async with serving(short_path, owner_uid=1000) as served:
        await served.client.perform(BridgeDown(bridge="banger0"))
        uid = 1000
        await served.client.perform(BridgeDown(bridge="banger0"))
        uid = 1001
        with capture_logs() as logs, pytest.raises(PermissionDenied, match="not uid 1001"):
            await served.client.perform(BridgeDown(bridge="banger0"))
        assert len(served.host.asked) == 2
    (line,) = calls(logs)
    assert (line["event"], line["peer_uid"]) == ("helper rpc refused", 1001)


async def test_an_operation_of_a_later_version_is_refused_as_unknown(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(short_path) as served:
        monkeypatch.setattr(wire, "TAGS", frozenset())
        with pytest.raises(UnknownMethod, match="open_tap") as raised:
            await served.client.perform(TAP)
        assert "banger system install" in raised.value.hint


async def test_a_caller_cancelled_at_any_step_leaves_nothing_open(short_path: Path) -> None:
    async with serving(short_path) as served:
        before = descriptors_open()
        for steps in range(25):
            task = asyncio.create_task(served.client.perform(TAP))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not task.cancel():
                os.close((await task).fd)
                continue
            with pytest.raises(asyncio.CancelledError):
                await task
        # Each connection before this one has been answered or given up when it is answered twice.
        for _ in range(2):
            await served.client.perform(BridgeDown(bridge="banger0"))
        assert served.host.closed_everywhere()
        for writer in served.host.writers:
            os.close(writer)
        served.host.writers.clear()
        assert descriptors_open() == before


async def test_a_reply_that_nobody_waits_for_is_closed_and_logged(short_path: Path) -> None:
    async with serving(short_path) as served:
        served.host.go_on.clear()
        with capture_logs() as logs:
            task = asyncio.create_task(served.client.perform(TAP))
            await served.host.begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            served.host.go_on.set()
            await served.client.perform(BridgeDown(bridge="banger0"))
        assert served.host.closed_everywhere()
    assert calls(logs)[0]["error"] == "nobody waited for the reply"


async def test_who_says_nothing_is_given_up(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "TRANSFER_TIMEOUT_S", 0.05)
    async with serving(short_path) as served:
        with capture_logs() as logs:
            reply = await asyncio.to_thread(exchange, served.path, struct.pack(">I", 10))
        assert b"did not come in time" in reply
        assert calls(logs)[0]["event"] == "helper rpc refused"


async def test_no_more_connections_than_it_takes(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "CONNECTIONS_MAX", 1)
    async with serving(short_path) as served:
        served.host.go_on.clear()
        first = asyncio.create_task(served.client.perform(BridgeDown(bridge="banger0")))
        await served.host.begun.wait()
        with capture_logs() as logs, pytest.raises(Unavailable, match="busy"):
            await served.client.perform(TAP)
        served.host.go_on.set()
        await first
    assert calls(logs)[0]["event"] == "helper rpc refused"


async def test_a_client_has_no_more_calls_than_a_helper_takes(short_path: Path) -> None:
    async with serving(short_path) as served:
        many = [served.client.perform(BridgeDown(bridge="banger0")) for _ in range(100)]
        assert await asyncio.gather(*many) == [Done()] * 100


async def test_what_keeps_a_machine_going_waits_for_no_other_call(short_path: Path) -> None:
    async with serving(short_path) as served:
        served.host.go_on.clear()
        down = BridgeDown(bridge="banger0")
        many = [asyncio.create_task(served.client.perform(down)) for _ in range(20)]
        async with asyncio.timeout(_TIMEOUT_S):
            while len(served.host.asked) < client._CALLS_MAX:
                await asyncio.sleep(0)
            urgent = [served.client.perform(LookAtSnapshot(vm_id=f"{n:012x}")) for n in range(20)]
            assert await asyncio.gather(*urgent) == [Done()] * 20
        assert not any(each.done() for each in many)
        served.host.go_on.set()
        assert await asyncio.gather(*many) == [Done()] * 20


def test_a_helper_takes_the_calls_of_two_daemons() -> None:
    """The owner's and root's."""
    assert 2 * (client._CALLS_MAX + client._URGENT_MAX) <= helper.CONNECTIONS_MAX


async def test_a_stop_answers_what_has_begun_and_waits_for_nobody_else(short_path: Path) -> None:
    async with serving(short_path) as served:
        served.host.go_on.clear()
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(os.fspath(served.path))
            task = asyncio.create_task(served.client.perform(TAP))
            await served.host.begun.wait()
            served.stopping.set()
            await asyncio.sleep(0)
            assert not served.helper.done()
            served.host.go_on.set()
            os.close((await task).fd)
            async with asyncio.timeout(_TIMEOUT_S):
                await served.helper


class InstalledClient(HelperHost):
    """Of an installation that is ours."""

    installed = True


@pytest.mark.parametrize("stale", [False, True])
async def test_a_helper_that_is_started_again_is_waited_for(short_path: Path, stale: bool) -> None:
    """Nothing that was asked for meanwhile fails, nor is it asked for twice."""
    path = short_path / "s"
    if stale:  # the socket of one that was killed
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(path))
    asking = asyncio.create_task(InstalledClient(path).perform(BridgeDown(bridge="banger0")))
    await asyncio.sleep(0.1)
    assert not asking.done()
    path.unlink(missing_ok=True)
    async with serving(short_path) as served:
        async with asyncio.timeout(_TIMEOUT_S):
            await asking
        assert len(served.host.asked) == 1


async def test_a_helper_that_stays_away_is_told_of(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RESTART_TIMEOUT_S", 0.1)
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        await InstalledClient(short_path / "s").perform(BridgeDown(bridge="banger0"))
    assert caught.value.hint == "look at it: banger system status"


async def test_a_helper_that_is_gone_or_silent_is_unavailable(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HelperHost(short_path / "s")
    with pytest.raises(PermissionDenied, match="there is no helper") as refused:
        await host.perform(TAP)
    assert refused.value.hint == host.hint
    assert host.hint == "install one: sudo banger system install"  # not how to do without
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "s"))
        with pytest.raises(Unavailable, match="cannot be reached"):
            await host.perform(TAP)
        listener.listen()
        assert not host.problem
        assert not host.hint
        monkeypatch.setattr(client, "_TIMEOUT_S", 0.05)
        with pytest.raises(Unavailable, match="did not answer"):
            await host.perform(TAP)


@pytest.mark.parametrize("reply", [b"", b"\0\0", struct.pack(">I", 1 << 30), b"\0\0\0\x02[]"])
async def test_a_helper_that_answers_anything_else_is_an_error_without_a_trace(
    short_path: Path, reply: bytes
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(reply)
        await writer.drain()
        writer.close()

    before = descriptors_open()
    server = await asyncio.start_unix_server(answer, short_path / "s")
    async with server:
        with pytest.raises(Unavailable, match="no reply"):
            await HelperHost(short_path / "s").perform(TAP)
    await asyncio.sleep(0)
    assert len(descriptors_open()) <= len(before) + 1
