"""One start of a VM: from its disks, or from a template, to an agent with an identity.

Used for a new VM (`vm_create`) and for one that was stopped (`lifecycle`), both with the VM's
lock. What fails before the guest runs leaves no process; a guest that does not come up is a
`GuestLost`, with the end of its console.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from banger.base.cancellation import past_recall, to_its_end
from banger.base.errors import (
    BadRequest,
    BangerError,
    Cancelled,
    OperationTimeout,
)
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Image, Kernel, Snapshot, Template, Vm, VmState
from banger.base.paths import Paths, prepare_private_dir
from banger.drivers.base import (
    DiskDeviceMaker,
    Hypervisor,
    Machine,
    MachineLost,
    MachineStatus,
    MemoryFile,
    Networks,
    StateRefused,
    Storage,
)
from banger.guest.channel import call
from banger.services.agents import Agents
from banger.services.capabilities import Capabilities, Start
from banger.services.guest_wait import console_size, console_tail, while_it_runs
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.machine import machine_of
from banger.services.operations import Stages
from banger.services.preflight import agent_checks, link_checks, require, vcpu_checks
from banger.services.standby import Standby, Standbys
from banger.services.templates import TemplateService
from banger.services.vm import VmService

#: From launch to an agent that answers. Alone a guest takes seconds, under emulation beside
#: others many times that, with systemd about a minute.
BOOT_TIMEOUT_S = 240.0
_BOOT_TIMEOUT_MAX_S = 3600.0
_SETUP_TIMEOUT_S = 60.0
#: Growing a file system by a terabyte takes an emulated guest 6 s and more.
_SETUP_S_PER_MIB = 60.0 / (1 << 20)
_WANTED_INTERVAL_S = 0.2
#: From a restored machine to its agent: far more than it takes beside any number of others.
_RESTORE_TIMEOUT_S = 60.0
_ENTROPY_BYTES = 256


@dataclass(frozen=True)
class Drivers:
    """The drivers this daemon works with."""

    hypervisor: Hypervisor
    storage: Storage
    networks: Networks
    #: Hypervisors that may have been configured before.
    others: tuple[Hypervisor, ...] = ()
    #: What makes devices of disks, for VMs whose storage does, which may not be `storage`.
    devices: DiskDeviceMaker | None = None
    #: Why it is this hypervisor: that it is configured, or what ``auto`` has found.
    hypervisor_reason: str = "as configured"


class GuestLost(BangerError):
    """A guest that was started and did not come up; the VM is kept.

    `console_from` is where in the console log this start begins: the end of an earlier one
    would tell of a power-off that is none of this one's. `reason` and `console` are what the
    message has of it, for who does not keep the VM.
    """

    def __init__(self, error: BangerError, vm: Vm, console_from: int) -> None:
        self.reason = error.message
        self.console = tail = console_tail(Path(vm.runtime.log_path), console_from)
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
        templates: TemplateService,
        standbys: Standbys,
    ) -> None:
        self._paths = paths
        self._drivers = drivers
        self._capabilities = capabilities
        self._kernels = kernels
        self._vms = vms
        self._liveness = liveness
        self._agents = agents
        self._templates = templates
        self._standbys = standbys

    async def preflight(
        self, vm: Vm, image: Image, kernel: Kernel, snapshot: Snapshot | None = None
    ) -> Start:
        """A start of which everything is there; PreconditionFailed with all that is missing.

        The disks of a new VM begin as those of the `snapshot`, if one is given.
        """
        start = Start(vm, image, kernel, snapshot=snapshot, untouched=_never_ran(vm))
        require(
            [
                *await self._drivers.hypervisor.checks(),
                *link_checks(self._drivers.hypervisor, self._drivers.networks, vm),
                *vcpu_checks(self._drivers.hypervisor, vm),
                *agent_checks(self._drivers.hypervisor, kernel),
                *await self._capabilities.prereqs(start),
            ]
        )
        return start

    async def create(self, start: Start) -> None:
        """What a new VM has for life: its directory and its disks."""
        prepare_private_dir(self._paths.vm(start.vm.id).directory)
        await self._capabilities.create(start)

    async def run(
        self, start: Start, stages: Stages, *, boot_timeout_s: float, cold: bool = False
    ) -> Vm:
        """Bring the machine up; the VM as it is recorded then, running.

        A start with a saved machine goes on from that. A VM that never ran starts from a template,
        unless `cold`; when that fails it boots. Raises GuestLost when the machine runs and the
        guest does not come up. Whoever calls ends and cleans up what is left of a start that failed
        or was cancelled (`VmService`).
        """
        if standby := self._standbys.take(start.vm):
            vm = await self._taken_over(start, standby, stages, boot_timeout_s)
            if vm is not None:
                return vm
        prepare_private_dir(self._paths.vm(start.vm.id).runtime)
        if start.saved is not None:
            return await self._went_on(start, stages, boot_timeout_s)
        if not cold and start.untouched:
            template = await self._obtained(start, stages, boot_timeout_s)
            if template is not None:
                vm = await self._restored(start, template, stages, boot_timeout_s)
                if vm is not None:
                    return vm
        if start.vm.runtime.state is VmState.CREATING:
            stages.stage("disks")
            await self.create(start)
        return await self._booted(start, stages, boot_timeout_s)

    async def reserve(self, start: Start) -> Vm:
        """The VM of `start`, which has no record yet, as it is to be recorded: with the machine of
        a standby where one waits for such a VM. `run` starts it, or else `give_back` is called."""
        if not self._standbys.count:
            return start.vm
        initramfs = await self._kernels.initramfs(start.kernel)
        key = await self._templates.key(start, initramfs)
        return self._standbys.reserve(key, start) or start.vm

    def give_back(self, vm: Vm) -> None:
        """The VM was not recorded after all."""
        self._standbys.give_back(vm)

    async def _taken_over(
        self, start: Start, standby: Standby, stages: Stages, boot_timeout_s: float
    ) -> Vm | None:
        """The VM, on the machine of its standby; None when that failed, and nothing is left."""
        vm, made = start.vm, standby.start
        ready = replace(made, vm=vm, setup=replace(made.setup, hostname=vm.name))
        try:
            stages.stage("resume")
            self._check_wanted(vm)
            async with asyncio.timeout(boot_timeout_s):
                await self._drivers.hypervisor.resume(Path(vm.runtime.api_socket))
                stages.stage("setup")
                await self._while_it_runs(vm, self._set_up(ready), _setup_timeout_s(vm))
        except Cancelled:
            raise
        except (BangerError, OSError) as error:  # TimeoutError is one
            await to_its_end(self._vms.start_over(vm))
            self._check_wanted(vm)
            get_logger().warning("standby lost", error=str(error), **vm_attributes(vm))
            return None
        assert made.template is not None  # standbys are made from templates
        await self._templates.used(made.template)
        self._standbys.prepare(start, made.template, self._restore)
        return await self._running(ready)

    async def _went_on(self, start: Start, stages: Stages, boot_timeout_s: float) -> Vm:
        """The VM, with a memory of its own or of another's, which there is no other way to.

        While a machine goes on from its own, a cancellation, which would lose it, comes too late.
        """
        own = start.vm.runtime.state is not VmState.CREATING
        if not own:
            stages.stage("disks")
            await self.create(start)
        stages.stage("prepare")
        going_on = self._going_on(start, stages, boot_timeout_s)
        return await (past_recall(going_on) if own else going_on)

    async def _going_on(self, start: Start, stages: Stages, boot_timeout_s: float) -> Vm:
        await self._launch(start, stages)
        await self._introduce(start, stages, boot_timeout_s)
        return await self._running(start)

    async def _introduce(self, start: Start, stages: Stages, boot_timeout_s: float) -> None:
        """Tell the guest of a restored machine who it is."""
        stages.stage("setup")
        timeout_s = min(boot_timeout_s, _RESTORE_TIMEOUT_S)
        vm = start.vm
        await self._while_it_runs(vm, self._agents.connect(vm, timeout_s), timeout_s)
        await self._while_it_runs(vm, self._set_up(start), _setup_timeout_s(vm))

    async def _obtained(
        self, start: Start, stages: Stages, boot_timeout_s: float
    ) -> Template | None:
        """The template for this start, which may be made for it; None when it has to boot."""
        initramfs = await self._kernels.initramfs(start.kernel)
        obtaining = asyncio.ensure_future(self._templates.obtain(start, initramfs, stages))
        try:
            async with asyncio.timeout(boot_timeout_s):
                # Nobody rings when a VM is no longer wanted: that is looked at again and again.
                while not obtaining.done():
                    await asyncio.wait({obtaining}, timeout=_WANTED_INTERVAL_S)
                    self._check_wanted(start.vm)
            return obtaining.result()
        except TimeoutError:
            stages.note(f"no template within {boot_timeout_s:g} s, the machine boots")
            return None
        finally:
            obtaining.cancel()
            await asyncio.gather(obtaining, return_exceptions=True)

    async def _restore(
        self, start: Start, template: Template, stages: Stages, boot_timeout_s: float
    ) -> None:
        """Bring the machine up from `template`, to its identity as far as `start` has one."""
        prepare_private_dir(self._paths.vm(start.vm.id).runtime)
        with self._templates.in_use(template):
            stages.stage("disks")
            await self.create(start)
            stages.stage("prepare")
            await self._launch(start, stages)
        await self._introduce(start, stages, boot_timeout_s)

    async def _restored(
        self, start: Start, template: Template, stages: Stages, boot_timeout_s: float
    ) -> Vm | None:
        """The VM, started from `template`; None when that failed, and nothing of it is left."""
        warm = self._templates.start_from(template, start)
        try:
            async with asyncio.timeout(boot_timeout_s):
                await self._restore(warm, template, stages, boot_timeout_s)
        except Cancelled:
            raise
        except (BangerError, OSError) as error:  # TimeoutError is one
            await to_its_end(self._vms.start_over(start.vm))
            self._check_wanted(start.vm)
            why = str(error) or f"it took longer than {boot_timeout_s:g} s"
            if isinstance(error, StateRefused):
                await self._templates.discard(template, why)
            elif warm.ran and isinstance(error, BangerError):
                await self._templates.doubt(template, why)
            stages.note(f"starting from a template failed, the machine boots: {why}")
            if start.vm.runtime.state is not VmState.CREATING:
                await self.create(start)  # its own disks, as a VM that was not started has them
            prepare_private_dir(self._paths.vm(start.vm.id).runtime)
            return None
        await self._templates.used(template)
        self._standbys.prepare(start, template, self._restore)
        return await self._running(warm)

    async def _booted(self, start: Start, stages: Stages, boot_timeout_s: float) -> Vm:
        stages.stage("prepare")
        vm = start.vm
        console_from = console_size(Path(vm.runtime.log_path))
        await self._launch(start, stages)
        stages.stage("boot", "waiting for the guest")
        try:
            await self._await_agent(vm, boot_timeout_s)
            stages.stage("setup")
            await self._while_it_runs(vm, self._set_up(start), _setup_timeout_s(vm))
        except BangerError as error:
            raise GuestLost(error, vm, console_from) from error
        return await self._running(start)

    async def _running(self, start: Start) -> Vm:
        vm = start.vm
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
            tap = start.network.tap if start.network is not None else ""
            self._liveness.record(vm, pid=0, network_pids=network_pids, tap=tap)
            self._check_wanted(vm)
            stages.stage("launch" if start.saved is None else "restore")
            machine = self._handed_over(start, initramfs)
        except BaseException:
            start.abandon()
            raise
        async with AsyncExitStack() as undo:
            pid = await self._pid_of(start, machine)
            undo.push_async_callback(self._liveness.end, vm)
            self._liveness.record(vm, pid=pid, network_pids=network_pids, tap=tap)
            self._check_wanted(vm)
            undo.pop_all()

    def _handed_over(self, start: Start, initramfs: Path) -> Machine:
        """The machine of this start, which may go on from the VM's own memory from now on.

        Raises OSError when that cannot be noted."""
        paths, saved = self._paths.vm(start.vm.id), start.saved
        if saved is None:
            return machine_of(start, paths, initramfs)
        machine = machine_of(start, paths, initramfs, MemoryFile(saved.memory, private=True))
        self._vms.hand_over_memory(start.vm)
        return machine

    async def _pid_of(self, start: Start, machine: Machine) -> int:
        """Launch or restore the machine: its pid. The network's descriptor is the hypervisor's."""
        saved = start.saved
        if saved is None:
            return await self._drivers.hypervisor.launch(machine, start.network)
        start.ran = True
        try:
            return await self._drivers.hypervisor.restore(machine, start.network, saved.state)
        except MachineLost:
            raise
        except (BangerError, OSError):  # cancelled, it may have run for a moment
            start.ran = False
            raise

    def _check_wanted(self, vm: Vm) -> None:
        """Raise Cancelled when somebody has killed the VM before it had a machine."""
        if reason := self._vms.end_reasons.get(vm.id):
            raise Cancelled(f'vm "{vm.name}" does not start: {reason}')

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
        await while_it_runs(work, self._liveness.wait_exit(vm, timeout_s))

    async def _set_up(self, start: Start) -> None:
        channel = await self._agents.channel(start.vm)
        request = replace(
            start.setup,
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            unix_time_ns=time.time_ns(),
        )
        await call(channel, request, timeout_s=_setup_timeout_s(start.vm))


def _never_ran(vm: Vm) -> bool:
    """Whether its disks are as they were made: no guest has written to them."""
    return vm.started_at is None and not vm.runtime.last_error and not vm.copied_from


def _setup_timeout_s(vm: Vm) -> float:
    return _SETUP_TIMEOUT_S + vm.spec.disk_size_mib * _SETUP_S_PER_MIB
