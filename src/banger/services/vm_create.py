"""Making a VM: its record, its disks, and its first start up to an agent with an identity.

What fails before the guest runs leaves nothing. A guest that boots and does not answer is kept,
stopped and with its console log, for inspection.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base.config import VCPU_MAX, Config
from banger.base.errors import (
    BadRequest,
    BangerError,
    Conflict,
    Internal,
    OperationTimeout,
    Unavailable,
)
from banger.base.log import OperationLog, vm_attributes
from banger.base.model import (
    Image,
    InitMode,
    Kernel,
    NetworkMode,
    Vm,
    VmRuntime,
    VmSpec,
    VmState,
    check_vm_name,
    now,
)
from banger.base.paths import Paths, check_socket_path, prepare_private_dir
from banger.base.units import SIZE_MAX_MIB
from banger.drivers.base import (
    Disk,
    DiskFormat,
    GuestNetwork,
    Hypervisor,
    Machine,
    Network,
    NetworkAttachment,
    Storage,
)
from banger.guest.channel import call
from banger.guest.requests import Setup
from banger.services.agents import Agents
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.names import generate_name
from banger.services.operations import Progress
from banger.services.preflight import check_artifacts, check_free_disk, require
from banger.services.vm import VmService
from banger.store.store import Store

#: From launch to an agent that answers. Alone a guest takes seconds, under emulation beside
#: others many times that, with systemd about a minute.
BOOT_TIMEOUT_S = 240.0
_BOOT_TIMEOUT_MAX_S = 3600.0
_SETUP_TIMEOUT_S = 60.0
_EXIT_AFTER_CLOSE_S = 3.0
_MEMORY_MIN_MIB = 128
_CONSOLE_TAIL_LINES = 8
_CONSOLE_TAIL_BYTES = 8192


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say about a new VM; what it does not say is the configuration's."""

    name: str = ""
    image: str = ""
    vcpu_count: int | None = None
    memory_mib: int | None = None
    disk_size_mib: int | None = None
    init: InitMode | None = None
    network: NetworkMode = NetworkMode.USER
    ephemeral: bool = False
    boot_timeout_s: float = BOOT_TIMEOUT_S


@dataclass(frozen=True)
class Drivers:
    """The drivers this daemon works with."""

    hypervisor: Hypervisor
    storage: Storage
    network: Network


class GuestLost(BangerError):
    """A guest that was started and did not come up; the VM is kept."""

    def __init__(self, error: BangerError, vm: Vm) -> None:
        tail = console_tail(Path(vm.runtime.log_path))
        message = f'the guest of vm "{vm.name}" did not come up: {error.message}'
        if tail:
            message += f"\nthe end of its console:\n{tail}\n"
        super().__init__(
            f"{message}; inspect {vm.runtime.log_path}",
            hint=f"the VM is kept: banger vm logs {vm.name}, then banger vm delete {vm.name}",
        )
        self.code = error.code


class VmCreator:
    def __init__(
        self,
        *,
        paths: Paths,
        config: Config,
        store: Store,
        drivers: Drivers,
        images: ImageService,
        kernels: KernelService,
        vms: VmService,
        liveness: Liveness,
        agents: Agents,
    ) -> None:
        self._paths = paths
        self._config = config
        self._store = store
        self._drivers = drivers
        self._images = images
        self._kernels = kernels
        self._vms = vms
        self._liveness = liveness
        self._agents = agents

    def check(self, request: CreateRequest) -> None:
        """Raise BadRequest for what can be seen to be wrong without looking further."""
        if request.name:
            check_vm_name(request.name)
        self._spec(request)
        if not 1 <= request.boot_timeout_s <= _BOOT_TIMEOUT_MAX_S:
            raise BadRequest(f"a boot timeout of {request.boot_timeout_s:g} s is not possible")

    async def work(self, request: CreateRequest, progress: Progress) -> None:
        """`create` as the work of an operation, which has the VM as its result."""
        await self.create(request, progress)

    async def create(self, request: CreateRequest, progress: Progress) -> Vm:
        """Make and start the VM; it runs and has its identity when this returns.

        Raises PreconditionFailed with all that is missing, Conflict for a name that is taken,
        GuestLost (the VM is kept) when the guest does not come up. Cancelled or failed before
        that, it leaves nothing.
        """
        self.check(request)
        image = await self._images.ensure(
            request.image or self._config.default_image_name, progress
        )
        async with self._images.locks.hold(image.id):
            image = await self._images.get(image.name)
            kernel = await self._kernels.get(image.kernel_id)
            progress.stage("preflight")
            await self._preflight(image, kernel)
            vm = await self._insert(request, image)
        progress.describe(**vm_attributes(vm))
        async with self._vms.locks.hold(vm.id):
            progress.result(vm=vm)
            try:
                vm = await self._bring_up(vm, image, kernel, request, progress)
            except GuestLost as error:
                vm = await asyncio.shield(self._vms.mark_failed(vm, error))
                progress.result(vm=vm)
                raise
            except BaseException:
                await asyncio.shield(self._discard(vm))
                raise
            progress.result(vm=vm)
            return vm

    async def _discard(self, vm: Vm) -> None:
        try:
            with OperationLog("vm.discard", **vm_attributes(vm)) as log:
                await self._vms.remove(vm, log)
        except (BangerError, OSError) as error:
            # A record that says so can be deleted again; one "in creation" could not.
            await self._vms.mark_failed(vm, Internal(f"its clean-up failed: {error}"))

    def _spec(self, request: CreateRequest) -> VmSpec:
        config = self._config
        spec = VmSpec(
            vcpu_count=_given(request.vcpu_count, config.vm_defaults_vcpu),
            memory_mib=_given(request.memory_mib, config.vm_defaults_memory),
            disk_size_mib=_given(request.disk_size_mib, config.vm_defaults_disk_size),
            system_overlay_size_mib=config.vm_defaults_system_overlay_size,
            init=request.init or config.vm_defaults_init,
            network=request.network,
            ephemeral=request.ephemeral,
        )
        if not 1 <= spec.vcpu_count <= VCPU_MAX:
            raise BadRequest(f"{spec.vcpu_count} vCPUs are not possible (1 to {VCPU_MAX})")
        if not _MEMORY_MIN_MIB <= spec.memory_mib <= SIZE_MAX_MIB:
            raise BadRequest(
                f"{spec.memory_mib} MiB of memory are not possible",
                hint=f"give at least {_MEMORY_MIN_MIB}M",
            )
        if not 1 <= spec.disk_size_mib <= SIZE_MAX_MIB:
            raise BadRequest(f"a work disk of {spec.disk_size_mib} MiB is not possible")
        return spec

    async def _preflight(self, image: Image, kernel: Kernel) -> None:
        drivers = self._drivers
        checks = [
            *await drivers.hypervisor.checks(),
            *await drivers.storage.checks(),
            *await drivers.network.checks(),
            check_free_disk(self._paths.vms_dir),
            *await asyncio.to_thread(check_artifacts, image, kernel),
        ]
        require(checks)

    async def _insert(self, request: CreateRequest, image: Image) -> Vm:
        while True:
            taken = {vm.name for vm in await self._store.vms()}
            try:
                return await self._insert_as(request.name or generate_name(taken), request, image)
            except Conflict:
                # Others draw names at the same time; only one that was asked for is insisted on.
                if request.name:
                    raise

    async def _insert_as(self, name: str, request: CreateRequest, image: Image) -> Vm:
        vm_id = secrets.token_hex(6)
        paths = self._paths.vm(vm_id)
        check_socket_path(paths.control_socket)
        spec = self._spec(request)
        if spec.init is InitMode.AUTO:
            spec = msgspec.structs.replace(spec, init=image.init)
        moment = now()
        vm = Vm(
            id=vm_id,
            name=name,
            image_id=image.id,
            image_name=image.name,
            kernel_id=image.kernel_id,
            spec=spec,
            runtime=VmRuntime(
                state=VmState.CREATING,
                api_socket=str(paths.control_socket),
                agent_socket=str(paths.agent_socket),
                log_path=str(paths.console_log),
                vm_dir=str(paths.directory),
                system_overlay=str(paths.system_overlay),
                work_disk=str(paths.work_disk),
            ),
            created_at=moment,
            updated_at=moment,
        )
        try:
            await self._store.insert_vm(vm)
        except asyncio.CancelledError:
            # The transaction is done all the same; nobody else knows this id.
            await asyncio.shield(self._store.delete_vm(vm.id))
            raise
        return vm

    async def _bring_up(
        self, vm: Vm, image: Image, kernel: Kernel, request: CreateRequest, progress: Progress
    ) -> Vm:
        progress.stage("disks")
        paths = self._paths.vm(vm.id)
        for directory in (paths.directory, paths.runtime):
            prepare_private_dir(directory)
        work_seed = await self._images.work_seed(image, vm.spec.disk_size_mib)
        made = await asyncio.gather(
            self._drivers.storage.create_overlay(
                Path(image.rootfs_path), paths.system_overlay, vm.spec.system_overlay_size_mib
            ),
            self._drivers.storage.create_overlay(work_seed, paths.work_disk, vm.spec.disk_size_mib),
            return_exceptions=True,  # when one fails, the other must not go on behind our back
        )
        for failure in filter(None, made):
            raise failure
        machine = self._machine(vm, kernel, await self._kernels.initramfs(kernel))
        progress.stage("launch")
        network = await self._launch(vm, machine)
        progress.stage("boot", "waiting for the guest")
        try:
            await self._await_agent(vm, request.boot_timeout_s)
            progress.stage("setup")
            await self._set_up(vm, network)
        except BangerError as error:
            raise GuestLost(error, vm) from error
        address = network.address.partition("/")[0] if network else ""
        runtime = msgspec.structs.replace(vm.runtime, guest_ip=address)
        return await self._vms.mark_running(msgspec.structs.replace(vm, runtime=runtime))

    def _machine(self, vm: Vm, kernel: Kernel, initramfs: Path) -> Machine:
        paths = self._paths.vm(vm.id)
        disk_format = self._drivers.storage.format
        return Machine(
            vm_id=vm.id,
            vcpu_count=vm.spec.vcpu_count,
            memory_mib=vm.spec.memory_mib,
            kernel=Path(kernel.vmlinux_path),
            initramfs=initramfs,
            kernel_parameters=_kernel_parameters(vm.spec.init),
            disks=(
                Disk("system", paths.system_overlay, disk_format),
                Disk("work", paths.work_disk, disk_format),
                Disk("modules", Path(kernel.modules_path), DiskFormat.RAW, read_only=True),
            ),
            console_log=paths.console_log,
            hypervisor_log=paths.hypervisor_log,
            control_socket=paths.control_socket,
            agent_socket=paths.agent_socket,
        )

    async def _launch(self, vm: Vm, machine: Machine) -> GuestNetwork | None:
        """Start network and machine, and record their processes. On failure neither is left."""
        attachment: NetworkAttachment | None = None
        async with AsyncExitStack() as undo:
            if vm.spec.network is NetworkMode.USER:
                log = self._paths.vm(vm.id).network_log
                attachment = await self._drivers.network.attach(vm.id, log)
                # The machine's end of the network is what keeps the network's process alive: a
                # launch that fails closes it, and the process ends.
            pid = await self._drivers.hypervisor.launch(machine, attachment)
            undo.push_async_callback(self._liveness.end, vm)
            self._liveness.record(
                vm, pid=pid, network_pid=attachment.pid if attachment is not None else 0
            )
            undo.pop_all()
        return attachment.guest if attachment is not None else None

    async def _await_agent(self, vm: Vm, timeout_s: float) -> None:
        """Wait for the agent; a machine that ends meanwhile ends the wait."""
        connecting = asyncio.ensure_future(self._agents.connect(vm, timeout_s))
        ending = asyncio.ensure_future(self._liveness.wait_exit(vm, timeout_s))
        try:
            await asyncio.wait({connecting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done() and connecting.exception() is None:
                return
            if connecting.done() and not isinstance(connecting.exception(), OperationTimeout):
                # Its sockets close before its process is gone: that is what to tell of.
                await asyncio.wait({ending}, timeout=_EXIT_AFTER_CLOSE_S)
            if ending.done() and ending.result():
                raise Unavailable("the machine ended while it booted")
            try:
                await connecting
            except OperationTimeout as error:
                raise OperationTimeout(f"no answer within {timeout_s:g} s") from error
        finally:
            for task in (connecting, ending):
                task.cancel()
            await asyncio.gather(connecting, ending, return_exceptions=True)

    async def _set_up(self, vm: Vm, network: GuestNetwork | None) -> None:
        channel = await self._agents.channel(vm)
        request = Setup(
            hostname=vm.name,
            machine_id=secrets.token_hex(16),
            address=network.address if network else None,
            gateway=network.gateway if network else None,
            dns=network.dns if network else None,
            mac=network.mac if network else None,
            entropy=secrets.token_bytes(256),
            unix_time_ns=time.time_ns(),
        )
        await call(channel, request, timeout_s=_SETUP_TIMEOUT_S)


def _kernel_parameters(init: InitMode) -> tuple[str, ...]:
    mode = f"banger.init={init}"
    if init is not InitMode.SYSTEMD:
        return (mode,)
    # A log is no terminal to log in at; and without udev, which tells systemd that a device is
    # there, systemd 252 waits 90 s for it before its boot is complete.
    return mode, "systemd.getty_auto=no"


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def console_tail(log: Path) -> str:
    """The last lines of a console log, as text that is safe to print."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _CONSOLE_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = deque((line.rstrip() for line in text.splitlines()), maxlen=_CONSOLE_TAIL_LINES)
    # The console is the guest's: its control characters must not reach a terminal.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
