"""Jails of machines: Firecracker under its jailer, each as a user of its own. For `local`, as root.

What is the caller's comes open, and is looked at here; what is run is found here, by names that are
the privileged side's own (`jail_programs`). A jail is known by its control group (`jail_groups`):
no pid is ever named. `jail_launcher` makes one, in a process of its own.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from banger.base import log, proc
from banger.base.errors import Conflict, PreconditionFailed, Unavailable
from banger.base.jail import groups_root, is_populated, jail_uid, parent_group
from banger.base.trust import first_doubtful
from banger.hostops import jail_files, jail_groups, jail_launcher, links
from banger.hostops.jail_launcher import BASE, JailOrder, LaunchFailed
from banger.hostops.jail_programs import JailPrograms, Programs, joined, noting
from banger.hostops.ops import Done, LaunchJail

_LAUNCH_TIMEOUT_S = 60.0
_WITHOUT = "to do without a jail, for debugging: jailer_enabled = false in config.toml"


class Jails:
    """Those of one user, and the programs that they are made with."""

    def __init__(self, owner_uid: int, firecracker: str, jailer: str) -> None:
        """The programs are names to be found on the PATH of this process, or paths."""
        self._owner_uid = owner_uid
        self._programs = JailPrograms(firecracker, jailer)

    async def check(self) -> str:
        """The path of the Firecracker that runs in jails. Raises PreconditionFailed where none can
        be made, with all that is missing and what to do."""
        programs, _ = await self._ready()
        return programs.firecracker

    async def _ready(self) -> tuple[Programs, Path]:
        """The programs, and the root of control groups. Raises as `check` does."""
        lacking: list[PreconditionFailed] = []
        with noting(lacking):
            programs = await self._programs.found()
        with noting(lacking):
            jail_groups.check_kernel()
        with noting(lacking):
            root = jail_groups.usable_root()
        if lacking:
            raise joined(lacking, _WITHOUT)
        return programs, root

    async def launch(self, operation: LaunchJail) -> Done:
        """Make a jail and start Firecracker in it: its pid, and a pidfd.

        Raises Conflict where the machine, or another with its uid, has one that lives.
        """
        programs, root = await self._ready()
        owner = await asyncio.to_thread(jail_files.owner_of, self._owner_uid)
        jail_files.check(operation, owner)
        self._check_free(root, operation.vm_id)
        await asyncio.to_thread(_check_nobodys, operation.vm_id)
        await asyncio.to_thread(jail_groups.sweep, root, self._owner_uid)
        await asyncio.to_thread(_have_base)
        group = root / parent_group(self._owner_uid) / operation.vm_id
        async with _network(operation, self._owner_uid) as network:
            try:
                await asyncio.to_thread(jail_groups.make_group, group)
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
        self, operation: LaunchJail, programs: Programs, group: Path, network: int
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
                limits=jail_groups.limits(operation.vcpu_count, operation.memory_mib),
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
            await asyncio.to_thread(jail_groups.end_group, group)

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
        for group in jail_groups.groups_of(root, owner_uid):
            await asyncio.to_thread(jail_groups.end_group, group)


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
