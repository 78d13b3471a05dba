"""Snapshots: a VM's disks and, while it runs, its memory, kept for others to be made from.

The VM is paused for some milliseconds at most and goes on. A snapshot and its VM share the layers
of disks that were written until then (`layers`), and otherwise know nothing of each other: either
can be deleted first. Where the storage has no layers the disks are copied in that pause, which is
as short where the file system makes clones. `taken` is also the first half of a fork, which keeps
no snapshot.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from banger.base.cancellation import to_its_end
from banger.base.errors import (
    BangerError,
    Conflict,
    PreconditionFailed,
    Unavailable,
)
from banger.base.files import sync_file
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import Snapshot, Vm, VmState, check_vm_name, now
from banger.base.paths import Paths
from banger.drivers.base import Capture, Hypervisor, MachineStatus, Networks, Storage
from banger.services import artifacts
from banger.services.agents import Agents
from banger.services.artifacts import (
    Staging,
    allocated_bytes,
    new_id,
    remove_leftovers,
    staged,
)
from banger.services.capabilities import Capabilities, Saved, Start
from banger.services.disk_room import DiskRoom
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.layers import DiskLayers, check_kind, disks_of
from banger.services.liveness import Liveness
from banger.services.machine import machine_of
from banger.services.operations import Progress, Stages
from banger.services.preflight import check_room_for_memory, require
from banger.services.references import find
from banger.services.resumption import Resumption
from banger.services.vm import VmService
from banger.store.store import Store, snapshot_exists

MEMORY = "memory"
STATE = "machine-state"
_OTHER_MACHINE_HINT = "boot its disks without the memory: add --cold"


class SnapshotService:
    def __init__(
        self,
        *,
        paths: Paths,
        store: Store,
        hypervisor: Hypervisor,
        storage: Storage,
        networks: Networks,
        capabilities: Capabilities,
        images: ImageService,
        kernels: KernelService,
        vms: VmService,
        liveness: Liveness,
        layers: DiskLayers,
        agents: Agents,
        room: DiskRoom,
        resumption: Resumption,
    ) -> None:
        self._paths = paths
        self._store = store
        self._hypervisor = hypervisor
        self._storage = storage
        self._networks = networks
        self._capabilities = capabilities
        self._images = images
        self._kernels = kernels
        self._vms = vms
        self._liveness = liveness
        self._layers = layers
        self._agents = agents
        self._room = room
        self._resumption = resumption
        self._users: Counter[str] = Counter()

    # Taking one.

    async def take(self, reference: str, name: str, progress: Progress) -> Snapshot:
        """A snapshot of a VM as it is now, which goes on as it was: running, or stopped.

        Raises Conflict for a name that is taken and a VM in another state. Cancelled or failed it
        leaves nothing but an empty layer of the VM's disks.
        """
        check_vm_name(name)
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, progress) as vm:
            progress.stage("preflight")
            if name in {each.name for each in await self._store.snapshots()}:
                raise snapshot_exists(name)
            async with self.taken(vm, name, progress) as (snapshot, staging):
                progress.stage("sync")
                await asyncio.to_thread(_sync, staging.path)
                await staging.publish(partial(self._store.insert_snapshot, snapshot))
        progress.result(snapshot=snapshot)
        return snapshot

    @asynccontextmanager
    async def taken(
        self, vm: Vm, name: str, stages: Stages, *, forks: int = 0
    ) -> AsyncIterator[tuple[Snapshot, Staging]]:
        """A snapshot with its files in a staging directory, which goes unless it is published.

        With the VM's lock held, which the block needs no more. So many `forks` are to be made of
        it: there is room for them, too.
        """
        running = self._check_state(vm)
        vm = await self._layers.settle(vm)
        memory_mib = vm.spec.memory_mib if running else 0
        room_bytes = 0 if self._storage.layering else await asyncio.to_thread(self._room_bytes, vm)
        room_bytes *= 1 + forks
        require([check_room_for_memory(self._paths.vms_dir, memory_mib, room_bytes)])
        await self._layers.bound(vm, stages, memory_mib)
        snapshot_id = new_id()
        final = self._paths.snapshot_dir(snapshot_id)
        async with staged(final) as staging:
            shape, paused_s = "", 0.0
            if running:
                async with self._room.left_alone(vm.id):
                    shape, paused_s = await self._captured(vm, staging.path, stages)
                stages.describe(paused_ms=round(paused_s * 1000, 1))
            else:
                await self._frozen(vm, staging.path, stages)
            disks = disks_of(vm)
            snapshot = Snapshot(
                id=snapshot_id,
                name=name,
                vm_id=vm.id,
                vm_name=vm.name,
                image_id=vm.image_id,
                image_name=vm.image_name,
                kernel_id=vm.kernel_id,
                spec=vm.spec,
                shape=shape,
                directory=str(final),
                system_disk=disks["system"].name,
                work_disk=disks["work"].name,
                size_bytes=await asyncio.to_thread(allocated_bytes, staging.path),
                paused_ms=round(paused_s * 1000, 1),
                created_at=now(),
                workspace=vm.workspace,
            )
            yield snapshot, staging

    def _check_state(self, vm: Vm) -> bool:
        """Whether it runs; Conflict for a VM that neither runs nor is stopped."""
        if vm.runtime.state is VmState.RUNNING and self._liveness.vm_alive(vm):
            return True
        if vm.runtime.state in (VmState.RUNNING, VmState.STOPPED, VmState.ERROR):
            if self._liveness.vm_alive(vm):
                raise Conflict(f'vm "{vm.name}" is ending', hint="try again")
            return False
        hint = f"first: banger vm start {vm.name}" if vm.runtime.state is VmState.SUSPENDED else ""
        raise Conflict(f'vm "{vm.name}" is {vm.runtime.state}', hint=hint)

    async def check_capturable(self, vm: Vm, why_not: str) -> None:
        """Raise Conflict for a machine that is held, which says `why_not`, and for one whose disk
        has lost something."""
        socket = Path(vm.runtime.api_socket)
        if await self._hypervisor.status(socket) is not MachineStatus.RUNNING:
            raise Conflict(
                f'the machine of vm "{vm.name}" is held: {why_not}',
                hint=f"why: banger vm health {vm.name}",
            )
        await self._room.check_whole(vm)

    async def _captured(self, vm: Vm, directory: Path, stages: Stages) -> tuple[str, float]:
        """Copy the machine, and have its disks go on in new layers or copy them; its shape, and
        for how many seconds it was paused."""
        socket = Path(vm.runtime.api_socket)
        await self.check_capturable(vm, "nothing of it can be copied now")
        shape = await self.shape(vm)
        try:
            _, overlays = await self._layers.add(vm)
            at_rest = None if overlays else partial(self._share, vm, directory)
            capture = Capture(directory / MEMORY, directory / STATE, overlays, at_rest)
            try:
                pid = self._liveness.pid(vm)
                try:
                    paused_s = await self._hypervisor.capture(socket, pid, capture, stages.stage)
                finally:
                    await to_its_end(self.drop_channel(vm.id))
            except OSError as error:
                raise Unavailable(
                    f'the memory of vm "{vm.name}" cannot be copied: {error.strerror or error}',
                    hint="see that the disk has free space",
                ) from error
            if overlays:
                await self._share(vm, directory)
            await self._room.check_whole(vm)  # what it had in flight was written in that pause
        except BaseException:
            await to_its_end(self._settled(vm))
            raise
        return shape, paused_s

    async def drop_channel(self, vm_id: str) -> None:
        """Its machine was captured, or may have been. A vsock is reset in the guest then, also
        where what is saved comes to nothing, and nobody tells this side."""
        if self._hypervisor.features.agent_vsock_port:
            await self._agents.drop(vm_id)

    async def _frozen(self, vm: Vm, directory: Path, stages: Stages) -> None:
        stages.stage("freeze")
        try:
            await self._layers.add(vm)
            await self._share(vm, directory)
        except BaseException:
            # Nothing was written to the new layers: the old ones are its disks again.
            await to_its_end(self._unfrozen(vm))
            raise

    async def _share(self, vm: Vm, directory: Path) -> None:
        for disk in disks_of(vm).values():
            await self._storage.share(disk, directory)

    def _room_bytes(self, vm: Vm) -> int:
        """For copies of its disks."""
        return sum(self._storage.room_bytes(name, disk) for name, disk in disks_of(vm).items())

    async def _settled(self, vm: Vm) -> None:
        """After a failure: it runs, and what it writes to is on the record."""
        try:
            current = await self._store.get_vm(vm.id)
            if current is not None:
                await self._resumption.let_run_on(current)
        except (BangerError, OSError) as error:
            get_logger().error("layers not settled", error=str(error), **vm_attributes(vm))

    async def _unfrozen(self, vm: Vm) -> None:
        try:
            await self._layers.settle(await self._vms.save(vm))
        except (BangerError, OSError) as error:
            get_logger().error("layers not settled", error=str(error), **vm_attributes(vm))

    async def shape(self, vm: Vm) -> str:
        """What a machine must have to go on from the memory of this VM's. Raises PreconditionFailed
        for one whose disks another storage has made: nobody knows its machine now."""
        for name, disk in disks_of(vm).items():
            check_kind(self._storage, name, disk)
        image, kernel = await self._images.of_vm(vm), await self._kernels.get(vm.kernel_id)
        start = Start(vm, image, kernel)
        self._capabilities.contribute_machine(start)
        initramfs = await self._kernels.initramfs(kernel)
        machine = machine_of(start, self._paths.vm(vm.id), initramfs)
        return await self._hypervisor.shape(machine, self._networks.link(vm.spec.network))

    # Making VMs from one.

    @contextmanager
    def in_use(self, snapshot: Snapshot) -> Iterator[None]:
        """A VM is being made from it: it is not deleted meanwhile."""
        self._users[snapshot.id] += 1
        try:
            yield
        finally:
            self._users[snapshot.id] -= 1
            if not self._users[snapshot.id]:
                del self._users[snapshot.id]

    async def saved(self, snapshot: Snapshot, vm: Vm) -> Saved:
        """The memory for a VM that is being made from it.

        Raises PreconditionFailed when its machine would be another than the one that was saved.
        """
        if await self.shape(vm) != snapshot.shape:
            raise PreconditionFailed(
                f'the memory of snapshot "{snapshot.name}" is of another machine: the hypervisor,'
                " the processor or banger has changed since",
                hint=_OTHER_MACHINE_HINT,
            )
        directory = Path(snapshot.directory)
        saved = Saved(directory / MEMORY, directory / STATE, snapshot.spec.disk_size_mib)
        for path in (saved.memory, saved.state):
            if not path.is_file():
                raise PreconditionFailed(f"{path} is missing", hint=_OTHER_MACHINE_HINT)
        return saved

    # What there is.

    async def all(self) -> list[Snapshot]:
        """All of them, by name."""
        return await self._store.snapshots()

    async def resolve(self, reference: str) -> Snapshot:
        """The snapshot of an id, a name, or an unambiguous prefix of either; exact wins."""
        return find(
            await self.all(),
            reference,
            noun="snapshot",
            plural="snapshots",
            name=lambda snapshot: snapshot.name,
        )

    async def delete(self, reference: str) -> Snapshot:
        """Delete a snapshot. VMs that were made from it have all they need."""
        snapshot = await self.resolve(reference)
        if self._users[snapshot.id]:
            raise Conflict(f'a VM is being made from snapshot "{snapshot.name}"', hint="try again")
        log = OperationLog("snapshot.delete", snapshot=snapshot.id, snapshot_name=snapshot.name)
        with log:
            await artifacts.delete(
                Path(snapshot.directory), partial(self._store.delete_snapshot, snapshot.id)
            )
        return snapshot

    async def remove_leftovers(self) -> None:
        """At start-up: what interrupted snapshots, forks and deletions left."""
        for each in await self.all():
            # Its deletion went no further than that.
            if not await asyncio.to_thread(Path(each.directory).is_dir):
                await self._store.delete_snapshot(each.id)
        known = {each.id for each in await self.all()}
        await remove_leftovers(self._paths.snapshots_dir, known)


def _sync(directory: Path) -> None:
    """What a power failure must not leave half written."""
    for path in directory.iterdir():
        sync_file(path)
