"""Lets machines run on that were paused for a copy, when whoever paused them could not.

A hypervisor may answer nobody while it writes: Firecracker takes one request at a time, and one of
them writes all of a machine's memory. So what does not run on at once is remembered, and tried
again until it runs or has ended. As long as the daemon lives: the next one begins anew.

A machine that is held for want of room is left to `DiskRoom`, one that is being copied to whoever
has its VM's lock for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, NotFound
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Vm, VmState
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths
from banger.drivers.base import Hypervisor, MachineStatus
from banger.services.disk_room import DiskRoom
from banger.services.layers import DiskLayers
from banger.services.vm import VmService

#: An operation that has failed, and a daemon that starts, wait so long for a hypervisor's answer: a
#: few milliseconds are usual.
_PATIENCE_S = 2.0
_INTERVAL_S = 1.0


class Resumption:
    def __init__(
        self,
        paths: Paths,
        hypervisor: Hypervisor,
        vms: VmService,
        layers: DiskLayers,
        room: DiskRoom,
    ) -> None:
        self._paths = paths
        self._hypervisor = hypervisor
        self._vms = vms
        self._layers = layers
        self._room = room
        #: By the VM's id: those that may be paused still.
        self._trying: dict[str, asyncio.Task[None]] = {}

    def is_due(self, vm_id: str) -> bool:
        """Whether its machine may be paused until its hypervisor answers again."""
        return vm_id in self._trying

    async def adopt(self, vms: Iterable[Vm]) -> None:
        """Have those run on that an earlier daemon has left, whatever was being made of them. All
        at once: who does not answer soon is waited for by nobody, and tried again."""
        await asyncio.gather(*(self._adopt(vm) for vm in vms))

    async def _adopt(self, vm: Vm) -> None:
        try:
            with suppress(NotFound):
                async with self._vms.locked(vm) as current:
                    await self.let_run_on(current)
        except Exception:
            # A supervisor's boundary: one VM's trouble must not keep the daemon down.
            get_logger().exception("vm not looked at", **vm_attributes(vm))

    async def let_run_on(self, vm: Vm, *, has_room: bool = False) -> None:
        """Have a VM's machine run on, now or as soon as it can be, and its record say where its
        disks are. With the VM's lock held. Nothing happens to one that does not run.

        One that its hypervisor holds for want of room runs on, too, if there is room now. What
        fails is logged.
        """
        if not self._runs(vm):
            return
        try:
            # What comes afterwards is not cut short: its threads would go on without the lock.
            async with asyncio.timeout(_PATIENCE_S):
                await self._resume(vm, has_room=has_room)
        except (BangerError, OSError) as error:
            why = str(error) or f"no answer within {_PATIENCE_S:g} s"
            get_logger().error("vm may be paused", error=why, **vm_attributes(vm))
            if vm.id not in self._trying:
                self._trying[vm.id] = asyncio.create_task(self._try_until_it_runs(vm))
        else:
            await self._settle(vm)

    async def _try_until_it_runs(self, vm: Vm) -> None:
        told = ""
        try:
            while True:
                await asyncio.sleep(_INTERVAL_S)
                current_op_id.set(new_op_id())
                try:
                    await self._try(vm)
                except NotFound:
                    return  # deleted meanwhile
                except Exception as error:  # a supervisor's boundary: it is tried again
                    if str(error) != told:
                        told = str(error)  # each is told once
                        get_logger().error("vm may be paused", error=told, **vm_attributes(vm))
                else:
                    return
        finally:
            del self._trying[vm.id]

    async def _try(self, vm: Vm) -> None:
        """Once. Returns when its machine runs, has ended, or is left to somebody else."""
        current = await self._vms.show(vm.id)
        if not self._runs(current):
            return
        # An answer says that nothing is under way any more. Until then the lock is others' to have.
        await self._hypervisor.status(Path(current.runtime.api_socket))
        async with self._vms.locked(vm) as current:
            if self._runs(current):
                await self._resume(current)
                await to_its_end(self._settle(current))  # also when the daemon ends

    def _runs(self, vm: Vm) -> bool:
        return vm.runtime.state is VmState.RUNNING and self._vms.has_machine(vm)

    async def _resume(self, vm: Vm, *, has_room: bool = False) -> None:
        socket = Path(vm.runtime.api_socket)
        async with self._room.left_alone(vm.id):
            status = await self._hypervisor.status(socket)
            stands = status is MachineStatus.PAUSED
            stands = stands or (has_room and status is MachineStatus.DISK_FULL)
            if stands and not self._room.is_held(vm.id):
                await self._hypervisor.resume(socket)
                get_logger().warning("vm was paused, and runs on", **vm_attributes(vm))

    async def _settle(self, vm: Vm) -> None:
        """Nothing is being written of it any more: what was goes, and its record says where its
        disks are."""
        paths = self._paths.vm(vm.id)
        try:
            self._vms.drop_memory(vm)
            # Files of snapshots have the same names.
            await self._hypervisor.discard(
                Path(vm.runtime.api_socket), (paths.memory, paths.machine_state)
            )
            await self._layers.settle(vm)
        except (BangerError, OSError) as error:
            get_logger().error("vm not settled", error=str(error), **vm_attributes(vm))

    async def close(self) -> None:
        """The daemon ends; who is paused still is let run on by the next one."""
        tasks = list(self._trying.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
