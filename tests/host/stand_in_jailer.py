#!/usr/bin/python3
"""Stands in for Firecracker's jailer v1.16.1, where that is not to be had.

It takes the same command line, strictly, and does to the process what that does, in the same order
(`Env::run` in its source).
"""

import argparse
import ctypes
import os
import resource
import shutil
import stat
import sys
from pathlib import Path

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
MNT_DETACH = 2
SYS_PIVOT_ROOT = 155
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def enter_group(root: Path, parent: str, name: str, limits: list[str]) -> None:
    group = root / parent / name
    group.mkdir(parents=True, exist_ok=True)
    for limit in limits:
        file, value = limit.split("=")
        controller = file.split(".")[0]
        for directory in (root, group.parent):
            (directory / "cgroup.subtree_control").write_text(f"+{controller}\n")
        (group / file).write_text(f"{value}\n")
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")


def enter_root(root: Path) -> None:
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_SLAVE | MS_REC, None))
    check(libc.mount(bytes(root), bytes(root), None, MS_BIND | MS_REC, None))
    os.chdir(root)
    Path("old_root").mkdir(0o600)
    check(libc.syscall(SYS_PIVOT_ROOT, b".", b"old_root"))
    os.chdir("/")
    check(libc.umount2(b"old_root", MNT_DETACH))
    Path("old_root").rmdir()


def furnish(uid: int, gid: int) -> None:
    for folder in map(Path, ("/", "/dev", "/dev/net", "/run")):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        os.chown(folder, uid, gid)
    for path, number in (
        ("/dev/net/tun", (10, 200)),
        ("/dev/kvm", (10, 232)),
        ("/dev/urandom", (1, 9)),
    ):
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(*number))
        os.chown(path, uid, gid)


def main() -> None:
    os.closerange(3, 4096)
    os.environ.clear()
    if sys.argv[1:] == ["--version"]:
        print("Jailer v1.16.1\n")
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("id", "exec-file", "chroot-base-dir", "parent-cgroup"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("uid", "gid"):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--cgroup-version", required=True, choices=["2"])
    parser.add_argument("--cgroup", action="append", required=True)
    parser.add_argument("--resource-limit", action="append", required=True)
    at = sys.argv.index("--")
    given, extra = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    program = Path(given.exec_file).resolve(strict=True)
    root = Path(given.chroot_base_dir).resolve(strict=True) / program.name / given.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(program, root / program.name)
    (root / program.name).chmod(program.stat().st_mode)
    os.chown(root / program.name, given.uid, given.gid)
    for limit in given.resource_limit:
        name, value = limit.split("=")
        assert name == "no-file", limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(value), int(value)))
    enter_group(Path("/sys/fs/cgroup"), given.parent_cgroup, given.id, given.cgroup)
    enter_root(root)
    furnish(given.uid, given.gid)
    os.setgroups([])
    os.setresgid(given.gid, given.gid, given.gid)
    os.setresuid(given.uid, given.uid, given.uid)
    os.execve(f"/{program.name}", [f"/{program.name}", "--id", given.id, *extra], {})


main()
