"""The wire, shared by both ends: request and reply lines, and the frames of a switched connection.

A request is one JSON object a line; so is each reply: any number of ``{"event": …}``, then one
``{"result": …}`` or ``{"error": …}``. Unknown fields are ignored in both directions. After the
result of a switching method the connection carries frames: ``type u8 · length u32 · payload``,
big-endian.

A client's DATA is held to a credit, so that the daemon can read on, and see a signal or the
client's end, while a guest takes no input: CREDIT_BYTES to begin with, and more by WINDOW frames.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import msgspec

from banger.base.errors import BadRequest
from banger.base.model import ErrorInfo

PROTOCOL_VERSION = 1

#: Longest request or reply line. A list of 10,000 VMs is about 8 MB.
LINE_MAX_BYTES = 32 << 20
#: Longest request line: arguments and environment of a command, never bulk data.
REQUEST_MAX_BYTES = 1 << 20

FRAME_HEADER = struct.Struct(">BI")
FRAME_MAX_BYTES = 256 << 10
#: DATA that a client may send before the first WINDOW, and that the daemon holds for a session.
CREDIT_BYTES = 256 << 10
WINDOW_SIZE = struct.Struct(">HH")
NUMBER = struct.Struct(">I")


class FrameType(IntEnum):
    """What a frame carries; the direction is as for a process and its terminal."""

    DATA = 1  # to the daemon: stdin; from it: stdout
    STDERR = 2
    EOF = 3
    SIGNAL = 4  # NUMBER: the signal
    RESIZE = 5  # WINDOW_SIZE: rows, columns
    EXIT = 6  # JSON of Exit; always the last frame
    WINDOW = 7  # NUMBER, to the client only: so many bytes more of DATA may come


class Request(msgspec.Struct, kw_only=True):
    """One call. ``params`` stays raw until the method's own type decodes it."""

    version: int
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")
    op_id: str = ""


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a command in a guest ended: exited, killed by a signal, or lost to an error."""

    exit_code: int | None = None
    signal: int | None = None
    error: ErrorInfo | None = None

    @property
    def status(self) -> int:
        """The status a shell would give: the command's own, 128+n for signal n, 125 for ours."""
        if self.error is not None:
            return 125
        return 128 + self.signal if self.signal is not None else self.exit_code or 0


class Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One reply line; exactly one of event, result and error is there. Raw ones may be empty."""

    event: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()
    error: ErrorInfo | None = None
    #: The daemon's version, on results and errors, so that a CLI can see that it differs.
    daemon_version: str = ""


encode_json = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
decode_exit = msgspec.json.Decoder(Exit).decode


def frame(kind: FrameType, payload: bytes | memoryview = b"") -> bytes:
    """One frame, ready to send. Payloads longer than FRAME_MAX_BYTES are the caller's bug."""
    assert len(payload) <= FRAME_MAX_BYTES
    return FRAME_HEADER.pack(kind, len(payload)) + bytes(payload)


def parse_frame_header(header: bytes) -> tuple[FrameType, int]:
    """(type, payload length) of a header. Raises BadRequest for one that cannot be."""
    kind, length = FRAME_HEADER.unpack(header)
    if length > FRAME_MAX_BYTES or kind not in FrameType.__members__.values():
        raise BadRequest(f"bad frame: type {kind}, {length} bytes")
    return FrameType(kind), length
