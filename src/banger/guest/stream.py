"""One stream of an agent's channel: a process, file or connection in the guest.

It lives from the OPEN to the EXIT or a reset. What the guest sent and nobody has received yet is
held here, at most one window of credit; credit goes back as it is received.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Self

from banger.base.errors import (
    BadRequest,
    BangerError,
    Conflict,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from banger.guest.frames import (
    WINDOW_BYTES,
    Frame,
    FrameType,
    ProtocolViolation,
    encode,
)

if TYPE_CHECKING:
    from banger.guest.channel import AgentChannel

#: Largest DATA we send: small enough that streams take turns.
_SEND_BYTES = 65_536
_CREDIT_BATCH_BYTES = WINDOW_BYTES // 4
#: Pieces up to this size are joined with the one before, so that a guest that writes single bytes
#: does not fill the daemon with objects.
_JOIN_BYTES = 16_384
_JOINED_BYTES = 65_536
#: Pieces that all streams of a channel may hold: stdout and stderr in turn cannot be joined.
_PIECES_LIMIT = 65_536


class ExitKind(IntEnum):
    EXITED = 0
    KILLED = 1
    FAILED = 2


@dataclass(frozen=True)
class Data:
    """Bytes of stdout."""

    data: bytes


@dataclass(frozen=True)
class Stderr:
    data: bytes


@dataclass(frozen=True)
class Eof:
    """No more `Data` will come. Only a `Connect` has it: its other direction may go on."""


@dataclass(frozen=True)
class Exit:
    """The end of a stream. ``value`` is a status, a signal or an errno, by ``kind``."""

    kind: ExitKind
    value: int
    message: str

    @property
    def status(self) -> int:
        """What a shell would call it: the status, or 128 and the signal."""
        return 128 + self.value if self.kind is ExitKind.KILLED else self.value

    def error(self) -> BangerError:
        """The error for a FAILED exit."""
        kind = _ERRORS.get(self.value, PreconditionFailed)
        reason = os.strerror(self.value) if self.value else "unknown reason"
        return kind(self.message or f"the guest agent failed: {reason}")


_ERRORS: dict[int, type[BangerError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EEXIST: Conflict,
    errno.EBUSY: Conflict,
    errno.EINVAL: BadRequest,
    errno.EAGAIN: Unavailable,
    errno.ECONNREFUSED: Unavailable,
}

Event = Data | Stderr | Eof | Exit


class StreamEnded(Unavailable):
    """The stream is over: the process has ended, or the stream was reset on this side."""


class QueueBudget:
    """How many pieces the streams of a channel hold together."""

    def __init__(self) -> None:
        self.pieces = 0

    def add(self) -> None:
        self.pieces += 1
        if self.pieces > _PIECES_LIMIT:
            raise ProtocolViolation("the guest agent sent too many small pieces of output")


class AgentStream:
    """See the module. Several tasks may send, signal and resize; one receives.

    As a context manager it resets the stream on the way out, unless it is over.
    """

    def __init__(self, channel: AgentChannel, stream_id: int, budget: QueueBudget) -> None:
        self.id = stream_id
        self._channel = channel
        self._budget = budget
        self._queue: deque[tuple[bool, bytearray | bytes]] = deque()
        self._exit: Exit | None = None
        self._eof = False
        self._over = False  # no frames go out any more
        self._eof_sent = False
        self._send_credit = WINDOW_BYTES
        self._receive_credit = WINDOW_BYTES
        self._consumed = 0
        self._arrived = asyncio.Event()
        self._credit = asyncio.Event()
        self._credit.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.reset()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send to stdin, waiting for credit. Raises StreamEnded when the process has ended or EOF
        was sent, or the channel's error."""
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            await self._wait_credit()
            size = min(_SEND_BYTES, self._send_credit, len(view) - at)
            self._send_credit -= size
            if self._send_credit == 0:
                self._credit.clear()
            self._channel.write(encode(FrameType.DATA, self.id, view[at : at + size]))
            at += size
            await self._channel.drain()

    async def _wait_credit(self) -> None:
        while True:
            self._channel.check_open()
            if self._over or self._eof_sent:
                raise StreamEnded("the process in the guest takes no more input")
            if self._send_credit > 0:
                return
            await self._credit.wait()

    async def send_eof(self) -> None:
        """No more stdin. Does nothing when that was said already or the stream is over."""
        if not self._eof_sent:
            self._control(FrameType.EOF, b"")
        self._eof_sent = True
        self._credit.set()

    async def signal(self, number: int) -> None:
        """Send a signal (Linux number) to the process group."""
        self._control(FrameType.SIGNAL, struct.pack(">I", number))

    async def resize(self, rows: int, columns: int) -> None:
        self._control(FrameType.RESIZE, struct.pack(">HH", rows, columns))

    async def reset(self) -> None:
        """The client is gone: SIGHUP, and no EXIT. Idempotent."""
        self._control(FrameType.RESET, b"")
        if not self._over:
            self._channel.forget(self)
        self._over = True
        self._drop_queue()
        self._credit.set()
        self._arrived.set()

    def _control(self, frame_type: FrameType, payload: bytes) -> None:
        if not self._over:
            self._channel.write(encode(frame_type, self.id, payload))

    async def receive(self) -> Event:
        """The next thing from the guest; `Exit` is the last. Raises the channel's error when it
        breaks first, StreamEnded after the `Exit` or a reset."""
        while True:
            if self._queue:
                return self._take()
            if self._eof:
                self._eof = False
                return Eof()
            if self._exit is not None:
                last, self._exit = self._exit, None
                return last
            if self._over:
                self._channel.check_open()
                raise StreamEnded("the stream to the guest is over")
            self._arrived.clear()
            await self._arrived.wait()

    def _take(self) -> Data | Stderr:
        is_stderr, piece = self._queue.popleft()
        self._budget.pieces -= 1
        self._consumed += len(piece)
        if self._consumed >= _CREDIT_BATCH_BYTES and not self._over:
            self._control(FrameType.WINDOW, struct.pack(">I", self._consumed))
            self._receive_credit += self._consumed
            self._consumed = 0
        return Stderr(bytes(piece)) if is_stderr else Data(bytes(piece))

    def _drop_queue(self) -> None:
        self._budget.pieces -= len(self._queue)
        self._queue.clear()

    # For AgentChannel.

    def handle(self, frame: Frame) -> None:
        """A frame of this stream. Raises ProtocolViolation."""
        match frame.type:
            case FrameType.DATA | FrameType.STDERR:
                self._store(frame.type == FrameType.STDERR, frame.payload)
            case FrameType.WINDOW:
                (credit,) = struct.unpack(">I", frame.payload)
                if credit > WINDOW_BYTES - self._send_credit:
                    raise ProtocolViolation("the guest agent gave more credit than a window")
                self._send_credit += credit
                self._credit.set()
            case FrameType.EOF:
                self._eof = True
            case _:
                self._finish(frame.payload)
        self._arrived.set()

    def _store(self, is_stderr: bool, data: bytes) -> None:
        if len(data) > self._receive_credit or self._eof:
            raise ProtocolViolation(f"the guest agent sent more than stream {self.id} allows")
        self._receive_credit -= len(data)
        if len(data) <= _JOIN_BYTES and self._queue and self._queue[-1][0] is is_stderr:
            last = self._queue[-1][1]
            if len(last) + len(data) <= _JOINED_BYTES:
                if isinstance(last, bytes):
                    last = bytearray(last)
                    self._queue[-1] = (is_stderr, last)
                last += data
                return
        self._budget.add()
        self._queue.append((is_stderr, data))

    def _finish(self, payload: bytes) -> None:
        kind, value = struct.unpack_from(">BI", payload)
        if kind not in ExitKind.__members__.values():
            raise ProtocolViolation(f"the guest agent sent an EXIT of kind {kind}")
        self._exit = Exit(ExitKind(kind), value, payload[5:].decode(errors="replace"))
        self._over = True
        self._credit.set()

    def channel_closed(self) -> None:
        self._over = True
        self._credit.set()
        self._arrived.set()
