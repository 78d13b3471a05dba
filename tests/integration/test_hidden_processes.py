"""What an ordinary user's daemon sees of jailed machines where /proc hides other users' processes:
with the kernel's own /proc and control groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from banger.base.jail import groups_root, jail_uid, parent_group
from helper_world import OWNER_UID

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root: they mount")

VM_ID = "0123456789ab"
#: Prints its pid and waits; by its command line it is a jailed machine's.
_MACHINE = """
import os, sys
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""
_LOOK = """
import json, os, sys
from banger.base import procfs
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
seen = [pid for pid, argv in procfs.own_processes() if "--id" in argv]
print(json.dumps([procfs.hides_others(), list(procfs.hidden_machines()), seen]))
"""


@pytest.fixture
def machine() -> Iterator[int]:
    """A process of a jail's user, in the control group of a jail of the owner's: its pid."""
    root = groups_root()
    if root is None:
        pytest.skip("there are no control groups of version 2: mount -t cgroup2 none /mnt")
    group = root / parent_group(OWNER_UID) / VM_ID
    argv = [sys.executable, "-I", "-c", _MACHINE, str(jail_uid(VM_ID)), "--id", VM_ID]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        group.mkdir(parents=True, exist_ok=True)
        try:
            (group / "cgroup.procs").write_text(str(pid))
            yield pid
        finally:
            process.communicate()
            group.rmdir()
            group.parent.rmdir()


def _look(option: str) -> tuple[bool, list[str], list[int]]:
    """What the owner sees in a /proc of his own that is mounted so: whether others are hidden,
    which machines are, and which jailed process is not."""
    script = 'mount -t proc -o "$1" proc /proc && shift && exec "$@"'
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", option]
    argv += [sys.executable, "-I", "-c", _LOOK, str(OWNER_UID)]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=60)
    hides, hidden, seen = json.loads(done.stdout)
    return hides, hidden, seen


@pytest.mark.parametrize("option", ["hidepid=1", "hidepid=2", "hidepid=4", "subset=pid,hidepid=2"])
def test_a_machine_that_is_hidden_is_known_to_be(machine: int, option: str) -> None:
    """It is not among those that run, as one that has ended is not."""
    assert _look(option) == (True, [VM_ID], [])


@pytest.mark.parametrize("option", ["hidepid=0", "hidepid=2,gid={owner}"])
def test_nobody_is_hidden_from_who_may_look(machine: int, option: str) -> None:
    assert _look(option.format(owner=OWNER_UID)) == (False, [], [machine])
