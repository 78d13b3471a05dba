"""`vm cp`: which side is whose, and that nothing of a guest's gets where it must not."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any, Self

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import Conflict, NotFound
from banger.cli import copy as module
from banger.cli.copy import (
    FileKind,
    GuestSide,
    _guest_target,
    _host_target,
    _move,
    _private_directory,
    parse_side,
)


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("box:/etc/hosts", GuestSide("box", "/etc/hosts")),
        ("box:notes", GuestSide("box", "/root/notes")),
        ("box:a:b", GuestSide("box", "/root/a:b")),
        ("box:.", GuestSide("box", "/root/.")),
        ("file", "file"),
        ("/a/b", "/a/b"),
        ("./a:b", "./a:b"),
        ("/tmp/a:b", "/tmp/a:b"),
        ("a/b:c", "a/b:c"),
        (":x", ":x"),
        ("-", "-"),
        ("..", ".."),
    ],
)
def test_a_side_is_the_guests_when_a_name_and_a_colon_come_first(
    text: str, side: GuestSide | str
) -> None:
    assert parse_side(text) == side


@pytest.mark.parametrize("text", ["", "box:"])
def test_a_side_without_a_path_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        parse_side(text)


@given(st.text(min_size=1))
def test_a_host_path_can_always_be_written(path: str) -> None:
    assert parse_side(f"./{path}") == f"./{path}"


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True), st.text(min_size=1))
def test_a_guests_path_is_absolute_and_says_what_was_written(name: str, path: str) -> None:
    side = parse_side(f"{name}:{path}")
    assert isinstance(side, GuestSide)
    assert side.vm == name
    assert side.path in (path, f"/root/{path}")
    assert side.path.startswith("/")


@pytest.mark.parametrize(
    ("source", "destination"), [("a", "b"), ("-", "b"), ("x:/a", "y:/b"), ("x:/a", "y:b")]
)
def test_exactly_one_side_is_a_guests(
    source: str, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not for one copy
    with pytest.raises(click.UsageError, match="one side must be NAME:PATH"):
        module.copy(source, destination)


# Where a copy goes, as with cp


def test_a_copy_out_goes_into_a_directory_or_gets_the_new_name(tmp_path: Path) -> None:
    source = GuestSide("box", "/root/tree")
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    assert _host_target(source, str(tmp_path / "dir")) == (tmp_path / "dir" / "tree", "tree")
    assert _host_target(source, str(tmp_path / "new")) == (tmp_path / "new", "new")
    assert _host_target(source, str(tmp_path / "file")) == (tmp_path / "file", "file")
    assert _host_target(GuestSide("box", "/"), str(tmp_path)) == (tmp_path / "box", "box")
    for missing in ("none/", "file/", "none/x", "file/x"):
        with pytest.raises(NotFound, match="is not a directory"):
            _host_target(source, f"{tmp_path}/{missing}")


@pytest.mark.parametrize("path", ["/root/..", "/root/a/..", "/.."])
def test_a_guest_path_without_a_name_of_its_own_is_refused(tmp_path: Path, path: str) -> None:
    """Its copy would be moved out of the directory it was unpacked in."""
    with pytest.raises(match="name the directory itself"):
        _host_target(GuestSide("box", path), str(tmp_path))


@given(st.text("./ab"))
def test_a_copy_out_always_has_one_plain_name(path: str) -> None:
    try:
        target, name = _host_target(GuestSide("box", f"/{path}"), "/tmp")
    except click.UsageError:
        return
    assert name not in ("", ".", "..")
    assert "/" not in name
    assert target == Path("/tmp") / name


class Guest:
    """What lies in the guest, for `vm.stat`."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, params: dict[str, Any], result: object) -> FileKind:
        kind = self.kinds.get(params["path"].rstrip("/") or "/", "")
        return FileKind(exists=bool(kind), kind=kind)


@pytest.mark.parametrize(
    ("path", "is_tree", "target"),
    [
        ("/d", False, ("/d", "name")),
        ("/d/", True, ("/d", "name")),
        ("/d/new", False, ("/d", "new")),
        ("/d/new", True, ("/d", "new")),
        ("/d/f", False, ("/d", "f")),
        ("/d/f", True, Conflict),
        ("/d/new/", False, NotFound),
        ("/d/f/", False, NotFound),
        ("/none/x", False, NotFound),
        ("/d/f/x", False, NotFound),
    ],
)
def test_a_copy_in_goes_where_cp_would_put_it(
    monkeypatch: pytest.MonkeyPatch, path: str, is_tree: bool, target: Any
) -> None:
    guest = Guest({"/d": "directory", "/d/f": "file", "/": "directory"})
    monkeypatch.setattr(module, "connect", lambda: guest)
    side = GuestSide("box", path)
    if isinstance(target, tuple):
        directory, name = _guest_target(side, "name", is_tree=is_tree)
        assert (str(directory), name) == target
    else:
        with pytest.raises(target):
            _guest_target(side, "name", is_tree=is_tree)


# What was unpacked is moved to its place


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """What a guest sent, as tar has unpacked it."""
    made = tmp_path / "unpacked"
    made.mkdir()
    return made


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_tree_is_moved_with_its_modes_links_and_times(unpacked: Path, tmp_path: Path) -> None:
    (unpacked / "dir").mkdir()
    (unpacked / "dir" / "script").write_text("x")
    (unpacked / "dir" / "script").chmod(0o751)
    (unpacked / "dir" / "link").symlink_to("/etc/passwd")
    (unpacked / "dir" / "dangling").symlink_to("nowhere")
    (unpacked / "empty").mkdir()
    os.utime(unpacked / "dir" / "script", (1, 1_000_000))
    for name in ("dir", "empty", "."):
        os.utime(unpacked / name, (1, 2_000_000))
    target = tmp_path / "target"
    _move(unpacked, target)
    assert (target / "dir" / "script").read_text() == "x"
    assert mode_of(target / "dir" / "script") == 0o751
    assert (target / "dir" / "link").readlink() == Path("/etc/passwd")
    assert (target / "dir" / "dangling").readlink() == Path("nowhere")
    assert (target / "dir" / "script").stat().st_mtime == 1_000_000
    for directory in (target / "dir", target / "empty", target):
        assert directory.stat().st_mtime == 2_000_000


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1777, 0o6777])
def test_no_set_id_bit_comes_out_of_a_guest(unpacked: Path, tmp_path: Path, mode: int) -> None:
    (unpacked / "file").write_text("x")
    (unpacked / "file").chmod(mode)
    (unpacked / "dir").mkdir()
    (unpacked / "dir").chmod(mode)
    _move(unpacked, tmp_path / "target")
    assert mode_of(tmp_path / "target" / "file") == mode & 0o777
    assert mode_of(tmp_path / "target" / "dir") == mode & 0o777


def test_a_tree_is_merged_and_files_replace_files(unpacked: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "dir").mkdir(parents=True)
    (target / "dir" / "mine").write_text("mine")
    (target / "dir" / "both").write_text("old")
    (unpacked / "dir").mkdir()
    (unpacked / "dir" / "both").write_text("new")
    _move(unpacked, target)
    assert (target / "dir" / "mine").read_text() == "mine"
    assert (target / "dir" / "both").read_text() == "new"


def test_a_directory_that_is_there_keeps_its_mode_and_a_new_one_gets_its_own(
    unpacked: Path, tmp_path: Path
) -> None:
    """A guest must not open one of ours to everybody."""
    target = tmp_path / "target"
    (target / "dir").mkdir(parents=True)
    for mine in (target, target / "dir"):
        mine.chmod(0o700)
    (unpacked / "dir" / "new").mkdir(parents=True)
    for theirs in (unpacked, unpacked / "dir", unpacked / "dir" / "new"):
        theirs.chmod(0o777)
    _move(unpacked, target)
    assert mode_of(target) == mode_of(target / "dir") == 0o700
    assert mode_of(target / "dir" / "new") == 0o777


def test_nothing_is_written_through_a_link_on_the_host(unpacked: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    (target / "dir").symlink_to(elsewhere)
    (target / "link").symlink_to(elsewhere / "file")
    (unpacked / "link").write_text("theirs")
    _move(unpacked, target)
    assert (elsewhere / "file").read_text() == "mine"
    assert (target / "link").read_text() == "theirs"
    again = tmp_path / "again"
    (again / "dir").mkdir(parents=True)
    (again / "dir" / "file").write_text("theirs")
    with pytest.raises(Conflict, match="is there and is not a directory"):
        _move(again, target)
    assert (elsewhere / "file").read_text() == "mine"


def test_a_link_from_the_guest_is_moved_and_not_followed(unpacked: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    outside.chmod(0o755)
    (unpacked / "link").symlink_to(outside)
    _move(unpacked, tmp_path / "target")
    assert (tmp_path / "target" / "link").is_symlink()
    assert (outside / "file").read_text() == "mine"
    assert mode_of(outside) == 0o755


def test_a_directory_does_not_replace_a_file_nor_a_file_a_directory(
    unpacked: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    (target / "a").mkdir(parents=True)
    (unpacked / "a").write_text("x")
    with pytest.raises(Conflict, match="is there and is a directory"):
        _move(unpacked, target)
    (unpacked / "a").unlink()
    (unpacked / "b").mkdir()
    (target / "b").write_text("mine")
    with pytest.raises(Conflict, match="is there and is not a directory"):
        _move(unpacked, target)
    assert (target / "b").read_text() == "mine"


def test_sockets_and_devices_are_refused_and_pipes_are_not(unpacked: Path, tmp_path: Path) -> None:
    os.mkfifo(unpacked / "pipe")
    _move(unpacked / "pipe", tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(unpacked / "socket"))
        with pytest.raises(Conflict, match="a device or a socket in the guest: not copied"):
            _move(unpacked / "socket", tmp_path / "socket")


def test_a_device_is_refused(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unpacked / "null").touch()
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        found = real(path)
        if path.name != "null":
            return found
        return os.stat_result((stat.S_IFCHR | 0o666, *found[1:]))

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(Conflict, match="null is a device"):
        _move(unpacked / "null", tmp_path / "null")


def test_the_private_directory_is_ours_alone_and_goes_whatever_is_in_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    with _private_directory(tmp_path) as directory:
        assert mode_of(directory) == 0o700
        directory.chmod(0o777)  # as an archive may
        assert mode_of(directory.parent) == 0o700
        assert directory.parent.parent == tmp_path
        (directory / "a" / "b").mkdir(parents=True)
        (directory / "a" / "b" / "file").touch()
        (directory / "a" / "out").symlink_to(outside)
        (directory / "a" / "b").chmod(0)
        (directory / "a").chmod(0o500)
    assert list(tmp_path.iterdir()) == [outside]
    assert mode_of(outside) == 0o755
