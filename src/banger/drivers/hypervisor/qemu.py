"""QEMU as a hypervisor: starts it, asks it to end, recognises its process.

The process outlives the daemon; while the daemon lives it reaps it. What is said to it over its
control protocol is in `qemu_monitor`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from qemu.qmp import ExecInterruptedError, QMPClient, Runstate

from banger.base import proc, procfs
from banger.base.cancellation import to_its_end
from banger.base.config import VCPU_MAX
from banger.base.errors import OperationTimeout, PreconditionFailed, Unavailable
from banger.base.paths import check_socket_path
from banger.base.procfs import UNKNOWN, Process
from banger.drivers.base import (
    Capture,
    Check,
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
from banger.drivers.hypervisor import kvm
from banger.drivers.hypervisor.process_log import Log
from banger.drivers.hypervisor.processor import processor
from banger.drivers.hypervisor.qemu_argv import (
    Accelerator,
    HostFacts,
    Inherited,
    control_socket_in,
    qemu_argv,
    shape_of,
)
from banger.drivers.hypervisor.qemu_capture import (
    MemoryCopy,
    add_overlays,
    copying,
    drop_overlays,
    file_of,
    find_memory,
    stream_down,
    top_nodes,
)
from banger.drivers.hypervisor.qemu_monitor import (
    conversation,
    launching,
    load_state,
    save_state,
)
from banger.drivers.hypervisor.qemu_program import QemuProgram

_CPUINFO = Path("/proc/cpuinfo")
#: Waiting for the state to be written is waiting for the disk.
_SAVE_TIMEOUT_S = 60.0
#: Gigabytes of memory are copied, gigabytes of disk in the other case.
_CAPTURE_TIMEOUT_S = 600.0
#: As long as two disks may take where they are copied.
_CAPTURE_AND_COPY_TIMEOUT_S = 7800.0
_COLLAPSE_TIMEOUT_S = 3600.0


class QemuHypervisor:
    """Implements `drivers.base.Hypervisor`."""

    name = "qemu"
    features = HypervisorFeatures(
        disk_formats=frozenset({DiskFormat.RAW, DiskFormat.QCOW2}),
        links=frozenset(Link),
        vcpu_max=VCPU_MAX,
    )

    def __init__(self, accelerator: str, probe_cache: Path, program: QemuProgram) -> None:
        """`accelerator` is the setting: ``auto``, ``kvm`` or ``tcg``."""
        self._setting = accelerator
        self._probe_cache = probe_cache
        self._program = program
        self._probing = asyncio.Lock()

    async def checks(self) -> list[Check]:
        """QEMU itself, and the accelerator: which one, and why."""
        try:
            path = self._program.path()
        except PreconditionFailed as error:
            return [Check("hypervisor qemu", Level.FAIL, error.message, error.hint)]
        return [
            Check("hypervisor qemu", Level.OK, path),
            (await self.choose_accelerator())[1],
        ]

    async def choose_accelerator(self) -> tuple[Accelerator, Check]:
        """The accelerator that machines get, and how that stands as a line of `banger doctor`."""
        name = "accelerator"
        if self._setting == Accelerator.TCG:
            return Accelerator.TCG, Check(name, Level.OK, "tcg, as configured")
        async with self._probing:  # one probe: beside others it would take longer
            answer = await kvm.probe(self._probe_cache, self._program)
        if answer.usable:
            return Accelerator.KVM, Check(name, Level.OK, f"kvm: {answer.detail}")
        if self._setting == Accelerator.KVM:
            detail = f"kvm is configured, but {answer.detail}"
            hint = "; or ".join(filter(None, (answer.hint, 'set accelerator = "auto"')))
            return Accelerator.KVM, Check(name, Level.FAIL, detail, hint)
        detail = f"tcg, which is slow: {answer.detail}"
        hint = ": ".join(filter(None, ("with KVM guests run at full speed", answer.hint)))
        return Accelerator.TCG, Check(name, Level.WARN, detail, hint)

    async def launch(self, machine: Machine, network: NetworkAttachment | None) -> int:
        """See `Hypervisor.launch`. The descriptor of `network` is closed here in any case."""
        return await self._start(machine, network, None)

    async def restore(
        self, machine: Machine, network: NetworkAttachment | None, state: Path
    ) -> int:
        """See `Hypervisor.restore`. The descriptor of `network` is closed here in any case."""
        return await self._start(machine, network, state)

    async def _start(
        self, machine: Machine, network: NetworkAttachment | None, state: Path | None
    ) -> int:
        network_fd = network.fd if network is not None else -1
        mac = network.guest.mac if network is not None else ""
        link = network.link if network is not None else None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                for path in (machine.control_socket, machine.agent_socket):
                    check_socket_path(path)
                accelerator, _ = await self.choose_accelerator()
                log = Log(machine.hypervisor_log)
                facts = HostFacts(accelerator, tsc_khz())
                inherited = Inherited(theirs.fileno(), network_fd, link)
                argv = qemu_argv(machine, facts, inherited, mac, incoming=state is not None)
                process = self._spawn(argv, log, (theirs.fileno(), network_fd))
        except BaseException:
            ours.close()
            raise
        finally:
            if network_fd >= 0:
                os.close(network_fd)
        ended = proc.watch(process)
        try:
            with ours:
                await self._begin(ours, ended, log, machine, state)
            self._check_recognised(process.pid, machine)
        except BaseException:
            if not ended.done():
                # Not reaped yet, so the pid is still its own, and its group's.
                os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(ended)
            raise
        return process.pid

    def _spawn(self, argv: tuple[str, ...], log: Log, inherited: tuple[int, ...]) -> proc.Detached:
        with self._program.starting() as path:
            return proc.spawn_detached(
                argv,
                program=path,
                log=log.path,
                pass_fds=[fd for fd in inherited if fd >= 0],
                env=proc.BARE_ENVIRONMENT,
            )

    def _check_recognised(self, pid: int, machine: Machine) -> None:
        """A machine that nobody finds again would count as stopped, and run on with its disks."""
        process = procfs.look_at(pid)
        if process == UNKNOWN:
            return  # it has ended by itself
        if self.control_socket(process) != machine.control_socket:
            raise self._program.is_not_the_machine()

    async def _begin(
        self,
        ours: socket.socket,
        ended: asyncio.Future[int],
        log: Log,
        machine: Machine,
        state: Path | None,
    ) -> None:
        """Wait until QEMU answers, and give it its state if it is to have one."""
        failure: type[Unavailable] = Unavailable
        try:
            async with launching(ours, ended, log) as client:
                if state is not None:
                    failure = StateRefused
                    await load_state(client, state, machine.disks)
                    failure = MachineLost
                    await client.execute("cont")
        except Unavailable as error:
            hint = error.hint or (self._program.doubt if failure is Unavailable else "")
            raise failure(error.message, hint=hint) from error
        except OperationTimeout as error:
            if failure is MachineLost:
                raise MachineLost(error.message, hint=error.hint) from error
            raise

    async def save(self, machine: Machine, state: Path) -> None:
        """See `Hypervisor.save`. The memory is in its file from the start."""
        async with conversation(machine.control_socket, _SAVE_TIMEOUT_S) as client:
            await save_state(client, state)

    async def capture(
        self, control_socket: Path, pid: int, capture: Capture, stages: Callable[[str], None]
    ) -> float:
        """See `Hypervisor.capture`."""
        timeout_s = _CAPTURE_TIMEOUT_S if capture.at_rest is None else _CAPTURE_AND_COPY_TIMEOUT_S
        async with conversation(control_socket, timeout_s) as client:
            memory = await find_memory(client, pid)
            with copying(memory, capture.memory) as copy:
                stages("memory")
                await to_its_end(asyncio.to_thread(copy.beforehand))
                actions = await add_overlays(client, capture.overlays)
                stages("freeze")
                # The machine is not left paused by a cancellation.
                freezing = partial(self._freeze, client, copy, capture, actions)
                if capture.at_rest is None:
                    return await to_its_end(freezing())
                return await self._copied_at_rest(client, capture.at_rest, freezing)

    async def _copied_at_rest(
        self,
        client: QMPClient,
        at_rest: Callable[[], Awaitable[None]],
        freezing: Callable[[], Coroutine[Any, Any, float]],
    ) -> float:
        """The seconds from when it was paused for its disks to be copied. That may take long, and
        can be cancelled."""
        began = time.monotonic()
        try:
            await _stop(client)
            await at_rest()
            await to_its_end(freezing())
        except BaseException:
            await to_its_end(_go_on(client))
            raise
        return time.monotonic() - began

    async def _freeze(
        self,
        client: QMPClient,
        copy: MemoryCopy,
        capture: Capture,
        actions: list[dict[str, Any]],
    ) -> float:
        frozen, began = False, time.monotonic()
        try:
            await _stop(client)
            await asyncio.to_thread(copy.at_rest)
            state = {"filename": str(capture.state), "live": False}
            await client.execute("xen-save-devices-state", state)
            if actions:
                await client.execute("transaction", {"actions": actions})
            frozen = True
        finally:
            if capture.runs_on or not frozen:
                await _go_on(client)
            paused_s = time.monotonic() - began
            if not frozen:
                await drop_overlays(client, actions)
        return paused_s

    async def discard(self, control_socket: Path, paths: Collection[Path]) -> None:
        """See `Hypervisor.discard`: it is written where it is to be."""

    async def disks(self, control_socket: Path) -> dict[str, Path]:
        """See `Hypervisor.disks`."""
        async with conversation(control_socket) as client:
            return {name: file_of(node) for name, node in (await top_nodes(client)).items()}

    async def collapse(
        self, control_socket: Path, disk: str, tell: Callable[[float], None]
    ) -> None:
        """See `Hypervisor.collapse`."""
        async with conversation(control_socket, _COLLAPSE_TIMEOUT_S) as client:
            await stream_down(client, disk, tell)

    async def shape(self, machine: Machine, link: Link | None) -> str:
        """See `Hypervisor.shape`: a digest of the command line, QEMU itself and the processor."""
        path = self._program.path()
        accelerator, _ = await self.choose_accelerator()
        program = os.stat(path)  # noqa: PTH116 - pathlib is no faster here
        parts = (
            *shape_of(machine, HostFacts(accelerator, tsc_khz()), link),
            *(str(program.st_size), str(program.st_mtime_ns)),
            processor(),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    async def quit(self, control_socket: Path) -> None:
        """See `Hypervisor.quit`. Returns when QEMU closes the connection, as it ends."""
        async with conversation(control_socket) as client:
            # It may be gone before its answer is.
            with suppress(ExecInterruptedError):
                await client.execute("quit")
            while client.runstate is Runstate.RUNNING:
                await client.runstate_changed()

    async def clear(self, control_socket: Path) -> None:
        """See `Hypervisor.clear`: it is the user's own process."""

    async def end_strays(self, running: Collection[str]) -> None:
        """See `Hypervisor.end_strays`: by its command line each is found."""

    async def power_button(self, control_socket: Path) -> None:
        """See `Hypervisor.power_button`: an ACPI event, which systemd's logind listens to."""
        async with conversation(control_socket) as client:
            await client.execute("system_powerdown")

    async def status(self, control_socket: Path) -> MachineStatus:
        """See `Hypervisor.status`."""
        async with conversation(control_socket) as client:
            answer = cast("dict[str, object]", await client.execute("query-status"))
        # By default a write that meets ENOSPC stops the machine, and is done again on `cont`.
        if answer.get("status") == "io-error":
            return MachineStatus.DISK_FULL
        return MachineStatus.RUNNING if answer.get("running") else MachineStatus.PAUSED

    async def traffic(self, control_socket: Path) -> Traffic:
        """See `Hypervisor.traffic`. QEMU counts what its disks move, and nothing of networks."""
        async with conversation(control_socket) as client:
            answer = cast("list[dict[str, Any]]", await client.execute("query-blockstats"))
        counts = [device["stats"] for device in answer]
        return Traffic(
            disk_read_bytes=sum(each["rd_bytes"] for each in counts),
            disk_written_bytes=sum(each["wr_bytes"] for each in counts),
        )

    async def drain(self, control_socket: Path) -> None:
        """See `Hypervisor.drain`: QEMU counts in its memory."""

    async def pause(self, control_socket: Path) -> None:
        """See `Hypervisor.pause`."""
        async with conversation(control_socket) as client:
            await client.execute("stop")

    async def resume(self, control_socket: Path) -> None:
        """See `Hypervisor.resume`."""
        async with conversation(control_socket) as client:
            await client.execute("cont")

    def control_socket(self, process: Process) -> Path | None:
        """See `Hypervisor.control_socket`."""
        return control_socket_in(process.argv)


async def _stop(client: QMPClient) -> None:
    """Pause the machine, with nothing on its way to its disks. Idempotent."""
    await client.execute("stop")
    status = cast("dict[str, object]", await client.execute("query-status"))
    if status.get("status") != "paused":  # a full disk holds it in the middle of a write
        raise Unavailable(f"its machine is {status.get('status')}")


async def _go_on(client: QMPClient) -> None:
    await client.execute("cont")


def tsc_khz() -> int:
    """The rate of the host's TSC: half of bogomips, which the kernel derives from it; 0 if unknown.

    (Linux sets loops_per_jiffy to it when it knows the TSC's frequency: `calibrate_delay`.)
    """
    for line in _CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "bogomips":
            return round(float(value) * 1000 / 2)
    return 0
