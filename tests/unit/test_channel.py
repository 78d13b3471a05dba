"""AgentChannel against an agent made of bytes, on a real socket in this process."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.base.errors import (
    NotFound,
    OperationTimeout,
    PreconditionFailed,
    Unavailable,
)
from banger.guest.channel import (
    AgentChannel,
    AgentInfo,
    AgentStream,
    Data,
    Eof,
    Exit,
    ExitKind,
    Stderr,
    StreamEnded,
    call,
)
from banger.guest.frames import (
    FRAME_LIMIT_BYTES,
    HEADER,
    HELLO_MAGIC,
    WINDOW_BYTES,
    FrameType,
    ProtocolViolation,
    encode,
    field,
)
from banger.guest.requests import Connect, Exec, Ping, Request

_EXIT_0 = bytes(5)
_TIMEOUT_S = 10.0


class FakeAgent:
    """Listens where a hypervisor would, and says what a test tells it to."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "agent.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None

    async def accept(self) -> bytes:
        """Take the connection; the nonce of the daemon's HELLO."""
        connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        self.reader, self.writer = await asyncio.open_connection(
            sock=connection, limit=4 * FRAME_LIMIT_BYTES
        )
        padding = await self.reader.readexactly(FRAME_LIMIT_BYTES + HEADER.size)
        assert not any(padding)
        kind, stream, payload = await self.frame()
        assert (kind, stream, payload[:8]) == (FrameType.HELLO, 0, HELLO_MAGIC)
        return payload[8:]

    async def frame(self) -> tuple[int, int, bytes]:
        kind, stream, length = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        return kind, stream, await self.reader.readexactly(length)

    def say(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)

    def send(self, kind: FrameType, stream: int, payload: bytes = b"") -> None:
        self.say(encode(kind, stream, payload))

    def greet(self, nonce: bytes) -> None:
        fields = field(1, b"9") + field(2, b"6.1") + field(3, b"boot")
        self.send(FrameType.HELLO, 0, HELLO_MAGIC + nonce + fields)

    async def close(self) -> None:
        self._listener.close()
        if self.writer is not None:
            self.writer.close()
            await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    fake = FakeAgent(tmp_path)
    yield fake
    await fake.close()


async def connected(agent: FakeAgent, before: bytes = b"") -> AgentChannel:
    connecting = asyncio.create_task(AgentChannel.connect(agent.path, timeout_s=_TIMEOUT_S))
    nonce = await agent.accept()
    agent.say(before)
    agent.greet(nonce)
    return await connecting


@pytest.fixture
async def channel(agent: FakeAgent) -> AsyncIterator[AgentChannel]:
    made = await connected(agent)
    yield made
    await made.close()


async def opened(
    agent: FakeAgent, channel: AgentChannel, request: Request | None = None
) -> AgentStream:
    stream = await channel.open(request or Exec(["x"]))
    kind, stream_id, _ = await agent.frame()
    assert (kind, stream_id) == (FrameType.OPEN, stream.id)
    return stream


async def all_was_read(agent: FakeAgent, channel: AgentChannel) -> None:
    """Until the channel has read all that the agent said before."""
    marker = await opened(agent, channel)
    agent.send(FrameType.EXIT, marker.id, _EXIT_0)
    assert isinstance(await asyncio.wait_for(marker.receive(), _TIMEOUT_S), Exit)


async def test_the_greeting_says_who_answers(channel: AgentChannel) -> None:
    assert channel.info == AgentInfo("9", "6.1")
    assert not channel.closed


async def test_what_an_earlier_session_left_is_thrown_away(agent: FakeAgent) -> None:
    old_hello = encode(FrameType.HELLO, 0, HELLO_MAGIC + bytes(16))
    channel = await connected(agent, encode(FrameType.DATA, 7, b"old" * 9999) + old_hello + b"\x03")
    stream = await opened(agent, channel)
    agent.send(FrameType.EXIT, stream.id, _EXIT_0)
    assert await stream.receive() == Exit(ExitKind.EXITED, 0, "")
    await channel.close()


async def test_a_greeting_cut_anywhere_is_found(agent: FakeAgent) -> None:
    connecting = asyncio.create_task(AgentChannel.connect(agent.path, timeout_s=_TIMEOUT_S))
    nonce = await agent.accept()
    assert agent.writer is not None
    for byte in b"junk" + encode(FrameType.HELLO, 0, HELLO_MAGIC + nonce + field(1, b"9")):
        agent.say(bytes((byte,)))
        await agent.writer.drain()
        await asyncio.sleep(0)
    assert (await connecting).info.version == "9"
    await (await connecting).close()


async def test_endless_junk_before_the_greeting_is_refused(agent: FakeAgent) -> None:
    connecting = asyncio.create_task(AgentChannel.connect(agent.path, timeout_s=_TIMEOUT_S))
    await agent.accept()
    agent.say(b"\x03junk" * (1 << 20))
    with pytest.raises(ProtocolViolation, match="is not an agent"):
        await connecting


async def test_a_silent_guest_is_a_timeout(agent: FakeAgent) -> None:
    with pytest.raises(OperationTimeout, match="did not answer"):
        await AgentChannel.connect(agent.path, timeout_s=0.05)


@pytest.mark.parametrize("left_over", [False, True])
async def test_where_no_machine_listens_nothing_is_waited_for(
    tmp_path: Path, left_over: bool
) -> None:
    path = tmp_path / "agent.sock"
    if left_over:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    with pytest.raises(Unavailable, match="cannot connect to"):
        await asyncio.wait_for(AgentChannel.connect(path, timeout_s=60), 5)


async def test_a_machine_that_ends_while_we_wait_is_unavailable(agent: FakeAgent) -> None:
    connecting = asyncio.create_task(AgentChannel.connect(agent.path, timeout_s=_TIMEOUT_S))
    await agent.accept()
    await agent.close()
    with pytest.raises(Unavailable, match="lost"):
        await connecting


async def test_events_come_in_order_and_end_with_the_exit(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    stream = await opened(agent, channel, Connect(80))
    agent.send(FrameType.DATA, stream.id, b"out")
    agent.send(FrameType.STDERR, stream.id, b"err")
    agent.send(FrameType.EOF, stream.id)
    agent.send(FrameType.EXIT, stream.id, b"\x01\0\0\0\x09why")
    got = [await stream.receive() for _ in range(4)]
    assert got == [Data(b"out"), Stderr(b"err"), Eof(), Exit(ExitKind.KILLED, 9, "why")]
    with pytest.raises(StreamEnded):
        await stream.receive()
    with pytest.raises(StreamEnded):
        await stream.send(b"x")


async def test_control_frames_say_what_was_asked(agent: FakeAgent, channel: AgentChannel) -> None:
    stream = await opened(agent, channel)
    await stream.signal(15)
    await stream.resize(40, 120)
    await stream.send(b"in")
    await stream.send_eof()
    await stream.send_eof()
    await stream.reset()
    await stream.reset()
    sent = [await agent.frame() for _ in range(5)]
    assert sent == [
        (FrameType.SIGNAL, stream.id, b"\0\0\0\x0f"),
        (FrameType.RESIZE, stream.id, b"\0\x28\0\x78"),
        (FrameType.DATA, stream.id, b"in"),
        (FrameType.EOF, stream.id, b""),
        (FrameType.RESET, stream.id, b""),
    ]


async def test_a_sender_waits_for_credit_and_goes_on_with_it(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    stream = await opened(agent, channel)
    sending = asyncio.create_task(stream.send(bytes(WINDOW_BYTES + 10)))
    received = 0
    while received < WINDOW_BYTES:
        received += len((await agent.frame())[2])
    other = await opened(agent, channel)  # a stalled stream stalls nobody else
    assert received == WINDOW_BYTES
    assert not sending.done()
    agent.send(FrameType.WINDOW, stream.id, struct.pack(">I", 10))
    await sending
    assert (await agent.frame()) == (FrameType.DATA, stream.id, bytes(10))
    await other.reset()


async def test_a_waiting_sender_is_told_of_the_end(agent: FakeAgent, channel: AgentChannel) -> None:
    stream = await opened(agent, channel)
    sending = asyncio.create_task(stream.send(bytes(WINDOW_BYTES + 1)))
    received = 0
    while received < WINDOW_BYTES:
        received += len((await agent.frame())[2])
    agent.send(FrameType.EXIT, stream.id, _EXIT_0)
    with pytest.raises(StreamEnded):
        await sending


async def test_credit_goes_back_as_output_is_received(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    stream = await opened(agent, channel)
    agent.send(FrameType.DATA, stream.id, bytes(WINDOW_BYTES))
    assert await stream.receive() == Data(bytes(WINDOW_BYTES))
    assert await agent.frame() == (FrameType.WINDOW, stream.id, struct.pack(">I", WINDOW_BYTES))


async def test_single_bytes_are_held_joined(agent: FakeAgent, channel: AgentChannel) -> None:
    stream = await opened(agent, channel)
    agent.say(encode(FrameType.DATA, stream.id, b"x") * 5000)
    agent.send(FrameType.EXIT, stream.id, _EXIT_0)
    await all_was_read(agent, channel)
    assert await stream.receive() == Data(b"x" * 5000)


async def test_single_bytes_on_both_outputs_in_turn_are_held_joined(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    """A whole window of them, as from a program that writes so to a slow reader."""
    stream = await opened(agent, channel)
    out = bytes(i % 251 for i in range(WINDOW_BYTES // 2))
    err = out[::-1]
    for o, e in zip(out, err, strict=True):
        agent.say(encode(FrameType.DATA, stream.id, bytes((o,))))
        agent.say(encode(FrameType.STDERR, stream.id, bytes((e,))))
    agent.send(FrameType.EXIT, stream.id, _EXIT_0)
    await all_was_read(agent, channel)
    got: dict[type, list[bytes]] = {Data: [], Stderr: []}
    while not isinstance(event := await stream.receive(), Exit):
        assert isinstance(event, Data | Stderr)
        got[type(event)].append(event.data)
    assert (b"".join(got[Data]), b"".join(got[Stderr])) == (out, err)
    assert sum(map(len, got.values())) < 1000


@given(
    pieces=st.lists(
        st.tuples(st.booleans(), st.sampled_from([1, 2, 3, 16_384, 16_385])),
        min_size=1,
        max_size=40,
    ),
    turns=st.integers(0, 400),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
async def test_however_output_is_cut_each_kind_keeps_its_order(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bool, int]], turns: int
) -> None:
    agent = FakeAgent(tmp_path_factory.mktemp("agent"))
    channel = await connected(agent)
    stream = await opened(agent, channel)
    sent, got = {False: b"", True: b""}, {False: b"", True: b""}
    left = WINDOW_BYTES
    for number, (is_stderr, size) in enumerate([(i % 2 == 0, 1) for i in range(turns)] + pieces):
        if (size := min(size, left)) == 0:
            break
        left -= size
        data = bytes((number % 256,)) * size
        sent[is_stderr] += data
        agent.send(FrameType.STDERR if is_stderr else FrameType.DATA, stream.id, data)
    agent.send(FrameType.EXIT, stream.id, _EXIT_0)
    await all_was_read(agent, channel)
    while not isinstance(event := await stream.receive(), Exit):
        assert isinstance(event, Data | Stderr)
        got[isinstance(event, Stderr)] += event.data
    assert got == sent
    await channel.close()
    await agent.close()


async def test_credit_for_nothing_does_not_hold_up_the_daemon(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    stream = await opened(agent, channel)
    sending = asyncio.create_task(stream.send(bytes(WINDOW_BYTES + 1)))
    received = 0
    while received < WINDOW_BYTES:
        received += len((await agent.frame())[2])
    agent.send(FrameType.WINDOW, stream.id, bytes(4))
    with pytest.raises(ProtocolViolation, match="credit of 0"):
        await asyncio.wait_for(sending, _TIMEOUT_S)


@pytest.mark.parametrize(
    "attack",
    [
        lambda i: encode(FrameType.DATA, i + 1, b"unknown stream"),
        lambda i: encode(FrameType.DATA, i, bytes(WINDOW_BYTES)) + encode(FrameType.DATA, i, b"x"),
        lambda i: encode(FrameType.EXIT, i, _EXIT_0) + encode(FrameType.DATA, i, b"late"),
        lambda i: encode(FrameType.EXIT, i, b"\x03\0\0\0\0"),
        lambda i: encode(FrameType.EXIT, i, b"\0\0\0\x01\0"),
        lambda i: encode(FrameType.EXIT, i, b"\x01\0\0\0\x41"),
        lambda i: encode(FrameType.EXIT, i, b"\x02\0\0\x10\0"),
        lambda i: encode(FrameType.EXIT, i, b"\x02\xff\xff\xff\xff"),
        lambda i: encode(FrameType.EOF, i),
        lambda i: encode(FrameType.WINDOW, i, bytes(4)),
        lambda i: encode(FrameType.WINDOW, i, b"\0\0\0\x01"),
        lambda i: encode(FrameType.WINDOW, i, b"\xff\xff\xff\xff"),
        lambda i: HEADER.pack(FrameType.DATA, i, 2**32 - 1),
        lambda i: HEADER.pack(FrameType.DATA, i, 0),
        lambda i: encode(FrameType.HELLO, 0, HELLO_MAGIC + bytes(16)),
    ],
)
async def test_a_breach_closes_the_channel_for_every_stream(
    agent: FakeAgent,
    channel: AgentChannel,
    attack: object,
) -> None:
    assert callable(attack)
    bystander = await opened(agent, channel)
    victim = await opened(agent, channel)
    agent.say(attack(victim.id))
    with pytest.raises(ProtocolViolation):
        await asyncio.wait_for(bystander.receive(), _TIMEOUT_S)
    await channel.wait_closed()
    assert channel.closed
    with pytest.raises(ProtocolViolation):
        await channel.open(Ping())
    with pytest.raises(ProtocolViolation):
        await bystander.send(b"x")


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_bytes_leave_the_channel_working_or_closed_with_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    agent = FakeAgent(tmp_path_factory.mktemp("agent"))
    channel = await connected(agent)
    stream = await opened(agent, channel)
    agent.say(data)
    await agent.close()
    await asyncio.wait_for(channel.wait_closed(), _TIMEOUT_S)
    assert channel.error is not None
    with pytest.raises(Unavailable):
        await stream.send(b"x")


async def test_frames_on_their_way_to_a_reset_stream_are_ignored(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    stream = await opened(agent, channel)
    await stream.reset()
    agent.send(FrameType.DATA, stream.id, b"late")
    agent.send(FrameType.EXIT, stream.id, _EXIT_0)
    assert (await agent.frame())[0] == FrameType.RESET
    other = await opened(agent, channel)
    agent.send(FrameType.EXIT, other.id, _EXIT_0)
    assert isinstance(await other.receive(), Exit)


@pytest.mark.parametrize(
    "attack",
    [
        lambda i: encode(FrameType.DATA, i, bytes(WINDOW_BYTES)) + encode(FrameType.DATA, i, b"x"),
        lambda i: encode(FrameType.EOF, i),
        lambda i: encode(FrameType.WINDOW, i, bytes(4)),
        lambda i: encode(FrameType.EXIT, i, _EXIT_0) + encode(FrameType.EXIT, i, _EXIT_0),
    ],
)
async def test_a_reset_stream_is_held_to_what_it_may_still_send(
    agent: FakeAgent, channel: AgentChannel, attack: object
) -> None:
    assert callable(attack)
    stream = await opened(agent, channel)
    await stream.reset()
    agent.say(attack(stream.id))
    await asyncio.wait_for(channel.wait_closed(), _TIMEOUT_S)
    assert isinstance(channel.error, ProtocolViolation)


@pytest.mark.parametrize(("kind", "payload"), [(FrameType.DATA, b"late"), (FrameType.EOF, b"")])
async def test_nothing_follows_the_end_of_a_connections_output(
    agent: FakeAgent, channel: AgentChannel, kind: FrameType, payload: bytes
) -> None:
    stream = await opened(agent, channel, Connect(80))
    agent.send(FrameType.EOF, stream.id)
    assert await stream.receive() == Eof()
    agent.send(kind, stream.id, payload)
    with pytest.raises(ProtocolViolation):
        await asyncio.wait_for(stream.receive(), _TIMEOUT_S)


async def test_a_lost_connection_is_seen_by_streams(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    stream = await opened(agent, channel)
    receiving = asyncio.create_task(stream.receive())
    await agent.close()
    with pytest.raises(Unavailable, match="lost"):
        await receiving
    await channel.wait_closed()


async def test_call_collects_the_whole_exchange(agent: FakeAgent, channel: AgentChannel) -> None:
    calling = asyncio.create_task(call(channel, Exec(["x"]), stdin=b"in", timeout_s=_TIMEOUT_S))
    _, stream, _ = await agent.frame()
    assert await agent.frame() == (FrameType.DATA, stream, b"in")
    assert await agent.frame() == (FrameType.EOF, stream, b"")
    agent.send(FrameType.STDERR, stream, b"e")
    agent.send(FrameType.DATA, stream, b"o")
    agent.send(FrameType.EXIT, stream, b"\0\0\0\0\x07")
    result = await calling
    assert (result.stdout, result.stderr, result.exit.status) == (b"o", b"e", 7)


async def test_call_raises_what_the_agent_reports(agent: FakeAgent, channel: AgentChannel) -> None:
    calling = asyncio.create_task(call(channel, Ping(), timeout_s=_TIMEOUT_S))
    _, stream, _ = await agent.frame()
    agent.send(FrameType.EXIT, stream, b"\x02\0\0\0\x02gone")
    with pytest.raises(NotFound, match="gone"):
        await calling


async def test_call_resets_what_says_too_much_or_takes_too_long(
    agent: FakeAgent, channel: AgentChannel
) -> None:
    calling = asyncio.create_task(call(channel, Ping(), timeout_s=_TIMEOUT_S, limit_bytes=3))
    _, stream, _ = await agent.frame()
    agent.send(FrameType.DATA, stream, b"four")
    with pytest.raises(PreconditionFailed, match="more than 3 bytes"):
        await calling
    with pytest.raises(OperationTimeout, match="PING"):
        await call(channel, Ping(), timeout_s=0.05)
    kinds = [(await agent.frame())[0] for _ in range(5)]
    assert kinds == [
        FrameType.EOF,
        FrameType.RESET,
        FrameType.OPEN,
        FrameType.EOF,
        FrameType.RESET,
    ]


def test_a_killed_process_has_a_shells_status() -> None:
    assert Exit(ExitKind.KILLED, 9, "").status == 137
    assert Exit(ExitKind.EXITED, 7, "").status == 7
