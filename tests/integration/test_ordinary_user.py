"""The whole way as an ordinary user made for it: build, run, look, and nothing is left.

As an ordinary user all other tests are that test; this one is for when they run as root.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import banger as package
import suite
from ext4_trees import tree_of
from oci_layouts import Layout, Member, everything, tar
from product import IMAGE, Banger

pytestmark = [
    pytest.mark.guest,
    suite.names_its_drivers,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root to make another user"),
]


@dataclass(frozen=True)
class OtherUser(Banger):
    """The command as another user has it: nothing of this process's environment."""

    user: pwd.struct_passwd = field(kw_only=True)
    python: Path = field(kw_only=True)

    def argv(self, *words: str | Path) -> list[str]:
        identity = ["--reuid", self.user.pw_name, "--regid", str(self.user.pw_gid)]
        home = Path(self.user.pw_dir)
        environment = [
            f"HOME={home}",
            "PATH=/usr/local/bin:/usr/bin:/bin",
            f"PYTHONPATH={home / 'lib'}",
            f"LD_LIBRARY_PATH={home / 'python/lib'}",
        ]
        proxies = [
            f"{name}={value}" for name, value in os.environ.items() if "proxy" in name.lower()
        ]
        return ["setpriv", *identity, "--init-groups", "env", "-i", "-C", str(home), *environment,
                *proxies, str(self.python), "-m", "banger.cli.entry", *map(str, words)]  # fmt: skip

    def processes(self) -> list[int]:
        """The user's processes."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == self.user.pw_uid:
                    found.append(int(entry.name))
        return found

    @property
    def runtime(self) -> Path:
        """Where the daemon's socket is when there is no XDG_RUNTIME_DIR."""
        return Path(f"/tmp/banger-runtime-{self.user.pw_uid}")


def _copy_interpreter(home: Path) -> Path:
    """This interpreter where the user can reach it: it may lie below root's own home."""
    base = Path(sys.base_prefix)
    version = f"python3.{sys.version_info.minor}"
    ignore = shutil.ignore_patterns("test", "site-packages", "dist-packages", "__pycache__",
                                    "config-*", "idlelib", "ensurepip")  # fmt: skip
    shutil.copytree(base / "lib" / version, home / "python/lib" / version, ignore=ignore)
    for library in (base / "lib").glob("libpython3*.so*"):
        shutil.copy(library, home / "python/lib")
    (home / "python/bin").mkdir()
    return Path(shutil.copy(base / "bin" / version, home / "python/bin"))


@pytest.fixture(scope="module")
def user() -> Iterator[OtherUser]:
    """A new user with a copy of banger; removed at the end, after a look at what it left."""
    name = f"bt-{secrets.token_hex(4)}"
    subprocess.run(["useradd", "--create-home", name], check=True)
    entry = pwd.getpwnam(name)
    home = Path(entry.pw_dir)
    other = OtherUser(user=entry, python=_copy_interpreter(home))
    site = Path(sysconfig.get_path("purelib"))
    # The compiler is for building the agent, which is built.
    shutil.copytree(site, home / "lib", ignore=shutil.ignore_patterns("ziglang*", "__pycache__"))
    source = Path(package.__file__).parent
    shutil.rmtree(home / "lib/banger", ignore_errors=True)
    shutil.copytree(source, home / "lib/banger", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["chown", "-R", f"{name}:", home], check=True)
    try:
        yield other
        other.ok("daemon", "stop")
        left = [pid for pid in other.processes() if not _ends(pid)]
        assert left == []
        assert list((home / ".local/state/banger/vms").glob("*")) == []
        assert sorted(path.name for path in (other.runtime / "vms").glob("*")) == []
    finally:
        for pid in other.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
            _ends(pid)
        shutil.rmtree(other.runtime, ignore_errors=True)
        subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


def _ends(pid: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10)[0])
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def built(user: OtherUser) -> OtherUser:
    """The user, who has built the small image."""
    done = user.run("image", "build", IMAGE, timeout_s=400)
    assert done.returncode == 0, done.stderr
    return user


def test_the_doctor_finds_nothing_missing(user: OtherUser) -> None:
    done = user.run("doctor")
    assert done.returncode == 0, done.stdout
    assert b"fail" not in done.stdout


def test_a_user_builds_runs_and_is_root_only_in_the_guest(built: OtherUser) -> None:
    answer = built.ok("vm", "run", "--rm", "-q", "--image", IMAGE, "--", "id")
    assert answer == "uid=0(root) gid=0(root) groups=0(root)\n"
    owners = {path.lstat().st_uid for path in Path(built.user.pw_dir, ".local").rglob("*")}
    assert owners == {built.user.pw_uid}


def test_the_network_and_copies_work_without_privileges(built: OtherUser, tmp_path: Path) -> None:
    home = Path(built.user.pw_dir)
    built.ok("vm", "run", "-d", "-q", "--image", IMAGE, "--name", "mine")
    try:
        assert "172.16.0.2" in built.guest("mine", "ip -4 addr show eth0")
        script = "mkdir t; cp /bin/true t; chmod 4755 t/true; chown 1:1 t/true; chmod 500 t"
        built.guest("mine", script)
        built.ok("vm", "cp", "mine:/root/t", "out")
        info = (home / "out/true").stat()
        assert (info.st_uid, info.st_mode & 0o7777) == (built.user.pw_uid, 0o755)
        built.ok("vm", "cp", "out", "mine:/tmp")
        assert built.guest("mine", "stat -c '%u %a' /tmp/out/true") == "0 755\n"
    finally:
        built.ok("vm", "delete", "--force", "mine")


#: What an ordinary user's host has to be helped with: other owners' directories, device nodes, and
#: capabilities (by the system calls of x86-64: the image has no tool for them).
_SETUP = r"""#!/bin/sh
set -e
useradd --uid 4242 worker
for place in /var/log /var/tmp /opt; do
    mkdir -m 700 $place/worker
    echo said >$place/worker/file
    chown -R worker $place/worker
done
mknod -m 620 /opt/node c 1 3
cp /bin/true /opt/able
perl -e '($file, $name, $value) = (@ARGV, pack("V5", 0x02000001, 0x2000, 0, 0, 0));
    syscall(188, $file, $name, $value, 20, 0) and die $!' /opt/able security.capability
"""
_LOOK = r"""
cd /opt
stat -c '%n %a %u' worker worker/file
stat -c '%n %F %a %t %T' node
ls /var/log/worker /var/tmp
perl -e '($file, $name, $value) = (@ARGV, "\0" x 30);
    $size = syscall(191, $file, $name, $value, 30);
    print unpack("H*", substr($value, 0, $size)), "\n"' able security.capability
"""


def test_a_user_makes_an_image_of_his_own(built: OtherUser) -> None:
    script = Path(built.user.pw_dir, "setup.sh")
    script.write_text(_SETUP)
    built.ok("image", "build", "own", "--from", IMAGE, "-q", "--run", script)
    try:
        look = ("--", "sh", "-c", _LOOK)
        assert built.ok("vm", "run", "--rm", "-q", "--image", "own", *look).splitlines() == [
            "worker 700 4242",
            "worker/file 644 4242",
            "node character special file 620 1 3",
            "/var/log/worker:",
            "",
            "/var/tmp:",
            "0100000200200000" + "0" * 24,
        ]
    finally:
        built.ok("image", "delete", "own")
    assert list(Path(built.user.pw_dir, ".local/share/banger/images").glob(".*")) == []


def test_the_files_are_the_users_alone(built: OtherUser) -> None:
    home = Path(built.user.pw_dir)
    for directory in (home / ".local/state/banger", home / ".local/share/banger", built.runtime):
        assert directory.stat().st_mode & 0o077 == 0, directory


def test_the_machine_and_its_network_are_processes_of_the_user(built: OtherUser) -> None:
    built.ok("vm", "run", "-d", "-q", "--image", IMAGE, "--name", "mine")
    try:
        names = {
            Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].rpartition(b"/")[2]
            for pid in built.processes()
        }
        assert b"qemu-system-x86_64" in names
        assert any(name.startswith(b"passt") for name in names), names
    finally:
        built.ok("vm", "delete", "--force", "mine")


def test_root_or_not_the_same_image_comes_of_it(
    built: OtherUser, banger: Banger, image: str, tmp_path: Path
) -> None:
    """An archive with all that a tar can hold, and layers with whiteouts, file for file."""
    home = Path(built.user.pw_dir)
    archive = home / "everything.tar"
    archive.write_bytes(everything())
    layout = Layout(home / "layout")
    layout.image([everything(), tar(Member("home/ann/.wh.same"), Member("home/.wh..wh..opq"))])
    subprocess.run(["chown", "-R", f"{built.user.pw_name}:", archive, layout.folder], check=True)
    for number, words in enumerate((("import", str(archive)), ("pull", f"oci:{layout.folder}"))):
        name = f"everything-{number}"
        trees = []
        for command in (built, banger):
            command.ok("image", words[0], "-q", words[1], "--name", name)
            shown = command.json("image", "show", name)
            trees.append([tree_of(Path(shown[key])) for key in ("rootfs_path", "work_seed_path")])
            command.ok("image", "delete", name)
        theirs, ours = trees
        assert "/dev/null" in ours[0]
        assert theirs == ours


def test_a_user_imports_a_kernel_with_modules_of_roots(built: OtherUser) -> None:
    (kernel,) = built.json("kernel", "list")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        modules = Path(name)
        modules.chmod(0o755)
        request = f"rdump /{kernel['version']} {modules}"
        subprocess.run(["debugfs", "-R", request, kernel["modules_path"]], check=True)
        tree = modules / str(kernel["version"])
        built.ok(*("kernel", "import", kernel["vmlinux_path"], "--name", "mine", "--modules", tree))
    mine = built.json("kernel", "show", "mine")
    request = f"stat /{kernel['version']}/modules.dep"
    said = subprocess.run(
        ["debugfs", "-R", request, mine["modules_path"]], capture_output=True, text=True, check=True
    )
    assert re.search(r"User: +0 +Group: +0 ", said.stdout), said.stdout
    built.ok("kernel", "export", "mine", "mine.tar.zst")
    assert (Path(built.user.pw_dir) / "mine.tar.zst").stat().st_uid == built.user.pw_uid
    built.ok("kernel", "delete", "mine")
