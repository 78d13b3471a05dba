"""Firecracker in a jail: started by its jailer, as a user of its own, by who has the privileges.

Inside, it knows files by the same names as outside a jail (`firecracker_place`); what it makes, its
sockets too, is in a directory of the machine's that the two sides share, and whose files belong to
the daemon's user outside and to the machine's inside. Outside, sockets are known by links to those.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.jail import API_SOCKET, OUT, TAP, is_vm_id
from banger.drivers.base import Check, Level, Machine, NetworkAttachment
from banger.drivers.hypervisor.firecracker_place import (
    Lent,
    Started,
    check_name,
    closing_tap,
    is_firecracker,
    option,
    prepare_links,
)
from banger.hostops.ops import CheckJail, EndJail, HostOps, InJail, LaunchJail


class Jailed:
    """Implements `Place` with a jail."""

    def __init__(self, host: HostOps, runtime_dirs: Sequence[Path]) -> None:
        """`host` makes jails. The sockets of a machine are in a directory with its id, in one of
        `runtime_dirs`."""
        self._host = host
        self._runtime_dirs = tuple(runtime_dirs)

    async def program(self) -> str:
        """See `Place.program`: the privileged side's, which the user's setting does not name."""
        if self._host.problem:
            raise PreconditionFailed(
                f"nobody can put Firecracker into a jail: {self._host.problem}",
                hint=self._host.hint,
            )
        path = (await self._host.perform(CheckJail())).name
        check_name(path)
        return path

    def check(self) -> Check:
        """That there is a jail."""
        detail = "each machine has a uid, root directory, network and limits of its own"
        return Check("jailer", Level.OK, detail)

    def runs(self, control_socket: Path) -> bool:
        """See `Place.runs`: its socket is a link."""
        return control_socket.is_symlink()

    def tap_of(self, network: NetworkAttachment) -> str:  # noqa: ARG002 - of the protocol
        """See `Place.tap_of`: the same in every jail."""
        return TAP

    async def start(
        self, machine: Machine, lent: Mapping[str, Lent], network: NetworkAttachment | None
    ) -> Started:
        """See `Place.start`."""
        with closing_tap(network):
            prepare_links(machine, lent)
            out = _make_out(machine)
            # Before there is a jail: by this link it is known that there may be one.
            machine.control_socket.symlink_to(out / API_SOCKET)
        if network is not None:
            os.close(network.fd)  # with which the tap goes: another interface gets its name
        with _opened(machine, lent, out) as descriptors:
            done = await self._host.perform(
                LaunchJail(
                    vm_id=machine.vm_id,
                    vcpu_count=machine.vcpu_count,
                    memory_mib=machine.memory_mib,
                    files=tuple(
                        InJail(name=name, read_only=each.read_only) for name, each in lent.items()
                    ),
                    bridge=network.tap.partition("-")[0] if network is not None else "",
                    tap=network.tap if network is not None else "",
                ).with_descriptors(descriptors)
            )
        return Started(done.pid, _ended(done.fd))

    def has_tap(self, process: Started, network: NetworkAttachment) -> None:
        """See `Place.has_tap`: it goes with the jail."""

    async def end(
        self,
        machine: Machine,
        process: Started,
        network: NetworkAttachment | None,  # noqa: ARG002 - of the protocol
    ) -> None:
        """See `Place.end`."""
        await self.clear(machine.control_socket)
        await asyncio.wait({process.ended})

    async def quit(self, control_socket: Path) -> None:
        """See `Place.quit`."""
        await self._host.perform(EndJail(vm_id=control_socket.parent.name))

    async def clear(self, control_socket: Path) -> None:
        """See `Place.clear`."""
        if not self.runs(control_socket):
            return
        await self.quit(control_socket)
        await asyncio.to_thread(shutil.rmtree, _out_of(control_socket), ignore_errors=True)

    def name_of(self, path: Path) -> str:
        """See `Place.name_of`."""
        return f"{OUT}/{path.name}"

    def metrics(self, control_socket: Path) -> Path:
        """See `Place.metrics`: it stays where it was made."""
        return _out_of(control_socket) / "metrics"

    async def collect(self, control_socket: Path, path: Path) -> None:
        """See `Place.collect`. Raises Unavailable for what no Firecracker makes."""
        try:
            await asyncio.to_thread(_take, _out_of(control_socket) / path.name, path)
        except OSError as error:
            raise Unavailable(f"Firecracker's {path.name} cannot be had: {error}") from error

    def control_socket(self, argv: tuple[str, ...]) -> Path | None:
        """See `Place.control_socket`: by the machine's id, in the directory that there is."""
        vm_id = option(argv, "--id")
        jailed = option(argv, "--api-sock") == f"{OUT}/{API_SOCKET}" and is_vm_id(vm_id)
        if not jailed or not is_firecracker(argv[0]):
            return None
        for directory in self._runtime_dirs:
            if (directory / vm_id).is_dir():
                return directory / vm_id / "control.sock"
        return None


def _make_out(machine: Machine) -> Path:
    """An empty directory for what the machine's Firecracker makes, beside its logs: what is moved
    from there stays on its file system."""
    out = machine.console_log.with_name("jail")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(mode=0o700)
    return out


def _out_of(control_socket: Path) -> Path:
    return control_socket.readlink().parent


@contextmanager
def _opened(machine: Machine, lent: Mapping[str, Lent], out: Path) -> Iterator[tuple[int, ...]]:
    """Descriptors of all that a jail is made of, in the order of `LaunchJail`."""
    log_flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    wanted = [
        (out, os.O_RDONLY | os.O_DIRECTORY),
        (machine.console_log, log_flags),
        (machine.hypervisor_log, log_flags),
        *((each.path, os.O_RDONLY if each.read_only else os.O_RDWR) for each in lent.values()),
    ]
    with ExitStack() as opened:
        descriptors = []
        for path, flags in wanted:
            try:
                descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise Unavailable(f"{path} cannot be lent to a jail: {error.strerror}") from error
            opened.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield tuple(descriptors)


def _ended(pidfd: int) -> asyncio.Future[None]:
    """Done when the process has ended; it closes the descriptor then."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def note() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(pidfd, note)
    return ended


def _take(made: Path, path: Path) -> None:
    """Have at `path` what a Firecracker, which a guest may have taken over, has made.

    Raises OSError.
    """
    if stat.S_ISSOCK(made.lstat().st_mode):
        path.unlink(missing_ok=True)
        path.symlink_to(made)
        return
    try:
        made.rename(path)
    except OSError:  # another file system
        with suppress(FileNotFoundError):
            path.unlink()
        descriptor = os.open(made, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as source, path.open("xb") as copy:
            shutil.copyfileobj(source, copy)
        made.unlink()
    # Now it is out of the jail's reach: a link could lead to any file of ours.
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        path.unlink()
        raise OSError(None, "it is not a file of its own")
