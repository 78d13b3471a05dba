"""Firecracker and its jailer, where nobody but root could have put them. For `jails`, as root."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.base.trust import first_doubtful

_VERSION_TIMEOUT_S = 10.0
#: Where administrators put what is not Debian's; the helper runs nothing else from there.
_LOCAL = "/usr/local/sbin:/usr/local/bin"


@contextmanager
def noting(lacking: list[PreconditionFailed]) -> Iterator[None]:
    """What is missing in the block is put there, for all of it to be told at once (`joined`)."""
    try:
        yield
    except PreconditionFailed as error:
        lacking.append(error)


def joined(errors: Sequence[PreconditionFailed], *hints: str) -> PreconditionFailed:
    """One error of several, with the hints of all, each once."""
    told = dict.fromkeys((*(error.hint for error in errors), *hints))
    message = "; ".join(error.message for error in errors)
    return PreconditionFailed(message, hint="; ".join(filter(None, told)))


class Programs(NamedTuple):
    """Their paths, links resolved."""

    firecracker: str
    jailer: str


class JailPrograms:
    """Where they are; asked for their releases once."""

    def __init__(self, firecracker: str, jailer: str) -> None:
        """Names to be found on the PATH of this process, or paths."""
        self._names = (firecracker, jailer)
        #: By paths, inodes, sizes and times: that they are one release.
        self._known: set[tuple[object, ...]] = set()

    async def found(self) -> Programs:
        """Raises PreconditionFailed for all that is not there, or not to be run."""
        lacking: list[PreconditionFailed] = []
        paths = []
        for name in self._names:
            with noting(lacking):
                paths.append(trusted(name))
        if lacking:
            raise joined(lacking)
        programs = Programs(*paths)
        key = tuple(map(_identity, programs))
        if key not in self._known:
            await _check_release(programs)
            self._known.add(key)
        return programs


def trusted(program: str) -> str:
    """The path of a program, links resolved, which nobody but root can have put there."""
    name = Path(program).name
    path = f"{proc.search_path(os.environ)}:{_LOCAL}"
    found = shutil.which(os.path.expanduser(program), path=path)  # noqa: PTH111 - it may be a name
    if found is None:
        raise PreconditionFailed(
            f"{name} is not installed where root's own programs are",
            hint="put firecracker and jailer of one release of"
            " github.com/firecracker-microvm/firecracker into /usr/local/bin",
        )
    path = os.path.realpath(found)
    for each in (found, path):
        if (wrong := first_doubtful(Path(each))) is not None:
            raise PreconditionFailed(
                f"root would run what others can change: {wrong}",
                hint=f"have {name} where only root can write",
            )
    return path


def _identity(path: str) -> tuple[object, ...]:
    status = os.stat(path)  # noqa: PTH116 - pathlib is no faster here
    return path, status.st_ino, status.st_size, status.st_mtime_ns


async def _check_release(programs: Programs) -> None:
    """Raise PreconditionFailed for two of different releases: they rely on each other."""
    said = []
    for path, name in zip(programs, (rb"Firecracker", rb"Jailer"), strict=True):
        done = await proc.run(
            [path, "--version"],
            timeout_s=_VERSION_TIMEOUT_S,
            env=proc.BARE_ENVIRONMENT,
            check=False,
        )
        found = re.match(name + rb" v(\d{1,6}\.\d{1,6}\.\d{1,6})", done.stdout)
        if found is None:
            raise PreconditionFailed(f"{path} is not Firecracker's {name.decode().lower()}")
        said.append(found[1].decode())
    if said[0] != said[1]:
        raise PreconditionFailed(
            f"{programs.firecracker} is v{said[0]} and {programs.jailer} is v{said[1]}",
            hint="install both of one release",
        )
