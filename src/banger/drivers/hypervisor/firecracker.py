"""Firecracker as a hypervisor: starts its processes, tells them of machines, ends them.

The process outlives the daemon. Where it runs, and who starts and ends it, is a `Place`'s business.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, PreconditionFailed, Unavailable
from banger.base.log import get_logger
from banger.base.paths import check_socket_path
from banger.base.procfs import Process
from banger.drivers.base import (
    Capture,
    Check,
    Disk,
    DiskFormat,
    HypervisorFeatures,
    Level,
    Link,
    Machine,
    MachineLost,
    MachineStatus,
    NetworkAttachment,
    StateRefused,
    Traffic,
)
from banger.drivers.hypervisor import firecracker_machine as told
from banger.drivers.hypervisor.firecracker_api import FirecrackerClient, conversation
from banger.drivers.hypervisor.firecracker_faults import FirecrackerRefused
from banger.drivers.hypervisor.firecracker_metrics import Meter
from banger.drivers.hypervisor.firecracker_place import (
    Ended,
    Lent,
    Place,
    closing_tap,
    disks_of,
    not_executable,
)
from banger.drivers.hypervisor.firecracker_requests import (
    VCPU_MAX,
    Action,
    ActionType,
    DriveUpdate,
    InstanceState,
    Metrics,
    SetState,
    SnapshotCreate,
    VmState,
)
from banger.drivers.hypervisor.kvm import KvmProbe
from banger.drivers.hypervisor.process_log import Log, how_it_ended
from banger.drivers.hypervisor.processor import processor
from banger.guest import vsock

_FALLOCATE = "fallocate"

#: Releases that are known to work: from the first one that can be told another vsock's path when a
#: state is loaded (1.16) and then loses none of what is on its way (1.16.1), to the last one whose
#: API this was written to.
VERSION_FIRST = (1, 16, 1)
VERSION_LAST = (1, 16)

#: 10 ms are usual; a host that swaps may take seconds.
_LAUNCH_TIMEOUT_S = 30.0
#: Nobody tells when its socket is there.
_LOOK_AGAIN_S = 0.002
_VERSION_TIMEOUT_S = 10.0
_DIG_TIMEOUT_S = 120.0


class FirecrackerHypervisor:
    """Implements `drivers.base.Hypervisor`."""

    name = "firecracker"
    features = HypervisorFeatures(
        disk_formats=frozenset({DiskFormat.RAW}),
        links=frozenset({Link.TAP}),
        vcpu_max=VCPU_MAX,
        agent_vsock_port=vsock.AGENT_PORT,
        # After a bare pause and resume 1.16.1 delivers nothing to the guest's vsock until that has
        # told of an event (`Vsock::kick`); mended upstream since.
        holds_well=False,
    )

    def __init__(
        self,
        place: Place,
        probe: Callable[[], Awaitable[KvmProbe]],
        *,
        earlier: Sequence[Place] = (),
    ) -> None:
        """Machines are started in `place`; `earlier` are those where some may run that an earlier
        daemon has started. `probe` says whether KVM runs guests."""
        self._place = place
        self._places = (place, *earlier)
        self._probe = probe
        self._probing = asyncio.Lock()
        #: By the program's inode, size and time: what it says of its release.
        self._versions: dict[tuple[int, int, int], tuple[int, ...]] = {}
        #: By control socket.
        self._meters: dict[Path, Meter] = {}

    async def checks(self) -> list[Check]:
        """Firecracker itself and its release, KVM, and where its processes run."""
        program, *jail = await self.program_checks()
        return [program, await self.accelerator_check(), *jail]

    async def program_checks(self) -> list[Check]:
        """Firecracker itself and its release first; then where its processes run, unless that is
        why there is no program to be looked at."""
        name = "hypervisor firecracker"
        try:
            jail = await self._place.check()
        except BangerError as error:
            return [Check(name, Level.FAIL, error.message, error.hint)]
        try:
            path, version = await self._known()
        except BangerError as error:
            return [Check(name, Level.FAIL, error.message, error.hint), jail]
        return [Check(name, Level.OK, f"{path}, v{'.'.join(map(str, version))}"), jail]

    async def accelerator_check(self) -> Check:
        """KVM. That it is not proved, as the daemon may not open the device, is no failure where
        machines have a node of their own."""
        name = "accelerator"
        async with self._probing:  # one probe: beside others it would take longer
            answer = await self._probe()
        if answer.usable:
            return Check(name, Level.OK, f"kvm: {answer.detail}")
        if answer.denied and self._place.has_own_devices:
            detail = f"kvm, not proved to run guests: {answer.detail}, though by jailed machines"
            return Check(name, Level.WARN, detail, f"to have it tried, {answer.hint}")
        hint = "; ".join(filter(None, (answer.hint, 'without KVM: hypervisor = "qemu"')))
        return Check(name, Level.FAIL, answer.detail, hint)

    async def _known(self) -> tuple[str, tuple[int, ...]]:
        """The program and its release. Raises PreconditionFailed for one that is not known to
        work."""
        path = await self._place.program()
        version = await self._version(path)
        if version < VERSION_FIRST or version[:2] > VERSION_LAST:
            first, last = (".".join(map(str, each)) for each in (VERSION_FIRST, VERSION_LAST))
            raise PreconditionFailed(
                f"{path} is Firecracker v{'.'.join(map(str, version)) or '?'}, which banger has not"
                f" been made for: v{first} and later ones of v{last} are",
                hint="set firecracker_bin to the path of such a release",
            )
        return path, version

    async def _version(self, path: str) -> tuple[int, ...]:
        """The release of a program, which is asked once. Raises PreconditionFailed for one that we
        cannot execute: who makes jails, and has found it, is root."""
        try:
            there = os.stat(path)  # noqa: PTH116 - pathlib is no faster here
            key = (there.st_ino, there.st_size, there.st_mtime_ns)
            if key in self._versions:
                return self._versions[key]
            if not os.access(path, os.X_OK):  # which `proc` would take for not installed
                raise not_executable(path)
            said = await proc.run(
                [path, "--version"], timeout_s=_VERSION_TIMEOUT_S, env=proc.BARE_ENVIRONMENT
            )
        except PermissionError as error:
            raise not_executable(path) from error
        except OSError as error:
            raise Unavailable(f"{path} cannot be executed: {error.strerror or error}") from error
        self._versions[key] = parse_version(said.stdout)
        return self._versions[key]

    async def launch(self, machine: Machine, network: NetworkAttachment | None) -> int:
        """See `Hypervisor.launch`. The descriptor of `network` is closed here in any case.

        The memory is the process's own: `save` writes it to the machine's memory file.
        """
        agent = self._place.name_of(machine.agent_socket)
        requests = told.boot_requests(machine, self._interface(network), agent)
        async with self._started(machine, network, told.lent_for_boot(machine)) as begun:
            for request in requests:
                await begun.client.tell(request)
            await self._place.collect(machine.control_socket, machine.agent_socket)
        return begun.pid

    async def restore(
        self, machine: Machine, network: NetworkAttachment | None, state: Path
    ) -> int:
        """See `Hypervisor.restore`. The descriptor of `network` is closed here in any case."""
        assert machine.memory_file is not None
        agent = self._place.name_of(machine.agent_socket)
        lent = told.lent_for_restore(machine, state, machine.memory_file.path)
        failure: type[Unavailable] = Unavailable
        try:
            async with self._started(machine, network, lent) as begun:
                failure = StateRefused
                for request in told.restore_requests(self._interface(network), agent):
                    await begun.client.tell(request)
                await _grow(begun.client, machine.disks)
                await self._place.collect(machine.control_socket, machine.agent_socket)
                failure = MachineLost
                await begun.client.tell(SetState(state=VmState.RESUMED))
        except Unavailable as error:
            if failure is StateRefused and not isinstance(error, FirecrackerRefused):
                raise  # a tap, a disk, the process itself: the state may be good
            raise failure(error.message, hint=error.hint) from error
        except PreconditionFailed as error:
            if failure is not StateRefused:
                raise
            raise failure(error.message, hint=error.hint) from error
        except OSError as error:
            if failure is not MachineLost:
                raise
            raise MachineLost(f"{machine.control_socket}: {error}") from error
        return begun.pid

    @asynccontextmanager
    async def _started(
        self, machine: Machine, network: NetworkAttachment | None, lent: Mapping[str, Lent]
    ) -> AsyncIterator[_Begun]:
        """A process that answers, to be told of its machine in the block. When that fails it is
        ended, and what it has logged and printed is in the error."""
        with closing_tap(network):
            for path in (machine.control_socket, machine.agent_socket):
                check_socket_path(path)
            await self._known()
            # Before it is started, which in a jail takes so long that it may have ended by then.
            logs = (Log(machine.hypervisor_log, anew=True), Log(machine.console_log))
        process = await self._place.start(machine, lent, network)
        try:
            await _listens(machine.control_socket, process.ended)
            async with conversation(machine.control_socket) as client:
                await _answers(client, process.ended)
                await self._begin_to_count(client, machine.control_socket)
                yield _Begun(client, process.pid)
            if network is not None:
                self._place.has_tap(process, network)
        except BaseException as error:
            # That it ends by itself now says more.
            await asyncio.shield(asyncio.wait({process.ended}, timeout=_LOOK_AGAIN_S))
            ended = process.ended
            how = how_it_ended(ended.result()) if ended.done() else "was ended for that"
            await asyncio.shield(self._place.end(machine, process, network))
            if isinstance(error, Unavailable) and not isinstance(error, FirecrackerRefused):
                raise _with_logs(error, how, logs) from error
            raise

    def _interface(self, network: NetworkAttachment | None) -> told.Interface | None:
        if network is None:
            return None
        return told.Interface(self._place.tap_of(network), network.guest.mac)

    async def save(self, machine: Machine, state: Path) -> None:
        """See `Hypervisor.save`."""
        assert machine.memory_file is not None
        async with conversation(machine.control_socket) as client:
            await client.tell(SetState(state=VmState.PAUSED))
            await self._write(client, machine.control_socket, state, machine.memory_file.path)
        await _dig_holes(machine.memory_file.path)

    async def capture(
        self,
        control_socket: Path,
        pid: int,  # noqa: ARG002 - of the protocol
        capture: Capture,
        stages: Callable[[str], None],
    ) -> float:
        """See `Hypervisor.capture`. Firecracker writes all of the memory while it is paused."""
        if capture.overlays:
            raise Unavailable("Firecracker's disks have no layers")
        async with conversation(control_socket) as client:
            stages("freeze")
            began = time.monotonic()
            try:
                # One request at a time: the machine could not be let run on while it is written.
                await to_its_end(self._paused(client, control_socket, capture))
                if capture.at_rest is not None:
                    await capture.at_rest()
            except BaseException:
                # The machine is not left paused by a cancellation, either.
                await to_its_end(_try_to_resume(client, control_socket))
                raise
            if capture.runs_on:
                await to_its_end(client.tell(SetState(state=VmState.RESUMED)))
            paused_s = time.monotonic() - began
        await _dig_holes(capture.memory)
        return paused_s

    async def _paused(
        self, client: FirecrackerClient, control_socket: Path, capture: Capture
    ) -> None:
        await client.tell(SetState(state=VmState.PAUSED))
        await self._write(client, control_socket, capture.state, capture.memory)

    async def _write(
        self, client: FirecrackerClient, control_socket: Path, state: Path, memory: Path
    ) -> None:
        place = self._of(control_socket)
        names = [place.name_of(path) for path in (state, memory)]
        try:
            await client.tell(SnapshotCreate(snapshot_path=names[0], mem_file_path=names[1]))
            for path in (state, memory):
                await place.collect(control_socket, path)
        except BaseException:
            # It may have filled the disk, and make no room before its machine ends.
            await to_its_end(self.discard(control_socket, (state, memory)))
            raise

    async def discard(self, control_socket: Path, paths: Collection[Path]) -> None:
        """See `Hypervisor.discard`."""
        place = self._of(control_socket)
        for path in paths:
            await place.discard(control_socket, path)

    async def disks(self, control_socket: Path) -> dict[str, Path]:
        """See `Hypervisor.disks`: those that it was started with, for there are no layers."""
        async with conversation(control_socket) as client:
            await client.instance()
        try:
            return disks_of(control_socket)
        except OSError as error:
            raise Unavailable(f"the disks of {control_socket} are not known: {error}") from error

    async def collapse(
        self,
        control_socket: Path,
        disk: str,
        tell: Callable[[float], None],  # noqa: ARG002 - of the protocol
    ) -> None:
        """See `Hypervisor.collapse`: there is nothing that lies between a disk and its image."""
        raise Unavailable(f"the {disk} disk of {control_socket} has no layers")

    async def shape(self, machine: Machine, link: Link | None) -> str:
        """See `Hypervisor.shape`: a digest of the machine, Firecracker itself and the processor."""
        path, _ = await self._known()
        program = os.stat(path)  # noqa: PTH116 - pathlib is no faster here
        parts = (
            msgspec.json.encode(told.shape_of(machine, link)).decode(),
            *(str(program.st_size), str(program.st_mtime_ns)),
            processor(),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    async def quit(self, control_socket: Path) -> None:
        """See `Hypervisor.quit`."""
        await self._of(control_socket).quit(control_socket)

    async def clear(self, control_socket: Path) -> None:
        """See `Hypervisor.clear`: in each place, for its socket, which tells where it runs, may be
        gone."""
        for place in self._places:
            await place.clear(control_socket)

    async def end_strays(self, running: Collection[str]) -> None:
        """See `Hypervisor.end_strays`."""
        for place in self._places:
            await place.end_strays(running)

    def _of(self, control_socket: Path) -> Place:
        """Where a machine runs."""
        return next((each for each in self._places if each.runs(control_socket)), self._place)

    async def power_button(self, control_socket: Path) -> None:
        """See `Hypervisor.power_button`: Ctrl-Alt-Del on a keyboard, which systemd listens to."""
        async with conversation(control_socket) as client:
            await client.tell(Action(action_type=ActionType.SEND_CTRL_ALT_DEL))

    async def status(self, control_socket: Path) -> MachineStatus:
        """See `Hypervisor.status`. A full disk holds nothing here: the guest is told of it."""
        async with conversation(control_socket) as client:
            state = (await client.instance()).state
        return MachineStatus.RUNNING if state is InstanceState.RUNNING else MachineStatus.PAUSED

    async def traffic(self, control_socket: Path) -> Traffic:
        """See `Hypervisor.traffic`: from the first time on that this is asked."""
        async with conversation(control_socket) as client:
            await client.tell(Action(action_type=ActionType.FLUSH_METRICS))
        try:
            return await asyncio.to_thread(self._meter(control_socket).read)
        except OSError as error:
            raise Unavailable(f"what Firecracker counts cannot be read: {error}") from error

    async def drain(self, control_socket: Path) -> None:
        """See `Hypervisor.drain`: it adds to a file, as long as it runs."""
        try:
            await asyncio.to_thread(self._meter(control_socket).drain)
        except OSError as error:
            raise Unavailable(f"what Firecracker counts cannot be read: {error}") from error

    def _meter(self, control_socket: Path) -> Meter:
        """Raises OSError where there is no such machine any more."""
        path = self._of(control_socket).metrics(control_socket)
        meter = self._meters.get(control_socket)
        if meter is None or meter.path != path:  # it may run in another place than before
            meter = Meter(path)
            there = {key: other for key, other in self._meters.items() if other.path.exists()}
            self._meters = there | {control_socket: meter}
        return meter

    async def _begin_to_count(self, client: FirecrackerClient, control_socket: Path) -> None:
        path = self._place.metrics(control_socket)
        path.unlink(missing_ok=True)
        await client.tell(Metrics(metrics_path=self._place.name_of(path)))

    async def pause(self, control_socket: Path) -> None:
        """See `Hypervisor.pause`."""
        async with conversation(control_socket) as client:
            await client.tell(SetState(state=VmState.PAUSED))

    async def resume(self, control_socket: Path) -> None:
        """See `Hypervisor.resume`."""
        async with conversation(control_socket) as client:
            await client.tell(SetState(state=VmState.RESUMED))

    def control_socket(self, process: Process) -> Path | None:
        """See `Hypervisor.control_socket`."""
        found = (place.control_socket(process) for place in self._places)
        return next((each for each in found if each is not None), None)


@dataclass(frozen=True)
class _Begun:
    """A process that waits to be told of its machine."""

    client: FirecrackerClient
    pid: int


def parse_version(output: bytes) -> tuple[int, ...]:
    """The release in what ``firecracker --version`` prints; empty when there is none in it."""
    found = re.match(rb"Firecracker v(\d{1,6})\.(\d{1,6})\.(\d{1,6})", output)
    return tuple(map(int, found.groups())) if found else ()


async def _listens(control_socket: Path, ended: Ended) -> None:
    """Return when there is a socket, or none will be."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _LAUNCH_TIMEOUT_S
    while not (ended.done() or loop.time() > until):
        if control_socket.exists():  # noqa: ASYNC240 - a look at what is in memory
            return
        await asyncio.wait({ended}, timeout=_LOOK_AGAIN_S)


async def _answers(client: FirecrackerClient, ended: Ended) -> None:
    """Return as soon as the process answers. Raises Unavailable when it ends or hangs."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _LAUNCH_TIMEOUT_S
    while True:
        try:
            await client.instance()
        except Unavailable:
            if ended.done() or loop.time() > until:
                raise
        else:
            return
        await asyncio.wait({ended}, timeout=_LOOK_AGAIN_S)


def _with_logs(error: Unavailable, how: str, logs: Sequence[Log]) -> Unavailable:
    said = "\n".join(tail for log in logs if (tail := log.tail()))
    where = " and ".join(str(log.path) for log in logs)
    return Unavailable(
        f"{error.message}; it {how}{': ' if said else ''}{said}; inspect {where}",
        hint=error.hint,
    )


async def _grow(client: FirecrackerClient, disks: Sequence[Disk]) -> None:
    """Have disks be as large as they are to be; the guest's driver is told of it."""
    for disk in disks:
        if disk.size_mib and disk.path.stat().st_size < disk.size_mib << 20:
            await asyncio.to_thread(os.truncate, disk.path, disk.size_mib << 20)
            path = told.disk_name(disk.name)
            await client.tell(DriveUpdate(drive_id=disk.name, path_on_host=path))


async def _try_to_resume(client: FirecrackerClient, control_socket: Path) -> None:
    """What went wrong before says more than that this does, too."""
    try:
        await client.tell(SetState(state=VmState.RESUMED))
    except BangerError as error:
        socket = str(control_socket)
        get_logger().error("machine stays paused", control_socket=socket, error=error.message)


async def _dig_holes(memory: Path) -> None:
    """Give back what is all zeros: Firecracker writes pages that the guest has never used, too."""
    try:
        await proc.run([_FALLOCATE, "--dig-holes", memory], timeout_s=_DIG_TIMEOUT_S)
    except BangerError as error:  # not every file system can
        get_logger().warning("memory not made sparse", path=str(memory), error=error.message)
