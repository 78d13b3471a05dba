"""Bytes between a client and a guest's stream: all of them, both ways, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.base.errors import BadRequest, BangerError, Unavailable
from banger.daemon.relay import follow_file, relay
from banger.guest.channel import Data, Eof, Event, ExitKind, Stderr, StreamEnded
from banger.guest.channel import Exit as GuestExit
from banger.rpc.protocol import (
    CREDIT_BYTES,
    FRAME_HEADER,
    NUMBER,
    WINDOW_SIZE,
    Exit,
    FrameType,
    frame,
)
from banger.rpc.server import Connection

_TIMEOUT_S = 10.0
_OVER = GuestExit(ExitKind.EXITED, 0, "")


class Stream:
    """A guest's stream as `relay` uses it."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | BangerError] = asyncio.Queue()
        self.said: list[tuple[object, ...]] = []
        self.spoken = asyncio.Event()
        #: Cleared while the process in the guest reads nothing.
        self.reads = asyncio.Event()
        self.reads.set()
        self.ended = False
        self.was_reset = False

    async def receive(self) -> Event:
        event = await self.events.get()
        if isinstance(event, BangerError):
            raise event
        return event

    async def send(self, data: bytes) -> None:
        await self.reads.wait()
        self._say("data", data)
        if self.ended:
            raise StreamEnded("over")

    async def send_eof(self) -> None:
        self._say("eof")

    async def signal(self, number: int) -> None:
        self._say("signal", number)

    async def resize(self, rows: int, columns: int) -> None:
        self._say("resize", rows, columns)

    async def reset(self) -> None:
        self.was_reset = True

    async def heard(self, *what: object) -> None:
        """Return when this was said."""
        async with asyncio.timeout(_TIMEOUT_S):
            while what not in self.said:
                self.spoken.clear()
                await self.spoken.wait()

    def input(self) -> bytes:
        """All of stdin."""
        return b"".join(each[-1] for each in self.said if isinstance(each[-1], bytes))

    def _say(self, *what: object) -> None:
        self.said.append(what)
        self.spoken.set()


class Pair:
    """A connection of the daemon, and its other end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._accepted: asyncio.Queue[Connection] = asyncio.Queue()
        self._server: asyncio.Server

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: self._accepted.put_nowait(Connection(reader, writer)),
            self._path,
        )
        self.reader, self.writer = await asyncio.open_unix_connection(self._path)
        self.connection = await self._accepted.get()

    async def close(self) -> None:
        self.writer.close()
        await self.connection.close()
        self._server.close()

    async def frame(self) -> tuple[FrameType, bytes]:
        async with asyncio.timeout(_TIMEOUT_S):
            kind, length = FRAME_HEADER.unpack(await self.reader.readexactly(FRAME_HEADER.size))
            return FrameType(kind), await self.reader.readexactly(length)

    def say(self, kind: FrameType, payload: bytes = b"") -> None:
        self.writer.write(frame(kind, payload))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    made = Pair(tmp_path / "s")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def stream() -> Stream:
    return Stream()


def start(pair: Pair, stream: Stream) -> asyncio.Task[Exit]:
    return asyncio.create_task(relay(pair.connection, stream))  # type: ignore[arg-type]


async def done(task: asyncio.Task[Exit]) -> Exit:
    return await asyncio.wait_for(task, _TIMEOUT_S)


async def test_output_reaches_the_client_in_order_and_the_exit_ends_it(
    pair: Pair, stream: Stream
) -> None:
    for event in (Data(b"out"), Stderr(b"err"), Data(b"more"), Eof(), _OVER):
        stream.events.put_nowait(event)
    assert await done(start(pair, stream)) == Exit(exit_code=0)
    assert [await pair.frame() for _ in range(4)] == [
        (FrameType.DATA, b"out"),
        (FrameType.STDERR, b"err"),
        (FrameType.DATA, b"more"),
        (FrameType.EOF, b""),
    ]
    assert stream.was_reset


async def test_what_the_client_says_reaches_the_guest(pair: Pair, stream: Stream) -> None:
    task = start(pair, stream)
    pair.say(FrameType.DATA, b"in")
    pair.say(FrameType.RESIZE, WINDOW_SIZE.pack(40, 120))
    pair.say(FrameType.SIGNAL, NUMBER.pack(2))
    await stream.heard("data", b"in")
    await stream.heard("signal", 2)
    pair.say(FrameType.EOF)
    await stream.heard("eof")
    assert [each for each in stream.said if each[0] in ("resize", "signal")] == [
        ("resize", 40, 120),
        ("signal", 2),
    ]
    stream.events.put_nowait(_OVER)
    assert await done(task) == Exit(exit_code=0)


@pytest.mark.parametrize(
    ("event", "exit_"),
    [
        (GuestExit(ExitKind.EXITED, 7, ""), Exit(exit_code=7)),
        (GuestExit(ExitKind.EXITED, 127, "no such program"), Exit(exit_code=127)),
        (GuestExit(ExitKind.KILLED, 9, ""), Exit(signal=9)),
    ],
)
async def test_an_end_is_passed_on_as_it_was(
    pair: Pair, stream: Stream, event: GuestExit, exit_: Exit
) -> None:
    stream.events.put_nowait(event)
    assert await done(start(pair, stream)) == exit_


async def test_a_failure_in_the_guest_is_an_error_with_its_code(pair: Pair, stream: Stream) -> None:
    stream.events.put_nowait(GuestExit(ExitKind.FAILED, 2, "no such directory"))
    exit_ = await done(start(pair, stream))
    assert exit_.error is not None
    assert (exit_.error.code, exit_.error.message) == ("not_found", "no such directory")
    assert exit_.status == 125


async def test_a_client_that_still_sends_gets_the_exit_of_a_process_that_has_ended(
    pair: Pair, stream: Stream
) -> None:
    """`yes | banger vm exec NAME -- true`."""
    stream.ended = True
    task = start(pair, stream)
    for _ in range(5):
        pair.say(FrameType.DATA, b"y\n")
    pair.say(FrameType.RESIZE, WINDOW_SIZE.pack(1, 2))
    await stream.heard("resize", 1, 2)
    assert not task.done()
    stream.events.put_nowait(_OVER)
    assert await done(task) == Exit(exit_code=0)


async def test_a_signal_passes_input_that_the_process_does_not_read(
    pair: Pair, stream: Stream
) -> None:
    """`yes | banger vm exec NAME -- sleep 1000`, and Ctrl-C."""
    stream.reads.clear()
    task = start(pair, stream)
    pair.say(FrameType.DATA, bytes(CREDIT_BYTES))
    pair.say(FrameType.SIGNAL, NUMBER.pack(2))
    await stream.heard("signal", 2)
    assert stream.input() == b""
    stream.events.put_nowait(GuestExit(ExitKind.KILLED, 2, ""))
    assert await done(task) == Exit(signal=2)


async def test_a_client_that_goes_is_seen_behind_input_that_the_process_does_not_read(
    pair: Pair, stream: Stream
) -> None:
    stream.reads.clear()
    task = start(pair, stream)
    pair.say(FrameType.DATA, bytes(CREDIT_BYTES))
    pair.writer.close()
    with pytest.raises(ConnectionError):
        await done(task)
    assert stream.was_reset


async def test_the_client_gets_credit_for_what_the_guest_has_taken(
    pair: Pair, stream: Stream
) -> None:
    stream.reads.clear()
    task = start(pair, stream)
    pair.say(FrameType.DATA, bytes(CREDIT_BYTES))
    stream.reads.set()
    credit = 0
    while credit < CREDIT_BYTES:
        kind, payload = await pair.frame()
        assert kind is FrameType.WINDOW
        credit += NUMBER.unpack(payload)[0]
    assert credit == CREDIT_BYTES
    stream.reads.clear()
    pair.say(FrameType.DATA, bytes(CREDIT_BYTES))  # it is a credit for as much again
    stream.reads.set()
    while len(stream.input()) < 2 * CREDIT_BYTES:
        await pair.frame()
    stream.events.put_nowait(_OVER)
    assert await done(task) == Exit(exit_code=0)


async def test_a_client_that_sends_more_than_its_credit_ends_its_session(
    pair: Pair, stream: Stream
) -> None:
    """Or the daemon would hold whatever a client sends to a process that reads nothing."""
    stream.reads.clear()
    task = start(pair, stream)
    pair.say(FrameType.DATA, bytes(CREDIT_BYTES))
    pair.say(FrameType.DATA, b"x")
    with pytest.raises(BadRequest, match="credit"):
        await done(task)
    assert stream.was_reset


async def test_a_client_that_goes_takes_the_process_along(pair: Pair, stream: Stream) -> None:
    task = start(pair, stream)
    pair.writer.close()
    with pytest.raises(ConnectionError):
        await done(task)
    assert stream.was_reset


async def test_a_lost_agent_is_an_error(pair: Pair, stream: Stream) -> None:
    stream.events.put_nowait(Unavailable("the connection to the guest agent was lost"))
    with pytest.raises(Unavailable, match="guest agent was lost"):
        await done(start(pair, stream))
    assert stream.was_reset


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FrameType.SIGNAL, b""),
        (FrameType.SIGNAL, b"\0\0\0\2\0"),
        (FrameType.RESIZE, b"\0\1"),
        (FrameType.STDERR, b"x"),
        (FrameType.EXIT, b"{}"),
        (FrameType.WINDOW, b"\0\0\0\2"),
    ],
)
async def test_a_frame_that_no_client_sends_ends_the_session(
    pair: Pair, stream: Stream, kind: FrameType, payload: bytes
) -> None:
    task = start(pair, stream)
    pair.say(kind, payload)
    with pytest.raises(BadRequest, match="unexpected frame"):
        await done(task)
    assert stream.was_reset


async def test_cancelling_resets_the_stream(pair: Pair, stream: Stream) -> None:
    task = start(pair, stream)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await done(task)
    assert stream.was_reset


@given(
    st.lists(st.binary(min_size=1, max_size=2000), max_size=20),
    st.lists(st.binary(min_size=1, max_size=2000), max_size=20),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_pass_both_ways_unchanged(
    tmp_path: Path, inward: list[bytes], outward: list[bytes]
) -> None:
    async def run() -> None:
        pair, stream = Pair(tmp_path / "s"), Stream()
        await pair.open()
        task = start(pair, stream)
        for data in outward:
            stream.events.put_nowait(Data(data))
        for data in inward:
            pair.say(FrameType.DATA, data)
        pair.say(FrameType.EOF)
        received = b""
        while len(received) < sum(map(len, outward)):
            kind, payload = await pair.frame()
            received += payload if kind is FrameType.DATA else b""
        await stream.heard("eof")
        stream.events.put_nowait(_OVER)
        await done(task)
        assert received == b"".join(outward)
        assert stream.input() == b"".join(inward)
        await pair.close()

    asyncio.run(run())


async def test_a_file_is_sent_whole_and_a_missing_one_is_nothing(
    pair: Pair, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 3000
    (tmp_path / "log").write_bytes(content)
    sending = asyncio.create_task(follow_file(pair.connection, tmp_path / "log", follow=False))
    received = b""
    while len(received) < len(content):
        kind, payload = await pair.frame()
        assert kind is FrameType.DATA
        received += payload
    assert received == content
    await asyncio.wait_for(sending, _TIMEOUT_S)
    await follow_file(pair.connection, tmp_path / "none", follow=False)


async def test_following_ends_when_the_client_goes(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    following = asyncio.create_task(follow_file(pair.connection, tmp_path / "log", follow=True))
    await asyncio.sleep(0)
    pair.writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(following, _TIMEOUT_S)
