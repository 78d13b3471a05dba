"""Firecracker in a jail: started by its jailer, as a user of its own, by who has the privileges.

Inside, it knows files by the same names as outside a jail (`firecracker_place`); what it makes, its
sockets too, is in a directory of the machine's that the two sides share, and whose files belong to
the daemon's user outside and to the machine's inside. Outside, sockets are known by links to those.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from banger.base import procfs
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, PreconditionFailed, Unavailable
from banger.base.files import remove_hostile_tree
from banger.base.jail import API_SOCKET, HIDDEN, HIDDEN_HINT, OUT, TAP, has_jail
from banger.base.log import get_logger
from banger.base.procfs import Process
from banger.drivers.base import Check, Level, Machine, NetworkAttachment
from banger.drivers.hypervisor.firecracker_place import (
    Lent,
    Started,
    check_name,
    closing_tap,
    prepare_links,
)
from banger.hostops.ops import CheckJail, EndJail, HostOps, InJail, LaunchJail

_COPY_BYTES = 1 << 20
_WITHOUT = (
    "to do without a jail, for debugging: jailer_enabled = false; or without Firecracker:"
    ' hypervisor = "qemu"'
)


class Jailed:
    """Implements `Place` with a jail."""

    has_own_devices = True

    def __init__(self, host: HostOps, runtime_dirs: Sequence[Path], jails_dir: Path) -> None:
        """`host` makes jails. The sockets of a machine are in a directory with its id, in one of
        `runtime_dirs`, or where an earlier daemon had its own; these may go while it runs.
        `jails_dir`, which stays, says which jails are ours, and where those sockets are: another
        home's daemon has control groups of the same user."""
        self._host = host
        self._runtime_dirs = tuple(runtime_dirs)
        self._jails_dir = jails_dir
        #: The Firecracker that the privileged side has found, and which file that was.
        self._found: tuple[str, tuple[int, ...]] | None = None
        #: By machine's id, for as long as somebody has or awaits it: who makes the traces by which
        #: a jail is known, or ends one and takes them away.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def program(self) -> str:
        """See `Place.program`: the privileged side's, which the user's setting does not name.

        It is remembered until the file there is another, and `check` asks anew. Nothing but the
        shape of machines depends on it: who makes a jail looks himself at all that it takes.
        """
        if self._found is not None:
            path, identity = self._found
            if identity and _identity(path) == identity:
                return path
        return await self._ask()

    async def _ask(self) -> str:
        # An installation's helper that is not there is being started again: asking waits for that.
        if self._host.problem and not self._host.installed:
            raise PreconditionFailed(
                f"nobody can put Firecracker into a jail: {self._host.problem}",
                hint=f"{self._host.hint}; {_WITHOUT}",
            )
        path = (await self._host.perform(CheckJail())).name
        check_name(path)
        self._found = path, _identity(path)
        return path

    async def check(self) -> Check:
        """See `Place.check`: that there is a jail, and that we can see who is in it."""
        await self._ask()
        if procfs.hides_others():
            return Check("jailer", Level.FAIL, HIDDEN, f"{HIDDEN_HINT}; {_WITHOUT}")
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
            if procfs.hides_others():
                raise PreconditionFailed(HIDDEN, hint=f"{HIDDEN_HINT}; {_WITHOUT}")
            async with self._lock(machine.vm_id):
                prepare_links(machine, lent)
                out = await _make_out(machine)
                # Before there is a jail: by these it is known that there may be one.
                self._make_mark(machine, out)
                machine.control_socket.symlink_to(out / API_SOCKET)
        if network is not None:
            os.close(network.fd)  # with which the tap goes: another interface gets its name
        launch = LaunchJail(
            vm_id=machine.vm_id,
            vcpu_count=machine.vcpu_count,
            memory_mib=machine.memory_mib,
            files=tuple(InJail(name=name, read_only=each.read_only) for name, each in lent.items()),
            bridge=network.tap.partition("-")[0] if network is not None else "",
            tap=network.tap if network is not None else "",
        )
        with _opened(machine, lent, out) as descriptors:
            try:
                done = await self._host.perform(launch.with_descriptors(descriptors))
            except BaseException:
                # Whoever was asked may do it, or have done it, though we were not told.
                await to_its_end(self._try_to_clear(machine.control_socket))
                raise
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
        """See `Place.quit`: nothing is left to be cleared then."""
        await self.clear(control_socket)

    async def clear(self, control_socket: Path) -> None:
        """See `Place.clear`.

        Several may be under way at once, for a VM is killed without its lock. One that lags behind
        must not take away what leads to the machine's next jail.
        """
        vm_id = control_socket.parent.name
        async with self._lock(vm_id):
            traced = self.runs(control_socket) or self._mark(vm_id).exists()
            # It may have been made after it was ended and its traces were gone.
            if traced or has_jail(vm_id, os.getuid()):
                await self._clear(vm_id, control_socket)

    async def _clear(self, vm_id: str, control_socket: Path) -> None:
        await self._end_jail(vm_id)
        traces, out = [self._mark(vm_id)], self._noted(vm_id).out
        if self.runs(control_socket):
            traces.append(control_socket)
            out = _out_of(control_socket)
        await self._remove_out(vm_id, out)
        for trace in traces:
            trace.unlink(missing_ok=True)

    async def _remove_out(self, vm_id: str, out: Path | None) -> None:
        try:
            if out is not None:
                # A thread goes on when its caller is cancelled: in the next jail's files, too.
                await to_its_end(asyncio.to_thread(remove_hostile_tree, out))
        except OSError as error:
            get_logger().warning("a jail's files stay", vm_id=vm_id, error=str(error))

    async def _try_to_clear(self, control_socket: Path) -> None:
        try:
            await self.clear(control_socket)
        except BangerError as error:
            vm_id = control_socket.parent.name
            get_logger().error("jail not ended", vm_id=vm_id, error=error.message)

    async def _end_jail(self, vm_id: str) -> None:
        """Raises BangerError when nobody can, and there is somebody in it."""
        try:
            await self._host.perform(EndJail(vm_id=vm_id))
        except BangerError as error:
            if has_jail(vm_id, os.getuid()):
                raise
            get_logger().warning("jail not cleared", vm_id=vm_id, error=error.message)

    async def end_strays(self, running: Collection[str]) -> None:
        """See `Place.end_strays`: a jail is known by its control group, whatever else is gone."""
        marks = sorted(self._jails_dir.iterdir()) if self._jails_dir.is_dir() else []
        for mark in marks:
            if mark.name in running:
                continue
            try:
                if has_jail(mark.name, os.getuid()):
                    get_logger().warning("a jail that nobody knows", vm_id=mark.name)
                    await self._end_jail(mark.name)
                # Its sockets, which lead there, may have gone with the host's last run.
                await self._remove_out(mark.name, self._noted(mark.name).out)
                mark.unlink()
            except (BangerError, OSError) as error:
                get_logger().error("jail not ended", vm_id=mark.name, error=str(error))

    def _lock(self, vm_id: str) -> asyncio.Lock:
        return self._locks.setdefault(vm_id, asyncio.Lock())

    def _make_mark(self, machine: Machine, out: Path) -> None:
        mark, sockets = self._mark(machine.vm_id), machine.control_socket.parent.parent
        try:
            self._jails_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            mark.write_bytes(b"\0".join((os.fsencode(sockets), os.fsencode(out))))
        except OSError as error:
            raise Unavailable(f"{mark} cannot be made: {error.strerror}") from error

    def _mark(self, vm_id: str) -> Path:
        return self._jails_dir / vm_id

    def name_of(self, path: Path) -> str:
        """See `Place.name_of`."""
        return f"{OUT}/{path.name}"

    def metrics(self, control_socket: Path) -> Path:
        """See `Place.metrics`: it stays where it was made."""
        return _out_of(control_socket) / "metrics"

    async def discard(self, control_socket: Path, path: Path) -> None:
        """See `Place.discard`. A directory, which no Firecracker makes, stays as long as the jail:
        whoever is in there could fill it for as long as it is emptied."""
        try:
            made = _out_of(control_socket) / path.name
            await asyncio.to_thread(made.unlink, missing_ok=True)  # a link itself, where it is one
        except OSError as error:
            vm_id = control_socket.parent.name
            get_logger().warning("a jail's file stays", vm_id=vm_id, error=str(error))

    async def collect(self, control_socket: Path, path: Path) -> None:
        """See `Place.collect`. Raises Unavailable for what no Firecracker makes; nothing is at
        `path` then."""
        try:
            await asyncio.to_thread(_take, _out_of(control_socket) / path.name, path)
        except OSError as error:
            await asyncio.to_thread(_remove, path)
            raise Unavailable(f"Firecracker's {path.name} cannot be had: {error}") from error

    def control_socket(self, process: Process) -> Path | None:
        """See `Place.control_socket`: by whose jail it is, in the directory that there is."""
        if process.jail:
            noted = self._noted(process.jail).sockets
            for directory in (noted, *self._runtime_dirs):
                if directory is not None and (directory / process.jail).is_dir():
                    return directory / process.jail / "control.sock"
        return None

    def _noted(self, vm_id: str) -> _Noted:
        try:
            words = self._mark(vm_id).read_bytes().split(b"\0")
        except OSError:  # it is not ours
            words = []
        paths = [Path(os.fsdecode(word)) if word.startswith(b"/") else None for word in words]
        return _Noted(*paths[:2])


@dataclass(frozen=True)
class _Noted:
    """What a mark says: where the directory with a machine's sockets is, and what its jail makes.
    Marks of earlier versions are empty."""

    sockets: Path | None = None
    out: Path | None = None


def _identity(path: str) -> tuple[int, ...]:
    """Which file a program is; of none, nothing."""
    try:
        status = os.stat(path)  # noqa: PTH116 - pathlib is no faster here
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


async def _make_out(machine: Machine) -> Path:
    """An empty directory for what the machine's Firecracker makes, beside its logs: what is moved
    from there stays on its file system."""
    out = machine.console_log.with_name("jail")
    try:
        await to_its_end(asyncio.to_thread(remove_hostile_tree, out))
        out.mkdir(mode=0o700)
    except OSError as error:
        raise Unavailable(f"{out} cannot be made anew: {error.strerror}") from error
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
    # A pipe would keep us waiting; a link could lead to any file of ours.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(made, flags), "rb") as source:
        status = os.fstat(source.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise OSError(errno.EINVAL, "it is not a file of its own")
        os.fchmod(source.fileno(), 0o600)
        try:
            made.rename(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            path.unlink(missing_ok=True)
            new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(path, new, 0o600), "wb") as copy:
                _copy_data(source.fileno(), copy.fileno(), status.st_size)
            made.unlink()
            return
        # Now it is out of the jail's reach, which may have put another in its place.
        moved, status = path.lstat(), os.fstat(source.fileno())
        if (moved.st_dev, moved.st_ino, status.st_nlink) != (status.st_dev, status.st_ino, 1):
            raise OSError(errno.EINVAL, "it is not a file of its own")


def _copy_data(source: int, copy: int, size: int) -> None:
    """Copy what is no hole: one may say that it is as large as it likes."""
    os.ftruncate(copy, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        while start < end:
            data = os.pread(source, min(end - start, _COPY_BYTES), start)
            if not data:
                return  # it was cut meanwhile
            start += os.pwrite(copy, data, start)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_hostile_tree(path)
    else:
        path.unlink(missing_ok=True)
