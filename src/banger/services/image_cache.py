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
from banger.base.paths import Paths
from banger.images.skopeo import Blobs
from banger.images.userns import temporary_tree
from banger.services.artifacts import new_id

_MIB = 1 << 20


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
        with self._lock(fcntl.LOCK_SH):
            self.blobs.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._paths.pulls_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with temporary_tree(self._paths.pulls_dir / new_id()) as scratch:
                yield scratch

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

    def remove_leftovers(self) -> None:
        """At start-up: what pulls that were killed have left beside whole layers."""
        with suppress(Conflict), self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            for entry in _entries(self._paths.pulls_dir):
                entry.path.unlink(missing_ok=True)
            _remove_empty(self._paths.pulls_dir)

    def _remove(self, keep_bytes: int, *, dry_run: bool) -> Pruned:
        count = size = 0
        with self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
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

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        self._paths.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        lock = os.open(self._paths.cache_dir / "lock", flags, 0o600)
        try:
            fcntl.flock(lock, how)
            yield
        except BlockingIOError:
            raise Conflict(
                "the cache is in use: something is being pulled",
                hint="see: banger operations list",
            ) from None
        finally:
            os.close(lock)


def _entries(directory: Path) -> list[_Entry]:
    found = []
    for above, _, files in os.walk(directory):
        for name in files:
            path = Path(above, name)
            with suppress(FileNotFoundError):
                info = path.lstat()
                found.append(_Entry(path, info.st_blocks * 512, info.st_mtime))
    return found


def _remove_empty(directory: Path) -> None:
    for above, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            Path(above).rmdir()
