"""A place for tools that act as root and must not outlive us: namespaces around one command.

Root needs them for the mount and pid namespaces only. An ordinary user gets a user namespace
besides, where uid 0 is that user and the others come from /etc/subuid, so that owners, modes and
setuid bits are kept. Every step of a build uses the same mapping: a tree made in one such place
looks the same from the next.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, PreconditionFailed

_REMOVE_TIMEOUT_S = 600
_REMOVE_ATTEMPTS = 5

#: unshare(1) --map-auto came with util-linux 2.38.
_USER_NAMESPACE = ("--user", "--map-auto", "--map-root-user")


def contained_argv(argv: proc.Argv, *, root: bool) -> list[str]:
    """`argv` as the first process of namespaces that end with us.

    When this process dies, however it does, the kernel kills `unshare` (pdeathsig), that kills the
    first process of the pid namespace (kill-child), and so the kernel kills all the others; the
    mounts go with the mount namespace. pdeathsig is bound to the thread that starts the process:
    the one of the event loop.
    """
    return [
        *("setpriv", "--pdeathsig", "KILL", "--", "unshare"),
        *(() if root else _USER_NAMESPACE),
        *("--mount", "--pid", "--fork", "--kill-child", "--"),
        *(os.fspath(word) for word in argv),
    ]


def mortal(argv: proc.Argv) -> list[str]:
    """`argv` as a process that the kernel kills when this one dies, however it does; it has none of
    its own. Raises PreconditionFailed when it is not installed."""
    tool = os.fspath(argv[0])
    if proc.which(tool) is None:
        raise proc.missing_tool(tool)
    return ["setpriv", "--pdeathsig", "KILL", "--", *(os.fspath(word) for word in argv)]


def contained(argv: proc.Argv) -> list[str]:
    """`contained_argv` for who we are."""
    return contained_argv(argv, root=os.geteuid() == 0)


async def remove_tree(path: Path) -> None:
    """Remove a file or tree, whatever user ids of ours it holds. Idempotent.

    Raises PreconditionFailed when something in it is not ours to remove. Links are not followed.
    """
    for attempt in range(_REMOVE_ATTEMPTS):
        try:
            await _remove_once(path)
        except OSError as error:
            # A killed process that is still on its way out may have made one more file.
            if error.errno != errno.ENOTEMPTY or attempt + 1 == _REMOVE_ATTEMPTS:
                raise PreconditionFailed(f"cannot remove {path}: {error.strerror}") from error
        else:
            return


async def _remove_once(path: Path) -> None:
    try:
        await asyncio.to_thread(_remove, path)
    except RecursionError:  # deeper than Python goes down; rm has no such limit
        await _remove_contained(path)
    except PermissionError:
        if os.geteuid() == 0:
            raise
        await _remove_contained(path)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except IsADirectoryError:
        shutil.rmtree(path)


async def _remove_contained(path: Path) -> None:
    """What belongs to a subordinate uid can be removed only by the root of the namespace."""
    argv = contained(["rm", "-rf", "--one-file-system", "--", path])
    try:
        await proc.run(argv, timeout_s=_REMOVE_TIMEOUT_S)
    except proc.ProcessFailed as error:
        raise PreconditionFailed(
            f"cannot remove {path}: {error.message}", hint="look who owns it, and remove it as root"
        ) from error


@asynccontextmanager
async def temporary_tree(path: Path) -> AsyncIterator[Path]:
    """An empty directory that is gone afterwards: on success, on failure, when cancelled.

    Replaces what an earlier, killed run has left there. It has no ACL that what is made in it
    would inherit.
    """
    await remove_tree(path)
    await asyncio.to_thread(path.mkdir, mode=0o755)
    for name in ("system.posix_acl_default", "system.posix_acl_access"):
        with suppress(OSError):  # it has none, or the file system has none at all
            os.removexattr(path, name)
    try:
        yield path
    finally:
        await to_its_end(remove_tree(path))


async def namespaces_problem() -> str:
    """Why a command cannot be contained, as the tools say it; empty when it can."""
    try:
        await proc.run(contained(["true"]), timeout_s=20)
    except BangerError as error:
        return error.message
    return ""
