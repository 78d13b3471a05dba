"""Jails of machines: Firecracker under its jailer, each as a user of its own. For `local`, as root.

What is the caller's comes open, and is looked at here; what is run is found here, by names that are
the privileged side's own, and only where nobody but root could have put it. A jail is known by its
control group, ``banger-UID/ID`` below the root of all: no pid is ever named. `jail_launcher` makes
one, in a process of its own.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import re
import select
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from banger.base import log, proc
from banger.base.errors import Conflict, PreconditionFailed, Unavailable
from banger.base.jail import groups_root, is_populated, jail_uid, parent_group
from banger.base.trust import first_doubtful
from banger.hostops import jail_files, jail_launcher, links
from banger.hostops.jail_launcher import BASE, JailOrder, LaunchFailed
from banger.hostops.ops import Done, LaunchJail

_CONTROLLERS = frozenset({"cpu", "memory", "pids"})
_VERSION_TIMEOUT_S = 10.0
_LAUNCH_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 20.0
#: For so long a control group may have nobody in it yet.
_NEW_S = 120.0
#: Where administrators put what is not Debian's; the helper runs nothing else from there.
_LOCAL = "/usr/local/sbin:/usr/local/bin"
#: From here on control groups can be killed; what else jails need is older, but for idmapped mounts
#: of btrfs (5.15).
_KERNEL_FIRST = (5, 14)
_BOOT_NEWER = "boot Linux 5.14 or later"
_WITHOUT = "to do without a jail, for debugging: jailer_enabled = false in config.toml"
#: What Firecracker itself and the kernel's part of a machine take, beside the guest's memory.
_OVERHEAD_MIB_MIN = 128
_OVERHEAD_SHARE = 16
#: Firecracker's own, beside one for each vCPU, and what the kernel starts for a machine.
_TASKS = 16
_PERIOD_US = 100_000


class _Programs(NamedTuple):
    """Their paths, links resolved."""

    firecracker: str
    jailer: str


class Jails:
    """Those of one user, and the programs that they are made with."""

    def __init__(self, owner_uid: int, firecracker: str, jailer: str) -> None:
        """The programs are names to be found on the PATH of this process, or paths."""
        self._owner_uid = owner_uid
        self._names = (firecracker, jailer)
        #: By paths, inodes, sizes and times: that they are one release.
        self._known: set[tuple[object, ...]] = set()

    async def check(self) -> str:
        """The path of the Firecracker that runs in jails. Raises PreconditionFailed where none can
        be made, with all that is missing and what to do."""
        programs, _ = await self._ready()
        return programs.firecracker

    async def _ready(self) -> tuple[_Programs, Path]:
        """The programs, and the root of control groups. Raises as `check` does."""
        lacking = _failures(_check_kernel, _groups)
        try:
            programs = await self._found()
        except PreconditionFailed as error:
            lacking.insert(0, error)
        if lacking:
            raise _joined(lacking, _WITHOUT)
        return programs, _groups()

    async def _found(self) -> _Programs:
        """Raises PreconditionFailed for all that is not there, or not to be run."""
        if lacking := _failures(*(partial(_trusted, name) for name in self._names)):
            raise _joined(lacking)
        programs = _Programs(*map(_trusted, self._names))
        key = tuple(map(_identity, programs))
        if key not in self._known:
            await _check_release(programs)
            self._known.add(key)
        return programs

    async def launch(self, operation: LaunchJail) -> Done:
        """Make a jail and start Firecracker in it: its pid, and a pidfd.

        Raises Conflict where the machine, or another with its uid, has one that lives.
        """
        programs, root = await self._ready()
        owner = await asyncio.to_thread(jail_files.owner_of, self._owner_uid)
        jail_files.check(operation, owner)
        self._check_free(root, operation.vm_id)
        await asyncio.to_thread(_check_nobodys, operation.vm_id)
        await asyncio.to_thread(_sweep, root, self._owner_uid)
        await asyncio.to_thread(_have_base)
        group = root / parent_group(self._owner_uid) / operation.vm_id
        async with _network(operation, self._owner_uid) as network:
            try:
                await asyncio.to_thread(_make_group, group)
                return await self._launched(operation, programs, group, network)
            except BaseException:
                await asyncio.shield(self._clear(operation))
                raise

    async def _clear(self, operation: LaunchJail) -> None:
        """After a launch that failed, which is what is to be told: a step that fails is logged."""
        steps = [self.end(operation.vm_id)]
        if operation.tap:
            steps.append(asyncio.to_thread(links.remove_uplink, operation.tap))
        for outcome in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.get_logger().warning(
                    "a failed jail is not cleared", vm_id=operation.vm_id, error=str(outcome)
                )

    async def _launched(
        self, operation: LaunchJail, programs: _Programs, group: Path, network: int
    ) -> Done:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            order = JailOrder(
                vm_id=operation.vm_id,
                uid=jail_uid(operation.vm_id),
                firecracker=programs.firecracker,
                jailer=programs.jailer,
                group=str(group),
                parent_group=parent_group(self._owner_uid),
                limits=limits(operation.vcpu_count, operation.memory_mib),
                files=jail_files.lent(operation),
                console=operation.console,
                log=operation.log,
                network=network,
                has_interface=bool(operation.tap),
                report=theirs.fileno(),
                parent=os.getpid(),
            )
            completed = await proc.run(
                [sys.executable, "-I", "-m", jail_launcher.__name__],
                timeout_s=_LAUNCH_TIMEOUT_S,
                stdin=msgspec.json.encode(order),
                env=proc.BARE_ENVIRONMENT,
                check=False,
                pass_fds=(network, theirs.fileno(), *operation.descriptors),
            )
            if completed.returncode != 0:
                raise _launch_failed(completed)
            ours.setblocking(False)
            _, (pidfd, *_), _, _ = socket.recv_fds(ours, 1, 1)
        os.set_inheritable(pidfd, False)
        return Done(pid=_pid_of(pidfd), fd=pidfd)

    async def end(self, vm_id: str) -> None:
        """End a machine's jail, and clear what is left of it. Idempotent.

        Raises Unavailable where the kernel does not let a process of it die.
        """
        root = groups_root()
        if root is not None:
            group = root / parent_group(self._owner_uid) / vm_id
            await asyncio.to_thread(_end_group, group)

    def _check_free(self, root: Path, vm_id: str) -> None:
        for group in root.glob("banger-*/*"):
            alike = group.is_dir() and group.name[:6] == vm_id[:6]
            if alike and is_populated(group):
                own = group.name == vm_id and group.parent.name == parent_group(self._owner_uid)
                raise Conflict(
                    f"the machine {vm_id} is in its jail already"
                    if own
                    else f"the machine {group.name} has the uid that {vm_id} would have",
                    hint="" if own else "create it anew: it gets another id",
                )


async def end_all(owner_uid: int) -> None:
    """End all jails of a user: for the end of an installation."""
    if (root := groups_root()) is not None:
        for group in _groups_of(root, owner_uid):
            await asyncio.to_thread(_end_group, group)


def limits(vcpu_count: int, memory_mib: int) -> tuple[str, ...]:
    """What a jail may use, as the jailer is told: memory and page cache, CPU time, processes."""
    overhead_mib = max(_OVERHEAD_MIB_MIN, memory_mib // _OVERHEAD_SHARE)
    # One more than vCPUs: devices have a thread of their own.
    return (
        f"memory.max={(memory_mib + overhead_mib) << 20}",
        f"cpu.max={(vcpu_count + 1) * _PERIOD_US} {_PERIOD_US}",
        f"pids.max={vcpu_count + _TASKS}",
    )


# What is missing.


def _failures(*looks: Callable[[], object]) -> list[PreconditionFailed]:
    """What they raise of that."""
    found = []
    for look in looks:
        try:
            look()
        except PreconditionFailed as error:
            found.append(error)
    return found


def _joined(errors: Sequence[PreconditionFailed], *hints: str) -> PreconditionFailed:
    """One error of several, with the hints of all, each once."""
    told = dict.fromkeys((*(error.hint for error in errors), *hints))
    message = "; ".join(error.message for error in errors)
    return PreconditionFailed(message, hint="; ".join(filter(None, told)))


def kernel_problem(release: str) -> str:
    """Why jails cannot be made by a kernel of this release (uname(2)), if they cannot. One that
    names no number is believed."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", release)
    if found is None or (int(found[1]), int(found[2])) >= _KERNEL_FIRST:
        return ""
    return f"Linux {release} cannot kill control groups, which jails are ended by"


def _check_kernel() -> None:
    if problem := kernel_problem(os.uname().release):
        raise PreconditionFailed(problem, hint=_BOOT_NEWER)


# Programs.


def _trusted(program: str) -> str:
    """The path of a program, links resolved, which nobody but root can have put there."""
    name = Path(program).name
    path = f"{proc.search_path(os.environ)}:{_LOCAL}"
    found = shutil.which(os.path.expanduser(program), path=path)  # noqa: PTH111 - it may be a name
    if found is None:
        raise PreconditionFailed(
            f"{name} is not installed where root's own programs are",
            hint="put firecracker and jailer of one release of"
            " github.com/firecracker-microvm/firecracker into /usr/local/bin",
        )
    path = os.path.realpath(found)
    for each in (found, path):
        if (wrong := first_doubtful(Path(each))) is not None:
            raise PreconditionFailed(
                f"root would run what others can change: {wrong}",
                hint=f"have {name} where only root can write",
            )
    return path


def _identity(path: str) -> tuple[object, ...]:
    status = os.stat(path)  # noqa: PTH116 - pathlib is no faster here
    return path, status.st_ino, status.st_size, status.st_mtime_ns


async def _check_release(programs: _Programs) -> None:
    """Raise PreconditionFailed for two of different releases: they rely on each other."""
    said = []
    for path, name in zip(programs, (rb"Firecracker", rb"Jailer"), strict=True):
        done = await proc.run(
            [path, "--version"],
            timeout_s=_VERSION_TIMEOUT_S,
            env=proc.BARE_ENVIRONMENT,
            check=False,
        )
        found = re.match(name + rb" v(\d{1,6}\.\d{1,6}\.\d{1,6})", done.stdout)
        if found is None:
            raise PreconditionFailed(f"{path} is not Firecracker's {name.decode().lower()}")
        said.append(found[1].decode())
    if said[0] != said[1]:
        raise PreconditionFailed(
            f"{programs.firecracker} is v{said[0]} and {programs.jailer} is v{said[1]}",
            hint="install both of one release",
        )


# The network, and the place.


@asynccontextmanager
async def _network(operation: LaunchJail, owner_uid: int) -> AsyncIterator[int]:
    """A network namespace with the machine's end of its connection, if it has one. It goes with
    the descriptor and the last process in it."""
    # In threads, as `local` does it: pyroute2 runs an event loop of its own.
    namespace = await asyncio.to_thread(links.new_namespace)
    try:
        if operation.tap:
            uplink = (operation.bridge, operation.tap, owner_uid, namespace)
            await asyncio.to_thread(links.add_uplink, *uplink)
        yield namespace
    finally:
        os.close(namespace)


def _have_base() -> None:
    """The directory on which each jail, in a mount namespace of its own, has its root."""
    for directory in (BASE.parent, BASE):
        with suppress(FileExistsError):
            directory.mkdir(mode=0o755)
            directory.chmod(0o755)  # whatever the umask says
    if (wrong := first_doubtful(BASE)) is not None:
        raise PreconditionFailed(f"others than root can change {wrong}", hint=f"remove {BASE}")


def _check_nobodys(vm_id: str) -> None:
    """Raise Conflict where somebody has the uid or gid of the jail after all. Blocks: a server may
    be asked."""
    uid = jail_uid(vm_id)
    for kind, look_up in (("user", pwd.getpwuid), ("group", grp.getgrgid)):
        with suppress(KeyError):
            raise Conflict(
                f"the {kind} {look_up(uid)[0]} has the number {uid}, which {vm_id} would have",
                hint="create it anew: it gets another id",
            )


def _launch_failed(completed: proc.Completed) -> Unavailable:
    try:
        failed = msgspec.json.decode(completed.stdout, type=LaunchFailed)
    except msgspec.DecodeError:
        tail = completed.stderr[-300:].decode(errors="replace").strip()
        return Unavailable(f"a jail cannot be made: {tail or completed.returncode}")
    return Unavailable(f"a jail cannot be made: {failed.message}", hint=failed.hint)


def _pid_of(pidfd: int) -> int:
    """In our namespace of processes (proc_pid_fdinfo(5)); 0 or less for one that has ended."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Pid":
            return int(value)
    return 0


# Control groups.


def _groups() -> Path:
    """The root of control groups that have what jails are limited by."""
    root = groups_root()
    there = set((root / "cgroup.controllers").read_text().split()) if root is not None else set()
    if root is None or not there >= _CONTROLLERS:
        missing = " ".join(sorted(_CONTROLLERS - there))
        raise PreconditionFailed(
            f"control groups of version 2 lack what jails are limited by: {missing}",
            hint="boot with systemd.unified_cgroup_hierarchy=1",
        )
    return root


def _groups_of(root: Path, owner_uid: int) -> list[Path]:
    return [each for each in (root / parent_group(owner_uid)).glob("*") if each.is_dir()]


def _sweep(root: Path, owner_uid: int) -> None:
    """Remove what is left of jails whose machines have ended by themselves, and that nobody has
    cleared. A new one is empty, too."""
    for group in _groups_of(root, owner_uid):
        with suppress(OSError):  # somebody is in it, or it has gone
            if time.time() - group.stat().st_mtime > _NEW_S:
                group.rmdir()


def _make_group(group: Path) -> None:
    """A jail's, with what the jailer would fail on where the kernel does not have it: a machine's
    processes end together when memory is short, and none of it is swapped. Blocks.

    Raises PreconditionFailed where it could not be ended.
    """
    group.mkdir(parents=True, exist_ok=True)
    if not (group / "cgroup.kill").exists():
        group.rmdir()
        raise PreconditionFailed(
            "control groups cannot be killed here", hint=f"{_BOOT_NEWER}; {_WITHOUT}"
        )
    for directory in (group.parent, group):
        directory.chmod(0o755)  # whatever the umask says: its owner's daemon looks who is in it
    for directory in (group.parent.parent, group.parent):
        (directory / "cgroup.subtree_control").write_text("+memory")
    (group / "memory.oom.group").write_text("1")
    swap = group / "memory.swap.max"
    if swap.exists():  # a kernel without swap, or swapaccount=0, has none
        swap.write_text("0")


def _end_group(group: Path) -> None:
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
