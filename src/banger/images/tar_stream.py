"""A tar archive of unknown origin, read once from front to back: decompressed, measured, hashed.

Headers are read by the standard library's `tarfile`; what it would pass over in silence (an
archive that is damaged or cut off) is an error here. Only the standard library is imported, and
everything before it is needed: the process that reads archives shuts itself in (`unpacker`).
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import queue
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import zstandard

#: What is read of the archive at once.
_PIECE_BYTES = 1 << 20
#: Decompressed pieces that may wait: while one is written, the next are being made.
_PIECES = 8
#: The longest header: a long name, extended attributes (64 KiB each), a map of a sparse file.
_HEADER_BYTES = 4 << 20
#: More than there are in any number, or in the name of a file.
_DIGITS = re.compile(rb"[0-9]{300}")
#: What it may say of all its members: each gets a copy.
_GLOBAL_HEADERS = 100
#: What zstd may ask for, as its own tool has it.
_MEMORY_BYTES = 128 << 20


class ArchiveError(Exception):
    """The archive cannot be used; the text says why."""


class _Counted(io.FileIO):
    """A file that knows how much of it was read."""

    read_bytes = 0

    def readinto(self, buffer: bytearray | memoryview) -> int | None:  # type: ignore[override]
        count = super().readinto(buffer)
        self.read_bytes += count or 0
        return count


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """Like `gzip.GzipFile`, in larger pieces; what follows the last member is no matter."""
    decompressor = zlib.decompressobj(wbits=_GZIP)
    ended = False
    while stored := file.read(_PIECE_BYTES):
        while stored:
            if ended:
                if not stored.lstrip(b"\0"):
                    break  # padding
                decompressor = zlib.decompressobj(wbits=_GZIP)  # several may follow one another
            full = True
            while full and not decompressor.eof:
                data = decompressor.decompress(stored, _PIECE_BYTES)
                stored, full = decompressor.unconsumed_tail, len(data) == _PIECE_BYTES
                yield data
            ended = decompressor.eof
            stored = decompressor.unused_data
    if not ended:
        raise ArchiveError("it is cut off")


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MEMORY_BYTES)
    yield from _pieces(decompressor.stream_reader(file, read_across_frames=True))


def _unxz(file: IO[bytes]) -> Iterator[bytes]:
    with lzma.open(file) as opened:
        yield from _pieces(opened)


def _bunzip2(file: IO[bytes]) -> Iterator[bytes]:
    with bz2.open(file) as opened:
        yield from _pieces(opened)


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece


#: What a compressed file begins with, and what undoes it, at most a piece at a time: what little
#: data may become in one step has no bound.
_COMPRESSIONS: tuple[tuple[bytes, Callable[[IO[bytes]], Iterator[bytes]]], ...] = (
    (b"\x1f\x8b", _gunzip),
    (b"\x28\xb5\x2f\xfd", _unzstd),
    (b"\xfd7zXZ\x00", _unxz),
    (b"BZh", _bunzip2),
)
_MAGIC_BYTES = max(len(magic) for magic, _ in _COMPRESSIONS)
_GZIP = zlib.MAX_WBITS | 16


class TarStream:
    """The decompressed bytes of the archive at a descriptor, and a file object for `tarfile`.

    Decompressing and hashing go on in a thread, ahead of who reads. Raises ArchiveError from
    `read` and the others for damaged input, and for more than `limit_bytes`.
    """

    def __init__(self, descriptor: int, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._digest = hashlib.sha256()
        self._pieces: queue.Queue[bytes | Exception | None] = queue.Queue(_PIECES)
        self._piece = memoryview(b"")
        self._position = 0
        self._ended = False
        #: Decompressed so far.
        self.total_bytes = 0
        self._stored = _Counted(descriptor)
        threading.Thread(target=self._fill, daemon=True).start()

    @property
    def read_bytes(self) -> int:
        """How much of the archive, as it is stored, has been read."""
        return self._stored.read_bytes

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """Forward only."""
        self.skip(position - self._position)
        return self._position

    def read(self, size: int) -> bytes:
        """Part of a header: `tarfile` asks for as much as the archive tells it to."""
        if size > _HEADER_BYTES:
            raise ArchiveError(f"a header of {size} bytes is more than any archive needs")
        parts = []
        left = size
        while left > 0 and (part := self.some(left)):
            parts.append(part)
            left -= len(part)
        data = b"".join(parts)
        # `tarfile` looks for numbers in extended headers, in time that is the square of the length
        # of a row of digits (CVE-2024-6232, open in many a Python 3.11).
        if size > tarfile.BLOCKSIZE and _DIGITS.search(data):
            raise ArchiveError("a header of it is damaged")
        return data

    def some(self, most: int) -> memoryview:
        """The next bytes, up to `most`; empty at the end."""
        while not self._piece and not self._ended:
            self._next()
        part, self._piece = self._piece[:most], self._piece[most:]
        self._position += len(part)
        return part

    def skip(self, count: int) -> None:
        while count > 0:
            part = self.some(count)
            if not part:
                raise ArchiveError("it is cut off")
            count -= len(part)

    def finish(self) -> str:
        """Read what is left; the sha256 of all, decompressed, in hex."""
        while self.some(_PIECE_BYTES):
            pass
        return self._digest.hexdigest()

    def _next(self) -> None:
        piece = self._pieces.get()
        if isinstance(piece, Exception):
            raise ArchiveError(_told(piece)) from piece
        self._ended = piece is None
        self._piece = memoryview(piece or b"")

    def _fill(self) -> None:
        try:
            with io.BufferedReader(self._stored, _PIECE_BYTES) as file:
                for piece in _decompressed(file):
                    self.total_bytes += len(piece)
                    if self.total_bytes > self._limit_bytes:
                        raise ArchiveError(f"it holds more than {self._limit_bytes >> 20} MiB")
                    self._digest.update(piece)
                    self._pieces.put(piece)
        except Exception as error:  # whatever it is: who reads is told
            self._pieces.put(error)
        else:
            self._pieces.put(None)


def is_archive(begin: bytes) -> bool:
    """Whether a file with this beginning (512 bytes) may be one: by what its format is known by."""
    compressed = any(begin.startswith(magic) for magic, _ in _COMPRESSIONS)
    return compressed or begin[257:262] == b"ustar"


def _decompressed(file: io.BufferedReader[_Counted]) -> Iterator[bytes]:
    begin = file.peek(_MAGIC_BYTES)
    for magic, decompress in _COMPRESSIONS:
        if begin.startswith(magic):
            return decompress(file)
    return _pieces(file)


def _told(error: Exception) -> str:
    if isinstance(error, ArchiveError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it takes more memory than any archive needs"
    if isinstance(error, EOFError):
        return "it is cut off"
    if isinstance(error, OSError) and error.errno is not None:
        return f"it cannot be read: {error.strerror}"
    return f"it is damaged: {error}"


def members(stream: TarStream, *, complete: bool) -> Iterator[tarfile.TarInfo]:
    """The members in order. The data of each must be read, as far as it is wanted, with
    `stream.some` before the next is asked for.

    `complete`: an archive without the block that marks its end is taken for one that is cut off.
    """
    # Not opened the usual way: that keeps all members in memory, and hides what is damaged.
    archive = tarfile.TarFile(
        fileobj=io.BytesIO(bytes(2 * tarfile.BLOCKSIZE)),
        mode="r", encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip
    archive.fileobj = stream  # type: ignore[assignment]
    archive.offset = 0
    while True:
        stream.skip(archive.offset - stream.tell())
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if complete or archive.offset == 0:
                raise ArchiveError("it is cut off, or no archive") from None
            return
        except tarfile.TruncatedHeaderError:  # type: ignore[attr-defined]
            raise ArchiveError("it is cut off") from None
        except tarfile.HeaderError as error:
            raise ArchiveError(f"it is damaged, or no tar archive: {error}") from None
        except (ValueError, IndexError, OverflowError, RecursionError) as error:
            raise ArchiveError(f"a header of it is damaged: {error}") from None
        if len(archive.pax_headers) > _GLOBAL_HEADERS:
            raise ArchiveError("it says more of all its files than any archive needs")
        yield member
