"""Files that share what they hold: clones where the file system makes them, and what is whose.

By the kernel's own interfaces: FICLONE (linux/fs.h), which btrfs and XFS have, and FIEMAP
(linux/fiemap.h), which tells of each piece of a file whether another file has it, too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
from pathlib import Path

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
#: struct fiemap: start, length, flags, mapped, count, reserved.
_HEADER = struct.Struct("=QQ4I")
#: struct fiemap_extent: logical, physical, length, 2 reserved, flags, 3 reserved.
_EXTENT = struct.Struct("=5Q4I")
_LAST = 0x1
_SHARED = 0x2000
#: Asked for at once: 28 KiB.
_COUNT = 512
_EVERYTHING = (1 << 64) - 1

#: What file systems say that cannot clone, or not from that other one.
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})


def clone(source: int, target: int) -> bool:
    """Make the file `target` a clone of `source` (descriptors); False where that cannot be.

    Takes milliseconds and no room. Raises OSError, when the disk is full, too.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def can_clone(source: Path, directory: Path) -> bool:
    """Whether a file in `directory` can be a clone of `source`."""
    try:
        with source.open("rb") as file, tempfile.TemporaryFile(dir=directory) as nameless:
            return clone(file.fileno(), nameless.fileno())
    except OSError:
        return False


def makes_clones(directory: Path) -> bool:
    """Whether files in `directory` can be clones of one another."""
    try:
        with (
            tempfile.TemporaryFile(dir=directory, buffering=0) as one,
            tempfile.TemporaryFile(dir=directory) as other,
        ):
            one.write(bytes(4096))
            return clone(one.fileno(), other.fileno())
    except OSError:
        return False


def own_bytes(path: Path) -> int:
    """What a file alone takes of its disk: what is freed when it goes.

    What it shares with others is left out where the file system tells; elsewhere nothing is shared
    but by hard links.
    """
    with path.open("rb") as file:
        try:
            return _not_shared(file.fileno())
        except OSError:
            return os.fstat(file.fileno()).st_blocks * 512


def _not_shared(descriptor: int) -> int:
    own, start = 0, 0
    while True:
        answer = bytearray(_HEADER.size + _COUNT * _EXTENT.size)
        _HEADER.pack_into(answer, 0, start, _EVERYTHING - start, 0, 0, _COUNT, 0)
        fcntl.ioctl(descriptor, _FIEMAP, answer)
        mapped = _HEADER.unpack_from(answer)[3]
        if not mapped:
            return own
        for number in range(mapped):
            logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(
                answer, _HEADER.size + number * _EXTENT.size
            )
            if not flags & _SHARED:
                own += length
            if flags & _LAST:
                return own
            start = logical + length
