"""Runs on a guest host, by the interpreter that banger is installed for: makes and takes away the
device of a disk, and is killed after each of its steps. What is left each time goes to stdout, as
JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path

from banger.base.model import DiskDevices
from banger.drivers.storage.dm_snapshot import DmSnapshotStorage
from banger.hostops.local import LocalHost
from banger.hostops.ops import Done, Operation

ID = "0123456789ab"
HOME = Path("/var/tmp/steps")
DISK = HOME / "vms" / ID / "system.cow"
BASE = HOME / "base"
RECORD = HOME / "record"
_MIB = 1 << 20


class Steps(LocalHost):
    """Kills this process after so many steps: operations, and records of them."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def step(self) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    async def perform(self, operation: Operation) -> Done:
        done = await super().perform(operation)
        self.step()
        return done


async def act(verb: str, steps: int) -> None:
    host = Steps(steps)
    storage = DmSnapshotStorage(HOME / "vms", host)

    def record(devices: DiskDevices) -> None:
        RECORD.write_text(devices.base)
        host.step()

    recorded = DiskDevices(base=RECORD.read_text() if RECORD.exists() else "")
    if verb == "open":
        await storage.open(ID, BASE, DISK, record)
    elif verb == "close":
        await storage.close(ID, DISK, recorded)
    else:
        await storage.sweep([], [BASE])


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
