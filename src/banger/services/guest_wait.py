"""Waiting for a guest whose machine may end meanwhile, and what its console says then."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from banger.base.errors import Unavailable
from banger.base.terminal import printable

_EXIT_AFTER_CLOSE_S = 3.0
_CONSOLE_TAIL_LINES = 8
_CONSOLE_TAIL_BYTES = 8192

T = TypeVar("T")


async def while_it_runs(work: Coroutine[Any, Any, T], machine_ends: Coroutine[Any, Any, bool]) -> T:
    """The result of `work` with a guest; Unavailable when `machine_ends` is true before it."""
    working = asyncio.ensure_future(work)
    ending = asyncio.ensure_future(machine_ends)
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        failure = working.exception() if working.done() else None
        if isinstance(failure, Unavailable):
            # Its sockets close before its process is gone: that is what to tell of.
            await asyncio.wait({ending}, timeout=_EXIT_AFTER_CLOSE_S)
        if ending.done() and ending.result() and (failure or not working.done()):
            raise Unavailable("the machine ended while it booted")
        return await working
    finally:
        for task in (working, ending):
            task.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


def console_size(log: Path) -> int:
    """How long a console log is: what is written from now on begins there."""
    try:
        return log.stat().st_size
    except FileNotFoundError:
        return 0


def console_tail(log: Path, begin: int) -> str:
    """The last lines of a console log from `begin` on, as text that is safe to print."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if begin > size:  # it was cut meanwhile
                begin = 0
            file.seek(max(begin, size - _CONSOLE_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = deque((line.rstrip() for line in text.splitlines()), maxlen=_CONSOLE_TAIL_LINES)
    # The console is the guest's: its control characters must not reach a terminal.
    return "\n".join(map(printable, lines))
