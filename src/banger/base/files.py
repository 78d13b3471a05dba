"""Files that matter are written beside their place, synced, and renamed."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from banger.base.errors import NotFound, PreconditionFailed

#: How often a directory that is being removed may have been filled meanwhile.
_ROUNDS = 100


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


@contextmanager
def socket_name(path: Path) -> Iterator[str]:
    """A name by which to connect to the socket at `path`, which may be a link of ours to one.

    What is there is held, and is no link itself: who may write in its directory, a machine that was
    taken over, has nobody led to another socket. Raises OSError where there is none.
    """
    place = path.readlink() if path.is_symlink() else path
    descriptor = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), str(place))
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def remove_hostile_tree(path: Path) -> None:
    """Remove a directory that a machine may have filled: however deep, whatever the permissions.

    Idempotent. Links are not followed. Nothing goes down: what is deeper is moved up first. What
    comes into it meanwhile goes, too: a log, say, that is just being cut. Raises OSError when
    something in it is not ours to remove, or when it fills again and again.
    """
    for rounds_left in reversed(range(_ROUNDS)):
        try:
            _remove_tree(path)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY and rounds_left:
                continue
            raise
        return


def _remove_tree(path: Path) -> None:
    with suppress(FileNotFoundError), _opened_directory(path) as top:
        while names := os.listdir(top):  # noqa: PTH208 - no path
            for name in names:
                with suppress(FileNotFoundError):  # it has just been renamed
                    _remove_level(name, top)
    with suppress(FileNotFoundError):
        path.rmdir()


def _remove_level(name: str, top: int) -> None:
    """Remove one entry of `top`; the directories in it become entries of `top`."""
    try:
        os.unlink(name, dir_fd=top)
    except IsADirectoryError:
        with _opened_directory(name, top) as directory:
            for entry in os.listdir(directory):  # noqa: PTH208 - no path
                try:
                    os.unlink(entry, dir_fd=directory)
                except IsADirectoryError:
                    up = f".{secrets.token_hex(8)}"
                    with _opened_directory(entry, directory):  # else it cannot be moved
                        os.rename(entry, up, src_dir_fd=directory, dst_dir_fd=top)
        os.rmdir(name, dir_fd=top)


@contextmanager
def _opened_directory(name: str | Path, parent: int | None = None) -> Iterator[int]:
    """A directory, open, and its owner may do anything in it."""
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    place = os.open(name, flags | os.O_PATH | os.O_NOFOLLOW, dir_fd=parent)
    try:
        by_descriptor = f"/proc/self/fd/{place}"
        os.chmod(by_descriptor, 0o700)  # noqa: PTH101 - no path
        directory = os.open(by_descriptor, flags | os.O_RDONLY)
    finally:
        os.close(place)
    try:
        yield directory
    finally:
        os.close(directory)


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
