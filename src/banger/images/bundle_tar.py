"""The tar of a bundle: written, and read strictly, for what a hostile one holds shall cost nothing.

Not by `tarfile`, which archives of images are read with: since its headers and maps may be of any
size, that is done in a process of its own, limited in memory. Here are plain headers only (POSIX
ustar, and GNU's for sparse files:
https://www.gnu.org/software/tar/manual/html_node/Standard.html). Of a member come its name, its
kind and its content; owners, modes and times are of no interest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from banger.base.errors import PreconditionFailed

_BLOCK = 512
_PAGE = 4096
_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)
#: A sparse map of that many pieces is for 4 GiB at its worst.
_EXTENTS_MAX = 1 << 20

_FILE = (b"0", b"\0")
_DIRECTORY = b"5"
_SPARSE = b"S"
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device",
    b"6": "a pipe", b"x": "an extended header", b"g": "an extended header",
    b"L": "a long name", b"K": "a long link",
}  # fmt: skip

# Offsets in a header, and in the blocks that go on with its map.
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)
_MAP_IN_HEADER = (386, 4)
_MAP_GOES_ON = 482
_REAL_SIZE = slice(483, 495)
_MAP_IN_BLOCK = (0, 21)
_MAP_STILL_GOES_ON = 504
_POSIX = b"ustar\0"


class Source(Protocol):
    """What a tar is read from: `read` gives less than it is asked for at the end only."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One member. ``extents`` are the (offset, length) of what is stored of its ``size``."""

    name: str
    is_directory: bool
    size: int
    extents: tuple[tuple[int, int], ...]

    @property
    def stored(self) -> int:
        return sum(length for _, length in self.extents)


class TarReader:
    """Go through `members`, and take the content of each file with `copy` or `content`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pending = 0

    def members(self) -> Iterator[Member]:
        """Each in turn; what was not taken of the one before is passed over.

        Raises PreconditionFailed for what is no tar, is cut off, or has a member that is neither
        a file nor a directory.
        """
        while True:
            self._pass_over()
            header = self._exactly(_BLOCK)
            if header == _ZEROS[:_BLOCK]:
                return
            member = self._member(header)
            stored = member.stored
            self._pending = stored + -stored % _BLOCK
            yield member

    def copy(self, member: Member, target: BinaryIO, check: Callable[[], None]) -> None:
        """Write its content to `target`, an empty file, which is sparse where there are zeros."""
        for offset, length in member.extents:
            done = 0
            while done < length:
                check()
                piece = self._take(min(_PIECE, length - done))
                write_sparsely(target, offset + done, piece)
                done += len(piece)
        target.truncate(member.size)

    def content(self, member: Member, limit: int) -> bytes:
        """The content of a small file."""
        if member.size > limit or member.extents != _whole(member.size):
            raise damaged(f"{member.name} is too large")
        return self._take(member.size)

    def _take(self, count: int) -> bytes:
        self._pending -= count
        return self._exactly(count)

    def _pass_over(self) -> None:
        while self._pending:
            self._take(min(_PIECE, self._pending))

    def _exactly(self, count: int) -> bytes:
        data = self._source.read(count)
        if len(data) != count:
            raise damaged("it is cut off")
        return data

    def _member(self, header: bytes) -> Member:
        kind = header[156:157]
        if _checksum(header) != _number(header[_CHECKSUM]):
            raise damaged("a header in it is damaged")
        name = _name(header)
        if kind == _SPARSE:
            return self._sparse(name, header)
        if kind not in (*_FILE, _DIRECTORY):
            what = _KINDS.get(kind, "of an unknown kind")
            raise damaged(f"{name} in it is {what}")
        size = _number(header[_SIZE])
        if kind == _DIRECTORY:
            return Member(name.rstrip("/"), True, 0, _whole(size))
        return Member(name, False, size, _whole(size))

    def _sparse(self, name: str, header: bytes) -> Member:
        extents = _map(header, *_MAP_IN_HEADER)
        goes_on = header[_MAP_GOES_ON]
        while goes_on:
            if len(extents) > _EXTENTS_MAX:
                raise damaged(f"{name} is in too many pieces")
            block = self._exactly(_BLOCK)
            extents += _map(block, *_MAP_IN_BLOCK)
            goes_on = block[_MAP_STILL_GOES_ON]
        size, end = _number(header[_REAL_SIZE]), 0
        for offset, length in extents:
            if offset < end:
                raise damaged(f"the pieces of {name} overlap")
            end = offset + length
        member = Member(name, False, size, tuple(each for each in extents if each[1]))
        if end > size or member.stored != _number(header[_SIZE]):
            raise damaged(f"the pieces of {name} do not fit it")
        return member


def write_sparsely(target: BinaryIO, offset: int, data: bytes) -> None:
    """Write `data` at `offset`, leaving out pages that are nothing but zeros."""
    if data == _ZEROS[: len(data)]:
        return
    first: int | None = None
    for start in range(0, len(data), _PAGE):
        page = data[start : start + _PAGE]
        if page == _ZEROS[: len(page)]:
            if first is not None:
                target.seek(offset + first)
                target.write(data[first:start])
                first = None
        elif first is None:
            first = start
    if first is not None:
        target.seek(offset + first)
        target.write(data[first:])


class TarWriter:
    """Write files to `target`, equal ones for equal input: no owners, no times, our own modes."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target

    def add(self, name: str, data: bytes) -> None:
        self._target.write(_header(name, b"0", len(data)) + data + bytes(-len(data) % _BLOCK))

    def add_directory(self, name: str) -> None:
        self._target.write(_header(f"{name}/", _DIRECTORY, 0))

    def add_file(self, name: str, file: BinaryIO, said: Callable[[int], None]) -> None:
        """The content of `file`, without its holes; `said` hears how many bytes each time."""
        size = os.fstat(file.fileno()).st_size
        extents = _extents(file.fileno(), size)
        stored = sum(length for _, length in extents)
        if stored == size:
            self._target.write(_header(name, b"0", size))
        else:
            self._target.write(_sparse_header(name, size, stored, extents))
        for offset, length in extents:
            file.seek(offset)
            done = 0
            while done < length:
                piece = file.read(min(_PIECE, length - done))
                if not piece:
                    raise PreconditionFailed(f"{name} has become shorter while it was read")
                self._target.write(piece)
                done += len(piece)
                said(len(piece))
        self._target.write(bytes(-stored % _BLOCK))

    def end(self) -> None:
        self._target.write(bytes(2 * _BLOCK))


def stored_bytes(path: Path) -> int:
    """How much of a file `TarWriter.add_file` writes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return sum(length for _, length in _extents(file.fileno(), size))


def _extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is not a hole (lseek(2), SEEK_DATA)."""
    found, end = [], 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, end - start))
    return found


def _header(name: str, kind: bytes, size: int, fields: dict[int, bytes] | None = None) -> bytes:
    """A header in GNU's form of ustar, which is that of the kind for sparse files."""
    header = bytearray(_BLOCK)
    for offset, value in {
        0: name.encode("ascii"),
        100: b"0000755" if kind == _DIRECTORY else b"0000644",
        108: b"0000000",
        116: b"0000000",
        124: _digits(size),
        136: b"00000000000",
        148: b" " * 8,
        156: kind,
        257: b"ustar  ",
        **(fields or {}),
    }.items():
        header[offset : offset + len(value)] = value
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _sparse_header(name: str, size: int, stored: int, extents: list[tuple[int, int]]) -> bytes:
    # An empty piece at the end says how long a file is that ends with a hole.
    pairs = [_digits(offset) + _digits(length) for offset, length in (*extents, (size, 0))]
    (start, count), (_, more) = _MAP_IN_HEADER, _MAP_IN_BLOCK
    rest = pairs[count:]
    fields = {start: b"".join(pairs[:count]), _REAL_SIZE.start: _digits(size)}
    if rest:
        fields[_MAP_GOES_ON] = b"\1"
    blocks = [_header(name, _SPARSE, stored, fields)]
    for position in range(0, len(rest), more):
        last = position + more >= len(rest)
        block = b"".join(rest[position : position + more]).ljust(_MAP_STILL_GOES_ON, b"\0")
        blocks.append((block + (b"\0" if last else b"\1")).ljust(_BLOCK, b"\0"))
    return b"".join(blocks)


def _digits(value: int) -> bytes:
    """The 12 bytes of a number: see `_number`."""
    if value < 8**11:
        return b"%011o\0" % value
    return b"\x80" + value.to_bytes(11, "big")


def damaged(problem: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"the bundle cannot be used: {problem}",
        hint="bundles are what `banger image export` and `banger kernel export` make",
    )


def _whole(size: int) -> tuple[tuple[int, int], ...]:
    return ((0, size),) if size else ()


def _map(block: bytes, start: int, count: int) -> list[tuple[int, int]]:
    """Up to `count` pairs of numbers; a pair of empty fields ends them."""
    found = []
    for position in range(start, start + 24 * count, 24):
        pair = block[position : position + 24]
        if not pair.strip(b"\0 "):
            break
        found.append((_number(pair[:12]), _number(pair[12:])))
    return found


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == _POSIX and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    text = name.decode("ascii", errors="replace").removeprefix("./") or "."
    if not text.isprintable():
        raise damaged("a name in it is not one of a file")
    return text


def _checksum(header: bytes) -> int:
    """The sum of the bytes, its own field taken as spaces."""
    return sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """Octal digits, or (GNU, for what these cannot hold) big-endian after a byte 0x80."""
    if field[:1] == b"\x80":
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b"\0 ")
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            if digits:
                raise damaged("a number in it is none")
            digits = b"0"
        value = int(digits, 8)
    if value >= 1 << 62:
        raise damaged("a number in it is too large")
    return value
