"""What a build prints: a file for people, the last line of it for progress, the end for errors.

The files of the last builds are kept, however they ended.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Self

from banger.base.paths import Paths, prepare_private_dir, safe_component

#: Builds whose logs are kept.
KEEP = 20
#: What is printed beyond that is not kept.
_LIMIT_BYTES = 64 << 20
_TAIL_LINES = 12
_LINE_BYTES = 400


def log_path(paths: Paths, name: str, op_id: str) -> Path:
    """The log of the build of the image `name` by the operation `op_id`."""
    return paths.builds_dir / safe_component(f"{name[:80]}-{op_id}.log")


class BuildLog:
    """As long as its build; a context manager. ``tell`` hears the last line whenever there is a
    new one; it is a guest's, and may hold anything."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self._tell = tell
        self._left_bytes = _LIMIT_BYTES
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._begun = b""
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        prepare_private_dir(self.path.parent)
        _remove_old(self.path.parent, KEEP - 1)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(self.path, flags, 0o600), "wb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def heading(self, text: str) -> None:
        """What is printed from here on is of this."""
        if self._begun:
            self.write(b"\n")
        self._lines.clear()
        self._write(f"== {text}\n".encode(errors="backslashreplace"))

    def write(self, data: bytes) -> None:
        """The next of what is printed."""
        self._write(data)
        *lines, rest = re.split(rb"[\r\n]", self._begun + data)
        self._begun = rest[-_LINE_BYTES:]
        told = [_text(line) for line in lines[-_TAIL_LINES:] if line.strip()]
        self._lines.extend(told)
        if told:
            self._tell(told[-1])

    def tail(self) -> str:
        """The last lines since the heading."""
        rest = [_text(self._begun)] if self._begun.strip() else []
        return "\n".join([*self._lines, *rest][-_TAIL_LINES:])

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data[: self._left_bytes])
        self._left_bytes = max(0, self._left_bytes - len(data))


def _text(line: bytes) -> str:
    return line[:_LINE_BYTES].decode(errors="replace").strip()


def _remove_old(directory: Path, keep: int) -> None:
    logs = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[: max(0, len(logs) - keep)]:
        path.unlink(missing_ok=True)
