"""The helper's wire, shared by both ends: one request and one reply on each connection.

A message is a length (u32, big-endian) and JSON of so many bytes; descriptors that belong to it
come with its first bytes (SCM_RIGHTS). Both ends bound what they take. Fields that an end does
not know are ignored around an operation, but not in one: who is asked for more than he understands
must not do less than that.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import get_args

import msgspec

from banger.base.errors import BadRequest, BadVersion, Unavailable, UnknownMethod, from_wire
from banger.base.malformed import MALFORMED
from banger.base.model import ErrorInfo
from banger.base.opid import is_op_id
from banger.hostops.ops import DESCRIPTORS_MAX, AnyOperation, Done, Operation, WithFiles

PROTOCOL_VERSION = 1
#: `SetGuests` with all it may have is 2 MB: `test_the_largest_operation_fits`.
REQUEST_MAX_BYTES = 4 << 20
REPLY_MAX_BYTES = 64 << 10
#: Not `socket.recv_fds`: of Python 3.11 it drops its flags, and what it receives is inherited.
_RIGHTS_BYTES = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)

_LENGTH = struct.Struct(">I")
_PIECE_BYTES = 64 << 10
_TEXT_MAX = 600

_OPERATION = msgspec.json.Decoder(AnyOperation)


class Request(msgspec.Struct, kw_only=True):
    """``operation`` stays raw until the op_id is known, so that what is wrong with it has one."""

    version: int
    operation: msgspec.Raw
    op_id: str


class Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One of `error` and the rest. ``descriptor`` says whether one came with it."""

    name: str = ""
    pid: int = 0
    descriptor: bool = False
    error: ErrorInfo | None = None


class _Tag(msgspec.Struct):
    op: str


def tag_of(kind: type[Operation]) -> str:
    """What an operation is called on the wire, in the log and in `docs/privileges.md`."""
    return str(kind.__struct_config__.tag)


#: All there are.
TAGS = frozenset(map(tag_of, get_args(AnyOperation)))


def encode_request(operation: Operation, op_id: str) -> tuple[bytes, tuple[int, ...]]:
    """The request, and the descriptors that go with it."""
    descriptors: tuple[int, ...] = ()
    if isinstance(operation, WithFiles):
        descriptors = operation.descriptors
        operation = operation.with_descriptors((-1,) * len(descriptors))
    raw = msgspec.Raw(msgspec.json.encode(operation))
    request = Request(version=PROTOCOL_VERSION, operation=raw, op_id=op_id)
    return msgspec.json.encode(request), descriptors


def decode_request(data: bytes) -> Request:
    """Raises BadRequest for what is none, BadVersion for one of another protocol."""
    try:
        request = msgspec.json.decode(data, type=Request)
    except MALFORMED as error:
        raise BadRequest(f"malformed request: {error}") from None
    if not is_op_id(request.op_id):
        raise BadRequest("malformed request: op_id is not op- and 12 hex digits")
    if request.version != PROTOCOL_VERSION:
        raise BadVersion(
            f"protocol version {request.version} is not supported (this is {PROTOCOL_VERSION})",
            hint="install the version that you use, as root: banger system install",
        )
    return request


def method_of(request: Request) -> str:
    """Which operation is asked for. Raises UnknownMethod for one that there is not."""
    try:
        tag = msgspec.json.decode(request.operation, type=_Tag).op
    except MALFORMED as error:
        raise BadRequest(f"malformed operation: {error}") from None
    if tag not in TAGS:
        raise UnknownMethod(
            f"the helper knows no operation {shortened(repr(tag))}",
            hint="install the version that you use, as root: banger system install",
        )
    return tag


def decode_operation(request: Request, descriptors: tuple[int, ...]) -> Operation:
    """The operation, with the descriptors that came with it."""
    try:
        operation: Operation = _OPERATION.decode(request.operation)
    except MALFORMED as error:
        raise BadRequest(f"malformed operation: {error}") from None
    if isinstance(operation, WithFiles):
        return operation.with_descriptors(descriptors)
    if descriptors:
        raise BadRequest(f"{len(descriptors)} descriptors came where 0 belong")
    return operation


def encode_reply(done: Done) -> tuple[bytes, tuple[int, ...]]:
    """The reply, and the descriptor that goes with it, if one does."""
    descriptors = () if done.fd < 0 else (done.fd,)
    reply = Reply(name=done.name, pid=done.pid, descriptor=bool(descriptors))
    return msgspec.json.encode(reply), descriptors


def encode_error(error: ErrorInfo) -> bytes:
    return msgspec.json.encode(Reply(error=error))


def decode_reply(data: bytes, descriptors: tuple[int, ...]) -> Done:
    """What came of it; whatever it raises, the descriptors are still the caller's.

    Raises the error that the reply has, Unavailable for what is no reply.
    """
    try:
        reply = msgspec.json.decode(data, type=Reply)
    except MALFORMED as error:
        raise Unavailable(f"the helper gave no reply: {error}") from None
    if reply.error is not None:
        told = reply.error
        raise from_wire(told.code, told.message, told.hint, told.op_id)
    if len(descriptors) != reply.descriptor:
        raise Unavailable("the helper gave no reply: its descriptor is not there, or not announced")
    return Done(name=reply.name, pid=reply.pid, fd=descriptors[0] if descriptors else -1)


def shortened(text: str) -> str:
    """Fit for a log and a reply: the beginning, with what is no text escaped."""
    plain = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return plain if len(plain) <= _TEXT_MAX else f"{plain[:_TEXT_MAX]}…"


def framed(data: bytes) -> bytes:
    """A message as it is sent."""
    return _LENGTH.pack(len(data)) + data


async def send(connection: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send a message over a non-blocking socket. The descriptors stay the caller's.

    Raises OSError where the other end takes none.
    """
    rest = memoryview(framed(data))
    while rest:
        try:
            if descriptors:
                sent = socket.send_fds(connection, [rest], descriptors)
            else:
                sent = connection.send(rest)
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            await _ready(connection, loop.add_writer, loop.remove_writer)
        else:
            descriptors = ()
            rest = rest[sent:]


async def receive(connection: socket.socket, max_bytes: int) -> tuple[bytes, tuple[int, ...]]:
    """A whole message from a non-blocking socket. Its descriptors are the caller's to close; where
    it raises, or is cancelled, none is left open.

    Raises BadRequest for one that is too long, cut off, or has too many descriptors, OSError where
    the connection fails.
    """
    descriptors: list[int] = []
    try:
        header = await _receive(connection, _LENGTH.size, descriptors)
        (length,) = _LENGTH.unpack(header)
        if length > max_bytes:
            raise BadRequest(f"a message of {length} bytes is too long (at most {max_bytes})")
        return await _receive(connection, length, descriptors), tuple(descriptors)
    except BaseException:
        close_all(descriptors)
        raise


async def _receive(connection: socket.socket, length: int, descriptors: list[int]) -> bytes:
    data = bytearray()
    while len(data) < length:
        wanted = min(length - len(data), _PIECE_BYTES)
        try:
            piece, ancillary, flags, _ = connection.recvmsg(
                wanted, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            await _ready(connection, loop.add_reader, loop.remove_reader)
            continue
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors += _passed(raw)
        if flags & socket.MSG_CTRUNC or len(descriptors) > DESCRIPTORS_MAX:
            raise BadRequest("more descriptors came than any message has")
        if not piece:
            raise BadRequest("the connection ended within a message")
        data += piece
    return bytes(data)


def _passed(raw: bytes) -> array.array[int]:
    found = array.array("i")
    found.frombytes(raw[: len(raw) - len(raw) % found.itemsize])
    return found


async def _ready(
    connection: socket.socket, add: Callable[..., None], remove: Callable[[socket.socket], bool]
) -> None:
    ready = asyncio.Event()
    add(connection, ready.set)
    try:
        await ready.wait()
    finally:
        remove(connection)


def close_all(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        with suppress(OSError):  # an error of writing back, of a file that is another's
            os.close(each)
