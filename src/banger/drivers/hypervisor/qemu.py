"""QEMU as a hypervisor: starts it, asks it to end, recognises its process.

The process outlives the daemon; while the daemon lives it reaps it. QEMU's control protocol (QMP)
is spoken by QEMU's own client, `qemu.qmp`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

from qemu.qmp import ExecInterruptedError, QMPClient, QMPError, Runstate

from banger.base import proc
from banger.base.errors import Unavailable
from banger.base.paths import check_socket_path
from banger.drivers.base import (
    Check,
    DiskFormat,
    HypervisorFeatures,
    Level,
    Machine,
    MachineStatus,
    NetworkAttachment,
)
from banger.drivers.hypervisor import kvm
from banger.drivers.hypervisor.qemu_argv import (
    QEMU,
    Accelerator,
    HostFacts,
    Inherited,
    control_socket_in,
    qemu_argv,
)

_CPUINFO = Path("/proc/cpuinfo")

#: 50 to 100 ms are usual; a host that swaps may take seconds.
_LAUNCH_TIMEOUT_S = 30.0
_QMP_TIMEOUT_S = 5.0
_LOG_TAIL_BYTES = 2000


class QemuHypervisor:
    """Implements `drivers.base.Hypervisor`."""

    name = "qemu"
    features = HypervisorFeatures(disk_formats=frozenset({DiskFormat.RAW, DiskFormat.QCOW2}))

    def __init__(self, accelerator: str, probe_cache: Path) -> None:
        """`accelerator` is the setting: ``auto``, ``kvm`` or ``tcg``."""
        self._setting = accelerator
        self._probe_cache = probe_cache
        self._probing = asyncio.Lock()

    async def checks(self) -> list[Check]:
        """QEMU itself, and the accelerator: which one, and why."""
        path = proc.which(QEMU)
        if path is None:
            error = proc.missing_tool(QEMU)
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
            answer = await kvm.probe(self._probe_cache)
        if answer.usable:
            return Accelerator.KVM, Check(name, Level.OK, f"kvm: {answer.detail}")
        if self._setting == Accelerator.KVM:
            detail = f"kvm is configured, but {answer.detail}"
            return Accelerator.KVM, Check(name, Level.FAIL, detail, 'set accelerator = "auto"')
        detail = f"tcg, which is slow: {answer.detail}"
        hint = "with KVM guests run at full speed: it needs access to /dev/kvm (group kvm)"
        return Accelerator.TCG, Check(name, Level.WARN, detail, hint)

    async def launch(self, machine: Machine, network: NetworkAttachment | None) -> int:
        """See `Hypervisor.launch`. The descriptor of `network` is closed here in any case."""
        network_fd = network.fd if network is not None else -1
        mac = network.guest.mac if network is not None else ""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                for path in (machine.control_socket, machine.agent_socket):
                    check_socket_path(path)
                accelerator, _ = await self.choose_accelerator()
                log = _Log(machine.hypervisor_log)
                inherited = Inherited(theirs.fileno(), network_fd)
                process = proc.spawn_detached(
                    qemu_argv(machine, HostFacts(accelerator, tsc_khz()), inherited, mac),
                    log=machine.hypervisor_log,
                    pass_fds=[fd for fd in (theirs.fileno(), network_fd) if fd >= 0],
                    env=proc.BARE_ENVIRONMENT,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            if network_fd >= 0:
                os.close(network_fd)
        ended = proc.watch(process)
        try:
            with ours:
                await _answers(ours, ended, log)
        except BaseException:
            if not ended.done():
                # Not reaped yet, so the pid is still its own.
                os.kill(process.pid, signal.SIGKILL)
                await asyncio.shield(ended)
            raise
        return process.pid

    async def quit(self, control_socket: Path) -> None:
        """See `Hypervisor.quit`. Returns when QEMU closes the connection, as it ends."""
        async with _qmp(control_socket) as client:
            # It may be gone before its answer is.
            with suppress(ExecInterruptedError):
                await client.execute("quit")
            while client.runstate is Runstate.RUNNING:
                await client.runstate_changed()

    async def power_button(self, control_socket: Path) -> None:
        """See `Hypervisor.power_button`: an ACPI event, which systemd's logind listens to."""
        async with _qmp(control_socket) as client:
            await client.execute("system_powerdown")

    async def status(self, control_socket: Path) -> MachineStatus:
        """See `Hypervisor.status`."""
        async with _qmp(control_socket) as client:
            answer = cast("dict[str, object]", await client.execute("query-status"))
        # By default a write that meets ENOSPC stops the machine, and is done again on `cont`.
        if answer.get("status") == "io-error":
            return MachineStatus.DISK_FULL
        return MachineStatus.RUNNING if answer.get("running") else MachineStatus.PAUSED

    async def resume(self, control_socket: Path) -> None:
        """See `Hypervisor.resume`."""
        async with _qmp(control_socket) as client:
            await client.execute("cont")

    def control_socket(self, argv: tuple[str, ...]) -> Path | None:
        """See `Hypervisor.control_socket`."""
        return control_socket_in(argv)


def tsc_khz() -> int:
    """The rate of the host's TSC: half of bogomips, which the kernel derives from it; 0 if unknown.

    (Linux sets loops_per_jiffy to it when it knows the TSC's frequency: `calibrate_delay`.)
    """
    for line in _CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "bogomips":
            return round(float(value) * 1000 / 2)
    return 0


@asynccontextmanager
async def _qmp(control_socket: Path) -> AsyncIterator[QMPClient]:
    """A short conversation with QEMU: it serves one client at a time, the next one waits.

    Raises Unavailable when it does not answer in time, here or in the block.
    """
    client = QMPClient("banger")
    try:
        async with asyncio.timeout(_QMP_TIMEOUT_S):
            await client.connect(str(control_socket))
            yield client
    except TimeoutError as error:  # says nothing itself
        raise Unavailable(
            f"QEMU does not answer at {control_socket} within {_QMP_TIMEOUT_S:g} s"
        ) from error
    except (QMPError, OSError) as error:
        raise Unavailable(f"QEMU does not answer at {control_socket}: {error}") from error
    finally:
        await _disconnect(client)


class _Log:
    """What QEMU adds to its log from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0

    def tail(self) -> str:
        with self.path.open("rb") as file:
            file.seek(max(self._start, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()


async def _answers(ours: socket.socket, ended: asyncio.Future[int], log: _Log) -> None:
    """Wait until QMP answers on the socket that QEMU inherited; raise Unavailable otherwise.

    QEMU takes its first command in its main loop, so by then all devices and sockets are there.
    """
    client = QMPClient("banger")
    connecting = asyncio.ensure_future(client.connect(ours))
    try:
        either: list[asyncio.Future[Any]] = [connecting, ended]
        await asyncio.wait(either, timeout=_LAUNCH_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and connecting.exception() is None:
            return
        if not connecting.done() and not ended.done():
            raise Unavailable(
                f"QEMU did not answer within {_LAUNCH_TIMEOUT_S:g} s; inspect {log.path}"
            )
        # A connection that fails means that QEMU is ending: its status comes next.
        await asyncio.wait({ended}, timeout=_QMP_TIMEOUT_S)
        how = _how_it_ended(ended) if ended.done() else "closed its control connection"
        tail = log.tail()
        raise Unavailable(f"QEMU {how}{': ' if tail else ''}{tail}; inspect {log.path}")
    finally:
        connecting.cancel()
        await asyncio.wait({connecting})
        await _disconnect(client)


def _how_it_ended(ended: asyncio.Future[int]) -> str:
    status = ended.result()
    return f"exited with status {status}" if status >= 0 else f"was ended by signal {-status}"


async def _disconnect(client: QMPClient) -> None:
    # What went wrong on the connection is reported again here, as whatever it was.
    with suppress(QMPError, EOFError, OSError, asyncio.IncompleteReadError):
        await client.disconnect()
