"""Disks as raw files, one each: what every hypervisor can use.

Where the file system can (btrfs, XFS) a new disk is a clone of the image's file: made in
milliseconds, it shares all that neither has changed. Elsewhere it is a copy, holes and all, of
what the image holds. A raw file has no layers: for a snapshot it is cloned or copied while the
machine is paused.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import PreconditionFailed
from banger.base.extents import can_clone, clone, makes_clones, own_bytes
from banger.drivers.base import Check, DiskFormat, Level
from banger.drivers.storage.cow_file import never_copied

CP = "cp"
_MIB = 1 << 20
#: All that a disk holds is copied.
_COPY_TIMEOUT_S = 3600.0


class ReflinkStorage:
    """Implements `drivers.base.Storage`."""

    name = "reflink"
    format = DiskFormat.RAW
    layering = None

    def __init__(self, directory: Path) -> None:
        """`directory` is where the disks of VMs are (which need not be there yet)."""
        self._directory = directory

    def file_name(self, disk: str) -> str:
        """See `Storage.file_name`."""
        return f"{disk}.raw"

    async def checks(self) -> list[Check]:
        """Whether the disks' file system makes clones: without them it works, too."""
        name = f"storage {self.name}"
        directory = await asyncio.to_thread(nearest, self._directory)
        if await self.makes_clones():
            return [Check(name, Level.OK, f"{directory} makes clones")]
        detail = f"{directory} makes no clones: each VM has a copy of its image, each fork another"
        hint = "have it on btrfs, or on XFS with reflink=1"
        return [Check(name, Level.WARN, detail, hint)]

    async def makes_clones(self) -> bool:
        """Whether disks are made in an instant, and share what they hold with their image."""
        return await asyncio.to_thread(lambda: makes_clones(nearest(self._directory)))

    async def create_overlay(self, base: Path, overlay: Path, size_mib: int) -> None:
        """See `Storage.create_overlay`. Raises PreconditionFailed when `base` is missing."""
        await copy_file(base, overlay, size_mib)

    async def size_mib(self, overlay: Path) -> int:
        """See `Storage.size_mib`."""
        return (await asyncio.to_thread(overlay.stat)).st_size // _MIB

    async def grow(self, overlay: Path, size_mib: int) -> None:
        """See `Storage.grow`: a hole at the file's end."""
        if await self.size_mib(overlay) >= size_mib:
            return
        try:
            os.truncate(overlay, size_mib * _MIB)
        except OSError as error:
            raise PreconditionFailed(
                f"{overlay} cannot grow to {size_mib} MiB: {error.strerror}",
                hint="file systems have a size that no file can be larger than",
            ) from error

    async def copy_overlay(self, overlay: Path, copy: Path) -> None:
        """See `Storage.copy_overlay`."""
        await copy_file(overlay, copy)

    async def share(self, disk: Path, directory: Path) -> None:
        """See `Storage.share`: a clone or a copy."""
        await copy_file(disk, directory / disk.name)

    async def branch(self, frozen: Path, disk: Path) -> None:
        """See `Storage.branch`."""
        await copy_file(frozen, disk)

    def room_bytes(self, disk: str, source: Path) -> int:  # noqa: ARG002 - of the protocol
        """See `Storage.room_bytes`."""
        try:
            allocated = source.stat().st_blocks * 512
        except FileNotFoundError:
            return 0
        return 0 if can_clone(source, nearest(self._directory)) else allocated

    def allocated_bytes(self, disk: Path) -> int:
        """See `Storage.allocated_bytes`."""
        try:
            return own_bytes(disk)
        except FileNotFoundError:
            return 0


async def copy_file(
    source: Path, target: Path, least_mib: int = 0, *, may_share: bool = True
) -> None:
    """A file like `source`, of at least that size, in the place of `target`, whole or not at all.

    It is a clone where it may share what it holds. Raises PreconditionFailed when there is no
    `source`, or no room.
    """
    if not await asyncio.to_thread(source.exists):
        raise PreconditionFailed(f"{source} is missing: the disk needs it")
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        # A thread goes on when its caller is cancelled: it would make the file once more.
        if not await to_its_end(asyncio.to_thread(_begun, source, unfinished, may_share)):
            await proc.run(copy_argv(source, unfinished), timeout_s=_COPY_TIMEOUT_S)
        if unfinished.stat().st_size < least_mib * _MIB:
            os.truncate(unfinished, least_mib * _MIB)
        unfinished.replace(target)
    except (OSError, proc.ProcessFailed) as error:
        why = error.strerror if isinstance(error, OSError) else error.message
        raise PreconditionFailed(
            f"{source} cannot be copied to {target.parent}: {why}",
            hint="see that the disk has free space",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def copy_argv(source: Path, target: Path) -> list[str]:
    """cp's command line for a copy of a file's data, into the file that is there; holes stay.

    (``auto``, not ``always``, which would read all of it for zeros. Clones are made without it.)
    """
    return [
        CP,
        "--sparse=auto",
        "--reflink=never",
        "--",
        str(source.absolute()),
        str(target.absolute()),
    ]


def _begun(source: Path, target: Path, may_share: bool) -> bool:
    """Whether `target`, a new file, is a clone of `source`; it is empty otherwise."""
    with source.open("rb") as ours:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(target, flags, 0o600)
        try:
            if not may_share:
                never_copied(target)
                return False
            return clone(ours.fileno(), descriptor)
        finally:
            os.close(descriptor)


def nearest(directory: Path) -> Path:
    """`directory`, or the nearest above it that is there."""
    while not directory.exists():
        directory = directory.parent
    return directory
