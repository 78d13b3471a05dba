"""The control groups of jails, by which they are limited, known and ended. For `jails`, as root.

A jail's is ``banger-UID/ID`` below the root of all (`base.jail`).
"""

from __future__ import annotations

import os
import re
import select
import time
from contextlib import suppress
from pathlib import Path

from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.jail import groups_root, parent_group

_CONTROLLERS = frozenset({"cpu", "memory", "pids"})
_END_TIMEOUT_S = 20.0
#: For so long a control group may have nobody in it yet.
_NEW_S = 120.0
#: From here on control groups can be killed; what else jails need is older, but for idmapped mounts
#: of btrfs (5.15).
_KERNEL_FIRST = (5, 14)
_BOOT_NEWER = "boot Linux 5.14 or later"
#: What Firecracker itself and the kernel's part of a machine take, beside the guest's memory.
_OVERHEAD_MIB_MIN = 128
_OVERHEAD_SHARE = 16
#: Firecracker's own, beside one for each vCPU, and what the kernel starts for a machine.
_TASKS = 16
_PERIOD_US = 100_000


def limits(vcpu_count: int, memory_mib: int) -> tuple[str, ...]:
    """What a jail may use, as the jailer is told: memory and page cache, CPU time, processes."""
    overhead_mib = max(_OVERHEAD_MIB_MIN, memory_mib // _OVERHEAD_SHARE)
    # One more than vCPUs: devices have a thread of their own.
    return (
        f"memory.max={(memory_mib + overhead_mib) << 20}",
        f"cpu.max={(vcpu_count + 1) * _PERIOD_US} {_PERIOD_US}",
        f"pids.max={vcpu_count + _TASKS}",
    )


def kernel_problem(release: str) -> str:
    """Why jails cannot be made by a kernel of this release (uname(2)), if they cannot. One that
    names no number is believed."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", release)
    if found is None or (int(found[1]), int(found[2])) >= _KERNEL_FIRST:
        return ""
    return f"Linux {release} cannot kill control groups, which jails are ended by"


def check_kernel() -> None:
    """Raise PreconditionFailed for a kernel that cannot have jails."""
    if problem := kernel_problem(os.uname().release):
        raise PreconditionFailed(problem, hint=_BOOT_NEWER)


def usable_root() -> Path:
    """The root of control groups that have what jails are limited by.

    Raises PreconditionFailed where they have not.
    """
    root = groups_root()
    there = set((root / "cgroup.controllers").read_text().split()) if root is not None else set()
    if root is None or not there >= _CONTROLLERS:
        missing = " ".join(sorted(_CONTROLLERS - there))
        raise PreconditionFailed(
            f"control groups of version 2 lack what jails are limited by: {missing}",
            hint="boot with systemd.unified_cgroup_hierarchy=1",
        )
    return root


def groups_of(root: Path, owner_uid: int) -> list[Path]:
    """Of all jails of a user."""
    return [each for each in (root / parent_group(owner_uid)).glob("*") if each.is_dir()]


def sweep(root: Path, owner_uid: int) -> None:
    """Remove what is left of jails whose machines have ended by themselves, and that nobody has
    cleared. A new one is empty, too."""
    for group in groups_of(root, owner_uid):
        with suppress(OSError):  # somebody is in it, or it has gone
            if time.time() - group.stat().st_mtime > _NEW_S:
                group.rmdir()


def make_group(group: Path) -> None:
    """A jail's, with what the jailer would fail on where the kernel does not have it: a machine's
    processes end together when memory is short, and none of it is swapped. Blocks.

    Raises PreconditionFailed where it could not be ended.
    """
    group.mkdir(parents=True, exist_ok=True)
    if not (group / "cgroup.kill").exists():
        group.rmdir()
        raise PreconditionFailed("control groups cannot be killed here", hint=_BOOT_NEWER)
    for directory in (group.parent, group):
        directory.chmod(0o755)  # whatever the umask says: its owner's daemon looks who is in it
    for directory in (group.parent.parent, group.parent):
        (directory / "cgroup.subtree_control").write_text("+memory")
    (group / "memory.oom.group").write_text("1")
    swap = group / "memory.swap.max"
    if swap.exists():  # a kernel without swap, or swapaccount=0, has none
        swap.write_text("0")


def end_group(group: Path) -> None:
    """Kill whoever is in it, wait until nobody is, and remove it. Blocks."""
    with suppress(FileNotFoundError):
        (group / "cgroup.kill").write_text("1")
        _await_empty(group)
        group.rmdir()
    with suppress(OSError):  # there are others in it, or it has gone
        group.parent.rmdir()


def _await_empty(group: Path) -> None:
    until = time.monotonic() + _END_TIMEOUT_S
    with (group / "cgroup.events").open("rb", buffering=0) as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)  # it has changed (cgroup-v2.rst)
        while b"populated 1" in os.pread(events.fileno(), 4096, 0):
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise Unavailable(f"the processes of {group} cannot be killed")
            poll.poll(left_s * 1000)
