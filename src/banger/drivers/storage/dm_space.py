"""How much room the changes of a machine have, and how much they are to have: `dm_snapshot`'s sums.

Pure but for what the host has yet to write. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from banger.base import procfs
from banger.drivers.base import Room
from banger.drivers.storage import cow_file

_MIB = 1 << 20

#: Allocated beyond what is used: a part of what is free, within these. It is looked after four
#: times a second: a machine that writes a gigabyte a second finds room where there is plenty, one
#: that writes 200 MiB a second where there is hardly any.
_AHEAD_LEAST_BYTES = 128 * _MIB
_AHEAD_MOST_BYTES = 512 * _MIB
_AHEAD_OF_FREE = 8
#: A machine that has less left is held: what it has in flight must find room yet.
_SHORT_BYTES = 48 * _MIB
#: Of the host's memory that is still to be written: it may be that of a machine which opens its
#: disk with a cache, as Firecracker does.
_DIRTY_MOST_BYTES = 128 * _MIB
#: The last of the host's disk is not taken: what is going on has to be recorded.
KEEP_FREE_BYTES = 64 * _MIB
#: What is allocated is so many times this, at least once; loop devices are whole sectors.
_STEP_BYTES = 4 * _MIB


@dataclass(frozen=True)
class Space:
    """Of the device of a machine's changes: its size, how far it is used, how large it may be. Its
    file is larger where whoever makes devices was not there to tell it so."""

    size_bytes: int
    used_bytes: int
    full_bytes: int
    file_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.size_bytes - self.used_bytes

    @property
    def is_at_its_end(self) -> bool:
        """Whether a change may have found no room already."""
        return self.left_bytes < 2 * cow_file.CHUNK_BYTES

    @property
    def is_ample(self) -> bool:
        """Whether there is room for whatever is under way."""
        return self.left_bytes >= _SHORT_BYTES + _DIRTY_MOST_BYTES

    @property
    def room(self) -> Room:
        """How it stands, but for what is lost already."""
        short = _SHORT_BYTES + min(procfs.dirty_bytes(), _DIRTY_MOST_BYTES)
        if self.size_bytes >= self.full_bytes or self.left_bytes >= 2 * short:
            return Room.AMPLE
        return Room.SHORT if self.left_bytes < short else Room.TIGHT

    def more_bytes(self, free_bytes: int) -> int:
        """How much larger the device is to be now, where so much of the host's disk is free."""
        ahead = ahead_bytes(free_bytes)
        wanted = min(self.used_bytes + ahead, self.full_bytes) - self.size_bytes
        is_last = self.size_bytes + wanted == self.full_bytes
        least = min(_STEP_BYTES, wanted)
        if least <= 0 or not (wanted >= ahead // 4 or is_last):
            return 0
        allocated = self.file_bytes - self.size_bytes
        if allocated < least:  # else the device has yet to be told, which takes nothing of the disk
            allocated = (free_bytes - KEEP_FREE_BYTES) // _STEP_BYTES * _STEP_BYTES
        more = min(wanted, allocated)
        return more if more >= least else 0


def good_size(size_bytes: int, full_bytes: int) -> int:
    """At least so much, of what can be used; never a size that ends where a new area of the
    kernel's store would begin: it clears that before it looks whether there is room for it, and
    gives the snapshot up when there is none."""
    size = min(size_bytes, full_bytes)
    if size < full_bytes and size // cow_file.CHUNK_BYTES % cow_file.AREA_CHUNKS == 1:
        size += cow_file.CHUNK_BYTES
    return size


def ahead_bytes(free_bytes: int) -> int:
    """How much is allocated beyond what is used, where so much of the host's disk is free."""
    part = min(free_bytes // _AHEAD_OF_FREE, _AHEAD_MOST_BYTES)
    return max(_AHEAD_LEAST_BYTES, part // _STEP_BYTES * _STEP_BYTES)
