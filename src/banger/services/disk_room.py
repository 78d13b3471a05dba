"""Keeps room for what machines write to disks that are devices, and holds those that run out.

Where disks are files there is nothing to do: a hypervisor that meets a full disk holds its machine
at that write. A device whose changes find no room fails for good: so it is looked after while the
machine runs, twice a second, and the machine is held before. As long as the daemon lives; without
machines it takes no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from banger.base.errors import PreconditionFailed
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Vm
from banger.base.opid import current_op_id, new_op_id
from banger.drivers.base import DiskDeviceMaker, Hypervisor, MachineStatus, Room, Storage

_INTERVAL_S = 0.5


class DiskRoom:
    def __init__(self, storage: Storage, hypervisor: Hypervisor) -> None:
        self._devices = storage.devices
        self._hypervisor = hypervisor
        self._watched: dict[str, Vm] = {}
        self._some = asyncio.Event()
        self._rooms: dict[str, Room] = {}
        self._held: set[str] = set()
        self._failures: dict[str, str] = {}

    def watch(self, vm: Vm) -> None:
        """Look after a machine from now on. Idempotent."""
        if self._devices is not None:
            self._watched[vm.id] = vm
            self._some.set()

    def forget(self, vm_id: str) -> None:
        """The machine has ended. Idempotent."""
        self._watched.pop(vm_id, None)
        self._rooms.pop(vm_id, None)
        self._failures.pop(vm_id, None)
        self._held.discard(vm_id)
        if not self._watched:
            self._some.clear()

    def room(self, vm_id: str) -> Room:
        """How it stood when it was last looked at."""
        return self._rooms.get(vm_id, Room.AMPLE)

    def is_held(self, vm_id: str) -> bool:
        """Whether its machine is held, until there is room again."""
        return vm_id in self._held

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Machines are looked after while the block runs."""
        task = asyncio.create_task(self._run(self._devices)) if self._devices else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _run(self, devices: DiskDeviceMaker) -> None:
        while True:
            await self._some.wait()
            current_op_id.set(new_op_id())
            await asyncio.gather(*(self._look(devices, vm) for vm in self._watched.values()))
            await asyncio.sleep(_INTERVAL_S)

    async def _look(self, devices: DiskDeviceMaker, vm: Vm) -> None:
        if self.room(vm.id) is Room.LOST:
            return  # for as long as it runs
        try:
            room = await self._tended(devices, vm)
            if vm.id not in self._watched:
                return
            self._rooms[vm.id] = room
            if room is Room.LOST:
                get_logger().error("disk overflowed", **vm_attributes(vm))
            if room is Room.SHORT:
                await self._hold(vm)
            elif room is Room.AMPLE and self.is_held(vm.id):
                await self._let_run_on(vm)
        except Exception as error:  # a supervisor's boundary: the others have their turn
            if vm.id in self._watched and str(error) != self._failures.get(vm.id):
                self._failures[vm.id] = str(error)  # each is told once
                get_logger().error("disk not looked after", error=str(error), **vm_attributes(vm))

    async def _tended(self, devices: DiskDeviceMaker, vm: Vm) -> Room:
        try:
            return await devices.tend(vm.id, Path(vm.runtime.system_overlay))
        except PreconditionFailed as error:
            get_logger().error("disk lost", error=error.message, **vm_attributes(vm))
            return Room.LOST

    async def _hold(self, vm: Vm) -> None:
        """Again each time: a snapshot that was taken meanwhile has let it run on. One that is
        paused for another reason (a standby) is left to that."""
        socket = Path(vm.runtime.api_socket)
        if await self._hypervisor.status(socket) is MachineStatus.RUNNING:
            await self._hypervisor.pause(socket)
            self._held.add(vm.id)
            get_logger().error("vm held: the disk is full", **vm_attributes(vm))

    async def _let_run_on(self, vm: Vm) -> None:
        await self._hypervisor.resume(Path(vm.runtime.api_socket))
        self._held.discard(vm.id)
        get_logger().warning("vm runs on: the disk has room", **vm_attributes(vm))
