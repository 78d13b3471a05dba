"""What a hypervisor's process adds to its log, for the error that tells of its end."""

from __future__ import annotations

import os
from pathlib import Path

_TAIL_BYTES = 2000


class Log:
    """What is added from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0

    def tail(self) -> str:
        """The end of it; empty when there is nothing."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(max(self._start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip()


def how_it_ended(status: int | None) -> str:
    """Of a return code as `proc.watch` gives it; None for a process that was not ours to ask."""
    if status is None:
        return "has ended"
    return f"exited with status {status}" if status >= 0 else f"was ended by signal {-status}"
