"""What images and kernels have in common: directories that appear whole or not at all.

An artifact is built in a staging directory beside its final place, renamed when complete, and
recorded. Until it is recorded a locked marker lies in it; on its way out it has a name of its own.
So start-up can tell what a dead daemon left half-made or half-deleted from what is merely not in
its database: that it leaves alone, for the directory may be shared with another state.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from banger.base.cancellation import past_recall, to_its_end
from banger.base.errors import BadRequest
from banger.base.extents import own_bytes
from banger.base.files import move_into_place, sync_directory
from banger.base.log import get_logger
from banger.images.userns import remove_tree
from banger.services.operations import Stages

_STAGING_PREFIX = ".staging-"
_DELETING_PREFIX = ".deleting-"
_MARKER = ".unrecorded"


def new_id() -> str:
    """12 hex digits."""
    return secrets.token_hex(6)


class Staging:
    """An artifact in the making, at `path`."""

    def __init__(self, final: Path) -> None:
        self.path = final.with_name(_STAGING_PREFIX + final.name)
        self.published = False
        self.final = final

    async def publish(self, record: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Move it to its final place and `record` it: from then on it is an artifact.

        A cancellation that comes while it is recorded comes too late.
        """
        await asyncio.to_thread(sync_directory, self.path)
        self.path = self.path.rename(self.final)
        await asyncio.to_thread(sync_directory, self.final.parent)
        await past_recall(record())
        self.published = True
        (self.path / _MARKER).unlink()


@asynccontextmanager
async def staged(final: Path) -> AsyncIterator[Staging]:
    """A staging directory; what has not been published when the block ends is removed."""
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = Staging(final)
    staging.path.mkdir(mode=0o700)
    marker = os.open(staging.path / _MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Held while we live: another daemon that shares the directory keeps its hands off.
        fcntl.flock(marker, fcntl.LOCK_EX)
        yield staging
    finally:
        try:
            if not staging.published:
                await to_its_end(remove_tree(staging.path))
        finally:
            os.close(marker)


async def delete(
    directory: Path, unrecord: Callable[[], Coroutine[Any, Any, None]], stages: Stages | None = None
) -> None:
    """Remove an artifact and its record; interrupted, the next start-up or call ends it.

    Stages ``rename``, ``files``, ``record``: on a full disk the database takes no change before
    there is room, and the directory, empty, says that the record is to go.
    """
    enter = stages.stage if stages is not None else _nobody_asks
    going = directory.with_name(_DELETING_PREFIX + directory.name)
    enter("rename")
    with suppress(FileNotFoundError):
        await asyncio.to_thread(directory.rename, going)
    enter("files")
    await _empty(going)
    enter("record")
    await unrecord()
    await remove_tree(going)


async def _empty(directory: Path) -> None:
    """Remove what is in a directory, which need not be there."""
    with suppress(FileNotFoundError):
        for name in await asyncio.to_thread(os.listdir, directory):
            await remove_tree(directory / name)


def _nobody_asks(stage: str) -> None:
    pass


async def check_target(file: Path) -> None:
    """Raise BadRequest for a path that no file can be written to, or that is no file's.

    The file is renamed to its place: a device, a pipe or a link there would be gone.
    """
    if not file.is_absolute():
        raise BadRequest(f"{file} is not an absolute path")
    if await asyncio.to_thread(file.is_dir) or not await asyncio.to_thread(file.parent.is_dir):
        raise BadRequest(f"{file} cannot be written: give the name of a file in a directory")
    with suppress(FileNotFoundError):
        if not stat.S_ISREG((await asyncio.to_thread(file.lstat)).st_mode):
            raise BadRequest(f"{file} is not a regular file", hint="give the name of a new file")


async def export(
    beside: Path, pack: Callable[[Path], Awaitable[None]], file: Path, umask: int, stages: Stages
) -> None:
    """Have a file made and put it in its place outside, as the user would have it; stage
    ``finish``.

    It is made in a staging directory like `beside`: what a daemon that dies leaves there, the next
    one removes.
    """
    async with staged(beside) as staging:
        bundle = staging.path / "bundle"
        await pack(bundle)
        stages.stage("finish")
        await asyncio.to_thread(move_into_place, bundle, file, 0o666 & ~umask)


def allocated_bytes(directory: Path) -> int:
    """How much of the disk the files in `directory` take (blocks, not lengths): what they share
    with others, as clones do, is left out where the file system tells."""
    return sum(
        own_bytes(entry) if stat.S_ISREG(info.st_mode) else info.st_blocks * 512
        for entry in directory.rglob("*")
        for info in (entry.lstat(),)
    )


def _leftovers(parent: Path, known_ids: set[str]) -> list[Path]:
    if not parent.is_dir():
        return []
    left = []
    for entry in sorted(parent.iterdir()):
        if entry.name in known_ids:
            continue
        if entry.name.startswith(_DELETING_PREFIX) or _is_abandoned(entry):
            left.append(entry)
        else:
            get_logger().warning("not in the database, left alone", path=str(entry))
    return left


def _is_abandoned(directory: Path) -> bool:
    """Whether whoever was building this has died."""
    try:
        marker = os.open(directory / _MARKER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        # Killed before it had its marker: then there is nothing in it.
        return directory.name.startswith(_STAGING_PREFIX) and _is_empty(directory)
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(marker)
    return True


def _is_empty(directory: Path) -> bool:
    """False for what is no directory, or another user's."""
    try:
        return not any(directory.iterdir())
    except OSError:
        return False


async def remove_leftovers(
    parent: Path,
    known_ids: set[str],
    unrecord: Callable[[str], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Remove what a daemon that died was making or deleting, with its record; what cannot be
    removed is logged and stops nothing."""
    for entry in await asyncio.to_thread(_leftovers, parent, known_ids):
        get_logger().warning("removing leftover", path=str(entry))
        going = entry.name.removeprefix(_DELETING_PREFIX)
        try:
            if unrecord is not None and going != entry.name:
                await _empty(entry)
                await unrecord(going)
            await remove_tree(entry)
        except Exception as error:  # whatever it is: the daemon starts
            get_logger().error("leftover stays", path=str(entry), error=str(error))
