"""What a hypervisor's process adds to its log, for the error that tells of its end."""

from __future__ import annotations

import os
from pathlib import Path

from banger.base.terminal import printable

_TAIL_BYTES = 2000


class Log:
    """What is added from now on; all of a file that the process gets `anew`, whatever is there."""

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        self.path = path
        self._start = path.stat().st_size if path.exists() and not anew else 0

    def tail(self) -> str:
        """The end of it, as text that is safe to print; empty when there is nothing."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(max(self._start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        # Some are consoles, too, which guests write: nothing of theirs commands a terminal.
        return "\n".join(printable(line.rstrip()) for line in lines).strip()


def how_it_ended(status: int | None) -> str:
    """Of a return code as `proc.watch` gives it; None for a process that was not ours to ask."""
    if status is None:
        return "has ended"
    return f"exited with status {status}" if status >= 0 else f"was ended by signal {-status}"
