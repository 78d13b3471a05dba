"""System disks as device-mapper snapshots, while their machines run: for hosts with many of them.

All machines of an image share one read-only loop device of its file, and with it what the host
keeps of that in memory. What a machine changes is in a file of its own (`cow_file`), on another
loop device; over both there is a mapping, which is what the machine opens. Between two runs there
is only that file, which is copied as a raw disk is. Work disks are raw files.

**Room.** The kernel gives a snapshot up for good when a change cannot be written. So the device of
the changes is never larger than what is allocated for them: where that ends writes fail, and all
that was written before stays good. It does not come to that as long as `tend` finds room in time;
where there is none left, the machine is to be held. Files of changes share nothing with others
(no clones): on btrfs and XFS, writing over what is shared needs room that nobody has kept.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Conflict, PreconditionFailed, Unavailable
from banger.base.log import get_logger
from banger.base.model import DiskDevices
from banger.drivers.base import Check, DiskFormat, Level, Room
from banger.drivers.storage import cow_file
from banger.drivers.storage.dm_kernel import kernel_checks
from banger.drivers.storage.dm_space import KEEP_FREE_BYTES, Space, ahead_bytes, good_size
from banger.drivers.storage.reflink import ReflinkStorage, copy_file, nearest
from banger.hostops import block_devices, mappings
from banger.hostops.block_devices import Mapping
from banger.hostops.mappings import DMSETUP, mapping_name
from banger.hostops.ops import (
    Done,
    GrowSnapshot,
    HostOps,
    LookAtSnapshot,
    MapSnapshot,
    Operation,
    SnapshotState,
    SweepSnapshots,
    UnmapSnapshot,
)

T = TypeVar("T")

_MIB = 1 << 20
_SUFFIX = ".cow"
_MAPPED = Path("/dev/mapper")
_WITHOUT = 'or do without: storage = "auto"'

_TENDING_THREADS = 4
#: Who looks at a machine waits no longer for whoever has the privileges, for whom milliseconds are
#: usual: one that has too little room is to be held, and one that is to end waits for that look.
_ANSWER_TIMEOUT_S = 2.0
_SOON_S = 0.25
_LOST = (SnapshotState.OVERFLOWED, SnapshotState.INVALID)

#: What is busy may be so for a moment: udev, or another daemon, looks at it.
_TRIES = 20
_TRY_AGAIN_S = 0.1


class DmSnapshotStorage:
    """Implements `drivers.base.Storage` and `DiskDeviceMaker`."""

    name = "dm_snapshot"
    format = DiskFormat.RAW
    layering = None

    def __init__(self, directory: Path, host: HostOps, instance: str) -> None:
        """`directory` is where the disks of VMs are; `host` does what needs root. `instance` tells
        daemons of one user apart."""
        self._host = host
        self._instance = instance
        self._raw = ReflinkStorage(directory)
        #: Where to look for the end of what is used.
        self._areas: dict[Path, int] = {}
        #: Of `tend` alone: in those that all share it would wait for copies of whole disks.
        self._tending = ThreadPoolExecutor(_TENDING_THREADS, "disk-room")
        #: When files were changed last that had room for whatever was under way.
        self._ample: dict[Path, int] = {}
        #: Of which nobody has asked the kernel since they may have grown: it does not tell by their
        #: space any more whether they were full before.
        self._unasked: set[Path] = set()
        #: By the question and the machine's id: what was asked, and is not answered yet.
        self._asked: dict[tuple[type[Operation], str], asyncio.Task[Done]] = {}
        #: Machines of which nobody has told anything since it was asked, those that had too little
        #: room last, and what was logged about silence last, by the machine's id.
        self._silent: set[str] = set()
        self._short: set[str] = set()
        self._told: dict[str, str] = {}

    def file_name(self, disk: str) -> str:
        """See `Storage.file_name`."""
        return f"{disk}{_SUFFIX}" if disk == "system" else self._raw.file_name(disk)

    async def checks(self) -> list[Check]:
        """Who does what needs root, device-mapper and loop devices in the kernel, dmsetup."""
        name = f"storage {self.name}"
        if self._host.problem:
            return [Check(name, Level.FAIL, self._host.problem, f"{self._host.hint}; {_WITHOUT}")]
        if proc.which(DMSETUP) is None:
            error = proc.missing_tool(DMSETUP)
            return [Check(name, Level.FAIL, error.message, error.hint)]
        return await asyncio.to_thread(kernel_checks, name)

    async def create_overlay(self, base: Path, overlay: Path, size_mib: int) -> None:
        """See `Storage.create_overlay`. A system disk is as large as its base: PreconditionFailed
        where more is asked for."""
        if overlay.suffix != _SUFFIX:
            await self._raw.create_overlay(base, overlay, size_mib)
            return
        try:
            there = await asyncio.to_thread(base.stat)
        except FileNotFoundError as error:
            raise PreconditionFailed(f"{base} is missing: the disk needs it") from error
        if there.st_uid != os.getuid():
            raise PreconditionFailed(
                f"{base} belongs to uid {there.st_uid}: a loop device is made of own files only",
                hint="import the image rather than register it: banger image import",
            )
        there_mib = there.st_size // _MIB
        if there_mib < size_mib:
            raise PreconditionFailed(
                f"a system disk of {size_mib} MiB cannot lie over {base}, which has {there_mib}:"
                f" {self.name} storage makes none larger than its image",
                hint=f'set system_overlay_size = "{there_mib}M" in [vm_defaults], make the image'
                ' larger, or set storage = "auto"',
            )
        await asyncio.to_thread(_make_empty, overlay)

    async def size_mib(self, overlay: Path) -> int:
        """See `Storage.size_mib`. Raises PreconditionFailed for a system disk, which nobody grows:
        it is as large as its image."""
        if overlay.suffix == _SUFFIX:
            raise PreconditionFailed(f"{overlay} is as large as the image that it lies over")
        return await self._raw.size_mib(overlay)

    async def grow(self, overlay: Path, size_mib: int) -> None:
        """See `Storage.grow`."""
        if await self.size_mib(overlay) < size_mib:
            await self._raw.grow(overlay, size_mib)

    async def copy_overlay(self, overlay: Path, copy: Path) -> None:
        """See `Storage.copy_overlay`."""
        await self._copy(overlay, copy)

    async def share(self, disk: Path, directory: Path) -> None:
        """See `Storage.share`. Of a machine that is paused, what the host has yet to write is
        written first."""
        await self._copy(disk, directory / disk.name)

    async def branch(self, frozen: Path, disk: Path) -> None:
        """See `Storage.branch`."""
        await self._copy(frozen, disk)

    async def _copy(self, source: Path, target: Path) -> None:
        if source.suffix == _SUFFIX:
            await asyncio.to_thread(_flush, source)
        await copy_file(source, target, may_share=source.suffix != _SUFFIX)

    def room_bytes(self, disk: str, source: Path) -> int:
        """See `Storage.room_bytes`: of changes, what is used of them is copied."""
        if disk != "system":
            return self._raw.room_bytes(disk, source)
        if source.suffix != _SUFFIX or not source.exists():
            return 0
        return source.stat().st_blocks * 512

    def allocated_bytes(self, disk: Path) -> int:
        """See `Storage.allocated_bytes`."""
        return self._raw.allocated_bytes(disk)

    # Devices.

    def serves(self, disk: Path) -> bool:
        """See `DiskDeviceMaker.serves`."""
        return disk.suffix == _SUFFIX

    def node(self, vm_id: str) -> Path:
        """See `DiskDeviceMaker.node`."""
        return _MAPPED / mapping_name(vm_id)

    async def open(
        self, vm_id: str, base: Path, disk: Path, record: Callable[[DiskDevices], None]
    ) -> None:
        """See `DiskDeviceMaker.open`. Raises PreconditionFailed for a disk that is none of these,
        which stays as it is: as a file of changes it would be cut to nothing."""
        if not self.serves(disk):
            raise PreconditionFailed(
                f"{disk} is no file of changes: it was not made by {self.name} storage",
                hint="set storage back to what it was then, and restart the daemon",
            )
        made = DiskDevices(base=str(base))
        record(made)
        # Of an earlier run: a file that is written to must not be cut.
        await self._unmap(vm_id)
        # Not to go on beside whoever cuts the file after a cancellation.
        await to_its_end(asyncio.to_thread(self._give_room, base, disk))
        name = await self._map(vm_id, base, disk)
        under, over = await asyncio.to_thread(lambda: _loops_of(_mapping_of(vm_id)))
        record(msgspec.structs.replace(made, base_loop=under, changes_loop=over, mapping=name))

    async def _map(self, vm_id: str, base: Path, disk: Path) -> str:
        """The name of the mapping, of two files that are opened here: whoever makes it is told no
        path."""
        with base.open("rb") as under, disk.open("rb+") as over:
            mapping = MapSnapshot(
                vm_id=vm_id,
                instance=self._instance,
                base=under.fileno(),
                changes=over.fileno(),
            )
            return (await self._host.perform(mapping)).name

    def _give_room(self, base: Path, disk: Path) -> None:
        """Have the file of changes begin with room ahead. Raises PreconditionFailed without."""
        cow_file.cut(disk)
        used = cow_file.extent(disk)
        self._areas[disk] = used.area
        free = _free_bytes(disk.parent)
        full = mappings.full_bytes(base.stat().st_size)
        size = good_size(used.end_bytes + ahead_bytes(free), full)
        try:
            if size - used.end_bytes > free - KEEP_FREE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            cow_file.allocate(disk, size)
        except OSError as error:
            cow_file.cut(disk)
            raise PreconditionFailed(
                f"there is no room for what the machine changes in {disk}: {error.strerror}",
                hint="make room on the host",
            ) from error

    async def close(self, vm_id: str, disk: Path) -> None:
        """See `DiskDeviceMaker.close`."""
        self._areas.pop(disk, None)
        self._ample.pop(disk, None)
        self._unasked.discard(disk)
        self._silent.discard(vm_id)
        self._short.discard(vm_id)
        self._told.pop(vm_id, None)
        if self._may_have_any() or await asyncio.to_thread(_mapping_of, vm_id) is not None:
            await self._unmap(vm_id)
        await asyncio.to_thread(cow_file.cut, disk)

    async def sweep(self, vm_ids: Collection[str]) -> None:
        """See `DiskDeviceMaker.sweep`."""
        if self._may_have_any():
            keep = tuple(sorted(vm_ids))
            await self._host.perform(SweepSnapshots(instance=self._instance, keep=keep))

    def _may_have_any(self) -> bool:
        """Whether there may be devices: whoever was able to make them took them back at the end of
        its installation."""
        return not self._host.problem or self._host.installed

    async def _unmap(self, vm_id: str) -> None:
        """Nobody tells when what is busy is not any more: it is tried again, for two seconds."""
        for _ in range(_TRIES - 1):
            try:
                await self._host.perform(UnmapSnapshot(vm_id=vm_id))
                return
            except Conflict:
                await asyncio.sleep(_TRY_AGAIN_S)
        await self._host.perform(UnmapSnapshot(vm_id=vm_id))

    # Room.

    async def tend(self, vm_id: str, disk: Path) -> Room:
        """See `DiskDeviceMaker.tend`. A machine that writes nothing costs a stat(2).

        Where nobody answers who has the privileges, it is told by the space that there is.
        """
        changed_ns = disk.stat().st_mtime_ns  # noqa: ASYNC240 - of a file that is in use
        if self._ample.get(disk) == changed_ns:
            return Room.AMPLE
        room = await self._kept(vm_id, disk, changed_ns)
        if room is Room.SHORT:
            self._short.add(vm_id)
        else:
            self._short.discard(vm_id)
        return room

    async def _kept(self, vm_id: str, disk: Path, changed_ns: int) -> Room:
        """How it stands when there is more room, if it needs some and there is any. It was changed
        last at `changed_ns`."""
        space = await self._in_thread(self._space, vm_id, disk)
        if space is None:
            return Room.AMPLE  # it has ended
        if space.is_at_its_end:
            state = await self._state(vm_id, disk)
            if state is None:
                return Room.SHORT
            if state in _LOST:
                return Room.LOST  # more room would not mend it
        if more_bytes := space.more_bytes(_free_bytes(disk.parent)):
            space = await self._extended(vm_id, disk, space, more_bytes)
        # Before there was more room. Who has not answered just now is not asked again.
        asks = disk in self._unasked and (not more_bytes or vm_id not in self._silent)
        if asks and await self._state(vm_id, disk) in _LOST:
            return Room.LOST
        if vm_id in self._silent:  # that took some time, in which the machine has written
            space = await self._in_thread(self._space, vm_id, disk) or space
        if space.is_ample and disk not in self._unasked:
            self._ample[disk] = changed_ns
        return space.room

    async def is_lost(self, vm_id: str) -> bool:
        """See `DiskDeviceMaker.is_lost`."""
        asked = LookAtSnapshot(vm_id=vm_id)
        return (await self._performed(asked, _ANSWER_TIMEOUT_S)).name in _LOST

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tending, work, *arguments)

    async def _state(self, vm_id: str, disk: Path) -> str | None:
        """What the kernel says of it; None where nobody answers."""
        done = await self._answer(LookAtSnapshot(vm_id=vm_id))
        if done is None:
            return None
        self._unasked.discard(disk)
        return done.name

    async def _answer(self, operation: GrowSnapshot | LookAtSnapshot) -> Done | None:
        """What came of it; None where nobody answers, which is logged.

        A machine that writes on is soon looked at again where nobody has answered: what is too late
        is done all the same. One that is held, or is to be, can wait.
        """
        vm_id = operation.vm_id
        writes_on = vm_id in self._silent and vm_id not in self._short
        try:
            done = await self._performed(operation, _SOON_S if writes_on else _ANSWER_TIMEOUT_S)
        except BangerError as error:
            self._silent.add(vm_id)
            if self._told.get(vm_id) != error.message:  # each is told once
                self._told[vm_id] = error.message
                get_logger().error(
                    "no help for the room of a disk", vm_id=vm_id, error=error.message
                )
            return None
        self._told.pop(vm_id, None)
        return done

    async def _performed(self, operation: GrowSnapshot | LookAtSnapshot, timeout_s: float) -> Done:
        """See `HostOps.perform`; Unavailable, too, for what takes longer.

        That goes on, whoever gives it up, and has a connection to the helper meanwhile: so none is
        asked beside another of its kind. Who finds one waits for it, and asks anew: it may tell of
        what was before.
        """
        asked = (type(operation), operation.vm_id)
        try:
            async with asyncio.timeout(timeout_s):
                while (earlier := self._asked.get(asked)) is not None and not earlier.done():
                    await asyncio.wait({earlier})
                question = asyncio.create_task(self._host.perform(operation))
                self._asked[asked] = question
                question.add_done_callback(partial(self._answered, asked))
                await asyncio.wait({question})
        except TimeoutError:
            raise Unavailable(
                f"{type(operation).__name__}: no answer in time",
                hint="look at the helper: banger system status",
            ) from None
        return question.result()

    def _answered(self, asked: tuple[type[Operation], str], question: asyncio.Task[Done]) -> None:
        if self._asked.get(asked) is question:
            del self._asked[asked]
        if not question.cancelled() and question.exception() is None:
            self._silent.discard(asked[1])  # also where it was too late for whoever asked

    def _space(self, vm_id: str, disk: Path) -> Space | None:
        mapping = _mapping_of(vm_id)
        if mapping is None:
            return None
        used = cow_file.extent(disk, self._areas.get(disk, 0))
        self._areas[disk] = used.area
        full = mappings.full_bytes(mapping.size_bytes)
        _, changes = _loops_of(mapping)
        if not changes:
            return None
        size = block_devices.size_bytes(changes)
        return Space(size, used.end_bytes, full, disk.stat().st_size)

    async def _extended(self, vm_id: str, disk: Path, space: Space, more_bytes: int) -> Space:
        """With more room, if there is, and if the device can be told of it; as it was otherwise."""
        size = good_size(space.size_bytes + more_bytes, space.full_bytes)
        try:
            await self._in_thread(cow_file.allocate, disk, size)
        except OSError:  # somebody else was quicker
            # What was allocated may end anywhere: the next one begins where the device ends.
            await self._in_thread(os.truncate, disk, space.size_bytes)
            return space
        # The file keeps its size in any case: an answer that comes too late gives it to the device.
        self._unasked.add(disk)
        grown = await self._answer(GrowSnapshot(vm_id=vm_id))
        return space if grown is None else replace(space, size_bytes=size)


def _mapping_of(vm_id: str) -> Mapping | None:
    name = mapping_name(vm_id)
    return next((each for each in block_devices.mappings() if each.name == name), None)


def _loops_of(mapping: Mapping | None) -> tuple[str, str]:
    """The devices of its image and of its changes, empty for none."""
    names = {block_devices.is_read_only(each): each for each in mapping.devices} if mapping else {}
    return names.get(True, ""), names.get(False, "")


def _free_bytes(directory: Path) -> int:
    info = os.statvfs(nearest(directory))
    return info.f_bavail * info.f_frsize


def _make_empty(overlay: Path) -> None:
    """An empty file, of which btrfs makes no copies when it is written over."""
    unfinished = overlay.with_name(f"{overlay.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    cow_file.never_copied(unfinished)
    unfinished.replace(overlay)


def _flush(disk: Path) -> None:
    """What was written to the device that a disk has, if it has one, is in its file."""
    # A disk is in a directory with the name of its machine. (A loop device's file has a name that
    # changes with mount namespaces.)
    if _mapping_of(disk.parent.name) is None:
        return
    descriptor = os.open(_MAPPED / mapping_name(disk.parent.name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
