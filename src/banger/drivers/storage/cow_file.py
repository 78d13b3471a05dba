"""The file that keeps what a machine has changed of its disk, as device-mapper writes it.

The format is the kernel's (drivers/md/dm-snap-persistent.c), in chunks of 4 KiB: the first is a
header; then come areas, each a chunk of exceptions and a chunk of data for each of those. It is
written in order, so that it has an end, before which nothing is free and after which nothing is
needed. (A write through the loop device is in the file at once: both use its page cache.)

Beyond its end the file is allocated ahead, and the device is no larger than the file: what is
written never meets a hole, for which the host's disk might have no room.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from banger.base.errors import PreconditionFailed
from banger.hostops.mappings import CHUNK_SECTORS, HEADER, MAGIC, VERSION

CHUNK_BYTES = CHUNK_SECTORS * 512
#: struct disk_exception: the chunk of the disk, and that of this file which stands for it.
_EXCEPTION = struct.Struct("<2Q")
_EXCEPTIONS = CHUNK_BYTES // _EXCEPTION.size
AREA_CHUNKS = 1 + _EXCEPTIONS

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


@dataclass(frozen=True)
class Extent:
    """How far a file is used. ``area`` is the last one that has anything: where to look next."""

    end_bytes: int
    area: int = 0


def extent(path: Path, area: int = 0) -> Extent:
    """How far it is used, by what is committed in it from this area on.

    Raises PreconditionFailed for a file that is none, or that the kernel has given up.
    """
    with path.open("rb") as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        if not _has_begun(path, os.pread(descriptor, CHUNK_BYTES, 0)):
            return Extent(0)
        while True:
            first = 1 + area * AREA_CHUNKS
            exceptions = os.pread(descriptor, CHUNK_BYTES, first * CHUNK_BYTES)
            last, is_full = _last_chunk(exceptions, first)
            end = (last + 1) * CHUNK_BYTES
            if exceptions and end > size:
                raise _damaged(path, "it ends before its changes do")
            if not is_full:
                return Extent(min(end, size), area)
            area += 1


def cut(path: Path) -> None:
    """Give back what was allocated ahead, when nobody has it open. One that cannot be read stays
    as it is."""
    try:
        end = extent(path).end_bytes
        if path.stat().st_size > end:
            os.truncate(path, end)
    except (PreconditionFailed, FileNotFoundError):
        pass  # whoever starts it is told


def allocate(path: Path, size_bytes: int) -> None:
    """Have it be that large, with room for all of it. Raises OSError where there is none."""
    with path.open("rb+") as file:
        size = os.fstat(file.fileno()).st_size
        if size_bytes > size:
            os.posix_fallocate(file.fileno(), size, size_bytes - size)


def never_copied(path: Path) -> None:
    """Have btrfs write over what is in a new, empty file instead of beside it, which takes room
    (FS_NOCOW_FL, linux/fs.h). Other file systems do so anyway."""
    with path.open("rb") as file, suppress(OSError):
        flags = bytearray(fcntl.ioctl(file, _FS_IOC_GETFLAGS, bytes(8)))
        (before,) = struct.unpack_from("=i", flags)
        struct.pack_into("=i", flags, 0, before | _FS_NOCOW_FL)
        fcntl.ioctl(file, _FS_IOC_SETFLAGS, bytes(flags))


def _has_begun(path: Path, chunk: bytes) -> bool:
    """Whether anything was written, by the first chunk: that is zeros until then.

    All of it, for other files begin with zeros, too: ext4 has its superblock behind 1024 of them.
    (What lies further on decides nothing: after a power failure the host may have kept chunks that
    were written later than a header which is lost.)
    """
    if not chunk.strip(b"\0"):
        return False
    if len(chunk) < HEADER.size:
        raise _damaged(path, "it is cut off")
    magic, valid, version, chunk_sectors = HEADER.unpack_from(chunk)
    if (magic, version, chunk_sectors) != (MAGIC, VERSION, CHUNK_SECTORS):
        raise _damaged(path, "it is no such file")
    if not valid:
        raise _damaged(path, "a change could not be written, and the kernel has given it up")
    return True


def _last_chunk(exceptions: bytes, first: int) -> tuple[int, bool]:
    """The last chunk that an area uses, and whether it has no exception free."""
    last = first
    for number in range(len(exceptions) // _EXCEPTION.size):
        _, chunk = _EXCEPTION.unpack_from(exceptions, number * _EXCEPTION.size)
        if not chunk:
            return last, False
        last = max(last, chunk)
    return last, len(exceptions) == CHUNK_BYTES


def _damaged(path: Path, why: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"{path} cannot be used: {why}",
        hint="what the machine changed on its system disk is lost: make another from its image",
    )
