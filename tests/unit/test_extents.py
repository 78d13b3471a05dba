"""Clones and sizes on whatever file system tests are run on. (Real clones: test_clones.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from banger.base import extents
from banger.base.errors import PreconditionFailed
from banger.drivers.base import Level
from banger.drivers.storage import reflink
from banger.drivers.storage.reflink import ReflinkStorage, copy_argv

MIB = 1 << 20


def sparse(path: Path) -> Path:
    """3 MiB, of which the second is data."""
    with path.open("wb") as file:
        file.seek(MIB)
        file.write(b"x" * MIB)
        file.truncate(3 * MIB)
    return path


def test_a_file_alone_takes_its_blocks(tmp_path: Path) -> None:
    file = sparse(tmp_path / "file")
    assert MIB <= extents.own_bytes(file) <= MIB + 65536
    assert extents.own_bytes(Path(os.devnull)) == 0


def test_extents_are_counted_over_more_than_one_answer(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        for number in range(1100):
            file.seek(number * 8192)
            file.write(b"x" * 4096)
    file_bytes = (tmp_path / "file").stat().st_blocks * 512
    assert file_bytes * 0.9 <= extents.own_bytes(tmp_path / "file") <= file_bytes


def test_what_is_missing_cannot_be_cloned(tmp_path: Path) -> None:
    assert not extents.can_clone(tmp_path / "none", tmp_path)
    assert not extents.makes_clones(tmp_path / "none")


def test_the_copy_keeps_holes_and_follows_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert copy_argv(Path("-a"), Path("b")) == [
        *("cp", "--sparse=auto", "--reflink=never", "--", f"{tmp_path}/-a", f"{tmp_path}/b")
    ]


async def test_a_missing_base_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match=r"rootfs\.ext4 is missing"):
        await ReflinkStorage(tmp_path).create_overlay(
            tmp_path / "rootfs.ext4", tmp_path / "system.raw", 1
        )
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_grows_by_a_hole_and_never_shrinks(tmp_path: Path) -> None:
    storage, disk = ReflinkStorage(tmp_path), sparse(tmp_path / "work.raw")
    before = storage.allocated_bytes(disk)
    await storage.grow(disk, 2)
    assert await storage.size_mib(disk) == 3
    await storage.grow(disk, 100)
    assert await storage.size_mib(disk) == 100
    assert storage.allocated_bytes(disk) == before
    with pytest.raises(PreconditionFailed, match="cannot grow"):
        await storage.grow(disk, 1 << 42)
    assert await storage.size_mib(disk) == 100


def test_what_is_not_there_takes_nothing(tmp_path: Path) -> None:
    storage = ReflinkStorage(tmp_path / "not" / "yet")
    assert storage.allocated_bytes(tmp_path / "none") == 0
    assert storage.room_bytes("work", tmp_path / "none") == 0


@pytest.mark.parametrize(("clones", "level"), [(True, Level.OK), (False, Level.WARN)])
async def test_the_check_says_whether_disks_are_clones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clones: bool, level: Level
) -> None:
    monkeypatch.setattr(reflink, "makes_clones", lambda directory: clones)
    (check,) = await ReflinkStorage(tmp_path / "not" / "yet").checks()
    assert check.level is level
    assert str(tmp_path) in check.detail
