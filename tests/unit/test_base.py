"""Names, errors, op_ids, and files written whole or not at all."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base import errors
from banger.base.errors import BadRequest, BangerError, ErrorCode, Internal, from_wire
from banger.base.files import reserve_if_reading_takes_room, write_atomically
from banger.base.model import check_artifact_name, check_vm_name
from banger.base.opid import is_op_id, new_op_id


@pytest.mark.parametrize("name", ["a", "0", "a-b", "x" * 63, "9-", "debian-12"])
def test_good_vm_names_pass(name: str) -> None:
    assert check_vm_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "A", "a_b", "a.b", "x" * 64, "a\n", "a b", "ä", "../x", "a/b", "\0"]
)
def test_bad_vm_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(BadRequest, match="is not a valid VM name") as caught:
        check_vm_name(name)
    assert "a-z" in caught.value.hint


@given(st.text())
def test_a_valid_vm_name_is_a_host_name_and_an_artifact_name(name: str) -> None:
    try:
        check_vm_name(name)
    except BadRequest:
        return
    assert check_artifact_name(name) == name
    assert name.isascii()
    assert len(name) <= 63


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a\n", "A", "-x", "x" * 128])
def test_bad_artifact_names_are_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="is not a valid image or kernel name"):
        check_artifact_name(name)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_its_class_and_comes_back_from_the_wire(code: ErrorCode) -> None:
    error = from_wire(code.value, "what", "do", "op-0123456789ab")
    assert error.code is code
    assert type(error) is not BangerError
    assert type(error).code is code
    assert (error.message, error.hint, error.op_id) == ("what", "do", "op-0123456789ab")
    assert str(error) == "what"


def test_no_two_classes_share_a_code_and_none_is_missing() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, BangerError) and value is not BangerError
    ]
    assert sorted(cls.code for cls in classes) == sorted(ErrorCode)
    assert all(cls.__name__ in (errors.__doc__ or "") for cls in classes)


def test_a_code_of_a_newer_version_is_internal() -> None:
    error = from_wire("of_tomorrow", "what")
    assert type(error) is Internal
    assert error.message == "what"


def test_new_op_ids_have_their_shape_and_differ() -> None:
    made = {new_op_id() for _ in range(100)}
    assert len(made) == 100
    assert all(map(is_op_id, made))


@pytest.mark.parametrize(
    "text", ["", "op-", "op-0123456789a", "op-0123456789abc", "op-0123456789AB", "op-0123456789a\n",
             "OP-0123456789ab", None, 7, b"op-0123456789ab"],
)  # fmt: skip
def test_other_shapes_are_no_op_ids(text: object) -> None:
    assert not is_op_id(text)


def test_a_file_is_written_with_its_mode_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomically(path, b"two", mode=0o640)
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_what_fails_in_between_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_content_is_synced_before_it_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    seen: list[bytes] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        real(descriptor)
        seen.append(path.read_bytes())
        seen.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, b"new")
    assert seen == [b"old", b"new"]


@pytest.mark.parametrize("content_at", [0, 1 << 20, (4 << 20) - 1])
@pytest.mark.parametrize("tmpfs", [True, False])
def test_reading_what_was_reserved_takes_no_more_room(
    content_at: int, tmpfs: bool, tmp_path: Path
) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if tmpfs else tmp_path) as file:
        os.ftruncate(file.fileno(), 4 << 20)
        os.pwrite(file.fileno(), b"x", content_at)
        reserve_if_reading_takes_room(file.fileno())
        reserved = os.fstat(file.fileno()).st_blocks
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
            content = bytearray(4 << 20)
            content[content_at] = ord("x")
            assert memory[:] == content
        assert os.fstat(file.fileno()).st_blocks == reserved
        if tmpfs:
            assert reserved == (4 << 20) // 512


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_file_without_holes_is_left_as_it_is(size: int) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(b"x" * size)
        file.flush()
        before = os.fstat(file.fileno()).st_blocks
        reserve_if_reading_takes_room(file.fileno())
        assert os.fstat(file.fileno()).st_blocks == before


def test_a_link_in_its_place_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "file").symlink_to("other")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "other").read_bytes() == b"other"
    assert not (tmp_path / "file").is_symlink()
