"""How long work tells its caller where it stands."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the stage (``download``, ``install``, …), a detail for people, and the percentage of
#: that stage that is done: -1 where it cannot be known. Called from the event loop, often: cheap.
Progress = Callable[[str, str, float], None]

#: The percentage of a stage whose end is not known.
UNKNOWN = -1.0
