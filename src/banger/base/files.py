"""Files that matter are written beside their place, synced, and renamed."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from banger.base.errors import NotFound, PreconditionFailed


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Make or replace `path`: a reader, or a crash, sees the old content or the new, whole.

    Not `durable`: true for crashes of this process; a power failure may leave an empty file.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def sync_file(path: Path) -> None:
    """Have the content of `path` on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make renames within `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve_if_reading_takes_room(descriptor: int) -> None:
    """Have room for all of a file where even reading a hole by a mapping takes some.

    That is so on a tmpfs: whoever maps a file with holes is killed (SIGBUS) when it is full. On
    any other file system nothing is changed. Raises OSError when there is no room.
    """
    size = os.fstat(descriptor).st_size
    hole = os.lseek(descriptor, 0, os.SEEK_HOLE) if size else 0
    page = hole // mmap.PAGESIZE * mmap.PAGESIZE
    if hole >= size or page < hole:
        return  # no page of it is a hole
    before = os.fstat(descriptor).st_blocks
    reader, writer = os.pipe()
    try:
        with mmap.mmap(descriptor, 1, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=page) as hole_page:
            # The kernel reads it: without room that is an error, and no SIGBUS.
            os.write(writer, hole_page)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
    finally:
        os.close(reader)
        os.close(writer)
    if os.fstat(descriptor).st_blocks > before:
        os.posix_fallocate(descriptor, 0, size)


def open_regular(path: Path) -> BinaryIO:
    """`path` for reading. PreconditionFailed unless it is a file (not a pipe, that could block)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"{path} is not there") from None
    except OSError as error:
        raise PreconditionFailed(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PreconditionFailed(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def move_into_place(source: Path, target: Path, mode: int) -> None:
    """Make or replace `target` by the file `source`, which goes; it may be on another disk.

    Atomic, and durable when it returns.
    """
    source.chmod(mode)
    beside = source
    try:
        try:
            sync_file(source)
            source.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            shutil.copy(source, beside)
            sync_file(beside)
            beside.replace(target)
            source.unlink()
    except BaseException:
        if beside != source:
            beside.unlink(missing_ok=True)
        raise
