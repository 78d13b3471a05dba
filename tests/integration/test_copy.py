"""`vm cp`: what a tree is on one side it is on the other."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from product import Banger, finish, until

pytestmark = pytest.mark.guest

MIB = 1 << 20

#: A moment with a fraction of a second: GNU tar's own format keeps whole seconds only.
_MTIME_NS = 1_000_000_000 * 10**9


def make_tree(root: Path) -> None:
    """A tree with everything that a user's own file system may hold."""
    root.mkdir()
    names = [
        b"plain", b" leading and trailing ", b"new\nline", b"-rf", b"--", b"*?[x]", b"quote'\"",
        b"caf\xc3\xa9", b"\xff\xfe not utf-8", b"x" * 255, b"back\\slash", b"a:b", b"$HOME",
    ]  # fmt: skip
    for name in names:
        (root / os.fsdecode(name)).write_bytes(b"content of " + name)
    (root / "empty").touch()
    (root / "empty-directory").mkdir()
    deep = root
    for _ in range(60):
        deep /= "deeper-and-deeper"
        deep.mkdir()
    (deep / "bottom").write_text("bottom")
    (root / "relative").symlink_to("plain")
    (root / "absolute").symlink_to("/etc/hostname")
    (root / "dangling").symlink_to("no/where")
    (root / "to-directory").symlink_to("empty-directory")
    (root / "hard").hardlink_to(root / "plain")
    with (root / "sparse").open("wb") as file:
        file.seek(300 * MIB)
        file.write(b"end")
        file.seek(100 * MIB)
        file.write(b"middle")
    for text, mode in (("executable", 0o755), ("private", 0o600), ("read-only", 0o444)):
        (root / text).write_text(text)
        (root / text).chmod(mode)
    (root / "closed").mkdir()
    (root / "closed/inside").write_text("x")
    (root / "closed").chmod(0o555)
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(_MTIME_NS, _MTIME_NS), follow_symlinks=False)


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Path to kind, mode, time and content of everything in a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        info = path.lstat()
        if path.is_symlink():
            content: object = str(path.readlink())
        elif path.is_dir():
            content = None
        elif info.st_size > MIB:
            content = info.st_size
        else:
            content = path.read_bytes()
        mode = info.st_mode & ~0o7000  # set-id and sticky bits do not come out of a guest
        name = os.fsencode(path.relative_to(root)).decode("latin-1")
        found[name] = (mode, info.st_mtime, info.st_nlink if path.is_file() else 0, content)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    make_tree(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def place(banger: Banger, vm: str) -> Iterator[str]:
    """A directory in the guest that is removed afterwards."""
    banger.guest(vm, "mkdir -p /root/place")
    yield f"{vm}:/root/place"
    banger.guest(vm, "rm -rf /root/place")


def test_a_tree_comes_back_as_it_was(
    banger: Banger, vm: str, place: str, tree: Path, tmp_path: Path
) -> None:
    banger.ok("vm", "cp", tree, place)
    look = (
        "cd /root/place/tree; stat -c '%U %a' executable closed; stat -c %h plain;"
        " readlink absolute; du -k sparse | cut -f1"
    )
    seen = banger.guest(vm, look)
    *facts, sparse_kib = seen.split()
    assert facts == ["root", "755", "root", "555", "2", "/etc/hostname"]
    assert int(sparse_kib) < 1024, "sparse in the guest, too"
    banger.ok("vm", "cp", f"{place}/tree", tmp_path / "back")
    assert describe(tmp_path / "back") == describe(tree)
    sparse = tmp_path / "back/sparse"
    assert sparse.stat().st_blocks * 512 < MIB
    assert sparse.stat().st_size == 300 * MIB + 3
    with sparse.open("rb") as file:
        file.seek(100 * MIB)
        assert file.read(8) == b"middle\0\0"
        file.seek(300 * MIB)
        assert file.read() == b"end"
    assert (tmp_path / "back/hard").samefile(tmp_path / "back/plain")


def test_the_destination_is_chosen_as_cp_r_does(
    banger: Banger, vm: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/file").write_text("1")
    one = tmp_path / "one"
    banger.ok("vm", "cp", one, f"{place}/new")  # not there: its new name
    banger.ok("vm", "cp", one, place)  # a directory: into it
    banger.ok("vm", "cp", one, f"{place}/")
    banger.ok("vm", "cp", one / "file", f"{place}/renamed")
    banger.ok("vm", "cp", one / "file", f"{vm}:place/relative")  # from root's home
    listing = "cd /root/place; find . -type f | sort"
    expected = "./new/file\n./one/file\n./relative\n./renamed\n"
    assert banger.guest(vm, listing) == expected
    banger.guest(vm, "echo 2 > /root/place/one/second")

    banger.ok("vm", "cp", f"{place}/one", tmp_path)  # into a directory, joined with what is there
    assert (tmp_path / "one/second").read_text() == "2\n"
    assert (tmp_path / "one/file").read_text() == "1"
    banger.ok("vm", "cp", f"{place}/one/file", tmp_path / "renamed")
    assert (tmp_path / "renamed").read_text() == "1"
    banger.ok("vm", "cp", f"{place}/one", tmp_path / "two")
    assert sorted(entry.name for entry in (tmp_path / "two").iterdir()) == ["file", "second"]


def test_a_tar_stream_goes_either_way(banger: Banger, vm: str, place: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in (("top/a", b"A"), ("other", b"O")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    banger.ok("vm", "cp", "-", place, stdin=buffer.getvalue())
    assert banger.guest(vm, "cd /root/place; find . -type f | sort") == "./other\n./top/a\n"
    done = banger.run("vm", "cp", f"{place}/top", "-")
    assert done.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert archive.getnames() == ["top", "top/a"]
        member_file = archive.extractfile("top/a")
        assert member_file is not None
        assert member_file.read() == b"A"


def test_a_copy_between_links_copies_the_link(
    banger: Banger, vm: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    banger.ok("vm", "cp", tmp_path / "link", f"{place}/l")
    assert banger.guest(vm, "readlink /root/place/l") == "/etc/passwd\n"
    banger.ok("vm", "cp", f"{place}/l", tmp_path / "back")
    assert (tmp_path / "back").readlink() == Path("/etc/passwd")


def test_a_directory_that_is_there_keeps_its_mode(
    banger: Banger, vm: str, place: str, tmp_path: Path
) -> None:
    banger.guest(vm, "mkdir -p /root/place/new; chmod 777 /root/place /root/place/new")
    (tmp_path / "place").mkdir(mode=0o700)
    banger.ok("vm", "cp", place, tmp_path)
    assert (tmp_path / "place").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "place/new").stat().st_mode & 0o777 == 0o777


#: VM stands for the name of the VM. Wrong use has status 2.
@pytest.mark.parametrize(
    ("source", "destination", "status", "message"),
    [
        ("no-such-file", "VM:/root/x", 1, "no-such-file does not exist"),
        ("VM:/no/such", ".", 1, "VM:/no/such does not exist in the guest"),
        ("here", "VM:/no/such/dir/x", 1, "VM:/no/such/dir is not a directory in the guest"),
        ("here", "VM:/etc/hostname/", 1, "VM:/etc/hostname/ is not a directory in the guest"),
        ("folder", "VM:/etc/hostname", 1, "VM:/etc/hostname is there and is not a directory"),
        ("VM:/etc/hostname", "no/such/dir/x", 1, "no/such/dir is not a directory"),
        ("VM:/etc", "here", 1, "here is there and is not a directory"),
        ("VM:", "x", 2, "names no path in the guest"),
        ("here", "there", 2, "one side must be NAME:PATH"),
        ("VM:/a", "VM:/b", 2, "one side must be NAME:PATH"),
        ("-", "-", 2, "one side must be NAME:PATH"),
        ("no-such-vm:/a", "x", 1, 'vm "no-such-vm" not found'),
        ("/", "VM:/root", 2, "the root directory cannot be copied"),
    ],
)
def test_what_cannot_be_copied_is_said(
    banger: Banger,
    vm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    destination: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").write_text("x")
    Path("folder").mkdir()
    words = [word.replace("VM:", f"{vm}:") for word in (source, destination)]
    said = banger.fails("vm", "cp", *words, status=status)
    assert message.replace("VM:", f"{vm}:") in said
    assert sorted(map(str, Path().iterdir())) == ["folder", "here"]


def test_a_host_path_with_a_colon_is_written_with_a_slash(
    banger: Banger, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").write_text("colon")
    banger.ok("vm", "cp", "./a:b", place)
    banger.ok("vm", "cp", f"{place}/a:b", "./c:d")
    assert Path("c:d").read_text() == "colon"


def test_a_large_file_comes_back_identical(banger: Banger, place: str, tmp_path: Path) -> None:
    data = os.urandom(30 * MIB)
    (tmp_path / "large").write_bytes(data)
    banger.ok("vm", "cp", tmp_path / "large", place)
    banger.ok("vm", "cp", f"{place}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupted_copy_out_leaves_nothing(
    banger: Banger, vm: str, place: str, tmp_path: Path, number: signal.Signals
) -> None:
    banger.guest(vm, "mkfifo /root/place/p; head -c 50000000 /dev/zero > /root/place/f")
    destination = tmp_path / "destination"
    destination.mkdir()
    process = banger.start("vm", "cp", place, destination)
    until(lambda: list(destination.glob(".banger-cp-*/tree/place/*")), "the copy is on its way")
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number
    assert b"Traceback" not in err
    assert list(destination.iterdir()) == []
    assert leftovers.processes_of(destination) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupted_copy_in_leaves_no_process(
    banger: Banger, vm: str, place: str, tmp_path: Path, number: signal.Signals
) -> None:
    with (tmp_path / "endless").open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(MIB))
    process = banger.start("vm", "cp", tmp_path / "endless", place)
    until(lambda: banger.guest(vm, "ls -A /root/place") != "", "the copy is on its way")
    process.send_signal(number)
    assert finish(process)[0] == 128 + number
    assert leftovers.processes_of(tmp_path) == []
    assert banger.guest(vm, "echo alive") == "alive\n"


def test_a_destination_without_room_is_an_error(banger: Banger, vm: str, tmp_path: Path) -> None:
    banger.guest(vm, "mkdir -p /mnt/small; mount -t tmpfs -o size=1m none /mnt/small")
    (tmp_path / "two").write_bytes(os.urandom(2 * MIB))
    said = banger.fails("vm", "cp", tmp_path / "two", f"{vm}:/mnt/small", status=1)
    assert "No space left on device" in said
    banger.guest(vm, "umount /mnt/small")


def test_the_reader_of_a_tar_stream_may_go(banger: Banger, vm: str) -> None:
    process = banger.start("vm", "cp", f"{vm}:/usr", "-")
    with subprocess.Popen(
        ["head", "-c", "1000"], stdin=process.stdout, stdout=subprocess.DEVNULL
    ) as reader:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        reader.wait(timeout=60)
    status, _, err = finish(process)
    assert (status, err) == (141, b"")
