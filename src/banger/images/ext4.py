"""ext4 images: made from a directory by mke2fs, and checked before a machine is given one."""

from __future__ import annotations

import asyncio
import math
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.base.files import sync_file
from banger.base.units import format_size
from banger.images.userns import contained, mortal

MIB = 1 << 20
_BLOCK = 4096
_INODE = 256
_TIMEOUT_S = 1800

#: Named in full, so that the host's mke2fs.conf cannot choose what the guest's kernel must know
#: (e2fsprogs 1.47.0 made orphan_file a default, which kernels before 5.15 refuse).
_FEATURES = (
    "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)

#: Group descriptors are reserved for a work disk of 1 TiB (127 blocks): it grows there without
#: changing its layout. Beyond that the kernel goes over to meta_bg by itself. (Measured in an
#: emulated guest: 256 MiB to 8 GiB 0.06 s, 100 GiB 0.3 s, 512 GiB 2 s, 2 TiB 13 s.)
_GROW_TO_BLOCKS = (1 << 40) // _BLOCK

# Documentation/filesystems/ext4/super.rst of the kernel.
_SUPERBLOCK = 1024
_MAGIC = 0xEF53
_MAGIC_OFFSET = 0x38
_INCOMPAT_64BIT = 0x80
_LOG_BLOCK_SIZE_MAX = 6


@dataclass(frozen=True)
class Shape:
    """The shape of a new file system. ``journal_mib`` 0 means none; ``inodes`` 0 the usual."""

    label: str
    size_mib: int
    journal_mib: int = 0
    inodes: int = 0


def mke2fs_argv(source: Path, image: Path, shape: Shape) -> list[str]:
    """Arguments for an ext4 with the content of `source`, owned by root where it is.

    The file is new, so its inode tables are zero already: neither mke2fs nor, at every first
    mount, the guest's kernel has to write them. (An option of e2fsprogs 1.47.0. With
    lazy_itable_init alone a guest would zero 131 MB for 8 GiB in the background.)
    """
    extended = "assume_storage_prezeroed=1,root_owner=0:0"
    return [
        *("mke2fs", "-q", "-F", "-b", str(_BLOCK), "-I", str(_INODE), "-m", "0"),
        *("-L", shape.label, "-E", f"{extended},resize={_GROW_TO_BLOCKS}"),
        *("-O", _FEATURES + (",has_journal" if shape.journal_mib else "")),
        *(("-J", f"size={shape.journal_mib}") if shape.journal_mib else ()),
        *(("-N", str(shape.inodes)) if shape.inodes else ("-i", "16384")),
        *("-d", str(source), str(image), f"{shape.size_mib}M"),
    ]


async def make_ext4(source: Path, image: Path, shape: Shape) -> None:
    """Write `image`, a sparse ext4 of `shape` with what is in `source`; owners are kept.

    `source` is a tree made in `userns.contained`. Raises PreconditionFailed when it does not fit
    or the host's disk is full. Not synced: see `base.files.sync_file`.
    """
    await asyncio.to_thread(_make_empty, image)
    try:
        await proc.run(contained(mke2fs_argv(source, image, shape)), timeout_s=_TIMEOUT_S)
    except proc.ProcessFailed as error:
        raise PreconditionFailed(
            f"cannot make {image.name}: {error.message}",
            hint=f"see that {image.parent} has free space",
        ) from error


def _make_empty(image: Path) -> None:
    image.unlink(missing_ok=True)
    image.touch(mode=0o600)


async def edit_ext4(image: Path, requests: Sequence[str]) -> None:
    """Have debugfs do `requests` to a file system of our own making. PreconditionFailed if it
    cannot."""
    script = "".join(f"{request}\n" for request in requests).encode("utf-8", "surrogateescape")
    argv: list[str | Path] = ["debugfs", "-w", "-f", "-", image]
    done = await proc.run(argv, stdin=script, timeout_s=_TIMEOUT_S)
    # debugfs exits with 0 whatever happens; when all is well it says its version, the
    # requests, and the number of a new inode.
    complaints = [
        line
        for line in (done.stdout + done.stderr).decode(errors="replace").splitlines()
        if line and not line.startswith(("debugfs", "Allocated inode: "))
    ]
    if complaints:
        raise PreconditionFailed(f"cannot set up {image.name}: {'; '.join(complaints[:3])}")


async def make_larger_copy(source: Path, copy: Path, size_mib: int) -> None:
    """Write `copy`, a sparse copy of the file system `source` that has grown to `size_mib`.

    Some milliseconds for a small one, where a guest takes a tenth of a second for the same. Atomic.
    """
    beside = copy.with_name(f"{copy.name}.new")
    try:
        steps: tuple[proc.Argv, ...] = (
            ("cp", "--sparse=always", "--reflink=auto", "--", source, beside),
            ("resize2fs", beside, f"{size_mib}M"),
        )
        for argv in steps:
            await proc.run(mortal(argv), timeout_s=_TIMEOUT_S)
        await asyncio.to_thread(sync_file, beside)
        beside.replace(copy)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if not isinstance(error, proc.ProcessFailed):
            raise
        raise PreconditionFailed(
            f"cannot grow {source.name} to {size_mib} MiB: {error.message}",
            hint=f"see that {copy.parent} has free space",
        ) from error


def fitting_shape(tree: Path, label: str) -> Shape:
    """A file system without journal that just holds `tree`, for one that is only read."""
    blocks = inodes = 0
    for directory, names, files in os.walk(tree):
        for name in (*names, *files):
            info = Path(directory, name).lstat()
            inodes += 1
            content = info.st_size if stat.S_ISREG(info.st_mode) else _BLOCK
            blocks += math.ceil(content / _BLOCK)
    inodes += 64
    used = blocks * _BLOCK + inodes * _INODE
    # Bitmaps, descriptors with their reserve, extent blocks: well under 3 % and 6 MiB.
    return Shape(label, math.ceil(used * 1.03 / MIB) + 6, inodes=inodes)


def file_identity(path: Path) -> str:
    """What tells a file from what it was: inode, size, time of the last change of its content."""
    info = path.stat()
    return f"{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"


def is_ext4(path: Path) -> bool:
    """Whether a file that can be read begins as an ext4, or as something that looks like one."""
    with path.open("rb") as file:
        file.seek(_SUPERBLOCK + _MAGIC_OFFSET)
        return file.read(2) == _MAGIC.to_bytes(2, "little")


def check_ext4(path: Path) -> None:
    """Raise PreconditionFailed unless `path` starts as an ext4 and has all of its length.

    Reads 1 KiB: enough for a missing, foreign or cut off image, not for damage inside.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(_SUPERBLOCK)
            superblock = file.read(1024)
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if len(superblock) < 1024 or struct.unpack_from("<H", superblock, _MAGIC_OFFSET)[0] != _MAGIC:
        raise _unusable(path, "it is not an ext4 file system")
    blocks, log_block_size = (
        struct.unpack_from("<I", superblock, 0x04)[0],
        struct.unpack_from("<I", superblock, 0x18)[0],
    )
    if struct.unpack_from("<I", superblock, 0x60)[0] & _INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", superblock, 0x150)[0] << 32
    if log_block_size > _LOG_BLOCK_SIZE_MAX or blocks == 0:
        raise _unusable(path, "its superblock is damaged")
    size = blocks * (1024 << log_block_size)
    if length < size:
        raise _unusable(
            path, f"it is cut off: {format_size(length)} of a {format_size(size)} file system"
        )


def _unusable(path: Path, problem: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"{path} cannot be used: {problem}",
        hint="delete the image or kernel it belongs to and build it again",
    )
