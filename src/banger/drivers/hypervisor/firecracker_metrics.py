"""What Firecracker counts of a machine's devices: lines of JSON, at the end of a file.

In each line is what was counted since the line before (Firecracker's docs/metrics.md); it adds one
each minute, and when it is asked to. So that the file takes no room, what was read is made a hole:
Firecracker goes on at the place where it is. Who gets out of his machine can write whatever he
likes into it: little of it is read at a time, and that strictly.
"""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from banger.base.malformed import MALFORMED
from banger.drivers.base import Traffic

#: A line has 6 KiB. A daemon that was away for longer than these took misses the earlier ones.
_READ_MAX_BYTES = 1 << 20
#: What nobody has read takes no more: half of the above, so that none of it is missed.
_UNREAD_MAX_BYTES = _READ_MAX_BYTES // 2
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class _Block(msgspec.Struct, frozen=True):
    read_bytes: _Count
    write_bytes: _Count


class _Net(msgspec.Struct, frozen=True):
    rx_bytes_count: _Count
    tx_bytes_count: _Count


class _Line(msgspec.Struct, frozen=True):
    """What is used of it: the sums over all disks, and over all interfaces."""

    block: _Block
    net: _Net


class Meter:
    """One machine's counts, from the first look on. Lives as long as somebody looks.

    Looks may come from several threads: one that nobody waits for any more goes on in its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = 0
        self._read_to = 0
        self._sums = Traffic(0, 0, 0, 0)
        self._lock = threading.Lock()

    def drain(self) -> None:
        """Read what is there once it takes much room. Raises as `read`."""
        if self.path.lstat().st_blocks * 512 > _UNREAD_MAX_BYTES:
            self.read()

    def read(self) -> Traffic:
        """All that was counted up to now. Raises OSError when there is no such file."""
        with self._lock:
            return self._read()

    def _read(self) -> Traffic:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(None, f"{self.path} is not a file")
            if status.st_ino != self._inode or status.st_size < self._read_to:
                self._inode, self._read_to = status.st_ino, 0  # of another process
            start = max(self._read_to, status.st_size - _READ_MAX_BYTES)
            data = os.pread(descriptor, _READ_MAX_BYTES, start)
            whole = data.rfind(b"\n") + 1
            for line in data[:whole].split(b"\n"):
                self._sums = _added(self._sums, line)
            self._read_to = start + whole
            _make_hole(descriptor, self._read_to)
        finally:
            os.close(descriptor)
        return self._sums


def _added(sums: Traffic, line: bytes) -> Traffic:
    """With what a line has; one that is none (cut off at its beginning, a hole) has nothing."""
    try:
        counted = msgspec.json.decode(line, type=_Line)
    except MALFORMED:
        return sums
    return Traffic(
        disk_read_bytes=sums.disk_read_bytes + counted.block.read_bytes,
        disk_written_bytes=sums.disk_written_bytes + counted.block.write_bytes,
        network_in_bytes=(sums.network_in_bytes or 0) + counted.net.rx_bytes_count,
        network_out_bytes=(sums.network_out_bytes or 0) + counted.net.tx_bytes_count,
    )


def _make_hole(descriptor: int, length: int) -> None:
    """Give back what the file takes up to there; a file system that cannot keeps it."""
    if length:
        libc = ctypes.CDLL(None)
        libc.fallocate(
            descriptor, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_longlong(0), ctypes.c_longlong(length)
        )
