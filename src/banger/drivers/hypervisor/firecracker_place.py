"""Where a machine's Firecracker runs: how it is started, and by which names it knows files.

A state that was saved has the names of disks in it, and a machine that goes on from it opens those.
So Firecracker knows each disk by a name in its own working directory, which is the same in every
machine; what is behind the name is another file in each.

The `Direct` place starts it as a process of ours, which sees all of the host that we see. A jail
is another place: its names lead to links within a root of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from banger.base import proc
from banger.drivers.base import Check, Level, Machine

#: The names of disks begin so.
DISKS = "disks"


@dataclass(frozen=True)
class Lent:
    """A file of the host's that a machine opens."""

    path: Path
    read_only: bool


@dataclass(frozen=True)
class Started:
    """A process of Firecracker's. ``ended`` gets its return code, as `proc.watch` has it."""

    pid: int
    ended: asyncio.Future[int]


class Place(Protocol):
    """How Firecracker is started, and what it sees of the host."""

    def checks(self) -> list[Check]:
        """What this place needs of the host besides Firecracker, each with how it stands."""
        ...

    async def start(self, program: str, machine: Machine, lent: Mapping[str, Lent]) -> Started:
        """Start it with the files of `lent` under these names, relative to its working directory.

        Its API is to be at `Machine.control_socket`, its log at `Machine.hypervisor_log`; what it
        prints, which is the guest's console, goes to `Machine.console_log`. What an earlier
        process has left of its sockets goes.
        """
        ...

    def name_of(self, control_socket: Path, path: Path) -> str:
        """By which name the process makes a file, or a socket, that is to be at `path`."""
        ...

    async def collect(self, control_socket: Path, path: Path) -> None:
        """The process has made what `name_of` was asked for: have it at `path`."""
        ...

    def disks(self, control_socket: Path) -> dict[str, Path]:
        """The disks that were lent, by name. Raises OSError when that is not known."""
        ...

    def control_socket(self, argv: tuple[str, ...]) -> Path | None:
        """See `Hypervisor.control_socket`."""
        ...


class Direct:
    """Implements `Place` without a jail."""

    def checks(self) -> list[Check]:
        """That there is no jail."""
        detail = "Firecracker runs as the daemon's own user, without its jailer"
        hint = "who breaks out of a machine is that user: run banger as one of its own"
        return [Check("jailer", Level.WARN, detail, hint)]

    async def start(self, program: str, machine: Machine, lent: Mapping[str, Lent]) -> Started:
        """See `Place.start`."""
        root = _root(machine.control_socket)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(mode=0o700)
        # It makes its sockets anew or not at all, and writes over what is in a log.
        for stale in (machine.control_socket, machine.agent_socket, machine.hypervisor_log):
            stale.unlink(missing_ok=True)
        for name, each in lent.items():
            link = root / name
            link.parent.mkdir(mode=0o700, exist_ok=True)
            link.symlink_to(each.path)  # `read_only` is Firecracker's own to keep
        process = proc.spawn_detached(
            firecracker_argv(
                program, machine.vm_id, str(machine.control_socket), str(machine.hypervisor_log)
            ),
            log=machine.console_log,
            env=proc.BARE_ENVIRONMENT,
            cwd=root,
        )
        return Started(process.pid, proc.watch(process))

    def name_of(self, control_socket: Path, path: Path) -> str:  # noqa: ARG002 - of the protocol
        """See `Place.name_of`: its own."""
        return str(path)

    async def collect(self, control_socket: Path, path: Path) -> None:
        """See `Place.collect`: it is there."""

    def disks(self, control_socket: Path) -> dict[str, Path]:
        """See `Place.disks`: where the links lead."""
        links = (_root(control_socket) / DISKS).iterdir()
        return {link.name: link.readlink() for link in links}

    def control_socket(self, argv: tuple[str, ...]) -> Path | None:
        """See `Place.control_socket`: in a command line of `firecracker_argv`. Releases are
        installed under names that begin so."""
        if not argv or not is_firecracker(argv[0]):
            return None
        for option, value in itertools.pairwise(argv):
            if option == "--api-sock":
                return Path(value)
        return None


def is_firecracker(program: str) -> bool:
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


def _root(control_socket: Path) -> Path:
    """The working directory of the machine with this socket."""
    return control_socket.with_name("firecracker")
