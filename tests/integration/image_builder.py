"""Builds an image or a kernel as a process of its own, as any user: run by `test_image_build.py`.

    python image_builder.py NAME DEST USER

NAME is a recipe's, ``kernel``, ``remove`` (removes DEST) or ``wait`` (for a contained process).
Prints a JSON line for each step of progress, and one with what was built or with the error.
SIGTERM cancels the build, as an operation's cancel does.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import sys
from pathlib import Path

from banger.base import proc
from banger.base.errors import BangerError
from banger.images.build import build_image
from banger.images.kernel import build_kernel
from banger.images.preflight import requirements
from banger.images.userns import contained, remove_tree


def _say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def _progress(stage: str, detail: str, percent: float) -> None:
    _say(stage=stage, detail=detail, percent=percent)


async def _work(name: str, dest: Path) -> None:
    if name == "remove":
        await remove_tree(dest)
    elif name == "wait":
        argv = contained(["sh", "-c", "sleep 300 & echo running >&2; wait"])
        await proc.run(argv, timeout_s=300, on_stderr_line=lambda line: _progress("wait", line, -1))
    elif name == "kernel":
        kernel = await build_kernel(dest, progress=_progress)
        _say(version=kernel.version, modules=sorted(p.name for p in kernel.boot_modules.iterdir()))
    else:
        image = await build_image(name, dest, progress=_progress)
        _say(packages=image.packages)


async def _main(name: str, dest: Path) -> int:
    work = asyncio.create_task(_work(name, dest))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
    try:
        await work
    except BangerError as error:
        _say(error=error.code, message=error.message, hint=error.hint)
        return 1
    except asyncio.CancelledError:
        _say(error="cancelled")
        return 1
    return 0


def _become(user: str) -> None:
    """Drop to `user` for good.

    Not by runuser: the interpreter may lie where only root can read it. What is imported late is
    therefore brought in first.
    """
    asyncio.run(requirements())
    asyncio.run(asyncio.to_thread(int))
    entry = pwd.getpwnam(user)
    os.initgroups(user, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir


if __name__ == "__main__":
    if pwd.getpwnam(sys.argv[3]).pw_uid != os.geteuid():
        _become(sys.argv[3])
    sys.exit(asyncio.run(_main(sys.argv[1], Path(sys.argv[2]))))
