"""Work that a cancellation does not cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from banger.base.log import get_logger

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end, which a cancellation waits for, too: it is raised after it.

    `asyncio.shield` alone would let the caller go on, give up its locks and report how it ended,
    while the work is still under way in a task that nobody owns.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return await task
    if not task.cancelled() and (failure := task.exception()) is not None:
        get_logger().error("clean-up failed", error=str(failure), exc_info=failure)
    raise cancelled


async def past_recall(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end: a cancellation meanwhile comes too late, and is forgotten.

    For the step that makes something so: whoever asked is told that it is, which is the truth.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return await task
