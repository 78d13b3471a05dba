"""Work that a cancellation does not cut short."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
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


class Unwanted(Exception):
    """Raised inside a thread whose work nobody wants any more; see `in_thread`."""


async def in_thread(work: Callable[[Callable[[], None]], T]) -> T:
    """Run `work` in a thread. It calls what it is given between its pieces (of milliseconds).

    A thread cannot be cancelled. When we are, that call raises `Unwanted` in it, and we wait for
    its end: whoever cleans up then has the files to itself.
    """
    unwanted = threading.Event()

    def check() -> None:
        if unwanted.is_set():
            raise Unwanted

    task = asyncio.ensure_future(asyncio.to_thread(work, check))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        unwanted.set()
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        task.exception()  # looked at: nobody else will
        raise
