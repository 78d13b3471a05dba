"""Whether root may run what is installed here: nobody else must be able to write any of it.

The helper is root, and Python reads its modules when it is started. So what it is made of, the
directories above, and what links lead through have to be root's alone.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from banger.base.errors import PreconditionFailed

_LINKS_MAX = 40  # as the kernel has it

_HINT = """\
install banger where only root can write, and from there, as root:
  python3 -m venv /opt/banger
  /opt/banger/bin/pip install banger
  /opt/banger/bin/banger system install"""


def check_programs() -> None:
    """Raise PreconditionFailed, naming a path, unless this interpreter and all that it imports
    modules from are root's."""
    for place in (sys.executable, *filter(None, sys.path)):
        if (wrong := first_doubtful(Path(place))) is not None:
            raise PreconditionFailed(
                f"the helper would run as root what others can change: {wrong}", hint=_HINT
            )


def first_doubtful(place: Path) -> Path | None:
    """The first path that others than root can change, among those that lead to `place` and all
    below it. What is not there can only be made by root if its directory is root's."""
    for path in _way_to(place.absolute()):
        if (status := _status(path)) is not None and _is_doubtful(status):
            return path
    return next(_doubtful_below(place), None) if place.is_dir() else None


def _way_to(path: Path) -> Iterator[Path]:
    """`path` and the directories above it, from the top, and what links among them lead through."""
    rest, links = list(path.parts[1:]), 0
    current = Path("/")
    yield current
    while rest:
        word = rest.pop(0)
        if word == "..":
            current = current.parent
            continue
        step = current / word
        yield step
        if not step.is_symlink():
            current = step
            continue
        links += 1
        if links > _LINKS_MAX:
            return
        target = step.readlink()
        if target.is_absolute():
            current = Path("/")
        rest = [each for each in target.parts if each != "/"] + rest


def _doubtful_below(directory: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = Path(entry.path)
        if _is_doubtful(entry.stat(follow_symlinks=False)):
            yield path
        elif entry.is_symlink():
            if (wrong := next(_doubtful_on(path), None)) is not None:
                yield wrong
        elif entry.is_dir():
            yield from _doubtful_below(path)


def _doubtful_on(link: Path) -> Iterator[Path]:
    for path in _way_to(link):
        if (status := _status(path)) is not None and _is_doubtful(status):
            yield path


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_doubtful(status: os.stat_result) -> bool:
    if status.st_uid != 0:
        return True
    # The mode of a link means nothing.
    return not stat.S_ISLNK(status.st_mode) and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
