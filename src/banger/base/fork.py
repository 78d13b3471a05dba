"""Copies of this process, and other programs in its place, for a process that is about to become
one: what `proc` does with a whole event loop, which costs a start 90 ms that needs none.

Only `hostops.jail_launcher` uses it: it prepares namespaces, which belong to a process, and then
has to be the program that runs in them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NoReturn


def fork() -> int:
    """0 in the copy, which is to end with `leave` or `execute`; its pid in the original."""
    return os.fork()


def leave(status: int) -> NoReturn:
    """End a copy, with nothing of the original's done once more."""
    os._exit(status)


def execute(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become the program `argv[0]`, a path. Raises OSError."""
    os.execve(argv[0], list(argv), dict(environment))  # noqa: S606 - without a shell, as everywhere
