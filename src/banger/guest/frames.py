"""The frames of docs/agent-protocol.md: numbers, the encoder, and the strict incremental parser.

The parser reads what a guest sent, so every byte is hostile: a frame that is not exactly what the
agent may send is a `ProtocolViolation`, and the parser never holds more than one frame.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from banger.base.errors import Unavailable

FRAME_LIMIT_BYTES = 262_144
WINDOW_BYTES = 262_144
STREAM_LIMIT = 256
HEADER = struct.Struct(">BII")
HELLO_MAGIC = b"BANGERv1"
NONCE_BYTES = 16
#: Longest HELLO of an agent: its fields are a version, a kernel release and a boot id.
HELLO_LIMIT_BYTES = 4096


class FrameType(IntEnum):
    HELLO = 1
    OPEN = 2
    DATA = 3
    STDERR = 4
    EOF = 5
    WINDOW = 6
    SIGNAL = 7
    RESIZE = 8
    EXIT = 9
    RESET = 10


class ProtocolViolation(Unavailable):
    """The agent broke the protocol: it is broken or hostile, and the channel to it is closed."""


class Frame(NamedTuple):
    type: int
    stream: int
    payload: bytes


#: What the agent may send once it has said HELLO, and the payload's least and greatest length.
_FROM_GUEST: dict[int, tuple[int, int]] = {
    FrameType.DATA: (1, FRAME_LIMIT_BYTES),
    FrameType.STDERR: (1, FRAME_LIMIT_BYTES),
    FrameType.EOF: (0, 0),
    FrameType.WINDOW: (4, 4),
    FrameType.EXIT: (5, 4096),
}


def encode(frame_type: FrameType, stream: int, payload: bytes | memoryview = b"") -> bytes:
    """One frame. The payload is at most FRAME_LIMIT_BYTES long; the caller sees to that."""
    return b"".join((HEADER.pack(frame_type, stream, len(payload)), payload))


def field(tag: int, value: bytes) -> bytes:
    """One field of an OPEN or HELLO."""
    return struct.pack(">BI", tag, len(value)) + value


def parse_fields(data: bytes) -> dict[int, bytes]:
    """The fields of an agent's HELLO; a tag that is there twice or a bad length is a violation."""
    fields: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if len(data) - at < 5:
            raise ProtocolViolation("the guest agent sent a HELLO with a cut-off field")
        tag, length = struct.unpack_from(">BI", data, at)
        at += 5
        if length > len(data) - at or tag in fields:
            raise ProtocolViolation("the guest agent sent a HELLO with a malformed field")
        fields[tag] = data[at : at + length]
        at += length
    return fields


def resync_and_hello(nonce: bytes) -> bytes:
    """What the daemon says first: enough zeros to complete any frame the agent is in, and HELLO."""
    padding = bytes(FRAME_LIMIT_BYTES + HEADER.size)
    return padding + encode(FrameType.HELLO, 0, HELLO_MAGIC + nonce)


class FrameParser:
    """Bytes in, frames out, however they are cut. Useless after it has raised."""

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def buffered_bytes(self) -> int:
        """What is held of an unfinished frame: at most a header and FRAME_LIMIT_BYTES."""
        return len(self._rest)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """The frames that `data` completes, in order. Raises ProtocolViolation."""
        frames: list[Frame] = []
        if self._rest:
            self._rest += data
            with memoryview(self._rest) as view:
                at = _parse(view, frames)
            del self._rest[:at]
        else:
            with memoryview(data) as view:
                at = _parse(view, frames)
                self._rest += view[at:]
        return frames


def _parse(view: memoryview, frames: list[Frame]) -> int:
    """Append the whole frames of `view`; returns where the unfinished one starts."""
    at, end = 0, len(view)
    while end - at >= HEADER.size:
        frame_type, stream, length = HEADER.unpack_from(view, at)
        _check_header(frame_type, stream, length)
        start = at + HEADER.size
        if end - start < length:
            return at
        at = start + length
        frames.append(Frame(frame_type, stream, bytes(view[start:at])))
    if at < end:
        _check_type(view[at])
    return at


def _check_type(frame_type: int) -> tuple[int, int]:
    limits = _FROM_GUEST.get(frame_type)
    if limits is None:
        raise ProtocolViolation(f"the guest agent sent a frame of type {frame_type}")
    return limits


def _check_header(frame_type: int, stream: int, length: int) -> None:
    least, most = _check_type(frame_type)
    if not least <= length <= most or stream == 0:
        raise ProtocolViolation(
            f"the guest agent sent a frame of type {frame_type} "
            f"for stream {stream} with {length} bytes"
        )
