"""What a jailed machine is called, for who makes it, ends it and looks for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: A range that nobody gives out: above subordinate ids as useradd(8) and systemd-nspawn(1) choose
#: them (up to 0x6fffffff) and what sssd-ldap(5) makes of SIDs (ldap_idmap_range_max, 2000200000),
#: below systemd's foreign ids (0x7ffe0000, in its UIDS-GIDS.md).
UID_FIRST = 0x77400000
UID_LAST = 0x783FFFFF

#: In a jail: the directory in which Firecracker makes files, its socket there, and what it joins
#: the machine's interface to.
OUT = "out"
API_SOCKET = "api.sock"
TAP = "tap0"

#: What keeps machines from being jailed where processes of other users are hidden, and what to do.
HIDDEN = (
    "/proc shows no processes of other users here (hidepid), and each jailed machine is another"
    " user's: while it runs it would be taken for ended"
)
HIDDEN_HINT = (
    "show them: mount -o remount,hidepid=0 /proc, and so in /etc/fstab, or with gid= of a group"
    " that you are in (proc(5)); the unit bangerd has a /proc of its own, which hides them by"
    " ProtectProc= in its drop-in: systemctl edit bangerd"
)

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


def is_populated(group: Path) -> bool:
    """Whether somebody is in a control group; zombies are not."""
    try:
        return "populated 1" in (group / "cgroup.events").read_text()
    except OSError:  # it has gone
        return False


def has_jail(vm_id: str, owner_uid: int) -> bool:
    """Whether somebody is in the jail of a machine of this user's."""
    root = groups_root()
    return root is not None and is_populated(root / parent_group(owner_uid) / vm_id)


def pids_in_jails(owner_uid: int) -> dict[str, set[int]]:
    """Who is in the jails of a user's machines, by their ids, whether or not /proc shows them; 0
    stands for whoever is in no namespace that we see."""
    root = groups_root()
    if root is None:
        return {}
    groups = (root / parent_group(owner_uid)).glob("*")
    return {each.name: _pids(each) for each in groups if is_vm_id(each.name)}


def _pids(group: Path) -> set[int]:
    try:
        return {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    except OSError:  # it has gone
        return set()


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
            if head == f"/{parent_group(owner_uid)}" and is_vm_id(vm_id):
                return vm_id
    return ""


def may_be_jailed(status: os.stat_result) -> bool:
    """Whether a process's directory in /proc is one of a jail, whoever's."""
    return UID_FIRST <= status.st_uid <= UID_LAST
