"""Real builds, by root and by an ordinary user, finished, cancelled and killed.

Packages come from Debian's mirrors. What a build makes is looked at without mounting it.
"""

from __future__ import annotations

import getpass
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import leftovers
from banger.images.ext4 import check_ext4
from banger.images.initramfs import build_initramfs
from banger.images.kernel import check_vmlinux

_BUILDER = Path(__file__).with_name("image_builder.py")
_MINIMAL = "debian-bookworm-minimal"
_DEATH_S = 20


@dataclass(frozen=True)
class Place:
    """A user, and a directory of that user's to build in."""

    user: str
    directory: Path

    def start(self, name: str, dest: Path, **environment: str) -> subprocess.Popen[str]:
        """Run the builder; `dest` is made first, as the daemon does with a staging directory."""
        if name != "remove":
            dest.mkdir(mode=0o700)
            shutil.chown(dest, self.user)
        return subprocess.Popen(
            [sys.executable, _BUILDER, name, dest, self.user],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )

    def build(self, name: str, dest: Path, **environment: str) -> list[dict[str, Any]]:
        """Everything the builder said; the last line is the result or the error."""
        with self.start(name, dest, **environment) as process:
            assert process.stdout is not None
            return [json.loads(line) for line in process.stdout]


def _ordinary_user(stack: ExitStack) -> Place:
    if os.geteuid() != 0:
        user = getpass.getuser()
    else:
        user = f"bt-{secrets.token_hex(4)}"
        # Gives the user ranges in /etc/subuid and /etc/subgid, too (login.defs).
        subprocess.run(["useradd", "--create-home", user], check=True)
        stack.callback(subprocess.run, ["userdel", "--remove", user], check=True)
    directory = Path(pwd.getpwnam(user).pw_dir) / f"bt-{secrets.token_hex(4)}"
    directory.mkdir(mode=0o700)
    shutil.chown(directory, user)
    return Place(user, directory)


@pytest.fixture(scope="module", params=["root", "user"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    with ExitStack() as stack:
        if request.param == "user":
            place = _ordinary_user(stack)
        elif os.geteuid() == 0:
            place = Place("root", tmp_path_factory.mktemp("root"))
        else:
            pytest.skip("run the tests as root to see builds by root, too")
        yield place
        for line in place.build("remove", place.directory):
            pytest.fail(f"cannot clean up: {line}")


@dataclass(frozen=True)
class Built:
    directory: Path
    said: list[dict[str, Any]]


@pytest.fixture(scope="module")
def image(place: Place) -> Built:
    dest = place.directory / "image"
    return Built(dest, place.build(_MINIMAL, dest))


@pytest.fixture(scope="module")
def listings() -> dict[str, dict[str, tuple[str, ...]]]:
    """What the images of this run hold, by user: compared when both are there."""
    return {}


def _names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def _debugfs(image: Path, requests: str) -> str:
    """debugfs as a reader; it needs no privilege, and shows what is really on the disk."""
    done = subprocess.run(
        ["debugfs", "-f", "-", image], input=requests, capture_output=True, text=True, check=True
    )
    return done.stdout


def _listing(image: Path) -> dict[str, tuple[str, ...]]:
    """Path to (mode in octal, uid, gid, size) of everything in an ext4."""
    found: dict[str, tuple[str, ...]] = {}
    directories = deque(["/"])
    while directories:
        batch = [directories.popleft() for _ in range(len(directories))]
        output = _debugfs(image, "".join(f'ls -p "{each}"\n' for each in batch))
        current = ""
        for line in output.splitlines():
            if line.startswith("debugfs: ls"):
                current = line.split('"')[1].rstrip("/")
            elif line.startswith("/"):
                _, _, mode, uid, gid, name, size, _ = line.split("/")
                if name not in {".", "..", ""}:  # lost+found has free entries without a name
                    found[f"{current}/{name}"] = (mode, uid, gid, size)
                    if mode.startswith("04"):
                        directories.append(f"{current}/{name}")
    return found


def test_a_build_says_where_it_stands_and_leaves_only_the_image(image: Built) -> None:
    *steps, result = image.said
    stages = [step["stage"] for step in steps]
    assert list(dict.fromkeys(stages)) == ["download", "install", "filesystem"]
    assert {"download", "install"} <= {s["stage"] for s in steps if s["percent"] > 90}
    assert any("of 1" in s["detail"] and "packages" in s["detail"] for s in steps)
    assert {each.partition("=")[0] for each in result["packages"]} > {"iproute2", "procps", "apt"}
    assert _names(image.directory) == ["rootfs.ext4", "work-seed.ext4"]


def test_the_file_systems_are_sound_sparse_and_of_the_expected_shape(image: Built) -> None:
    for name, label, size_mib in (
        ("rootfs.ext4", "banger-root", 8192),
        ("work-seed.ext4", "banger-work", 256),
    ):
        path = image.directory / name
        check_ext4(path)
        subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
        assert path.stat().st_size == size_mib << 20
        assert path.stat().st_blocks * 512 < path.stat().st_size // 4
        assert f"Filesystem volume name:   {label}\n" in _debugfs(path, "stats -h\n")


def test_owners_and_modes_are_debians_whoever_builds(
    place: Place, image: Built, listings: dict[str, dict[str, tuple[str, ...]]]
) -> None:
    listing = listings[place.user] = _listing(image.directory / "rootfs.ext4")
    for path, expected in {
        "/usr/bin/passwd": ("104755", "0", "0"),
        "/usr/bin/chage": ("102755", "0", "42"),
        "/etc/shadow": ("100640", "0", "42"),
        "/tmp": ("041777", "0", "0"),
        "/var/mail": ("042775", "0", "8"),
        "/root": ("040700", "0", "0"),
    }.items():
        assert listing[path][:3] == expected, path
    if len(listings) == 2:
        one, other = listings.values()
        assert {p: v for p, v in one.items() if other.get(p) != v} == {}
        assert other.keys() == one.keys()


def test_the_image_has_no_identity_and_no_rubbish(image: Built) -> None:
    rootfs = image.directory / "rootfs.ext4"
    listing = _listing(rootfs)
    assert listing["/etc/machine-id"][3] == "0"
    assert listing["/etc/resolv.conf"][0] == "100644"
    assert "banger" in _debugfs(rootfs, "cat /etc/hostname\n")
    empty = ("/dev/", "/tmp/", "/run/", "/var/cache/apt/", "/var/lib/apt/lists/", "/lib/modules/")
    assert [path for path in listing if path.startswith(empty)] == []
    assert [p for p, v in listing.items() if p.startswith("/var/log/") and v[3] not in "0"] == []


def test_the_work_seed_is_roots_home_ready_to_grow(image: Built) -> None:
    seed = image.directory / "work-seed.ext4"
    assert {"/.bashrc", "/.profile", "/lost+found"} == set(_listing(seed))
    assert "Mode:  0700" in _debugfs(seed, "stat <2>\n")
    stats = _debugfs(seed, "stats -h\n")
    assert "Reserved GDT blocks:      127\n" in stats


def test_a_kernel_brings_all_that_a_boot_needs(place: Place, tmp_path: Path) -> None:
    dest = place.directory / "kernel"
    result = place.build("kernel", dest)[-1]
    assert _names(dest) == ["boot-modules", "config", "modules.ext4", "vmlinux"]
    check_vmlinux(dest / "vmlinux")
    check_ext4(dest / "modules.ext4")
    names = {each[3:-3] for each in result["modules"]}
    assert names > {"virtio_blk", "virtio_net", "virtio_mmio", "virtio_pci", "virtio_console"}
    assert "CONFIG_PVH=y" in (dest / "config").read_text()
    top = f"/{result['version']}"
    listing = _listing(dest / "modules.ext4")
    assert {f"{top}/modules.dep.bin", f"{top}/kernel/fs/overlayfs/overlay.ko"} < listing.keys()
    assert {value[1:3] for value in listing.values()} == {("0", "0")}
    build_initramfs(tmp_path / "i.cpio", agent=Path("/bin/true"), modules=dest / "boot-modules")
    assert (tmp_path / "i.cpio").stat().st_size > 500_000


def _descendants(pid: int) -> list[int]:
    """The processes below `pid`, in whatever pid namespace."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended while we looked
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def test_a_contained_process_dies_with_the_one_that_started_it(place: Place) -> None:
    """Also one that never writes to the pipes that its parent's death has closed."""
    dest = place.directory / "waiting"
    with place.start("wait", dest) as process, ExitStack() as stack:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["stage"] == "wait"
        living = {pid: os.pidfd_open(pid) for pid in _descendants(process.pid)}
        for descriptor in living.values():
            stack.callback(os.close, descriptor)
        assert len(living) == 3  # unshare, sh, sleep
        process.kill()
        for pid, descriptor in living.items():
            assert select.select([descriptor], [], [], 5)[0], f"process {pid} lives on"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=["cancelled", "killed"])
def test_an_interrupted_build_leaves_no_process_and_no_mount(
    place: Place, sign: signal.Signals
) -> None:
    dest = place.directory / f"interrupted-{sign.name}"
    with place.start(_MINIMAL, dest) as process, ExitStack() as stack:
        assert process.stdout is not None
        for line in process.stdout:
            step = json.loads(line)
            assert "error" not in step
            if step["detail"].startswith("2 packages"):
                break
        living = {pid: os.pidfd_open(pid) for pid in _descendants(process.pid)}
        for descriptor in living.values():
            stack.callback(os.close, descriptor)
        assert len(living) >= 4  # unshare, mmdebstrap, apt, dpkg
        process.send_signal(sign)
        rest = process.stdout.read()
        process.wait()
        for pid, descriptor in living.items():
            assert select.select([descriptor], [], [], _DEATH_S)[0], f"process {pid} lives on"
    assert leftovers.processes_of(dest) == []
    assert list(leftovers.mounts_and_loops_of(dest)) == []
    if sign is signal.SIGTERM:
        assert json.loads(rest.splitlines()[-1]) == {"error": "cancelled"}
        assert _names(dest) == []
    else:
        assert _names(dest) == ["scratch"]  # what the next start of the daemon removes
        assert place.build("remove", dest) == []
        assert not dest.exists()


def test_an_unreachable_mirror_is_said_with_what_to_do(place: Place) -> None:
    dest = place.directory / "unreachable"
    error = place.build(_MINIMAL, dest, http_proxy="http://127.0.0.1:9")[-1]
    assert error["error"] == "unavailable"
    assert "mirror cannot be reached" in error["message"]
    assert "http_proxy" in error["hint"]
    assert _names(dest) == []
