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
    staging = final.with_name(_STAGING_PREFIX + final.name)
    staging.mkdir(mode=0o700)
    try:
        yield staging
        await asyncio.to_thread(sync_directory, staging)
        staging.rename(final)
        await asyncio.to_thread(sync_directory, final.parent)
    except BaseException:
        await asyncio.shield(remove_tree(staging))
        raise


async def remove_leftovers(parent: Path, known_ids: set[str]) -> list[str]:
    """Remove staging directories and artifacts without a record; their names."""
    removed = []
    for entry in sorted(parent.iterdir()) if parent.is_dir() else []:
        if entry.name not in known_ids:
            get_logger().warning("removing leftover", path=str(entry))
            await remove_tree(entry)
            removed.append(entry.name)
    return removed
