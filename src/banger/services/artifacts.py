"""What images and kernels have in common: directories that appear whole or not at all.

An artifact is built in a staging directory beside its final place and renamed when complete. A
staging directory that a dead daemon left is removed at start-up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from banger.base.errors import BangerError
from banger.base.files import sync_directory
from banger.base.log import get_logger
from banger.images.userns import remove_tree

_STAGING_PREFIX = ".staging-"


def new_id() -> str:
    """12 hex digits."""
    return secrets.token_hex(6)


@asynccontextmanager
async def staged(final: Path) -> AsyncIterator[Path]:
    """A staging directory that becomes `final` when the block ends well, and nothing otherwise."""
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = made = final.with_name(_STAGING_PREFIX + final.name)
    staging.mkdir(mode=0o700)
    try:
        yield staging
        await asyncio.to_thread(sync_directory, staging)
        made = staging.rename(final)
        await asyncio.to_thread(sync_directory, final.parent)
    except BaseException:
        await asyncio.shield(remove_tree(made))
        raise


@asynccontextmanager
async def kept_with_record(directory: Path) -> AsyncIterator[None]:
    """Around the writing of its record: an artifact that gets none is removed again."""
    try:
        yield
    except BangerError:
        await asyncio.shield(remove_tree(directory))
        raise


def allocated_bytes(directory: Path) -> int:
    """How much of the disk the files in `directory` take (blocks, not lengths)."""
    return sum(entry.lstat().st_blocks * 512 for entry in directory.rglob("*"))


def _strangers(parent: Path, known_ids: set[str]) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(entry for entry in parent.iterdir() if entry.name not in known_ids)


async def remove_leftovers(parent: Path, known_ids: set[str]) -> None:
    """Remove staging directories and artifacts without a record; what cannot be removed is
    logged and stops nothing."""
    for entry in _strangers(parent, known_ids):
        get_logger().warning("removing leftover", path=str(entry))
        try:
            await remove_tree(entry)
        except BangerError as error:
            get_logger().error("leftover stays", path=str(entry), error=error.message)
