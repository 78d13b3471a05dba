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
#: Pieces of a stream after which their order gives way: single bytes on stdout and stderr in turn
#: are then joined as well, with the last of their kind.
_PIECES_LIMIT = 256


class ExitKind(IntEnum):
    EXITED = 0
    KILLED = 1
    FAILED = 2


#: The values that Linux has for each: a status, a signal, an errno (or 0, for none).
_EXIT_VALUES = {
    ExitKind.EXITED: range(256),
    ExitKind.KILLED: range(1, 65),
    ExitKind.FAILED: range(4096),
}


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


class Allowance:
    """What the two ends of a stream may still send.

    It outlives a stream that is reset, whose last frames are held to it on their way.
    """

    __slots__ = ("_eof_allowed", "_eof_received", "receive_credit", "send_credit")

    def __init__(self, *, eof_allowed: bool) -> None:
        self.send_credit = WINDOW_BYTES
        self.receive_credit = WINDOW_BYTES
        self._eof_allowed = eof_allowed
        self._eof_received = False

    def account(self, frame: Frame) -> None:
        """Enter a frame from the guest. Raises ProtocolViolation for one it may not send now."""
        match frame.type:
            case FrameType.DATA | FrameType.STDERR:
                if len(frame.payload) > self.receive_credit or self._eof_received:
                    raise ProtocolViolation(
                        f"the guest agent sent more than stream {frame.stream} allows"
                    )
                self.receive_credit -= len(frame.payload)
            case FrameType.WINDOW:
                (credit,) = struct.unpack(">I", frame.payload)
                # Without the lower bound a guest could wake a sender for ever, for nothing.
                if not 0 < credit <= WINDOW_BYTES - self.send_credit:
                    raise ProtocolViolation(f"the guest agent gave a credit of {credit} bytes")
                self.send_credit += credit
            case FrameType.EOF:
                if self._eof_received or not self._eof_allowed:
                    raise ProtocolViolation(
                        f"the guest agent sent an EOF that stream {frame.stream} does not have"
                    )
                self._eof_received = True


def _parse_exit(payload: bytes) -> Exit:
    """The payload of an EXIT, of 5 bytes or more. Raises ProtocolViolation."""
    number, value = struct.unpack_from(">BI", payload)
    try:
        kind = ExitKind(number)
    except ValueError:
        raise ProtocolViolation(f"the guest agent sent an EXIT of kind {number}") from None
    if value not in _EXIT_VALUES[kind]:
        raise ProtocolViolation(f"the guest agent sent {value} as the value of an EXIT")
    return Exit(kind, value, payload[5:].decode(errors="replace"))


class AgentStream:
    """See the module. Several tasks may send, signal and resize; one receives.

    As a context manager it resets the stream on the way out, unless it is over.
    """

    def __init__(self, channel: AgentChannel, stream_id: int, *, is_connection: bool) -> None:
        self.id = stream_id
        self.allowance = Allowance(eof_allowed=is_connection)
        self._channel = channel
        self._queue: deque[tuple[bool, bytearray | bytes]] = deque()
        self._exit: Exit | None = None
        self._eof = False  # came, and was not received yet
        self._over = False  # no frames go out any more
        self._eof_sent = False
        self._consumed = 0
        self._arrived = asyncio.Event()
        self._credit = asyncio.Event()

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
            size = min(_SEND_BYTES, self.allowance.send_credit, len(view) - at)
            self.allowance.send_credit -= size
            self._channel.write(encode(FrameType.DATA, self.id, view[at : at + size]))
            at += size
            await self._channel.drain()

    async def _wait_credit(self) -> None:
        while True:
            self._channel.check_open()
            if self._over or self._eof_sent:
                raise StreamEnded("the process in the guest takes no more input")
            if self.allowance.send_credit > 0:
                return
            self._credit.clear()
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
        self._queue.clear()
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
        self._consumed += len(piece)
        if self._consumed >= _CREDIT_BATCH_BYTES and not self._over:
            self._control(FrameType.WINDOW, struct.pack(">I", self._consumed))
            self.allowance.receive_credit += self._consumed
            self._consumed = 0
        return Stderr(bytes(piece)) if is_stderr else Data(bytes(piece))

    # For AgentChannel.

    def handle(self, frame: Frame) -> None:
        """A frame of this stream. Raises ProtocolViolation."""
        self.allowance.account(frame)
        match frame.type:
            case FrameType.DATA | FrameType.STDERR:
                self._store(frame.type == FrameType.STDERR, frame.payload)
            case FrameType.WINDOW:
                self._credit.set()
            case FrameType.EOF:
                self._eof = True
            case _:
                self._exit = _parse_exit(frame.payload)
                self._over = True
                self._credit.set()
        self._arrived.set()

    def _store(self, is_stderr: bool, data: bytes) -> None:
        if (at := self._joinable(is_stderr, len(data))) is None:
            self._queue.append((is_stderr, data))
            return
        piece = self._queue[at][1]
        if isinstance(piece, bytes):
            piece = bytearray(piece)
            self._queue[at] = (is_stderr, piece)
        piece += data

    def _joinable(self, is_stderr: bool, size: int) -> int | None:
        """The place of the piece that `size` bytes may be joined with, if there is one."""
        if len(self._queue) >= _PIECES_LIMIT:
            # None of the last two is of this kind at most once: then it becomes the last itself.
            return next((at for at in (-1, -2) if self._queue[at][0] is is_stderr), None)
        if size <= _JOIN_BYTES and self._queue and self._queue[-1][0] is is_stderr:
            return -1 if len(self._queue[-1][1]) + size <= _JOINED_BYTES else None
        return None

    def channel_closed(self) -> None:
        self._over = True
        self._credit.set()
        self._arrived.set()
