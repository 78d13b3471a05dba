"""The daemon's end of the channel to one guest's agent: frames in, streams out.

An `AgentChannel` lives as long as its connection to the hypervisor's socket; it has one reader (the
event loop's, never paused) and any number of `AgentStream`. What a guest sends is bounded by credit
for each stream and strictly parsed: a guest that breaks the protocol gets its channel closed with a
`ProtocolViolation`, which every open stream then raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from banger.base.errors import BangerError, OperationTimeout, PreconditionFailed, Unavailable
from banger.base.paths import check_socket_path
from banger.guest import vsock
from banger.guest.frames import (
    HEADER,
    HELLO_LIMIT_BYTES,
    HELLO_MAGIC,
    NONCE_BYTES,
    STREAM_LIMIT,
    Frame,
    FrameParser,
    FrameType,
    ProtocolViolation,
    encode,
    parse_fields,
    resync_and_hello,
)
from banger.guest.requests import Connect, Request
from banger.guest.stream import (
    AgentStream,
    Allowance,
    Data,
    Eof,
    Event,
    Exit,
    ExitKind,
    Stderr,
    StreamEnded,
)

__all__ = [
    "AgentChannel",
    "AgentInfo",
    "AgentStream",
    "CallResult",
    "Data",
    "Eof",
    "Event",
    "Exit",
    "ExitKind",
    "Stderr",
    "StreamEnded",
    "call",
]

#: How much of an earlier session's output may stand before the agent's HELLO.
_JUNK_LIMIT_BYTES = 4 << 20
_READ_BYTES = 1 << 20
_WRITE_HIGH_BYTES = 1 << 20
#: Streams reset by us whose last frames may still be on their way.
_FORGOTTEN_LIMIT = 4096


@dataclass(frozen=True)
class AgentInfo:
    """What the agent said of itself in its HELLO."""

    version: str
    kernel: str


class AgentChannel(asyncio.BufferedProtocol):
    """See the module. Make one with `connect`."""

    def __init__(self) -> None:
        self.info = AgentInfo("", "")
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._greeting: _Greeting | None = _Greeting(self._nonce)
        loop = asyncio.get_running_loop()
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._lost: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._buffer = bytearray(_READ_BYTES)
        self._parser = FrameParser()
        self._streams: dict[int, AgentStream] = {}
        self._forgotten: dict[int, Allowance] = {}  # the longest forgotten first
        self._last_id = 0
        self._error: BangerError | None = None

    @classmethod
    async def connect(cls, socket_path: Path, *, timeout_s: float, vsock_port: int = 0) -> Self:
        """Connect to a hypervisor's socket and wait for the agent to boot and answer.

        A machine has its sockets by the time it is launched. Where they lead to a port of the
        agent's, one HELLO is enough: the hypervisor keeps it until the guest opens that. With a
        `vsock_port` the socket is one of `guest.vsock`, and the agent has to listen. Raises
        OperationTimeout when no answer came in `timeout_s` seconds, Unavailable when there is no
        machine (any more), ProtocolViolation when what answered is not an agent.
        """
        check_socket_path(socket_path)
        channel: Self | None = None
        try:
            async with asyncio.timeout(timeout_s):
                channel = await cls._connect(socket_path, vsock_port)
                await channel.greet()
        except TimeoutError:
            raise OperationTimeout(
                f"the guest agent did not answer within {timeout_s:g} s"
            ) from None
        finally:
            if channel is not None and not channel.info.version:
                channel.abort(Unavailable("the guest agent never answered"))
        return channel

    @classmethod
    async def _connect(cls, socket_path: Path, vsock_port: int) -> Self:
        loop = asyncio.get_running_loop()
        try:
            if vsock_port:
                connected = await vsock.connect(socket_path, vsock_port)
                _, channel = await loop.create_unix_connection(cls, sock=connected)
            else:
                _, channel = await loop.create_unix_connection(cls, str(socket_path))
        except OSError as error:
            raise Unavailable(f"cannot connect to {socket_path}: {error.strerror}") from error
        return channel

    async def greet(self) -> None:
        """Say HELLO and wait for the answer; once, by `connect`."""
        self.write(resync_and_hello(self._nonce))
        await self._greeted

    @property
    def closed(self) -> bool:
        return self._error is not None

    @property
    def error(self) -> BangerError | None:
        """Why the channel is closed."""
        return self._error

    async def open(self, request: Request) -> AgentStream:
        """Start what `request` asks for. Raises the channel's error when it is closed, BadRequest
        for a request that cannot be sent, Unavailable when too many streams are open."""
        payload = request.encode()
        self.check_open()
        if len(self._streams) >= STREAM_LIMIT:
            raise Unavailable(f"{STREAM_LIMIT} streams to the guest are open already")
        self._last_id += 1
        stream = AgentStream(self, self._last_id, is_connection=isinstance(request, Connect))
        self._streams[stream.id] = stream
        self.write(encode(FrameType.OPEN, stream.id, payload))
        return stream

    async def wait_closed(self) -> None:
        """Until the connection is gone, by whoever's doing."""
        await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Close the connection; processes in the guest get SIGHUP. Idempotent."""
        self.abort(Unavailable("the channel to the guest agent was closed"))
        await self.wait_closed()

    # For AgentStream.

    def check_open(self) -> None:
        if self._error is not None:
            # A new object for each raise: tracebacks of several streams must not mix.
            raise type(self._error)(self._error.message, hint=self._error.hint)

    def write(self, data: bytes) -> None:
        """Queue bytes; `drain` is the back-pressure."""
        if self._transport is not None and self._error is None:
            self._transport.write(data)

    async def drain(self) -> None:
        await self._writable.wait()
        self.check_open()

    def forget(self, stream: AgentStream) -> None:
        """A stream that was reset: what is still on its way for it is counted and thrown away."""
        if self._streams.pop(stream.id, None) is None:
            return
        self._forgotten[stream.id] = stream.allowance
        if len(self._forgotten) > _FORGOTTEN_LIMIT:
            del self._forgotten[next(iter(self._forgotten))]

    def abort(self, error: BangerError) -> None:
        """Close the connection at once, for this reason, unless it is closed already."""
        if self._error is not None:
            return
        self._error = error
        if self._transport is not None:
            self._transport.abort()
        elif not self._lost.done():
            self._lost.set_result(None)
        self._writable.set()
        if not self._greeted.done():
            self._greeted.set_exception(error)
            self._greeted.exception()  # there may be nobody left to ask
        for stream in self._streams.values():
            stream.channel_closed()
        self._streams.clear()

    # For asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.abort(Unavailable("the connection to the guest agent was lost"))
        if not self._lost.done():
            self._lost.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 - asyncio's
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._error is not None:
            return
        try:
            with memoryview(self._buffer) as view:
                self._received(view[:nbytes])
        except ProtocolViolation as violation:
            self.abort(violation)

    def _received(self, data: memoryview) -> None:
        if self._greeting is None:
            frames = self._parser.feed(data)
        else:
            answer = self._greeting.feed(data)
            if answer is None:
                return
            self._greeting = None
            self.info = answer.info
            if not self._greeted.done():
                self._greeted.set_result(None)
            frames = self._parser.feed(answer.rest)
        for frame in frames:
            self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        if (stream := self._streams.get(frame.stream)) is not None:
            stream.handle(frame)
            if frame.type == FrameType.EXIT:
                del self._streams[frame.stream]
        elif (allowance := self._forgotten.get(frame.stream)) is not None:
            allowance.account(frame)
            if frame.type == FrameType.EXIT:
                del self._forgotten[frame.stream]
        else:
            raise ProtocolViolation(
                f"the guest agent sent a frame for stream {frame.stream}, which is not open"
            )


@dataclass(frozen=True)
class CallResult:
    stdout: bytes
    stderr: bytes
    exit: Exit


async def call(
    channel: AgentChannel,
    request: Request,
    *,
    stdin: bytes = b"",
    timeout_s: float,
    limit_bytes: int = 1 << 20,
) -> CallResult:
    """Open `request`, feed it `stdin`, and collect what it says until its exit.

    Raises the error of a FAILED exit, OperationTimeout after `timeout_s` seconds, and
    PreconditionFailed when stdout and stderr together pass `limit_bytes`; the stream is reset then.
    """
    try:
        async with asyncio.timeout(timeout_s), await channel.open(request) as stream:
            feeder = asyncio.create_task(_feed(stream, stdin))
            try:
                result = await _collect(stream, limit_bytes)
            finally:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)
    except TimeoutError:
        name = type(request).__name__.upper()
        raise OperationTimeout(f"the guest did not finish {name} within {timeout_s:g} s") from None
    if result.exit.kind is ExitKind.FAILED:
        raise result.exit.error()
    return result


async def _feed(stream: AgentStream, stdin: bytes) -> None:
    with contextlib.suppress(StreamEnded):  # it may end without having read everything
        await stream.send(stdin)
        await stream.send_eof()


async def _collect(stream: AgentStream, limit_bytes: int) -> CallResult:
    stdout, stderr = bytearray(), bytearray()
    while True:
        event = await stream.receive()
        if isinstance(event, Exit):
            return CallResult(bytes(stdout), bytes(stderr), event)
        if isinstance(event, Data):
            stdout += event.data
        elif isinstance(event, Stderr):
            stderr += event.data
        if len(stdout) + len(stderr) > limit_bytes:
            raise PreconditionFailed(f"the guest answered with more than {limit_bytes} bytes")


@dataclass(frozen=True)
class _Answer:
    info: AgentInfo
    rest: bytes


class _Greeting:
    """Looks for the agent's HELLO with our nonce in whatever the last session left behind."""

    def __init__(self, nonce: bytes) -> None:
        self._mark = HELLO_MAGIC + nonce
        self._held = bytearray()
        self._skipped = 0

    def feed(self, data: memoryview) -> _Answer | None:
        """The answer once it is complete. Raises ProtocolViolation for too much junk before it."""
        self._held += data
        start = self._find()
        if start < 0:
            # A HELLO that has only begun is at most a header and a mark, less one byte, long.
            excess = len(self._held) - (HEADER.size + len(self._mark) - 1)
            if excess > 0:
                self._skip(excess)
            return None
        self._skip(start)
        length = HEADER.unpack_from(self._held)[2]
        end = HEADER.size + length
        if len(self._held) < end:
            return None
        fields = parse_fields(bytes(self._held[HEADER.size + len(self._mark) : end]))
        texts = {tag: value.decode(errors="replace") for tag, value in fields.items()}
        info = AgentInfo(texts.get(1) or "unknown", texts.get(2, ""))
        return _Answer(info, bytes(self._held[end:]))

    def _skip(self, count: int) -> None:
        del self._held[:count]
        self._skipped += count
        if self._skipped > _JUNK_LIMIT_BYTES:
            raise ProtocolViolation("what answers at the guest agent's port is not an agent")

    def _find(self) -> int:
        at = self._held.find(self._mark)
        while at >= 0:
            start = at - HEADER.size
            if start >= 0:
                frame_type, stream, length = HEADER.unpack_from(self._held, start)
                if (frame_type, stream) == (FrameType.HELLO, 0) and len(
                    self._mark
                ) <= length <= HELLO_LIMIT_BYTES:
                    return start
            at = self._held.find(self._mark, at + 1)
        return -1
