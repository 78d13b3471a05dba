"""Making a VM: its image when it is missing, its record, its disks, and its first start.

What fails before the guest runs leaves nothing. A guest that boots and does not answer is kept,
with its console log, for inspection.
"""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.config import Config
from banger.base.errors import BangerError, Conflict, Internal, PreconditionFailed
from banger.base.log import OperationLog, vm_attributes
from banger.base.model import (
    Image,
    InitMode,
    Kernel,
    NetworkMode,
    Snapshot,
    Vm,
    VmSpec,
    VmState,
    now,
)
from banger.base.paths import Paths, check_socket_path
from banger.drivers.base import Hypervisor
from banger.services.capabilities import Start
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.layers import layer_of
from banger.services.listeners import numbered
from banger.services.machine import new_runtime
from banger.services.names import generate_name
from banger.services.operations import Progress
from banger.services.snapshots import SnapshotService
from banger.services.vm import VmService
from banger.services.vm_spec import CreateRequest, check_vcpus
from banger.services.vm_start import GuestLost, VmStarter
from banger.store.store import Store


class VmCreator:
    def __init__(
        self,
        *,
        paths: Paths,
        config: Config,
        hypervisor: Hypervisor,
        store: Store,
        images: ImageService,
        kernels: KernelService,
        vms: VmService,
        starter: VmStarter,
        snapshots: SnapshotService,
        default_network: NetworkMode,
    ) -> None:
        self._paths = paths
        self._config = config
        self._hypervisor = hypervisor
        self._store = store
        self._images = images
        self._kernels = kernels
        self._vms = vms
        self._starter = starter
        self._snapshots = snapshots
        self._default_network = default_network

    def check(self, request: CreateRequest) -> None:
        """Raise BadRequest for what can be seen to be wrong without looking further."""
        spec = request.check(self._config, self._default_network)
        if not request.from_snapshot:  # that says what the request does not
            self._check_vcpus(spec)

    async def work(self, request: CreateRequest, progress: Progress) -> None:
        """`create` as the work of an operation, which has the VM as its result."""
        await self.create(request, progress)

    async def create(self, request: CreateRequest, progress: Progress) -> Vm:
        """Make the VM and (unless the request says no) start it: it has its identity then.

        Raises PreconditionFailed with all that is missing, Conflict for a name that is taken,
        GuestLost (the VM is kept) when the guest does not come up. Cancelled or failed before
        that, it leaves nothing.
        """
        if request.from_snapshot:
            snapshot = await self._snapshots.resolve(request.from_snapshot)
            with self._snapshots.in_use(snapshot):
                return await self.copy(
                    request, snapshot, progress, copied_from=f"snapshot {snapshot.name}"
                )
        spec = self._check_vcpus(request.check(self._config, self._default_network))
        image = await self._images.ensure(
            request.image or self._config.default_image_name, progress
        )
        return await self._over(image, request, spec, progress)

    async def copy(
        self, request: CreateRequest, snapshot: Snapshot, progress: Progress, *, copied_from: str
    ) -> Vm:
        """`create` of a VM that begins as a snapshot, which the caller keeps from going."""
        request.check(self._config, self._default_network)
        spec = self._check_vcpus(request.check_copy(snapshot))
        image = await self._store.get_image(snapshot.image_id)
        if image is None:
            raise PreconditionFailed(
                f'image "{snapshot.image_name}" of snapshot "{snapshot.name}" is gone'
            )
        return await self._over(image, request, spec, progress, snapshot, copied_from)

    def _check_vcpus(self, spec: VmSpec) -> VmSpec:
        """`spec`, when the hypervisor can have it. BadRequest otherwise."""
        hint = "give it fewer, by --vcpu or vm_defaults.vcpu"
        return check_vcpus(spec, self._hypervisor, hint)

    async def _over(
        self,
        image: Image,
        request: CreateRequest,
        spec: VmSpec,
        progress: Progress,
        snapshot: Snapshot | None = None,
        copied_from: str = "",
    ) -> Vm:
        async with AsyncExitStack() as held:
            async with self._images.locks.hold(image.id):
                image = await self._images.again(image)
                if spec.init is InitMode.AUTO:
                    spec = msgspec.structs.replace(spec, init=image.init)
                kernel_id = image.kernel_id if snapshot is None else snapshot.kernel_id
                kernel = await self._kernels.get(kernel_id)
                progress.stage("preflight")
                spec = await self._numbered(spec)
                vm = self._record(request.name, spec, image, kernel, copied_from)
                if snapshot is not None:
                    vm = msgspec.structs.replace(vm, workspace=snapshot.workspace)
                start = await self._starter.preflight(vm, image, kernel, snapshot)
                if snapshot is not None and snapshot.has_memory and not request.cold:
                    start.saved = await self._snapshots.saved(snapshot, vm)
                if snapshot is None and request.start and not request.cold:
                    start.vm = await self._starter.reserve(start)
                try:
                    # Before anybody sees the record: in creation and unheld, it has failed.
                    await held.enter_async_context(self._vms.hold(start.vm.id))
                    start.vm = await self._insert(start.vm)
                except BaseException:
                    self._starter.give_back(start.vm)
                    raise
            progress.describe(**vm_attributes(start.vm))
            return await self._bring_up(start, request, progress)

    async def _bring_up(self, start: Start, request: CreateRequest, progress: Progress) -> Vm:
        """What follows when there is a record, and its lock is held."""
        vm = start.vm
        progress.result(vm=vm)
        try:
            vm = await self._make(start, request, progress)
        except GuestLost as error:
            vm = await to_its_end(self._vms.mark_failed(vm, error))
            progress.result(vm=vm)
            raise
        except BaseException:
            await to_its_end(self._discard(vm))
            raise
        progress.result(vm=vm)
        return vm

    async def _make(self, start: Start, request: CreateRequest, progress: Progress) -> Vm:
        if not request.start:
            progress.stage("disks")
            await self._starter.create(start)
            return await self._vms.save(start.vm, state=VmState.STOPPED)
        return await self._starter.run(
            start, progress, boot_timeout_s=request.boot_timeout_s, cold=request.cold
        )

    async def _discard(self, vm: Vm) -> None:
        try:
            with OperationLog("vm.discard", **vm_attributes(vm)) as log:
                await self._vms.remove(vm, log)
        except (BangerError, OSError) as error:
            # A record that says so can be deleted again; one "in creation" could not.
            await self._vms.mark_failed(vm, Internal(f"its clean-up failed: {error}"))

    def _record(
        self, name: str, spec: VmSpec, image: Image, kernel: Kernel, copied_from: str
    ) -> Vm:
        """The record of a new VM; without a name it gets one when it is inserted."""
        vm_id = secrets.token_hex(6)
        paths = self._paths.vm(vm_id)
        check_socket_path(paths.control_socket)
        system, work = paths.system_overlay, paths.work_disk
        if copied_from:  # these names may be those of layers that come with the copy
            system, work = layer_of(system), layer_of(work)
        moment = now()
        return Vm(
            id=vm_id,
            name=name,
            image_id=image.id,
            image_name=image.name,
            kernel_id=kernel.id,
            spec=spec,
            runtime=msgspec.structs.replace(
                new_runtime(paths), system_overlay=str(system), work_disk=str(work)
            ),
            copied_from=copied_from,
            created_at=moment,
            updated_at=moment,
        )

    async def _numbered(self, spec: VmSpec) -> VmSpec:
        """`spec` with a number for each port that may be any."""
        claimed = [port for vm in await self._store.vms() for port in vm.spec.published_ports]
        ports = await numbered(spec.published_ports, claimed)
        return msgspec.structs.replace(spec, published_ports=ports)

    async def _insert(self, vm: Vm) -> Vm:
        if vm.name:
            return await self._insert_as(vm.name, vm)
        while True:
            # Others draw names at the same time.
            try:
                taken = {other.name for other in await self._store.vms()}
                return await self._insert_as(generate_name(taken), vm)
            except Conflict:
                continue

    async def _insert_as(self, name: str, vm: Vm) -> Vm:
        return await self._vms.insert(msgspec.structs.replace(vm, name=name))
