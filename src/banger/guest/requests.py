"""What can be asked of the guest agent: one frozen dataclass for each kind of OPEN.

`encode` gives the payload of the OPEN. Texts are sent as the bytes that `os.fsencode` makes of
them, so that names that are not UTF-8 pass. A text, the op_id, is always the last field: a frame
cut off by a dying daemon and completed by zeros then has a NUL in a text or the tag 0, and is
refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import ClassVar, Protocol

from banger.base.errors import BadRequest
from banger.base.opid import current_op_id
from banger.guest.frames import FRAME_LIMIT_BYTES, field

ENTROPY_LIMIT_BYTES = 512

#: Of every kind: the operation that the request is part of.
OP_ID_TAG = 9
NO_OP_ID = "-"


class Request(Protocol):
    """Anything that can be opened as a stream."""

    def encode(self) -> bytes: ...


class ExecFlag(IntFlag):
    PTY = 1
    LOGIN = 2
    DETACHED = 4
    MAKE_DIRECTORY = 8
    ANY_LOGIN = 16


class PackFlag(IntFlag):
    """Unknown to agents of older daemons: only a machine started by this one has them."""

    XATTRS = 1
    ONE_FILE_SYSTEM = 2


def _payload(kind: int, *fields: bytes) -> bytes:
    # Outside any operation there is a text too: a number at the end could be cut off unseen.
    op_id = current_op_id.get() or NO_OP_ID
    payload = bytes((kind,)) + b"".join(fields) + field(OP_ID_TAG, op_id.encode())
    if len(payload) > FRAME_LIMIT_BYTES:
        raise BadRequest(
            f"the request is too large for the guest agent: {len(payload)} bytes",
            hint=f"arguments and environment together can be {FRAME_LIMIT_BYTES} bytes at most",
        )
    return payload


def _text(tag: int, value: str) -> bytes:
    raw = os.fsencode(value)
    if b"\0" in raw:
        raise BadRequest(f"{value!r} has a NUL character in it")
    return field(tag, raw)


def _optional(tag: int, value: str | None) -> bytes:
    return b"" if value is None else _text(tag, value)


def _u32(tag: int, value: int | None) -> bytes:
    return b"" if value is None else field(tag, struct.pack(">I", value))


def _u64(tag: int, value: int | None) -> bytes:
    return b"" if value is None else field(tag, struct.pack(">Q", value))


@dataclass(frozen=True)
class Exec:
    """Run a program. No arguments and `login`: the user's login shell; with ``any_login`` /bin/sh
    for one whose shell is nologin or false.

    ``user`` is ``USER[:GROUP]``, names or numbers. With ``make_directory`` the working directory is
    made when it is missing. ``rows`` and ``columns`` are of the PTY. Detached: it lives on when the
    client goes, its output goes to the console, and the stream ends as soon as it runs.
    """

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] | None = None
    directory: str | None = None
    user: str | None = None
    pty: bool = False
    login: bool = False
    detached: bool = False
    make_directory: bool = False
    any_login: bool = False
    rows: int = 24
    columns: int = 80
    KIND: ClassVar[int] = 1

    def encode(self) -> bytes:
        flags = ExecFlag(0)
        for wanted, flag in (
            (self.pty, ExecFlag.PTY),
            (self.login, ExecFlag.LOGIN),
            (self.detached, ExecFlag.DETACHED),
            (self.make_directory, ExecFlag.MAKE_DIRECTORY),
            (self.any_login, ExecFlag.ANY_LOGIN),
        ):
            flags |= flag if wanted else ExecFlag(0)
        environment = [f"{key}={value}" for key, value in (self.environment or {}).items()]
        return _payload(
            self.KIND,
            _u32(5, int(flags)),
            field(6, struct.pack(">HH", self.rows, self.columns)) if self.pty else b"",
            *(_text(2, entry) for entry in environment),
            _optional(3, self.directory),
            _optional(4, self.user),
            *(_text(1, argument) for argument in self.arguments),
        )


@dataclass(frozen=True)
class Read:
    """A file's bytes."""

    path: str
    KIND: ClassVar[int] = 2

    def encode(self) -> bytes:
        return _payload(self.KIND, _text(1, self.path))


@dataclass(frozen=True)
class Write:
    """Stdin becomes a file. Mode and owner: those of the file it replaces, or 0644 and root."""

    path: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    KIND: ClassVar[int] = 3

    def encode(self) -> bytes:
        return _payload(
            self.KIND, _u32(2, self.mode), _u32(3, self.uid), _u32(4, self.gid), _text(1, self.path)
        )


@dataclass(frozen=True)
class Pack:
    """A tar of a file or tree, whose first component is `name` (default: its own).

    With flags also its extended attributes, or without what is mounted in it: a mount point is an
    empty directory then, as it is below what is mounted.
    """

    path: str
    name: str | None = None
    flags: PackFlag | None = None
    KIND: ClassVar[int] = 4

    def encode(self) -> bytes:
        return _payload(
            self.KIND,
            _u32(3, self.flags),
            _optional(2, self.name),
            _text(1, self.path),
        )


@dataclass(frozen=True)
class Unpack:
    """Stdin is a tar; `name` replaces the first component of every member."""

    directory: str
    name: str | None = None
    KIND: ClassVar[int] = 5

    def encode(self) -> bytes:
        return _payload(self.KIND, _optional(2, self.name), _text(1, self.directory))


@dataclass(frozen=True)
class Stat:
    """Type, mode and size of a path, links not followed: `FileStat.decode` reads the answer."""

    path: str
    KIND: ClassVar[int] = 6

    def encode(self) -> bytes:
        return _payload(self.KIND, _text(1, self.path))


@dataclass(frozen=True)
class FileStat:
    """The answer to `Stat`. ``type`` is one of f, d, l, o (file, directory, link, other)."""

    type: str
    mode: int
    size_bytes: int

    @classmethod
    def decode(cls, answer: bytes) -> FileStat:
        """Raises BadRequest when a guest's answer has not this shape."""
        if len(answer) != 13 or answer[:1] not in (b"f", b"d", b"l", b"o"):
            raise BadRequest("the guest agent answered a STAT with something else")
        mode, size = struct.unpack(">IQ", answer[1:])
        return cls(answer[:1].decode(), mode, size)


@dataclass(frozen=True)
class Connect:
    """A TCP connection to a port of the guest's loopback."""

    port: int
    KIND: ClassVar[int] = 7

    def encode(self) -> bytes:
        if not 0 < self.port < 65536:
            raise BadRequest(f"{self.port} is not a TCP port")
        return _payload(self.KIND, field(1, struct.pack(">H", self.port)))


@dataclass(frozen=True)
class Stats:
    """CPU, memory, disks and network, as JSON."""

    KIND: ClassVar[int] = 8

    def encode(self) -> bytes:
        return _payload(self.KIND)


@dataclass(frozen=True)
class Sockets:
    """Listening TCP sockets, as JSON."""

    KIND: ClassVar[int] = 9

    def encode(self) -> bytes:
        return _payload(self.KIND)


@dataclass(frozen=True)
class Setup:
    """The guest's identity. ``address`` has its prefix length; ``machine_id`` is 32 hex digits."""

    hostname: str | None = None
    machine_id: str | None = None
    address: str | None = None
    gateway: str | None = None
    dns: str | None = None
    mac: str | None = None
    entropy: bytes = b""
    unix_time_ns: int | None = None
    #: What the work disk has grown to since the guest booted: it waits until it has heard of that.
    work_size_bytes: int | None = None
    #: It was somebody else until now: what it must not share with that one is made anew.
    copied: bool = False
    KIND: ClassVar[int] = 10

    def encode(self) -> bytes:
        if len(self.entropy) > ENTROPY_LIMIT_BYTES:
            raise BadRequest(f"at most {ENTROPY_LIMIT_BYTES} bytes of entropy go in one request")
        return _payload(
            self.KIND,
            _u64(8, self.unix_time_ns),
            _u64(10, self.work_size_bytes),
            _u32(11, 1 if self.copied else None),
            field(7, self.entropy) if self.entropy else b"",
            _optional(6, self.mac),
            _optional(3, self.address),
            _optional(4, self.gateway),
            _optional(5, self.dns),
            _optional(1, self.hostname),
            _optional(2, self.machine_id),
        )


@dataclass(frozen=True)
class Shutdown:
    """End the machine in good order."""

    reboot: bool = False
    KIND: ClassVar[int] = 11

    def encode(self) -> bytes:
        return _payload(self.KIND, _u32(1, int(self.reboot)))


@dataclass(frozen=True)
class Ping:
    """Nothing: is the agent there?"""

    KIND: ClassVar[int] = 12

    def encode(self) -> bytes:
        return _payload(self.KIND)


@dataclass(frozen=True)
class Listeners:
    """A line of JSON as of `Sockets`, but without whose they are, now and whenever it changes.

    A byte of stdin has the guest look at once, EOF ends it. Unknown to agents of older daemons.
    """

    KIND: ClassVar[int] = 13

    def encode(self) -> bytes:
        return _payload(self.KIND)
