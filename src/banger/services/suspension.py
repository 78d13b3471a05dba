"""Suspending a VM: its process ends, its memory stays, and its next start goes on from there.

The memory lies in the VM's directory, complete before the record says so, and goes as soon as a
machine has gone on from it: the disks are then no longer those that it knows.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import (
    BangerError,
    NotRunning,
    PreconditionFailed,
    Unavailable,
)
from banger.base.files import sync_file
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Vm, VmState
from banger.base.paths import Paths
from banger.drivers.base import Capture, Hypervisor
from banger.services.capabilities import Saved
from banger.services.disk_room import DiskRoom
from banger.services.liveness import Liveness
from banger.services.operations import Stages
from banger.services.preflight import check_room_for_memory, require
from banger.services.resumption import Resumption
from banger.services.snapshots import SnapshotService
from banger.services.vm import VmService


class Suspension:
    def __init__(
        self,
        paths: Paths,
        hypervisor: Hypervisor,
        vms: VmService,
        liveness: Liveness,
        snapshots: SnapshotService,
        room: DiskRoom,
        resumption: Resumption,
    ) -> None:
        self._paths = paths
        self._hypervisor = hypervisor
        self._vms = vms
        self._liveness = liveness
        self._snapshots = snapshots
        self._room = room
        self._resumption = resumption

    async def suspend(self, reference: str, stages: Stages) -> Vm:
        """End a VM that runs and keep its memory. A suspended one stays as it is.

        Raises NotRunning for one that is stopped. Cancelled or failed it runs on.
        """
        found = await self._vms.settled(reference)
        async with self._vms.locked(found, stages) as vm:
            if vm.runtime.state is VmState.SUSPENDED:
                return vm
            if vm.runtime.state is not VmState.RUNNING or not self._liveness.vm_alive(vm):
                raise NotRunning(f'vm "{vm.name}" is not running: there is no memory to keep')
            stages.stage("preflight")
            require([check_room_for_memory(self._paths.vms_dir, vm.spec.memory_mib)])
            async with self._room.left_alone(vm.id):
                return await self._suspended(vm, stages)

    async def _suspended(self, vm: Vm, stages: Stages) -> Vm:
        await self._snapshots.check_capturable(vm, "it cannot be suspended now")
        shape = await self._snapshots.shape(vm)
        try:
            await self._save(vm, stages)
            await self._room.check_whole(vm)  # what it had in flight is written by now
            runtime = msgspec.structs.replace(vm.runtime, saved_shape=shape)
            stages.stage("cleanup")
            return await to_its_end(
                self._vms.mark_suspended(msgspec.structs.replace(vm, runtime=runtime))
            )
        except BaseException:
            await to_its_end(self._run_on(vm))
            raise

    async def _save(self, vm: Vm, stages: Stages) -> None:
        paths = self._paths.vm(vm.id)
        capture = Capture(paths.memory, paths.machine_state, {}, runs_on=False)
        try:
            pid = self._liveness.pid(vm)
            await self._hypervisor.capture(Path(vm.runtime.api_socket), pid, capture, stages.stage)
            stages.stage("sync")
            for path in (paths.memory, paths.machine_state):
                await asyncio.to_thread(sync_file, path)
        except OSError as error:
            raise Unavailable(
                f'the memory of vm "{vm.name}" cannot be kept: {error.strerror or error}',
                hint="see that the disk has free space",
            ) from error

    async def _run_on(self, vm: Vm) -> None:
        """After a failure, unless it came too late to be one."""
        try:
            current = await self._vms.show(vm.id)
            if current.runtime.state is not VmState.RUNNING:
                return
            await self._snapshots.drop_channel(vm.id)
            self._vms.drop_memory(vm)
            # It may be what had filled the disk, so that a guest was held.
            await self._resumption.let_run_on(current, has_room=True)
        except (BangerError, OSError) as error:
            get_logger().error("machine stays paused", error=str(error), **vm_attributes(vm))

    async def saved(self, vm: Vm) -> Saved:
        """What a suspended VM goes on from.

        Raises PreconditionFailed when its machine would be another one, or it is gone.
        """
        paths = self._paths.vm(vm.id)
        hint = f"boot it without its memory: banger vm start --cold {vm.name}"
        if await self._snapshots.shape(vm) != vm.runtime.saved_shape:
            raise PreconditionFailed(
                f'the memory of vm "{vm.name}" is of another machine: the hypervisor, the processor'
                " or banger has changed since",
                hint=hint,
            )
        for path in (paths.memory, paths.machine_state):
            if not path.is_file():
                raise PreconditionFailed(f"{path} is missing", hint=hint)
        return Saved(paths.memory, paths.machine_state, vm.spec.disk_size_mib)
