"""Processes, drivers and a guest agent in memory: what services are tested with.

`Processes` stands in for the kernel's table: pids that no real process has, pidfds that are pipes.
The agent speaks the real protocol on a real Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from banger.base import jail, procfs
from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.jail import jail_uid, parent_group
from banger.base.model import DiskDevices, Egress, NetworkMode, Reach
from banger.drivers.base import (
    Capture,
    Check,
    DiskFormat,
    GuestNetwork,
    HypervisorFeatures,
    Layering,
    Level,
    Link,
    Machine,
    MachineStatus,
    NetworkAttachment,
    Networks,
    Plug,
    Plugged,
    Room,
    Traffic,
)
from banger.guest import requests
from banger.guest.frames import (
    FRAME_LIMIT_BYTES,
    HEADER,
    HELLO_MAGIC,
    FrameType,
    encode,
    parse_fields,
)
from banger.guest.frames import field as hello_field

#: Above any pid_max: no real process can be hit by mistake.
_FIRST_PID = 1 << 30

#: Within which a hypervisor has to answer.
ANSWER_TIMEOUT_S = 0.05

EXIT_0 = bytes(5)


class Processes:
    """The kernel's process table, as `procfs` shows it."""

    def __init__(self) -> None:
        self.argv: dict[int, tuple[str, ...]] = {}
        self.ticks: dict[int, int] = {}
        self.killed: list[int] = []
        self.immortal: set[int] = set()
        #: The ids of machines in jails, and pids of theirs that /proc does not show.
        self.hidden: dict[str, set[int]] = {}
        #: What else happens when a process ends: its sockets close, its network helper ends.
        self.on_end: dict[int, Callable[[], None]] = {}
        self._pidfds: dict[int, tuple[int, int]] = {}
        self._next = _FIRST_PID

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(procfs, "start_ticks", lambda pid: self.ticks.get(pid, 0))
        patch.setattr(procfs, "usage", self._usage)
        patch.setattr(procfs, "look_at", lambda pid: procfs.Process(self.argv.get(pid, ())))
        patch.setattr(procfs, "own_processes", self._own)
        patch.setattr(procfs, "hidden_machines", lambda: self.hidden)
        patch.setattr(procfs, "open_pidfd", self._open)
        patch.setattr(procfs, "kill", self._kill)

    def start(self, *argv: str) -> int:
        self._next += 1
        self.argv[self._next] = argv
        self.ticks[self._next] = self._next * 10
        return self._next

    def end(self, pid: int) -> None:
        """The process ends: its pidfds become readable. Idempotent."""
        self.argv.pop(pid, None)
        self.ticks.pop(pid, None)
        for readable, (writable, of) in list(self._pidfds.items()):
            if of == pid:
                os.close(writable)
                del self._pidfds[readable]
        if then := self.on_end.pop(pid, None):
            then()

    def alive(self, pid: int) -> bool:
        return pid in self.argv

    def close(self) -> None:
        for pid in {pid for _, pid in self._pidfds.values()}:
            self.end(pid)

    def _usage(self, pid: int, expected_start_ticks: int) -> procfs.ProcessUsage | None:
        if self.ticks.get(pid) != expected_start_ticks:
            return None
        return procfs.ProcessUsage(cpu_s=1.0, resident_bytes=1 << 20)

    def _own(self) -> Iterator[tuple[int, procfs.Process]]:
        return iter([(pid, procfs.Process(argv)) for pid, argv in self.argv.items()])

    def _open(self, pid: int, is_it: Callable[[procfs.Process], bool]) -> int:
        if pid not in self.argv or not is_it(procfs.look_at(pid)):
            return -1
        readable, writable = os.pipe()
        if before := self._pidfds.get(readable):  # its reader has closed it: the number is free
            os.close(before[0])
        self._pidfds[readable] = (writable, pid)
        return readable

    async def _kill(self, pidfd: int, timeout_s: float = 5.0) -> bool:
        if pidfd in self._pidfds:
            _, pid = self._pidfds[pidfd]
            self.killed.append(pid)
            if pid in self.immortal:
                return False
            self.end(pid)
        return True


class JailedProcess:
    """What a /proc at `proc`, which is read instead of the kernel's, says of one process with a
    jail's uid: pid 7."""

    def __init__(self, proc: Path, vm_id: str, patch: pytest.MonkeyPatch) -> None:
        self._of_it, self._vm_id = proc / "7", vm_id
        self._of_it.mkdir(parents=True)
        for module in (procfs, jail):
            patch.setattr(module, "_PROC", proc)
        real, shown = Path.stat, os.stat_result((0o40555, 0, 0, 0, jail_uid(vm_id), 0, 0, 0, 0, 0))

        def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if path == self._of_it:
                return shown  # only root could have it so
            return real(path, follow_symlinks=follow_symlinks)

        patch.setattr(Path, "stat", stat)

    def says(
        self,
        *argv: str,
        name: str = "firecracker",
        state: str = "S (sleeping)",
        namespaces: str = "7\t1",
        group: str = "",
    ) -> None:
        """By default it is the machine of its jail."""
        group = group or f"{parent_group(os.getuid())}/{self._vm_id}"
        status = f"Name:\t{name}\nUmask:\t0077\nState:\t{state}\nNSpid:\t{namespaces}\n"
        for file, text in (
            ("cmdline", "\0".join(argv)),
            ("status", status),
            ("cgroup", f"0::/{group}\n"),
        ):
            (self._of_it / file).write_bytes(text.encode())

    def ends(self) -> None:
        (self._of_it / "status").unlink()


class Gate:
    """A point that work passes, fails at, or stays at until it is cancelled."""

    def __init__(self) -> None:
        self.fail: BaseException | None = None
        self.block = False
        self.reached = asyncio.Event()

    async def passed(self) -> None:
        self.reached.set()
        await asyncio.sleep(0)  # whatever a driver does, others have their turn meanwhile
        if self.fail is not None:
            raise self.fail
        if self.block:
            await asyncio.Event().wait()


Answer = Callable[[bytes], bytes | None]


class Agent:
    """A guest agent on a machine's agent socket. What it answers is by kind of OPEN."""

    def __init__(self) -> None:
        self.silent = False
        self.opened: list[int] = []
        #: The fields of each SETUP, by tag.
        self.setups: list[dict[int, bytes]] = []
        #: The payload of each EXEC.
        self.programs: list[bytes] = []
        #: kind -> payload of the EXIT; None never answers. Others are answered with EXIT 0.
        self.exits: dict[int, bytes | None] = {}
        self.stdout: dict[int, bytes] = {}
        #: What a SHUTDOWN does instead of ending the machine.
        self.on_shutdown: Callable[[], None] | None = None
        #: Ends the machine behind an agent's socket.
        self.power_offs: dict[Path, Callable[[], None]] = {}
        self._servers: dict[Path, asyncio.Server] = {}
        self._tasks: dict[asyncio.Task[None], Path] = {}

    async def listen(self, path: Path) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(path, reader, writer))
            self._tasks[task] = path
            task.add_done_callback(self._tasks.pop)
            # One that is cancelled before its first step closes nothing itself.
            task.add_done_callback(lambda _: writer.transport.abort())

        if path in self._servers:  # of a launch that was cancelled just here
            self.hang_up(path)
        server = self._servers[path] = await asyncio.start_unix_server(
            accept, path, limit=1 << 20, start_serving=False
        )
        await server.start_serving()

    def hang_up(self, path: Path) -> None:
        """The machine behind this socket is gone."""
        server, loop = self._servers.pop(path), asyncio.get_running_loop()
        for listening in server.sockets:
            loop.remove_reader(listening.fileno())
        path.unlink(missing_ok=True)
        # What was accepted in this step of the loop belongs to the server in the next: Python 3.11
        # would leak it if that were closed by then.
        loop.call_soon(loop.call_soon, server.close)
        for task, of in self._tasks.items():
            if of == path:
                task.cancel()

    async def close(self) -> None:
        for path in list(self._servers):
            self.hang_up(path)
        # What the kernel has accepted reaches us some steps of the loop later, and what is closed
        # is gone one step later still.
        for _ in range(5):
            await asyncio.sleep(0)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(3):
            await asyncio.sleep(0)

    async def _serve(
        self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await reader.readexactly(FRAME_LIMIT_BYTES + HEADER.size)
            while True:
                kind, stream, length = HEADER.unpack(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(length)
                self._answer(writer, kind, stream, payload)
                if (kind, payload[:1]) == (FrameType.OPEN, bytes([requests.Shutdown.KIND])):
                    self._shut_down(path)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _answer(self, writer: asyncio.StreamWriter, kind: int, stream: int, payload: bytes) -> None:
        if kind == FrameType.HELLO and not self.silent:
            fields = hello_field(1, b"9") + hello_field(2, b"6.1") + hello_field(3, b"boot")
            nonce = payload[len(HELLO_MAGIC) :]
            writer.write(encode(FrameType.HELLO, 0, HELLO_MAGIC + nonce + fields))
        if kind == FrameType.OPEN:
            self.opened.append(payload[0])
            if payload[0] == requests.Setup.KIND:
                self.setups.append(parse_fields(payload[1:]))
            if payload[0] == requests.Exec.KIND:
                self.programs.append(payload)
            if out := self.stdout.get(payload[0]):
                writer.write(encode(FrameType.DATA, stream, out))
            exit_ = self.exits.get(payload[0], EXIT_0)
            if exit_ is not None:
                writer.write(encode(FrameType.EXIT, stream, exit_))

    def _shut_down(self, path: Path) -> None:
        if self.exits.get(requests.Shutdown.KIND, EXIT_0) == EXIT_0:
            (self.on_shutdown or self.power_offs.get(path, lambda: None))()


class Hypervisor:
    """Machines are entries of `Processes`; ``machine SOCKET`` is their command line."""

    name = "fake"
    features = HypervisorFeatures(
        disk_formats=frozenset({DiskFormat.QCOW2}), links=frozenset(Link), vcpu_max=64
    )

    def __init__(self, processes: Processes, agent: Agent) -> None:
        self.processes = processes
        self.agent = agent
        self.found: list[Check] = []
        self.gate = Gate()
        self.restore_gate = Gate()
        self.save_gate = Gate()
        self.pause_gate = Gate()
        self.capture_gate = Gate()
        self.collapse_gate = Gate()
        #: Where each machine's disks are, by its control socket, and what was merged into them.
        self.tops: dict[Path, dict[str, Path]] = {}
        self.storage: Storage | None = None
        self.version = "1"
        self.machines: list[Machine] = []
        self.console = b""
        self.boots = True
        self.can_quit = True
        self.pids: dict[Path, int] = {}
        self.buttons = 0
        #: Of machines that nothing is left of.
        self.cleared: list[Path] = []
        self.unclearable = False
        self.spared: set[str] | None = None
        self.hears_button = False
        self.statuses: dict[Path, MachineStatus] = {}
        #: Of hypervisors at work: who asks one meanwhile waits, and is not answered in time.
        self.idle: dict[Path, asyncio.Event] = {}
        self.waiting = 0
        #: What captures have left unfinished was removed of these.
        self.discarded: list[Path] = []
        self.traffics: dict[Path, Traffic] = {}
        self.drained: list[Path] = []

    def limit_vcpus(self, most: int) -> None:
        """Be one whose machines have no more."""
        self.features = dataclasses.replace(self.features, vcpu_max=most)

    async def checks(self) -> list[Check]:
        return self.found

    async def launch(self, machine: Machine, network: NetworkAttachment | None) -> int:
        return await self._start(machine, network, self.gate)

    async def restore(
        self, machine: Machine, network: NetworkAttachment | None, state: Path
    ) -> int:
        assert machine.memory_file is not None
        assert machine.memory_file.private
        assert machine.memory_file.path.read_bytes() + state.read_bytes() == b"memorystate"
        return await self._start(machine, network, self.restore_gate)

    async def save(self, machine: Machine, state: Path) -> None:
        self._check_answers()
        await self.save_gate.passed()
        assert machine in self.machines
        assert machine.memory_file is not None
        assert not machine.memory_file.private
        machine.memory_file.path.write_bytes(b"memory")
        state.write_bytes(b"state")

    async def capture(
        self, control_socket: Path, pid: int, capture: Capture, stages: Callable[[str], None]
    ) -> float:
        self._check_answers()
        assert self.processes.alive(pid)
        stages("memory")
        capture.memory.write_bytes(b"mem")
        await asyncio.sleep(0)
        stages("freeze")
        self.statuses[control_socket] = MachineStatus.PAUSED
        try:
            await self.capture_gate.passed()
            if capture.at_rest is not None:
                await capture.at_rest()
            capture.memory.write_bytes(b"memory")
            capture.state.write_bytes(b"state")
            self.tops[control_socket].update(capture.overlays)
        except BaseException:
            self.statuses.pop(control_socket)
            raise
        if capture.runs_on:
            self.statuses.pop(control_socket)
        return 0.01

    async def discard(self, control_socket: Path, paths: Collection[Path]) -> None:
        assert [path.name for path in paths] == ["memory", "machine-state"]
        self.discarded.append(control_socket)

    async def disks(self, control_socket: Path) -> dict[str, Path]:
        self._check_answers()
        return dict(self.tops[control_socket])

    async def collapse(
        self, control_socket: Path, disk: str, tell: Callable[[float], None]
    ) -> None:
        self._check_answers()
        await self.collapse_gate.passed()
        tell(50)
        assert self.storage is not None
        await self.storage.collapse(self.tops[control_socket][disk])

    async def shape(self, machine: Machine, link: Link | None) -> str:
        shape = (machine.vcpu_count, machine.memory_mib, machine.kernel_parameters, link)
        return f"{self.version} {shape}"

    async def _start(self, machine: Machine, network: NetworkAttachment | None, gate: Gate) -> int:
        helpers = network.pids if network is not None else ()
        if network is not None:
            os.close(network.fd)
        try:
            await gate.passed()
            await self.agent.listen(machine.agent_socket)
        except BaseException:
            for helper in helpers:  # as a real one: its end of the network is closed
                self.processes.end(helper)
            raise
        self.machines.append(machine)
        with machine.console_log.open("ab") as console:
            console.write(self.console)
        pid = self.processes.start("machine", str(machine.control_socket))
        self.pids[machine.control_socket] = pid
        self.tops[machine.control_socket] = {
            disk.name: disk.path for disk in machine.disks if not disk.read_only
        }

        def then() -> None:
            for helper in helpers:
                self.processes.end(helper)
            self.agent.hang_up(machine.agent_socket)

        self.processes.on_end[pid] = then
        self.agent.power_offs[machine.agent_socket] = lambda: self.processes.end(pid)
        if not self.boots:
            self.processes.end(pid)
        return pid

    async def quit(self, control_socket: Path) -> None:
        self._check_answers()
        self.processes.end(self.pids.pop(control_socket, 0))

    async def clear(self, control_socket: Path) -> None:
        self.cleared.append(control_socket)
        if self.unclearable:
            raise Unavailable("nobody can")

    async def end_strays(self, running: Collection[str]) -> None:
        self.spared = set(running)

    async def power_button(self, control_socket: Path) -> None:
        self._check_answers()
        self.buttons += 1
        if self.hears_button:
            self.processes.end(self.pids.pop(control_socket, 0))

    async def status(self, control_socket: Path) -> MachineStatus:
        self._check_answers()
        await self._its_turn(control_socket)
        return self.statuses.get(control_socket, MachineStatus.RUNNING)

    async def traffic(self, control_socket: Path) -> Traffic:
        self._check_answers()
        return self.traffics.get(control_socket, Traffic(0, 0))

    async def drain(self, control_socket: Path) -> None:
        self._check_answers()
        self.drained.append(control_socket)

    async def pause(self, control_socket: Path) -> None:
        self._check_answers()
        await self.pause_gate.passed()
        self.statuses[control_socket] = MachineStatus.PAUSED

    async def resume(self, control_socket: Path) -> None:
        self._check_answers()
        await self._its_turn(control_socket)
        self.statuses.pop(control_socket, None)

    async def _its_turn(self, control_socket: Path) -> None:
        if (idle := self.idle.get(control_socket)) is None:
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await idle.wait()
        except TimeoutError:
            raise Unavailable("no answer in time") from None
        finally:
            self.waiting -= 1

    def _check_answers(self) -> None:
        if not self.can_quit:
            raise Unavailable("no answer")

    def control_socket(self, process: procfs.Process) -> Path | None:
        return Path(process.argv[1]) if process.argv[:1] == ("machine",) else None


class Storage:
    name = "fake"
    format = DiskFormat.QCOW2

    def __init__(self, *, layered: bool = True) -> None:
        self.layered = layered
        self.suffix = ".qcow2"
        self.found: list[Check] = []
        self.gate = Gate()
        #: The second disk of a VM, made beside the first.
        self.work_gate = Gate()
        self.grow_gate = Gate()
        self.copy_gate = Gate()
        self.layer_gate = Gate()
        self.share_gate = Gate()
        self.collapse_gate = Gate()

    @property
    def layering(self) -> Layering | None:
        return self if self.layered else None

    def file_name(self, disk: str) -> str:
        return f"{disk}{self.suffix}"

    async def checks(self) -> list[Check]:
        return self.found

    async def create_overlay(self, base: Path, overlay: Path, size_mib: int) -> None:
        await (self.work_gate if overlay.stem == "work" else self.gate).passed()
        overlay.write_text(f"{base} {size_mib}")

    async def size_mib(self, overlay: Path) -> int:
        return int(overlay.read_text().split()[-1])

    async def grow(self, overlay: Path, size_mib: int) -> None:
        await self.grow_gate.passed()
        if await self.size_mib(overlay) < size_mib:
            overlay.write_text(f"{overlay.read_text().split()[0]} {size_mib}")

    async def copy_overlay(self, overlay: Path, copy: Path) -> None:
        await self.copy_gate.passed()
        copy.write_text(overlay.read_text())

    async def add_layer(self, disk: Path, overlay: Path) -> None:
        """What a layer is over comes before its size, as in one that is over an image."""
        await self.layer_gate.passed()
        assert disk.parent == overlay.parent
        overlay.write_text(f"{disk.name} {await self.size_mib(disk)}")

    async def layers(self, disk: Path) -> list[Path]:
        base = Path(disk.read_text().split()[0])
        return [disk] if base.is_absolute() else [disk, *await self.layers(disk.parent / base)]

    async def share(self, disk: Path, directory: Path) -> None:
        await self.share_gate.passed()
        if not self.layered:
            (directory / disk.name).write_text(disk.read_text())
            return
        for layer in await self.layers(disk):
            os.link(layer, directory / layer.name)

    async def branch(self, frozen: Path, disk: Path) -> None:
        if not self.layered:
            disk.write_text(frozen.read_text())
            return
        await self.share(frozen, disk.parent)
        await self.add_layer(disk.with_name(frozen.name), disk)

    async def collapse(self, disk: Path) -> None:
        await self.collapse_gate.passed()
        base = (await self.layers(disk))[-1].read_text().split()[0]
        content = f"{base} {await self.size_mib(disk)}"
        disk.unlink()  # others have the layers below, and may have this file, too
        disk.write_text(content)

    async def collapse_bytes(self, disk: Path) -> int:
        return 0

    def room_bytes(self, disk: str, source: Path) -> int:
        return 0

    def allocated_bytes(self, disk: Path) -> int:
        return disk.stat().st_size if disk.exists() else 0


class DiskDevicesMade:
    """Devices of disks: entries of `opened`, by the machine, with the base and the file."""

    def __init__(self) -> None:
        self.opened: dict[str, tuple[Path, Path]] = {}
        self.closed: list[str] = []
        self.swept: list[set[str]] = []
        #: What `tend` says of each machine, and of which it was asked.
        self.rooms: dict[str, Room] = {}
        self.tended: list[str] = []
        self.tend_gate = Gate()
        self.lost_gate = Gate()
        self.open_gate = Gate()
        self.close_gate = Gate()

    def serves(self, disk: Path) -> bool:
        return disk.suffix == ".qcow2"

    def node(self, vm_id: str) -> Path:
        return Path("/dev/mapper") / vm_id

    async def open(
        self, vm_id: str, base: Path, disk: Path, record: Callable[[DiskDevices], None]
    ) -> None:
        record(DiskDevices(base=str(base)))
        assert disk.is_file()
        self.opened[vm_id] = (base, disk)
        await self.open_gate.passed()
        record(DiskDevices(base=str(base), base_loop="loop0", changes_loop="loop1", mapping="m"))

    async def close(self, vm_id: str, disk: Path) -> None:
        assert self.serves(disk)
        await self.close_gate.passed()
        self.closed.append(vm_id)
        self.opened.pop(vm_id, None)

    async def sweep(self, vm_ids: Collection[str]) -> None:
        self.swept.append(set(vm_ids))

    async def tend(self, vm_id: str, disk: Path) -> Room:
        self.tended.append(vm_id)
        await self.tend_gate.passed()
        return self.rooms.get(vm_id, Room.AMPLE)

    async def is_lost(self, vm_id: str) -> bool:
        await self.lost_gate.passed()
        return self.rooms.get(vm_id) is Room.LOST


class Network:
    name = "fake"
    link = Link.STREAM
    guests: IPv4Network | None = None

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.found: list[Check] = []
        self.gate = Gate()
        self.apply_gate = Gate()
        #: What each machine that is joined to it may reach.
        self.reaches: dict[str, Reach] = {}

    async def checks(self) -> list[Check]:
        return self.found

    def refusal(self, reach: Reach) -> Check | None:
        if reach.egress is Egress.ALLOWLIST:
            return Check("network", Level.FAIL, "not here", "elsewhere")
        return None

    async def resume(self, machines: Sequence[Plugged]) -> None:
        self.reaches = {each.vm_id: each.reach for each in machines}

    async def apply(self, machine: Plugged) -> None:
        await self.apply_gate.passed()
        self.reaches[machine.vm_id] = machine.reach

    async def detach(self, vm_id: str) -> None:
        self.reaches.pop(vm_id, None)

    async def close(self) -> None:
        pass

    async def attach(self, plug: Plug) -> NetworkAttachment:
        await self.gate.passed()
        plug.log.touch()
        self.reaches[plug.vm_id] = plug.reach
        address = plug.address or "172.16.0.2"
        return NetworkAttachment(
            guest=GuestNetwork("02:00:00:00:00:01", f"{address}/24", "172.16.0.1", "172.16.0.3"),
            link=self.link,
            fd=os.open(os.devnull, os.O_RDONLY),
            pids=(self.processes.start("network", plug.vm_id),),
        )

    @contextlib.asynccontextmanager
    async def unplugged(self) -> AsyncIterator[NetworkAttachment]:
        yield NetworkAttachment(
            guest=GuestNetwork("02:00:00:00:00:02", "172.16.0.2/24", "172.16.0.1", "172.16.0.3"),
            link=self.link,
            fd=os.open(os.devnull, os.O_RDONLY),
        )

    def owns(self, argv: tuple[str, ...], vm_id: str) -> bool:
        return argv == ("network", vm_id)


def networks(processes: Processes) -> Networks:
    """One network, which all VMs are joined to that have any."""
    return Networks(NetworkMode.USER, {NetworkMode.USER: Network(processes)})


def failed_check(name: str, hint: str = "") -> Check:
    """What a driver's check says when something is missing."""
    return Check(name, Level.FAIL, f"{name} is missing", hint)


def failing(problem: str = "no") -> PreconditionFailed:
    return PreconditionFailed(problem)


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
