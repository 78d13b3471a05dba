"""Where a machine's Firecracker runs: how it is started, and by which names it knows files.

A state that was saved has the names of disks in it, and a machine that goes on from it opens those.
So Firecracker knows each disk by a name in its own working directory, which is the same in every
machine; what is behind the name is another file in each.

The `Direct` place starts it as a process of ours, which sees all of the host that we see. A jail
is another place (`firecracker_jail`): its names lead to files within a root of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from banger.base import proc, procfs
from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.procfs import Process
from banger.drivers.base import Check, Level, Machine, NetworkAttachment
from banger.drivers.hypervisor import firecracker_tap

#: The names of disks begin so.
DISKS = "disks"

_END_TIMEOUT_S = 5.0
#: struct ucred: pid, uid, gid (unix(7)).
_UCRED = struct.Struct("iII")


@dataclass(frozen=True)
class Lent:
    """A file of the host's that a machine opens."""

    path: Path
    read_only: bool


#: Gets a process's return code, as `proc.watch` has it; None for one that is not our child.
Ended: TypeAlias = asyncio.Future[int] | asyncio.Future[None]


@dataclass(frozen=True)
class Started:
    """A process of Firecracker's."""

    pid: int
    ended: Ended


class Place(Protocol):
    """How Firecracker is started and ended, and what it sees of the host."""

    #: Whether machines have nodes of devices made for them, whatever the daemon may open.
    has_own_devices: bool

    async def program(self) -> str:
        """The path of the Firecracker that runs here. Raises PreconditionFailed without one, and
        what else keeps it from being started."""
        ...

    async def check(self) -> Check:
        """What keeps who breaks out of a machine from the rest of the host, looked at anew.

        Raises what `program` does."""
        ...

    def runs(self, control_socket: Path) -> bool:
        """Whether the machine with this socket was started here."""
        ...

    def tap_of(self, network: NetworkAttachment) -> str:
        """By which name the process knows the tap of a network that it is started with."""
        ...

    async def start(
        self, machine: Machine, lent: Mapping[str, Lent], network: NetworkAttachment | None
    ) -> Started:
        """Start it with the files of `lent` under these names, relative to its working directory.

        Its API is to be at `Machine.control_socket`, its log at `Machine.hypervisor_log`; what it
        prints, which is the guest's console, goes to `Machine.console_log`. What an earlier
        process has left of its sockets goes. It can open the tap then; our descriptor of that is
        closed in any case.
        """
        ...

    def has_tap(self, process: Started, network: NetworkAttachment) -> None:
        """The process has opened its tap: have that go with it. Raises Unavailable when it would
        stay."""
        ...

    async def end(
        self, machine: Machine, process: Started, network: NetworkAttachment | None
    ) -> None:
        """End a process that is good for nothing, and what it was started with."""
        ...

    async def quit(self, control_socket: Path) -> None:
        """See `Hypervisor.quit`."""
        ...

    async def clear(self, control_socket: Path) -> None:
        """See `Hypervisor.clear`."""
        ...

    async def end_strays(self, running: Collection[str]) -> None:
        """See `Hypervisor.end_strays`."""
        ...

    def name_of(self, path: Path) -> str:
        """By which name the process makes a file, or a socket, that is to be at `path`."""
        ...

    def metrics(self, control_socket: Path) -> Path:
        """Where the process is to count, for as long as it runs: `name_of` has its name for it."""
        ...

    async def discard(self, control_socket: Path, path: Path) -> None:
        """What the process was to make for `path` is wanted no more: have it gone, where that is
        elsewhere. Idempotent; what stays is logged."""
        ...

    async def collect(self, control_socket: Path, path: Path) -> None:
        """The process has made what `name_of` was asked for: have it at `path`."""
        ...

    def control_socket(self, process: Process) -> Path | None:
        """See `Hypervisor.control_socket`."""
        ...


class Direct:
    """Implements `Place` without a jail."""

    has_own_devices = False

    def __init__(self, program: str) -> None:
        """`program` is the setting: a name, or a path."""
        self._program = program

    async def program(self) -> str:
        """See `Place.program`."""
        path = proc.which(self._program)
        if path is None and _is_file(self._program):
            raise not_executable(self._program)
        if path is None:
            raise PreconditionFailed(
                f"{self._program} is not installed",
                hint="get a release of github.com/firecracker-microvm/firecracker and set"
                " firecracker_bin to its path",
            )
        check_name(path)
        return path

    async def check(self) -> Check:
        """See `Place.check`: that there is no jail."""
        detail = "Firecracker runs as the daemon's own user, without its jailer"
        hint = "who breaks out of a machine is that user: set jailer_enabled = true"
        return Check("jailer", Level.WARN, detail, hint)

    def runs(self, control_socket: Path) -> bool:
        """See `Place.runs`."""
        return not control_socket.is_symlink()

    def tap_of(self, network: NetworkAttachment) -> str:
        """See `Place.tap_of`: its own."""
        return network.tap

    async def start(
        self, machine: Machine, lent: Mapping[str, Lent], network: NetworkAttachment | None
    ) -> Started:
        """See `Place.start`."""
        with closing_tap(network):
            program = await self.program()
            prepare_links(machine, lent)
            argv = firecracker_argv(
                program, machine.vm_id, str(machine.control_socket), str(machine.hypervisor_log)
            )
            process = proc.spawn_detached(
                argv,
                log=machine.console_log,
                env=proc.BARE_ENVIRONMENT,
                cwd=links_of(machine.control_socket),
            )
        started = Started(process.pid, proc.watch(process))
        if network is not None:
            try:
                firecracker_tap.lend(network.fd, network.tap)
            except BaseException:
                await asyncio.shield(self.end(machine, started, None))
                raise
        return started

    def has_tap(self, process: Started, network: NetworkAttachment) -> None:
        """See `Place.has_tap`."""
        firecracker_tap.let_go(network.tap, process.pid)

    async def end(
        self,
        machine: Machine,  # noqa: ARG002 - of the protocol
        process: Started,
        network: NetworkAttachment | None,
    ) -> None:
        """See `Place.end`."""
        if not process.ended.done():
            os.kill(process.pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
            await asyncio.wait({process.ended})
        if network is not None:
            firecracker_tap.take_back(network.tap)

    async def quit(self, control_socket: Path) -> None:
        """See `Place.quit`. Firecracker has no such request: its process is killed, which is found
        by who listens on its socket."""
        pid = await asyncio.to_thread(_listener, control_socket)
        pidfd = procfs.open_pidfd(pid, lambda each: self.control_socket(each) == control_socket)
        if pidfd < 0:
            raise Unavailable(f"what listens at {control_socket} is not its Firecracker")
        try:
            if not await procfs.kill(pidfd, _END_TIMEOUT_S):
                raise Unavailable(f"the Firecracker at {control_socket} does not end")
        except PermissionError as error:
            raise Unavailable(f"the Firecracker at {control_socket} is another user's") from error
        finally:
            os.close(pidfd)

    async def clear(self, control_socket: Path) -> None:
        """See `Place.clear`: nothing is left of a process."""

    async def end_strays(self, running: Collection[str]) -> None:
        """See `Place.end_strays`: by its command line each is found."""

    def name_of(self, path: Path) -> str:
        """See `Place.name_of`: its own."""
        return str(path)

    def metrics(self, control_socket: Path) -> Path:
        """See `Place.metrics`: beside its sockets."""
        return control_socket.with_name("metrics")

    async def discard(self, control_socket: Path, path: Path) -> None:
        """See `Place.discard`: it is there."""

    async def collect(self, control_socket: Path, path: Path) -> None:
        """See `Place.collect`: it is there."""

    def control_socket(self, process: Process) -> Path | None:
        """See `Place.control_socket`: in a command line of `firecracker_argv`."""
        argv = process.argv
        if not argv or not _is_firecracker(argv[0]):
            return None
        socket = _option(argv, "--api-sock")
        return Path(socket) if socket.startswith("/") else None


@contextmanager
def closing_tap(network: NetworkAttachment | None) -> Iterator[None]:
    """Close our descriptor of a tap if the block fails, which comes before it is handed over."""
    try:
        yield
    except BaseException:
        if network is not None:
            os.close(network.fd)
        raise


def prepare_links(machine: Machine, lent: Mapping[str, Lent]) -> None:
    """Names for the files of a machine, beside its sockets; what an earlier process has left of
    those goes."""
    root = links_of(machine.control_socket)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(mode=0o700)
    # It makes its sockets anew or not at all, and writes over what is in a log.
    for stale in (machine.control_socket, machine.agent_socket, machine.hypervisor_log):
        stale.unlink(missing_ok=True)
    for name, each in lent.items():
        link = root / name
        link.parent.mkdir(mode=0o700, exist_ok=True)
        link.symlink_to(each.path)  # `read_only` is Firecracker's own to keep


def disks_of(control_socket: Path) -> dict[str, Path]:
    """The disks of a machine that `prepare_links` was told of. Raises OSError without them."""
    links = (links_of(control_socket) / DISKS).iterdir()
    return {link.name: link.readlink() for link in links}


def links_of(control_socket: Path) -> Path:
    """Where the links to the files of the machine with this socket are."""
    return control_socket.with_name("firecracker")


def _is_file(program: str) -> bool:
    """Whether it is the path of a file, as far as we can see."""
    return "/" in program and os.path.isfile(program)  # noqa: PTH113 - pathlib raises in 3.11


def not_executable(path: str) -> PreconditionFailed:
    """The error for a program that is there, and for others to run: for root alone, mostly."""
    return PreconditionFailed(
        f"{path} cannot be executed by this user",
        hint=f"chmod 755 {path}, and what others may not enter of the directories above it",
    )


def check_name(path: str) -> None:
    """Raise PreconditionFailed for a program whose machines would not be known by their command
    lines; the jailer, too, goes by the name."""
    if not _is_firecracker(path):
        raise PreconditionFailed(
            f"{path} is not called firecracker, which its machines are known by",
            hint="rename it, or link to it: firecracker, or a name that begins so",
        )


def _is_firecracker(program: str) -> bool:
    """Whether a program is called so. Releases are installed under names that begin so."""
    return program.rpartition("/")[2].startswith("firecracker")


def firecracker_argv(program: str, machine_id: str, socket: str, log: str) -> tuple[str, ...]:
    """Firecracker's command line; `socket` and `log` as it knows them.

    At a lower level it would log two lines for each request.
    """
    return (
        *(program, "--id", machine_id, "--api-sock", socket),
        *("--log-path", log, "--level", "Warning"),
    )


def _option(argv: tuple[str, ...], name: str) -> str:
    """The value of an option in a command line; empty without it."""
    return next((value for word, value in itertools.pairwise(argv) if word == name), "")


def _listener(path: Path) -> int:
    """Who listens on a socket: the kernel keeps who it was that began to. Raises Unavailable."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.settimeout(_END_TIMEOUT_S)
            connection.connect(str(path))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        except OSError as error:
            raise Unavailable(f"Firecracker does not answer at {path}: {error}") from error
    return int(_UCRED.unpack(peer)[0])
