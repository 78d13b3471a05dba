"""Running git on repositories that are not trusted.

A repository's own configuration can name programs: hooks, filters, a file system monitor, an ssh
command, a diff driver, an alias. Two ways keep them from running:

- `ask` puts to the repository itself only questions that start no program, whatever it configures.
- Everything else is done by `git.throwaway`, in a repository of ours over its objects and files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from banger.base import proc
from banger.base.errors import PreconditionFailed

#: Of the largest repositories: reading tens of thousands of files takes seconds.
TIMEOUT_S = 600.0

#: The first that merges a patch into an index alone.
_OLDEST = (2, 32)

#: Neither asks anybody anything nor changes what it only looks at. No transport is allowed: a
#: partial clone would otherwise fetch what it lacks, with the program that its configuration names.
_QUIET: Mapping[str, str] = {
    "LC_ALL": "C.UTF-8",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_PAGER": "cat",
    "GIT_NO_REPLACE_OBJECTS": "1",
}

#: Given on the command line, which a process that git starts for a submodule is told, too.
_NO_PROGRAMS = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")


def user_environment() -> dict[str, str]:
    """For `ask`: the user's own configuration, which says who he is and whom he trusts."""
    kept = {name: os.environ[name] for name in ("HOME", "XDG_CONFIG_HOME") if name in os.environ}
    return {**kept, **_QUIET}


def bare_environment(git_dir: Path) -> dict[str, str]:
    """For a repository of ours: no configuration but its own."""
    return {
        "HOME": "/",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_DIR": str(git_dir),
        **_QUIET,
    }


async def version() -> str:
    """Git's version. PreconditionFailed without git, or with one that is too old."""
    told = await proc.run(["git", "version"], timeout_s=TIMEOUT_S, env=user_environment())
    text = told.stdout.decode().strip().removeprefix("git version ")
    found = tuple(int(number) for number in re.findall(r"\d+", text)[:2])
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise PreconditionFailed(f"git {text} is older than {oldest}", hint="install a newer one")
    return text


async def ask(directory: Path, *arguments: str, check: bool = True) -> proc.Completed:
    """Ask the repository at `directory` (``rev-parse``, ``config``, ``symbolic-ref``)."""
    return await proc.run(
        ["git", *_NO_PROGRAMS, "-C", directory, *arguments],
        timeout_s=TIMEOUT_S,
        env=user_environment(),
        check=check,
    )


@dataclass(frozen=True)
class Limits:
    """What a git gets that reads what a guest wrote, or writes for the user."""

    #: Of address space; 0: no limit.
    memory_bytes: int = 0
    #: Of the files that it makes; -1: ours.
    umask: int = -1


NO_LIMITS = Limits()


async def run(
    git_dir: Path,
    *arguments: str | Path,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    limits: Limits = NO_LIMITS,
) -> proc.Completed:
    """Run git in a repository of ours, with `env` on top of its environment."""
    limited = ["prlimit", f"--as={limits.memory_bytes}"] if limits.memory_bytes else []
    return await proc.run(
        [*limited, "git", *_NO_PROGRAMS, *arguments],
        timeout_s=TIMEOUT_S,
        stdin=stdin,
        env=bare_environment(git_dir) | dict(env or {}),
        check=check,
        umask=limits.umask,
    )
