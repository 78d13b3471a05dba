"""What an ordinary user's daemon sees of jailed machines, where /proc hides other users' processes
and where such a machine lies about itself: with the kernel's own /proc and control groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.base.jail import groups_root, jail_uid, parent_group
from helper_world import OWNER_UID

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root: they mount")

VM_ID, OTHER_ID = "0123456789ab", "ba9876543210"
#: Prints its pid outside, then has the arguments that it is given, and a child with them.
_MACHINE = """
import ctypes, os, signal, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
print(os.readlink("/proc/self"), flush=True)
if claim := sys.stdin.buffer.readline().strip():
    fields = open("/proc/self/stat", "rb").read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    assert len(claim) < end - start
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, claim, len(claim))
if os.fork() == 0:
    signal.pause()
print("ready", flush=True)
sys.stdin.read()
"""
#: Space for other arguments.
_PADDING = "x" * 1000
_LOOK = """
import json, os, sys
from pathlib import Path
from banger.base import procfs
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_jail import Jailed
from banger.drivers.hypervisor.firecracker_place import Direct
from banger.drivers.hypervisor.qemu import QemuHypervisor
from banger.drivers.hypervisor.qemu_program import QemuProgram
from banger.hostops.client import HelperHost
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
runtime = Path(sys.argv[2])
jails = Jailed(HelperHost(runtime / "none"), (runtime,), runtime / "none")
firecracker = FirecrackerHypervisor(jails, None, earlier=(Direct(""),))
machines = [
    [each.name, pid, socket.parent.name]
    for each in (firecracker, QemuHypervisor("tcg", runtime / "none", QemuProgram()))
    for pid, process in procfs.own_processes()
    if (socket := each.control_socket(process)) is not None and socket.parent.parent == runtime
]
print(json.dumps([procfs.hides_others(), list(procfs.hidden_machines()), machines]))
"""


class Jailed:
    """A process of a jail's user, the first of a namespace, in the control group of a jail of the
    owner's."""

    def __init__(self, process: subprocess.Popen[bytes], runtime: Path) -> None:
        self._process = process
        self.runtime = runtime
        self.pid = int(self._line())

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def goes_on(self, *claim: str) -> None:
        """With these arguments instead of its own, if there are any; and with a child."""
        assert self._process.stdin is not None
        self._process.stdin.write("\0".join(claim).encode() + b"\n")
        self._process.stdin.flush()
        assert self._line() == b"ready"

    def look(self, option: str) -> tuple[bool, list[str], list[list[object]]]:
        """What the owner sees in a /proc of his own that is mounted so: whether others are hidden,
        which machines are, and which he finds: of which hypervisor, by which pid, whose."""
        script = 'mount -t proc -o "$1" proc /proc && shift && exec "$@"'
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", option]
        argv += [sys.executable, "-I", "-c", _LOOK, str(OWNER_UID), str(self.runtime)]
        done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=60)
        hides, hidden, found = json.loads(done.stdout)
        return hides, hidden, found


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Where the owner has the sockets of two machines; he looks into it, unlike into pytest's."""
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for vm_id in (VM_ID, OTHER_ID):
            (directory / vm_id).mkdir()
        yield directory


@pytest.fixture
def jailed(runtime: Path) -> Iterator[Jailed]:
    root = groups_root()
    if root is None:
        pytest.skip("there are no control groups of version 2: mount -t cgroup2 none /mnt")
    group = root / parent_group(OWNER_UID) / VM_ID
    argv = ["unshare", "--pid", "--fork", sys.executable, "-I", "-c", _MACHINE]
    argv += [str(jail_uid(VM_ID)), "--id", VM_ID, _PADDING]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        made = Jailed(process, runtime)
        group.mkdir(parents=True, exist_ok=True)
        try:
            (group / "cgroup.procs").write_text(str(made.pid))
            yield made
        finally:
            process.communicate()
            group.rmdir()
            group.parent.rmdir()


@pytest.mark.parametrize("option", ["hidepid=1", "hidepid=2", "hidepid=4", "subset=pid,hidepid=2"])
def test_a_machine_that_is_hidden_is_known_to_be(jailed: Jailed, option: str) -> None:
    """It is not among those that run, as one that has ended is not."""
    assert jailed.look(option) == (True, [VM_ID], [])


@pytest.mark.parametrize("option", ["hidepid=0", "hidepid=2,gid={owner}"])
def test_nobody_is_hidden_from_who_may_look(jailed: Jailed, option: str) -> None:
    found = jailed.look(option.format(owner=OWNER_UID))
    assert found == (False, [], [["firecracker", jailed.pid, VM_ID]])


@pytest.mark.parametrize(
    "claim",
    [
        (),
        ("qemu-system-x86_64", "-chardev", "socket,id=control,path={other},server=on,wait=off"),
        ("firecracker", "--api-sock", "{other}"),
        ("/firecracker", "--id", OTHER_ID, "--api-sock", "out/api.sock"),
        ("sleep", "60"),
    ],
)
def test_a_machine_that_says_it_is_another_is_found_as_what_it_is(
    jailed: Jailed, claim: tuple[str, ...]
) -> None:
    """And what it has started is not taken for it."""
    other = jailed.runtime / OTHER_ID / "control.sock"
    argv = [word.format(other=other) for word in claim]
    if argv:
        argv += ["--id", VM_ID]
    jailed.goes_on(*argv)
    if argv:
        said = Path(f"/proc/{jailed.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert [word.decode() for word in said] == argv
    assert jailed.look("hidepid=0") == (False, [], [["firecracker", jailed.pid, VM_ID]])
