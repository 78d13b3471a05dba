"""What a hostile guest offers to `vm cp` is taken as data, and never outside the destination."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from product import Banger

pytestmark = pytest.mark.guest


@pytest.fixture
def tree(banger: Banger, vm: str) -> Iterator[str]:
    """An empty directory in the guest, to be filled with evil."""
    banger.guest(vm, "mkdir /root/tree")
    yield f"{vm}:/root/tree"
    banger.guest(vm, "rm -rf /root/tree")


def test_set_id_bits_stay_in_the_guest(banger: Banger, vm: str, tree: str, tmp_path: Path) -> None:
    banger.guest(vm, "cd /root/tree; cp /bin/true t; chown 1000 t; chmod 6755 t; chmod 7777 .")
    banger.ok("vm", "cp", tree, tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out/t"):
        info = path.stat()
        assert stat.S_IMODE(info.st_mode) & ~0o777 == 0
        assert info.st_uid == os.getuid()


def test_a_device_is_refused(banger: Banger, vm: str, tree: str, tmp_path: Path) -> None:
    banger.guest(vm, "cd /root/tree; mknod null c 1 3; mknod disk b 254 0")
    said = banger.fails("vm", "cp", tree, tmp_path / "out", status=1)
    assert "not copied" in said or "refused" in said
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_pipe_is_copied_as_one_and_nobody_waits_for_it(
    banger: Banger, vm: str, tree: str, tmp_path: Path
) -> None:
    banger.guest(vm, "mkfifo /root/tree/pipe")
    banger.ok("vm", "cp", tree, tmp_path / "out")
    assert (tmp_path / "out/pipe").is_fifo()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_nothing_is_written_through_a_link_that_is_there_already(
    banger: Banger, vm: str, tree: str, tmp_path: Path, kind: str
) -> None:
    """The guest's earlier copy may have put the link there."""
    outside = tmp_path / "outside"
    destination = tmp_path / "destination"
    (destination / "tree").mkdir(parents=True)
    if kind == "directory":
        outside.mkdir()
        (destination / "tree/x").symlink_to(outside)
        banger.guest(vm, "mkdir /root/tree/x; echo evil > /root/tree/x/file")
        said = banger.fails("vm", "cp", tree, destination, status=1)
        assert "is there and is not a directory" in said
        assert list(outside.iterdir()) == []
    else:
        outside.write_text("mine")
        (destination / "tree/x").symlink_to(outside)
        banger.guest(vm, "echo evil > /root/tree/x")
        banger.ok("vm", "cp", tree, destination)
        assert (destination / "tree/x").read_text() == "evil\n"
        assert not (destination / "tree/x").is_symlink()
        assert outside.read_text() == "mine"


def test_a_link_and_then_a_directory_of_its_name_over_two_copies(
    banger: Banger, vm: str, tree: str, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    banger.guest(vm, f"ln -s {outside} /root/tree/x")
    banger.ok("vm", "cp", tree, tmp_path / "out")
    assert (tmp_path / "out/x").is_symlink()
    banger.guest(vm, "cd /root/tree; rm x; mkdir x; echo evil > x/file")
    (tmp_path / "out").rename(tmp_path / "tree")
    said = banger.fails("vm", "cp", tree, tmp_path, status=1)
    assert "is there and is not a directory" in said
    assert list(outside.iterdir()) == []


def test_odd_names_do_not_reach_the_terminal_raw(
    banger: Banger, vm: str, tree: str, tmp_path: Path
) -> None:
    banger.guest(vm, "cd /root/tree; mknod \"$(printf 'evil\\033[2J')\" c 1 3")
    said = banger.fails("vm", "cp", tree, tmp_path / "out", status=1)
    assert "\x1b" not in said


def test_a_file_that_grows_while_it_is_packed_is_no_disaster(
    banger: Banger, vm: str, tree: str, tmp_path: Path
) -> None:
    banger.guest(vm, "(yes > /root/tree/growing & echo $! > /root/pid; sleep 0.3)")
    done = banger.run("vm", "cp", tree, tmp_path / "out")
    banger.guest(vm, "kill $(cat /root/pid)")
    assert done.returncode in (0, 1), done
    assert b"Traceback" not in done.stderr
    if done.returncode == 0:
        assert set((tmp_path / "out/growing").read_bytes()) == set(b"y\n")


def test_a_name_of_two_dots_leads_nowhere(
    banger: Banger, vm: str, tree: str, tmp_path: Path
) -> None:
    banger.guest(vm, "mkdir /root/tree/sub")
    (tmp_path / "inner").mkdir()
    said = banger.fails("vm", "cp", f"{tree}/sub/..", tmp_path / "inner", status=2)
    assert "ends with ..: name the directory itself" in said
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inner"]


def test_a_tree_replaced_by_one_without_write_permission(
    banger: Banger, vm: str, tree: str, tmp_path: Path
) -> None:
    """As an ordinary user such a tree must still be movable, and removable after a failure."""
    banger.guest(vm, "cd /root/tree; mkdir -p a/b; echo x > a/b/c; chmod 500 a/b; chmod 000 a")
    banger.ok("vm", "cp", tree, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out/a").stat().st_mode) == 0
    (tmp_path / "out/a").chmod(0o700)
    assert (tmp_path / "out/a/b/c").read_text() == "x\n"
