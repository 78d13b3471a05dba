"""What the daemon does by itself from time to time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from banger.base.log import get_logger
from banger.base.opid import current_op_id, new_op_id
from banger.services import consoles
from banger.services.vm import VmService

_INTERVAL_S = 10.0


@asynccontextmanager
async def maintained(vms: VmService) -> AsyncIterator[None]:
    """Maintenance goes on while the block runs."""
    task = asyncio.create_task(_maintain(vms))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _maintain(vms: VmService) -> None:
    while True:
        await asyncio.sleep(_INTERVAL_S)
        current_op_id.set(new_op_id())
        try:
            await consoles.bound(await vms.all())
        except Exception:
            # A supervisor's boundary: it must go on whatever one round met with.
            get_logger().exception("maintenance failed")
