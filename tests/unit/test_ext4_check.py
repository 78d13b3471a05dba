"""ext4: what is asked of mke2fs, and what is refused before a boot."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.images.ext4 import MIB, Shape, check_ext4, fitting_shape, mke2fs_argv


def _image(
    path: Path, *, blocks: int = 256, log_block_size: int = 2, magic: int = 0xEF53, high: int = 0
) -> Path:
    superblock = bytearray(1024)
    struct.pack_into("<I", superblock, 0x04, blocks)
    struct.pack_into("<I", superblock, 0x18, log_block_size)
    struct.pack_into("<H", superblock, 0x38, magic)
    struct.pack_into("<I", superblock, 0x60, 0x80 if high else 0)
    struct.pack_into("<I", superblock, 0x150, high)
    path.write_bytes(bytes(1024) + superblock)
    with path.open("r+b") as file:
        file.truncate(MIB)
    return path


def test_a_whole_image_passes(tmp_path: Path) -> None:
    check_ext4(_image(tmp_path / "rootfs.ext4"))
    check_ext4(_image(tmp_path / "larger-file-than-needed.ext4", blocks=200))


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ({"magic": 0}, "not an ext4"),
        ({"blocks": 257}, "cut off"),
        ({"high": 1}, "cut off"),
        ({"blocks": 0}, "damaged"),
        ({"log_block_size": 40}, "damaged"),
    ],
)
def test_a_damaged_image_is_refused(tmp_path: Path, image: dict[str, int], problem: str) -> None:
    path = _image(tmp_path / "rootfs.ext4", **image)
    with pytest.raises(PreconditionFailed, match=problem) as caught:
        check_ext4(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"short", bytes(1500)])
def test_a_short_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rootfs.ext4"
    path.write_bytes(content)
    with pytest.raises(PreconditionFailed, match="not an ext4"):
        check_ext4(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="No such file"):
        check_ext4(tmp_path / "nowhere.ext4")
    with pytest.raises(PreconditionFailed, match="directory"):
        check_ext4(tmp_path)


@given(st.binary(min_size=1024, max_size=1024))
def test_any_superblock_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, superblock: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.ext4"
    for content in (superblock, superblock[:0x38] + b"\x53\xef" + superblock[0x3A:]):
        path.write_bytes(bytes(1024) + content)
        with pytest.raises(PreconditionFailed):  # 2 KiB hold no file system
            check_ext4(path)


def test_mke2fs_is_told_everything_that_the_guest_depends_on() -> None:
    argv = mke2fs_argv(Path("tree"), Path("out.ext4"), Shape("banger-work", 256, journal_mib=16))
    assert argv[-3:] == ["tree", "out.ext4", "256M"]
    assert argv[argv.index("-L") + 1] == "banger-work"
    features = argv[argv.index("-O") + 1].split(",")
    assert features[0] == "none"
    assert {"has_journal", "64bit", "resize_inode", "metadata_csum"} < set(features)
    assert "orphan_file" not in features
    assert argv[argv.index("-J") + 1] == "size=16"
    assert "has_journal" not in mke2fs_argv(Path("t"), Path("o"), Shape("x", 8))[-6]


def test_a_fitting_shape_has_room_for_the_content(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/file").write_bytes(bytes(10 * MIB + 1))
    (tmp_path / "link").symlink_to("directory")
    shape = fitting_shape(tmp_path, "banger-modules")
    assert 16 < shape.size_mib < 20
    assert 3 < shape.inodes < 100
    assert shape.journal_mib == 0
