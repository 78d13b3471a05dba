"""Runs on a guest host, by the interpreter that banger is installed for: makes and takes away the
device of a disk, and is killed after each of its steps. What is left each time goes to stdout, as
JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from banger.drivers.storage.dm_snapshot import DmSnapshotStorage
from banger.hostops import loops, mappings
from banger.hostops.local import LocalHost

ID = "0123456789ab"
HOME = Path("/var/tmp/steps")
DISK = HOME / "vms" / ID / "system.cow"
BASE = HOME / "base"
_MIB = 1 << 20

T = TypeVar("T")


class Steps:
    """Kills this process after so many of them: what the kernel is asked, and what is recorded."""

    def __init__(self, left: int) -> None:
        self.left = left

    def step(self) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, function: Callable[..., T]) -> Callable[..., T]:
        """The same, and a step."""

        def stepping(*arguments: object, **more: object) -> T:
            result = function(*arguments, **more)
            self.step()
            return result

        return stepping

    def take_part(self) -> None:
        """In all that a privileged operation consists of."""
        loops.attach = self.after(loops.attach)
        loops.resize = self.after(loops.resize)
        loops.detach_unused = self.after(loops.detach_unused)
        dmsetup = mappings._dmsetup

        async def stepping(*words: str) -> str:
            said = await dmsetup(*words)
            self.step()
            return said

        mappings._dmsetup = stepping


async def act(verb: str, count: int) -> None:
    steps = Steps(count)
    steps.take_part()
    storage = DmSnapshotStorage(HOME / "vms", LocalHost(), "89abcdef")
    if verb == "open":
        await storage.open(ID, BASE, DISK, lambda _: steps.step())
    elif verb == "close":
        await storage.close(ID, DISK)
    else:
        await storage.sweep([])


def killed(verb: str, steps: int = 0) -> bool:
    """Whether it was, after so many steps; else it has done what it should."""
    if not (child := os.fork()):  # an interpreter of its own would take seconds here
        status = 1
        try:
            asyncio.run(act(verb, steps))
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert ended == 0 or os.WTERMSIG(ended) == signal.SIGKILL, (verb, steps, ended)
    return ended != 0


def left() -> str:
    script = "dmsetup ls; losetup --all; ls /dev/mapper"
    return subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout


def walk(verb: str, undo: str) -> list[str]:
    """What is left after each step that `verb` was killed at, and `undo` after that."""
    found, steps, killing = [], 0, True
    while killing:
        steps += 1
        if verb == "close":
            assert not killed("open")
            change(steps)
        killing = killed(verb, steps)
        assert not killed(undo)
        found.append(left())
    return found


def change(number: int) -> None:
    """Write to the device what is there when it is opened again."""
    with Path(f"/dev/mapper/banger-{ID}").open("r+b", buffering=0) as device:
        expected = bytes([number - 1]) * 4096 if number > 1 else BASE.read_bytes()[:4096]
        assert device.read(4096) == expected, number
        device.seek(0)
        device.write(bytes([number]) * 4096)


def main() -> None:
    DISK.parent.mkdir(parents=True)
    BASE.write_bytes(b"base" * (2 * _MIB))
    DISK.touch()
    seen = {
        "opening, closed": walk("open", "close"),
        "opening, swept": walk("open", "sweep"),
        "closing, closed": walk("close", "close"),
        "bytes of changes": DISK.stat().st_size,
    }
    DISK.unlink()
    DISK.touch()
    seen["closing, swept"] = walk("close", "sweep")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
