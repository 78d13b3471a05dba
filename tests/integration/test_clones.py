"""Raw disks on file systems that make clones, and on one that does not: at another cost only."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.base.errors import PreconditionFailed
from banger.base.extents import can_clone, makes_clones
from banger.drivers.base import Level
from banger.drivers.storage import reflink
from banger.drivers.storage.reflink import ReflinkStorage
from banger.services.artifacts import allocated_bytes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root: they mount")

MIB = 1 << 20
_MAKE = {
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "ext4": ["mke2fs", "-q", "-t", "ext4"],
}
_SIZE = 400 * MIB


@pytest.fixture(params=_MAKE)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A file system of its own: its kind, and where it is."""
    file, where = tmp_path / "file-system", tmp_path / "mounted"
    file.touch()
    os.truncate(file, _SIZE)
    where.mkdir()
    subprocess.run([*_MAKE[request.param], file], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", file, where], check=True, timeout=60)
    try:
        yield request.param, where
    finally:
        subprocess.run(["umount", where], check=True, timeout=60)


def base_of(directory: Path, size_mib: int = 16) -> Path:
    """A file with so much of random data between two holes."""
    base = directory / "rootfs.ext4"
    with base.open("wb") as file:
        file.seek(MIB)
        for _ in range(size_mib):
            file.write(os.urandom(MIB))
        file.truncate((size_mib + 32) * MIB)
        os.fsync(file.fileno())
    return base


async def test_disks_share_what_they_can_and_nothing_that_is_written(
    mounted: tuple[str, Path],
) -> None:
    kind, where = mounted
    storage, base = ReflinkStorage(where), base_of(where)
    clones = kind != "ext4"
    assert (makes_clones(where), can_clone(base, where)) == (clones, clones)
    (check,) = await storage.checks()
    assert check.level is (Level.OK if clones else Level.WARN)
    room = storage.room_bytes("work", base)
    assert room == 0 if clones else 16 * MIB <= room < 17 * MIB
    disks = [where / f"{name}.raw" for name in ("system", "other")]
    for disk in disks:
        await storage.create_overlay(base, disk, 100)
        assert await storage.size_mib(disk) == 100
        with disk.open("rb") as ours:
            assert ours.read(48 * MIB) == base.read_bytes()
    os.sync()
    alone = storage.allocated_bytes(disks[0])
    assert alone <= MIB if clones else 16 * MIB <= alone < 17 * MIB
    before = base.read_bytes()
    with disks[0].open("rb+") as changed:
        changed.seek(2 * MIB)
        changed.write(b"x" * 4 * MIB)
        os.fsync(changed.fileno())
    assert base.read_bytes() == before
    assert disks[1].read_bytes()[: 48 * MIB] == before
    alone = storage.allocated_bytes(disks[0])
    assert 4 * MIB <= alone <= 5 * MIB if clones else 16 * MIB <= alone < 17 * MIB
    copy = where / "copies"
    copy.mkdir()
    await storage.share(disks[0], copy)
    await storage.branch(copy / "system.raw", copy / "branch.raw")
    assert (copy / "branch.raw").read_bytes() == disks[0].read_bytes()
    os.sync()
    size = allocated_bytes(copy)
    assert size < 2 * MIB if clones else size >= 32 * MIB


async def test_a_full_disk_fails_the_copy_and_leaves_nothing(mounted: tuple[str, Path]) -> None:
    kind, where = mounted
    if kind != "ext4":
        return  # clones take no room
    base = base_of(where, 200)
    with pytest.raises(PreconditionFailed, match="No space left") as caught:
        await ReflinkStorage(where).create_overlay(base, where / "system.raw", 1)
    assert "free space" in caught.value.hint
    assert sorted(each.name for each in where.iterdir()) == ["lost+found", "rootfs.ext4"]


async def test_what_is_missing_is_named(tmp_path: Path) -> None:
    storage, base = ReflinkStorage(tmp_path), base_of(tmp_path, 1)
    with pytest.raises(PreconditionFailed, match="rootfs is missing: the disk needs it"):
        await storage.create_overlay(tmp_path / "rootfs", tmp_path / "system.raw", 1)
    with pytest.raises(PreconditionFailed, match=r"to .*/gone: No such file"):
        await storage.create_overlay(base, tmp_path / "gone/system.raw", 1)


async def test_a_copy_that_nobody_wants_any_more_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, made = threading.Event(), reflink._begun

    def slow(source: Path, target: Path, may_share: bool) -> bool:
        begun.set()
        time.sleep(0.2)
        return made(source, target, may_share)

    monkeypatch.setattr(reflink, "_begun", slow)
    base = base_of(tmp_path, 1)
    making = asyncio.create_task(
        ReflinkStorage(tmp_path).create_overlay(base, tmp_path / "system.raw", 1)
    )
    await asyncio.to_thread(begun.wait)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    await asyncio.sleep(0.4)
    assert [each.name for each in tmp_path.iterdir()] == ["rootfs.ext4"]


async def test_from_another_file_system_it_is_a_copy(
    mounted: tuple[str, Path], tmp_path: Path
) -> None:
    _, where = mounted
    base = base_of(tmp_path)
    storage = ReflinkStorage(where)
    assert storage.room_bytes("work", base) >= 16 * MIB
    await storage.create_overlay(base, where / "system.raw", 1)
    assert (where / "system.raw").read_bytes() == base.read_bytes()
    with (where / "system.raw").open("rb") as made:
        assert os.lseek(made.fileno(), 0, os.SEEK_DATA) == MIB
