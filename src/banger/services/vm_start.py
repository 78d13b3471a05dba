"""One start of a VM: from its disks to an agent with an identity.

Used for a new VM (`vm_create`) and for one that was stopped (`lifecycle`), both with the VM's
lock. What fails before the guest runs leaves no process; a guest that does not come up is a
`GuestLost`, with the end of its console.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from banger.base.errors import (
    BadRequest,
    BangerError,
    Cancelled,
    OperationTimeout,
    Unavailable,
)
from banger.base.model import Image, InitMode, Kernel, Vm
from banger.base.paths import Paths, prepare_private_dir
from banger.drivers.base import (
    Disk,
    DiskFormat,
    Hypervisor,
    Machine,
    MachineStatus,
    Network,
    Storage,
)
from banger.guest.channel import call
from banger.services.agents import Agents
from banger.services.capabilities import Capabilities, Start
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.operations import Stages
from banger.services.preflight import require
from banger.services.vm import VmService

#: From launch to an agent that answers. Alone a guest takes seconds, under emulation beside
#: others many times that, with systemd about a minute.
BOOT_TIMEOUT_S = 240.0
_BOOT_TIMEOUT_MAX_S = 3600.0
_SETUP_TIMEOUT_S = 60.0
#: Growing a file system by a terabyte takes an emulated guest 6 s and more.
_SETUP_S_PER_MIB = 60.0 / (1 << 20)
_EXIT_AFTER_CLOSE_S = 3.0
_ENTROPY_BYTES = 256
_CONSOLE_TAIL_LINES = 8
_CONSOLE_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Drivers:
    """The drivers this daemon works with."""

    hypervisor: Hypervisor
    storage: Storage
    network: Network


class GuestLost(BangerError):
    """A guest that was started and did not come up; the VM is kept.

    `console_from` is where in the console log this start begins: the end of an earlier one
    would tell of a power-off that is none of this one's.
    """

    def __init__(self, error: BangerError, vm: Vm, console_from: int) -> None:
        tail = console_tail(Path(vm.runtime.log_path), console_from)
        message = f'the guest of vm "{vm.name}" did not come up: {error.message}'
        if tail:
            message += f"\nthe end of its console:\n{tail}\n"
        super().__init__(
            f"{message}; inspect {vm.runtime.log_path}",
            hint=f"the VM is kept: banger vm logs {vm.name}, then banger vm start or delete it",
        )
        self.code = error.code


def check_boot_timeout(timeout_s: float) -> None:
    """Raise BadRequest for a time limit that is none."""
    if not 1 <= timeout_s <= _BOOT_TIMEOUT_MAX_S:
        raise BadRequest(f"a boot timeout of {timeout_s:g} s is not possible")


class VmStarter:
    def __init__(
        self,
        *,
        paths: Paths,
        drivers: Drivers,
        capabilities: Capabilities,
        kernels: KernelService,
        vms: VmService,
        liveness: Liveness,
        agents: Agents,
    ) -> None:
        self._paths = paths
        self._drivers = drivers
        self._capabilities = capabilities
        self._kernels = kernels
        self._vms = vms
        self._liveness = liveness
        self._agents = agents

    async def preflight(self, vm: Vm, image: Image, kernel: Kernel) -> Start:
        """A start of which everything is there; PreconditionFailed with all that is missing."""
        start = Start(vm, image, kernel)
        require(
            [
                *await self._drivers.hypervisor.checks(),
                *await self._capabilities.prereqs(start),
            ]
        )
        return start

    async def create(self, start: Start) -> None:
        """What a new VM has for life: its directory and its disks."""
        prepare_private_dir(self._paths.vm(start.vm.id).directory)
        await self._capabilities.create(start)

    async def run(self, start: Start, stages: Stages, *, boot_timeout_s: float) -> Vm:
        """Bring the machine up; the VM as it is recorded then, running.

        Raises GuestLost when the machine runs and the guest does not come up. Whoever calls ends
        and cleans up what is left of a start that failed or was cancelled (`VmService`).
        """
        stages.stage("prepare")
        vm = start.vm
        prepare_private_dir(self._paths.vm(vm.id).runtime)
        console_from = _size(Path(vm.runtime.log_path))
        await self._launch(start, stages)
        stages.stage("boot", "waiting for the guest")
        try:
            await self._await_agent(vm, boot_timeout_s)
            stages.stage("setup")
            await self._while_it_runs(vm, self._set_up(start), _setup_timeout_s(vm))
        except BangerError as error:
            raise GuestLost(error, vm, console_from) from error
        await self._capabilities.post_start(vm)
        address = start.network.guest.address.partition("/")[0] if start.network else ""
        runtime = msgspec.structs.replace(vm.runtime, guest_ip=address)
        return await self._vms.mark_running(msgspec.structs.replace(vm, runtime=runtime))

    async def _launch(self, start: Start, stages: Stages) -> None:
        """Start network and machine, and record their processes. On failure neither is left."""
        vm = start.vm
        initramfs = await self._kernels.initramfs(start.kernel)
        try:
            await self._capabilities.prepare_host(start)
            # Before there is a machine: whatever comes between, the clean-up finds them.
            network_pids = start.network.pids if start.network is not None else ()
            self._liveness.record(vm, pid=0, network_pids=network_pids)
            self._check_wanted(vm)
            stages.stage("launch")
        except BaseException:
            start.abandon()
            raise
        async with AsyncExitStack() as undo:
            pid = await self._drivers.hypervisor.launch(
                self._machine(start, initramfs), start.network
            )
            undo.push_async_callback(self._liveness.end, vm)
            self._liveness.record(vm, pid=pid, network_pids=network_pids)
            self._check_wanted(vm)
            undo.pop_all()

    def _check_wanted(self, vm: Vm) -> None:
        """Raise Cancelled when somebody has killed the VM before it had a machine."""
        if reason := self._vms.end_reasons.get(vm.id):
            raise Cancelled(f'vm "{vm.name}" does not start: {reason}')

    def _machine(self, start: Start, initramfs: Path) -> Machine:
        vm, kernel = start.vm, start.kernel
        paths = self._paths.vm(vm.id)
        modules = Disk("modules", Path(kernel.modules_path), DiskFormat.RAW, read_only=True)
        return Machine(
            vm_id=vm.id,
            vcpu_count=vm.spec.vcpu_count,
            memory_mib=vm.spec.memory_mib,
            kernel=Path(kernel.vmlinux_path),
            initramfs=initramfs,
            kernel_parameters=_kernel_parameters(vm.spec.init),
            disks=(*start.disks, modules),
            console_log=paths.console_log,
            hypervisor_log=paths.hypervisor_log,
            control_socket=paths.control_socket,
            agent_socket=paths.agent_socket,
        )

    async def _await_agent(self, vm: Vm, timeout_s: float) -> None:
        try:
            await self._while_it_runs(vm, self._agents.connect(vm, timeout_s), timeout_s)
        except OperationTimeout as error:
            held = await self._why_held(vm)
            raise OperationTimeout(f"no answer within {timeout_s:g} s{held}") from error

    async def _why_held(self, vm: Vm) -> str:
        """What the hypervisor knows of a guest that does not answer."""
        with suppress(BangerError):
            status = await self._drivers.hypervisor.status(Path(vm.runtime.api_socket))
            if status is MachineStatus.DISK_FULL:
                return ": its machine is held, for the host's disk is full"
        return ""

    async def _while_it_runs(
        self, vm: Vm, work: Coroutine[Any, Any, object], timeout_s: float
    ) -> None:
        """Await `work`, which takes `timeout_s` at most; a machine that ends meanwhile ends it."""
        working = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._liveness.wait_exit(vm, timeout_s))
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            failure = working.exception() if working.done() else None
            if isinstance(failure, Unavailable):
                # Its sockets close before its process is gone: that is what to tell of.
                await asyncio.wait({ending}, timeout=_EXIT_AFTER_CLOSE_S)
            if ending.done() and ending.result() and (failure or not working.done()):
                raise Unavailable("the machine ended while it booted")
            await working
        finally:
            for task in (working, ending):
                task.cancel()
            await asyncio.gather(working, ending, return_exceptions=True)

    async def _set_up(self, start: Start) -> None:
        channel = await self._agents.channel(start.vm)
        request = replace(
            start.setup,
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            unix_time_ns=time.time_ns(),
        )
        await call(channel, request, timeout_s=_setup_timeout_s(start.vm))


def _setup_timeout_s(vm: Vm) -> float:
    return _SETUP_TIMEOUT_S + vm.spec.disk_size_mib * _SETUP_S_PER_MIB


def _kernel_parameters(init: InitMode) -> tuple[str, ...]:
    mode = f"banger.init={init}"
    if init is not InitMode.SYSTEMD:
        return (mode,)
    # A log is no terminal to log in at; and without udev, which tells systemd that a device is
    # there, systemd 252 waits 90 s for it before its boot is complete.
    return mode, "systemd.getty_auto=no"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def console_tail(log: Path, begin: int) -> str:
    """The last lines of a console log from `begin` on, as text that is safe to print."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if begin > size:  # it was cut meanwhile
                begin = 0
            file.seek(max(begin, size - _CONSOLE_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = deque((line.rstrip() for line in text.splitlines()), maxlen=_CONSOLE_TAIL_LINES)
    # The console is the guest's: its control characters must not reach a terminal.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
