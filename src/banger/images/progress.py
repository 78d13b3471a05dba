"""How long work tells its caller where it stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Called with the stage (``download``, ``install``, …), a detail for people, and the percentage of
#: that stage that is done: -1 where it cannot be known. Called from the event loop, often: cheap.
Progress = Callable[[str, str, float], None]

#: The percentage of a stage whose end is not known.
UNKNOWN = -1.0


class Steps:
    """Says from any thread how far a stage is, when another percent is done."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self._stage = stage
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._said = -1

    def say(self, done: int, total: int) -> None:
        percent = 100 * done // total
        if percent != self._said:
            self._said = percent
            detail = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
            self._loop.call_soon_threadsafe(self._progress, self._stage, detail, float(percent))
