"""What a jailed machine is called, for who makes it, ends it and looks for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: A range that nobody gives out: above subordinate ids as useradd(8) and systemd-nspawn(1) choose
#: them (up to 0x6fffffff), below 2^31.
UID_FIRST = 0x70000000
UID_LAST = 0x70FFFFFF

_VM_ID = re.compile(r"[0-9a-f]{12}")
_PROC = Path("/proc")


def is_vm_id(text: str) -> bool:
    """Whether it has the form of a machine's id."""
    return _VM_ID.fullmatch(text) is not None


def jail_uid(vm_id: str) -> int:
    """The uid, and gid, of a jailed machine's process: of the first 24 bits of its id."""
    return UID_FIRST + int(vm_id[:6], 16)


def parent_group(owner_uid: int) -> str:
    """The control group that those of a user's jails are in, below the root of all."""
    return f"banger-{owner_uid}"


def groups_root() -> Path | None:
    """Where the control groups of version 2 are mounted, if they are."""
    for line in (_PROC / "self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(place)
    return None


def jail_lives(vm_id: str, owner_uid: int) -> bool:
    """Whether somebody is in the jail of this user's machine, as the kernel tells everybody."""
    root = groups_root()
    if root is None:
        return False
    try:
        events = (root / parent_group(owner_uid) / vm_id / "cgroup.events").read_text()
    except OSError:  # there is none
        return False
    return "populated 1" in events


def jailed_vm(pid: int, owner_uid: int) -> str:
    """Whose machine a process is by its control group, which nobody in a jail can leave; empty for
    one that is not in a jail of this user's."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:  # it has ended
        return ""
    for line in lines:
        if line.startswith("0::"):
            head, _, vm_id = line.removeprefix("0::").rpartition("/")
            if head == f"/{parent_group(owner_uid)}" and _VM_ID.fullmatch(vm_id):
                return vm_id
    return ""


def may_be_jailed(status: os.stat_result) -> bool:
    """Whether a process's directory in /proc is one of a jail, whoever's."""
    return UID_FIRST <= status.st_uid <= UID_LAST
