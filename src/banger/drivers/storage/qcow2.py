"""Disks as qcow2 overlays over an image's raw files: no privileges, no loop devices.

The header of an overlay names the format of its backing file, so QEMU never guesses it from what
the file begins with. The guest writes to the overlay's contents, never to its header.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import msgspec

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import PreconditionFailed
from banger.base.files import sync_directory, sync_file
from banger.drivers.base import Check, DiskFormat, Layering, Level

QEMU_IMG = "qemu-img"

_CREATE_TIMEOUT_S = 30.0
_INFO_TIMEOUT_S = 30.0
#: All of the metadata of a disk is read: some seconds for hundreds of gigabytes.
_CHECK_TIMEOUT_S = 600.0
#: All of the layers' content is copied.
_COLLAPSE_TIMEOUT_S = 3600.0
_MIB = 1 << 20


class Qcow2Storage:
    """Implements `drivers.base.Storage` and `drivers.base.Layering`."""

    name = "qcow2"
    format = DiskFormat.QCOW2

    @property
    def layering(self) -> Layering:
        """See `Storage.layering`."""
        return self

    def file_name(self, disk: str) -> str:
        """See `Storage.file_name`."""
        return f"{disk}.qcow2"

    async def checks(self) -> list[Check]:
        path = proc.which(QEMU_IMG)
        if path is None:
            error = proc.missing_tool(QEMU_IMG)
            return [Check("storage qcow2", Level.FAIL, error.message, error.hint)]
        return [Check("storage qcow2", Level.OK, f"overlays made by {path}")]

    async def create_overlay(self, base: Path, overlay: Path, size_mib: int) -> None:
        """See `Storage.create_overlay`. About 10 ms, 200 KiB.

        Raises PreconditionFailed when qemu-img or `base` is missing, ProcessFailed when qemu-img
        fails: then `overlay` is as it was.
        """
        try:
            size_bytes = overlay_bytes(base, size_mib)
        except FileNotFoundError as error:
            raise PreconditionFailed(f"{base} is missing: the disk needs it") from error
        unfinished = overlay.with_name(f"{overlay.name}.unfinished")
        try:
            argv = create_argv(base, unfinished, size_bytes)
            await proc.run(argv, timeout_s=_CREATE_TIMEOUT_S)
            unfinished.replace(overlay)
        finally:
            unfinished.unlink(missing_ok=True)

    async def size_mib(self, overlay: Path) -> int:
        """See `Storage.size_mib`. Raises ProcessFailed for what is no qcow2."""
        answer = await proc.run(
            overlay_argv("info", overlay, "--output=json"), timeout_s=_INFO_TIMEOUT_S
        )
        return int(msgspec.json.decode(answer.stdout, type=_Info).virtual_size // _MIB)

    async def grow(self, overlay: Path, size_mib: int) -> None:
        """See `Storage.grow`. qemu-img writes the new size last, into the header."""
        if await self.size_mib(overlay) >= size_mib:
            return
        try:
            checked = await proc.run(
                overlay_argv("check", overlay, "-q"), timeout_s=_CHECK_TIMEOUT_S, check=False
            )
            # 3: clusters that belong to nothing, as a killed QEMU leaves. Wasted, but harmless.
            if checked.returncode not in (0, 3):
                raise proc.ProcessFailed(checked)
            resize = [*overlay_argv("resize", overlay, "-q"), f"{size_mib}M"]
            await proc.run(resize, timeout_s=_CREATE_TIMEOUT_S)
        except proc.ProcessFailed as error:
            raise PreconditionFailed(
                f"{overlay} cannot grow: {error.message}",
                hint="see that the disk has free space; a damaged one can still be read",
            ) from error

    async def copy_overlay(self, overlay: Path, copy: Path) -> None:
        """See `Storage.copy_overlay`: the file as it is, for it names its base by the whole path.

        About 1 ms for the megabyte that a booted guest has written.
        """
        # A thread goes on when its caller is cancelled: it must not write over what comes next.
        await to_its_end(asyncio.to_thread(_copy, overlay, copy))

    async def add_layer(self, disk: Path, overlay: Path) -> None:
        """See `Layering.add_layer`. Raises ProcessFailed when qemu-img fails."""
        size_bytes = (await _infos(disk))[0].virtual_size
        argv = layer_argv(disk.name, overlay, size_bytes)
        await proc.run(argv, timeout_s=_CREATE_TIMEOUT_S)
        # Its VM is about to depend on it, across a power failure, too.
        await asyncio.to_thread(_sync, overlay)

    async def layers(self, disk: Path) -> list[Path]:
        """See `Layering.layers`."""
        return [Path(each.filename) for each in await _infos(disk) if each.format == "qcow2"]

    async def share(self, disk: Path, directory: Path) -> None:
        """See `Storage.share`. All of the disk's files, as hard links: they are there for as long
        as one of their names is."""
        for layer in await self.layers(disk):
            os.link(layer, directory / layer.name)

    async def branch(self, frozen: Path, disk: Path) -> None:
        """See `Storage.branch`: the same files, and a layer over them."""
        await self.share(frozen, disk.parent)
        await self.add_layer(disk.with_name(frozen.name), disk)

    async def collapse(self, disk: Path) -> None:
        """See `Layering.collapse`. qemu-img writes the new base last, into the header.

        Raises ProcessFailed when it fails, on a full disk, say: the disk is then as it was.
        """
        base = (await _infos(disk))[-1].filename
        rebase = overlay_argv("rebase", disk, "-q", "-b", base, "-F", "raw")
        await proc.run(rebase, timeout_s=_COLLAPSE_TIMEOUT_S)

    async def collapse_bytes(self, disk: Path) -> int:
        """See `Layering.collapse_bytes`: all that the layers below have, or all of the disk."""
        top, *below = await _infos(disk)
        layers = [Path(each.filename) for each in below if each.format == "qcow2"]
        return min(sum(map(self.allocated_bytes, layers)), top.virtual_size)

    def room_bytes(self, disk: str, source: Path) -> int:  # noqa: ARG002 - others copy it
        """See `Storage.room_bytes`."""
        return 0

    def allocated_bytes(self, disk: Path) -> int:
        """See `Storage.allocated_bytes`."""
        try:
            return disk.stat().st_blocks * 512
        except FileNotFoundError:
            return 0


class _Info(msgspec.Struct, rename="kebab"):
    """What we read of ``qemu-img info --output=json``."""

    virtual_size: int
    filename: str
    format: str


async def _infos(disk: Path) -> list[_Info]:
    """Of each file that a disk consists of, which a machine may have open, the topmost first."""
    argv = overlay_argv("info", disk, "--output=json", "--backing-chain", "--force-share")
    answer = await proc.run(argv, timeout_s=_INFO_TIMEOUT_S)
    return msgspec.json.decode(answer.stdout, type=list[_Info])


def _sync(file: Path) -> None:
    sync_file(file)
    sync_directory(file.parent)


def _copy(overlay: Path, copy: Path) -> None:
    unfinished = copy.with_name(f"{copy.name}.unfinished")
    try:
        shutil.copyfile(overlay, unfinished)
        unfinished.replace(copy)
    finally:
        unfinished.unlink(missing_ok=True)


def overlay_bytes(base: Path, size_mib: int) -> int:
    """The overlay's size: what is asked for, but never less than what lies beneath."""
    return max(size_mib << 20, base.stat().st_size)


def overlay_argv(command: str, overlay: Path, *options: str) -> list[str]:
    """The command line of a qemu-img that looks at or changes one overlay."""
    return [QEMU_IMG, command, *options, "-f", "qcow2", str(overlay.absolute())]


def layer_argv(disk_name: str, overlay: Path, size_bytes: int) -> list[str]:
    """qemu-img's command line for a layer over a qcow2 in the same directory, which is not looked
    at: a machine may be writing to it."""
    return [
        QEMU_IMG,
        *("create", "-q", "-u", "-f", "qcow2", "-b", disk_name, "-F", "qcow2"),
        str(overlay.absolute()),
        str(size_bytes),
    ]


def create_argv(base: Path, overlay: Path, size_bytes: int) -> list[str]:
    """qemu-img's command line. The backing file is named by its absolute path.

    (A relative name is looked up from the overlay's directory, and ``json:`` or ``nbd:`` at its
    beginning would be a protocol.)
    """
    return [
        QEMU_IMG,
        *("create", "-q", "-f", "qcow2"),
        *("-b", str(base.absolute()), "-F", "raw"),
        str(overlay.absolute()),
        str(size_bytes),
    ]
