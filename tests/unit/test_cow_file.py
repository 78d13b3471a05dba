"""Files of changes: how far they are used, by the kernel's own format."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.drivers.storage import cow_file
from test_ext4_check import _image

CHUNK = 4096
MIB = 1 << 20


def written(path: Path, chunks: int, *, valid: int = 1, ahead: int = 0) -> Path:
    """A file as the kernel leaves it when so many chunks of a disk were changed, with so many
    chunks of room after them."""
    areas = chunks // 256 + 1
    size = 1 + areas + chunks + ahead
    content = bytearray(size * CHUNK)
    struct.pack_into("<4s3I", content, 0, b"SnAp", valid, 1, 8)
    for number in range(chunks):
        area, slot = divmod(number, 256)
        first = 1 + area * 257
        place = first * CHUNK + slot * 16
        struct.pack_into("<2Q", content, place, number * 3, first + 1 + slot)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("chunks", [0, 1, 255, 256, 257, 511, 512, 513, 1000])
@pytest.mark.parametrize("ahead", [0, 1, 300])
def test_it_is_used_to_the_last_change_and_no_further(
    tmp_path: Path, chunks: int, ahead: int
) -> None:
    path = written(tmp_path / "system.cow", chunks, ahead=ahead)
    size = path.stat().st_size
    found = cow_file.extent(path)
    assert found.end_bytes == size - ahead * CHUNK
    assert found.area == chunks // 256
    assert cow_file.extent(path, found.area) == found
    cow_file.cut(path)
    assert path.stat().st_size == size - ahead * CHUNK
    assert cow_file.extent(path) == found


def test_an_area_is_read_whatever_the_order_of_its_changes(tmp_path: Path) -> None:
    path = written(tmp_path / "system.cow", 3, ahead=9)
    content = bytearray(path.read_bytes())
    struct.pack_into("<2Q", content, CHUNK, 77, 8)  # the first to be done was not the first begun
    path.write_bytes(content)
    assert cow_file.extent(path).end_bytes == 9 * CHUNK


def test_where_the_next_area_was_cut_off_there_are_no_more_changes(tmp_path: Path) -> None:
    path = written(tmp_path / "system.cow", 256)
    with path.open("rb+") as file:
        file.truncate(258 * CHUNK)
    assert cow_file.extent(path).end_bytes == 258 * CHUNK


@pytest.mark.parametrize("content", [b"", bytes(CHUNK), bytes(MIB)])
def test_one_that_was_never_written_begins_as_zeros(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "system.cow"
    path.write_bytes(content)
    assert cow_file.extent(path) == cow_file.Extent(0)
    cow_file.cut(path)
    assert path.stat().st_size == 0


def test_one_that_the_kernel_has_given_up_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "system.cow", 5, valid=0, ahead=7)
    before = path.read_bytes()
    with pytest.raises(PreconditionFailed, match=r"system\.cow cannot be used: .*given it up"):
        cow_file.extent(path)
    cow_file.cut(path)
    assert path.read_bytes() == before


def test_one_that_ends_before_its_changes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "system.cow", 5)
    with path.open("rb+") as file:
        file.truncate(4 * CHUNK)
    with pytest.raises(PreconditionFailed, match="ends before its changes"):
        cow_file.extent(path)


@given(header=st.binary(min_size=1, max_size=64))
def test_what_is_no_such_file_is_refused_and_never_cut(
    tmp_path_factory: pytest.TempPathFactory, header: bytes
) -> None:
    path = tmp_path_factory.mktemp("cow") / "system.cow"
    path.write_bytes(header + bytes(2 * CHUNK))
    if not header.strip(b"\0") or header.startswith(b"SnAp"):
        return
    with pytest.raises(PreconditionFailed, match="no such file"):
        cow_file.extent(path)
    cow_file.cut(path)
    assert path.stat().st_size == len(header) + 2 * CHUNK


def test_a_file_system_is_never_cut_though_it_begins_with_zeros(tmp_path: Path) -> None:
    path = _image(tmp_path / "rootfs.ext4")
    before = path.read_bytes()
    assert not before[:1024].strip(b"\0")
    with pytest.raises(PreconditionFailed, match="no such file"):
        cow_file.extent(path)
    cow_file.cut(path)
    assert path.read_bytes() == before


def test_room_is_allocated_and_what_was_written_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "system.cow", 5)
    before = path.read_bytes()
    cow_file.allocate(path, MIB)
    assert (path.stat().st_size, path.stat().st_blocks * 512 >= MIB) == (MIB, True)
    assert path.read_bytes() == before + bytes(MIB - len(before))
    cow_file.allocate(path, 1)
    assert path.stat().st_size == MIB
