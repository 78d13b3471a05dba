"""Images from files of this machine, on real guests: copied, registered, promoted."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
from pathlib import Path

import pytest

from ext4_trees import tree_of
from homes import Home
from oci_layouts import Member, everything, tar
from product import IMAGE, Banger, finish, until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("archives") / "small.tar.gz"
    file.write_bytes(gzip.compress(everything()))
    return file


def _rootfs(banger: Banger, name: str) -> Path:
    return Path(banger.json("image", "show", name)["rootfs_path"])


def _left(home: Home) -> list[str]:
    known = {each["id"] for each in home.banger.json("image", "list")}
    return [each.name for each in (home.data / "images").iterdir() if each.name not in known]


def test_all_that_an_archive_holds_is_in_the_image(home: Home, file: Path) -> None:
    assert home.banger.ok("image", "import", file).startswith("small (")
    found = tree_of(_rootfs(home.banger, "small"))
    assert found["/far"]["owner"] == [200_000, 4_000_000_000]
    assert found["/home/ann/setuid"]["mode"] == oct(0o106711)
    assert found["/home/ann/setuid"]["xattrs"] == {"user.binary": "ff003d"}
    assert found["/home/ann/same"]["same_as"] == found["/home/ann/setuid"]["same_as"]
    assert found["/bin/busybox"]["xattrs"] == {
        "security.capability": "0100000200040000000000000000000000000000"
    }
    assert found["/dev/null"]["device"] == [1, 3]
    assert found["/dev/null"]["mode"] == oct(0o020666)
    assert found["/dev/disk"]["device"] == [254, 70_000]
    assert found["/pipe"]["mode"] == oct(0o010620)
    assert '/caf\\xe9 "quoted"' in found
    seed = tree_of(Path(home.banger.json("image", "show", "small")["work_seed_path"]))
    assert seed[""]["mode"] == oct(0o040750)
    assert list(seed) == ["", "/kept"]


def test_it_runs(home: Home, file: Path) -> None:
    home.banger.ok("image", "import", "-q", file)
    command = "cat /root/kept; id -u; stat -c %a /home/ann/setuid"
    done = home.banger.run("vm", "run", "-q", "--rm", "--image", "small", "--", "sh", "-c", command)
    assert (done.returncode, done.stdout) == (0, b"at home0\n6711\n"), done.stderr


def test_a_file_system_is_copied(home: Home, tmp_path: Path) -> None:
    banger = home.banger
    source = _rootfs(banger, IMAGE)
    copy = tmp_path / "Debian.ext4"
    subprocess.run(["cp", "--sparse=always", source, copy], check=True)
    assert banger.ok("image", "import", copy).startswith("debian (")
    made = _rootfs(banger, "debian")
    copy.unlink()
    assert ".profile" in banger.ok("vm", "run", "-q", "--rm", "--image", "debian", "--", "ls", "-A")
    assert made.stat().st_blocks * 512 < 1 << 30
    assert banger.ok("vm", "run", "-q", "--rm", "--image", "debian", "--", "cat", "/etc/os-release")


def test_used_where_it_lies_and_then_made_its_own(home: Home, tmp_path: Path) -> None:
    banger = home.banger
    mine = tmp_path / "mine.ext4"
    subprocess.run(["cp", "--sparse=always", _rootfs(banger, IMAGE), mine], check=True)
    before = mine.stat()
    banger.ok("image", "register", mine)
    assert _rootfs(banger, "mine") == mine
    banger.ok("vm", "create", "-q", "--image", "mine", "--name", "box")
    assert "uid=0" in banger.guest("box", "id; touch /changed; sync")
    assert mine.stat().st_mtime_ns == before.st_mtime_ns
    said = banger.fails("image", "promote", "mine", status=1)
    assert 'image "mine" is used by box' in said
    banger.ok("vm", "delete", "--force", "box")
    banger.ok("image", "promote", "mine")
    own = _rootfs(banger, "mine")
    assert own.is_relative_to(home.data)
    mine.unlink()
    assert banger.ok("vm", "run", "-q", "--rm", "--image", "mine", "--", "true") == ""
    said = banger.fails("image", "promote", "mine", status=1)
    assert "is banger's own already" in said
    banger.ok("image", "delete", "mine")
    assert _left(home) == []


def test_what_is_registered_must_not_change(home: Home, tmp_path: Path) -> None:
    banger = home.banger
    mine = tmp_path / "mine.ext4"
    subprocess.run(["cp", "--sparse=always", _rootfs(banger, IMAGE), mine], check=True)
    banger.ok("image", "register", mine)
    banger.ok("vm", "create", "-q", "--no-start", "--image", "mine", "--name", "box")
    os.utime(mine)
    said = banger.fails("vm", "start", "box", status=1)
    assert f"{mine} has changed since it was registered" in said
    assert "register it anew" in said
    mine.unlink()
    assert "No such file" in banger.fails("vm", "start", "box", status=1)
    banger.ok("vm", "delete", "box")
    banger.ok("image", "delete", "mine")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is cut off, or no archive"),
        (b"just some text\n" * 100, "or no tar archive"),
        (b"QFI\xfb" + bytes(2000), "is a qcow2 disk"),
        (bytes(510) + b"\x55\xaa" + bytes(2000), "is a disk with partitions"),
        (b"hsqs" + bytes(2000), "is a squashfs"),
        (everything()[:-20_000], "it is cut off"),
        (gzip.compress(everything())[:-1000], "it is cut off"),
        (tar(Member("../../escaped")), "leads out of the image"),
        (bytes(1080) + b"\x53\xef" + bytes(3000), "superblock is damaged"),
        # Compressed data may have any bytes where a file system has its mark.
        (b"\x1f\x8b".ljust(1080, b"\0") + b"\x53\xef" + bytes(3000), "it is damaged"),
    ],
)
def test_what_cannot_be_one_is_refused_and_leaves_nothing(
    home: Home, tmp_path: Path, content: bytes, why: str
) -> None:
    bad = tmp_path / "bad.img"
    bad.write_bytes(content)
    assert why in home.banger.fails("image", "import", bad, status=1)
    assert [each["name"] for each in home.banger.json("image", "list")] == [IMAGE]
    assert _left(home) == []


def test_usage(home: Home, file: Path, tmp_path: Path) -> None:
    banger = home.banger
    assert "is a directory" in banger.fails("image", "import", "--name", "x", tmp_path, status=1)
    assert "oci:" in banger.fails("image", "import", "--name", "x", tmp_path, status=1)
    banger.fails("image", "import", tmp_path / "not-there", status=2)
    odd = tmp_path / "Größe!.tar"
    odd.write_bytes(file.read_bytes())
    assert "give one with --name" in banger.fails("image", "import", odd, status=2)
    assert "already exists" in banger.fails("image", "import", "--name", IMAGE, file, status=1)
    said = banger.fails("image", "import", "--name", "x", "--kernel", "none", file, status=1)
    assert 'kernel "none" not found' in said
    said = banger.fails("image", "register", "--name", "x", file, status=1)
    assert "only that can be used where it lies" in said
    said = banger.fails("image", "promote", IMAGE, status=1)
    assert "is banger's own already" in said


def test_a_limit_on_what_it_may_hold(home: Home, file: Path) -> None:
    home.configure('image_size_limit = "1M"')
    home.banger.run("daemon", "stop")
    said = home.banger.fails("image", "import", file, status=1)
    assert "image_size_limit" in said or "larger together than an image may be" in said
    assert _left(home) == []


@pytest.mark.parametrize(
    ("point", "source"),
    [("image.import:unpack", "tar"), ("image.import:filesystem", "tar"),
     ("image.import:finish", "tar"), ("image.import:copy", "ext4"),
     ("image.register:filesystem", "ext4"), ("image.register:finish", "ext4")],
)  # fmt: skip
def test_the_daemon_is_killed_in_each_stage(
    home: Home, file: Path, tmp_path: Path, point: str, source: str
) -> None:
    given = file
    if source == "ext4":
        given = tmp_path / "small.ext4"
        subprocess.run(["cp", "--sparse=always", _rootfs(home.banger, IMAGE), given], check=True)
    verb = point.partition(":")[0].partition(".")[2]
    home.banger.run("daemon", "stop")
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@{point}"})
    faulty.run("image", verb, "--name", "new", given)
    home.await_end_of_processes()
    assert [each["name"] for each in home.banger.json("image", "list")] == [IMAGE]
    assert _left(home) == []
    assert home.banger.ok("image", verb, "--name", "new", given).startswith("new (")


def test_the_daemon_is_killed_while_it_makes_a_registered_image_its_own(
    home: Home, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.ext4"
    subprocess.run(["cp", "--sparse=always", _rootfs(home.banger, IMAGE), mine], check=True)
    home.banger.ok("image", "register", mine)
    home.banger.run("daemon", "stop")
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": "SIGKILL@image.promote:copy"})
    faulty.run("image", "promote", "mine")
    home.await_end_of_processes()
    shown = home.banger.json("image", "show", "mine")
    assert shown["rootfs_path"] == str(mine)
    assert {each.name for each in Path(shown["artifact_dir"]).iterdir()} == {
        "image.json", "work-seed.ext4"}  # fmt: skip
    home.banger.ok("image", "promote", "mine")


def test_what_was_saved_of_a_registered_image_goes_when_it_moves(
    home: Home, tmp_path: Path
) -> None:
    """A template lies over the file where it was."""
    banger, mine = home.banger, tmp_path / "mine.ext4"
    subprocess.run(["cp", "--sparse=always", _rootfs(banger, IMAGE), mine], check=True)
    banger.ok("image", "register", mine)
    run = ("vm", "run", "-q", "--rm", "--image", "mine", "--", "true")
    banger.ok(*run)
    (template,) = banger.json("template", "list")
    banger.ok("image", "promote", "mine")
    assert banger.json("template", "list") == []
    mine.unlink()
    banger.ok(*run)
    (anew,) = banger.json("template", "list")
    assert anew["id"] != template["id"]


def test_a_file_that_changes_while_it_is_copied_is_noticed(home: Home, tmp_path: Path) -> None:
    banger, mine = home.banger, tmp_path / "mine.ext4"
    subprocess.run(["cp", "--sparse=always", _rootfs(banger, IMAGE), mine], check=True)
    banger.ok("image", "register", mine)
    banger.ok("daemon", "stop")
    stopping = Banger(banger.environment | {"BANGER_FAULT": "SIGSTOP@image.promote:copy"})
    promoting = stopping.start("image", "promote", "mine")
    daemon = until(home.stopped_daemon, "the daemon stops before the copy")
    os.utime(mine)
    os.kill(daemon, signal.SIGCONT)
    status, _, said = finish(promoting)
    assert status == 1
    assert f"{mine} has changed since it was registered".encode() in said
    shown = banger.json("image", "show", "mine")
    assert shown["rootfs_path"] == str(mine)
    assert {each.name for each in Path(shown["artifact_dir"]).iterdir()} == {
        "image.json", "work-seed.ext4"}  # fmt: skip


@pytest.mark.parametrize("stage", ["rename", "record", "files"])
def test_the_daemon_is_killed_while_it_deletes(home: Home, file: Path, stage: str) -> None:
    """It is there, whole, or gone; never listed without its files."""
    home.banger.ok("image", "import", "-q", "--name", "going", file)
    home.banger.run("daemon", "stop")
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@image.delete:{stage}"})
    assert faulty.run("image", "delete", "going").returncode == 1
    home.await_end_of_processes()
    there = [each["name"] for each in home.banger.json("image", "list")]
    assert there == ([IMAGE, "going"] if stage == "rename" else [IMAGE])
    if stage == "rename":
        assert tree_of(_rootfs(home.banger, "going"))
        home.banger.ok("image", "delete", "going")
    assert _left(home) == []
