"""What is kept of pulls: layers by digest, and downloads. All of it can be fetched again.

Pulls share the cache, also those of another daemon with the same cache directory: each holds the
lock shared, and who removes something holds it alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base.errors import Conflict
from banger.base.log import get_logger
from banger.base.paths import Paths
from banger.images.skopeo import Blobs
from banger.images.userns import remove_tree, temporary_tree
from banger.services.artifacts import new_id

_MIB = 1 << 20
_LOCK_POLL_S = 0.05


class Pruned(msgspec.Struct, frozen=True):
    """What was removed from the cache, or would be."""

    files: int
    size_bytes: int


@dataclass(frozen=True)
class _Entry:
    path: Path
    size_bytes: int
    used_at: float


class ImageCache:
    """The cache directory of this user, at most `limit_mib` large between pulls."""

    def __init__(self, paths: Paths, limit_mib: int) -> None:
        self._paths = paths
        self._limit_bytes = limit_mib * _MIB
        self.blobs = Blobs(paths.blobs_dir)

    @asynccontextmanager
    async def pulling(self) -> AsyncIterator[Path]:
        """Nothing is removed from the cache until the block ends; with an empty directory on the
        cache's file system."""
        lock = self._open_lock()
        try:
            # Somebody removes, which takes no time; it may be another process.
            while not _try_lock(lock, fcntl.LOCK_SH):  # noqa: ASYNC110
                await asyncio.sleep(_LOCK_POLL_S)
            self.blobs.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._paths.pulls_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with temporary_tree(self._paths.pulls_dir / new_id()) as scratch:
                yield scratch
        finally:
            os.close(lock)

    def touch(self, digests: list[str]) -> None:
        """These were used now: those that were used longest ago go first."""
        for digest in digests:
            with suppress(OSError):
                os.utime(self.blobs.path(digest))

    async def evict(self) -> None:
        """Bring the cache within its limit, unless somebody pulls at this moment."""
        with suppress(Conflict):
            await asyncio.to_thread(self._remove, self._limit_bytes, dry_run=False)

    async def prune(self, *, dry_run: bool) -> Pruned:
        """Empty the cache; Conflict while a pull or a download uses it."""
        return await asyncio.to_thread(self._remove, 0, dry_run=dry_run)

    async def remove_leftovers(self) -> None:
        """At start-up: what pulls that were killed have left beside whole layers, and what is
        over the limit."""
        with suppress(Conflict), self._alone():
            for entry in await asyncio.to_thread(_names, self._paths.pulls_dir):
                try:
                    await remove_tree(entry)
                except Exception as error:  # whatever it is: the daemon starts
                    get_logger().error("leftover stays", path=str(entry), error=str(error))
        await self.evict()

    def _remove(self, keep_bytes: int, *, dry_run: bool) -> Pruned:
        count = size = 0
        with self._alone():
            entries = sorted(
                (
                    entry
                    for directory in (self._paths.blobs_dir, self._paths.downloads_dir)
                    for entry in _entries(directory)
                ),
                key=lambda entry: entry.used_at,
            )
            over = sum(entry.size_bytes for entry in entries) - keep_bytes
            for entry in entries:
                if over <= 0:
                    break
                over -= entry.size_bytes
                count += 1
                size += entry.size_bytes
                if not dry_run:
                    entry.path.unlink(missing_ok=True)
        return Pruned(files=count, size_bytes=size)

    def _open_lock(self) -> int:
        self._paths.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return os.open(self._paths.cache_dir / "lock", flags, 0o600)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = self._open_lock()
        try:
            if not _try_lock(lock, fcntl.LOCK_EX):
                raise Conflict(
                    "the cache is in use: something is being pulled",
                    hint="see: banger operations list",
                )
            yield
        finally:
            os.close(lock)


def _try_lock(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _entries(directory: Path) -> list[_Entry]:
    found = []
    for above, _, files in os.walk(directory):
        for name in files:
            path = Path(above, name)
            with suppress(FileNotFoundError):
                info = path.lstat()
                found.append(_Entry(path, info.st_blocks * 512, info.st_mtime))
    return found
