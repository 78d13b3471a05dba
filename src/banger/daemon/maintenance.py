"""What the daemon does by itself from time to time: bounds logs and counts, lets held machines run
on, stops what nobody uses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from banger.base.errors import BangerError, Conflict, NotFound
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import Vm, VmState, now
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths
from banger.base.units import format_age
from banger.drivers.base import Hypervisor, Level, MachineStatus
from banger.services import machine_logs
from banger.services.lifecycle import Lifecycle
from banger.services.preflight import check_free_disk
from banger.services.vm import VmService

_INTERVAL_S = 10.0
#: Machines are asked whether they are held when the disk is nearly full, and every so many rounds,
#: as what their hypervisors have noted is bounded: that comes to some KiB a minute.
_ASK_EVERY = 6
_NEARLY_FULL_BYTES = 256 << 20
#: Room with which a held machine may go on.
_ROOM_BYTES = 64 << 20


class Maintenance:
    def __init__(
        self,
        *,
        paths: Paths,
        hypervisor: Hypervisor,
        vms: VmService,
        lifecycle: Lifecycle,
        stale_after_s: float,
    ) -> None:
        self._paths = paths
        self._hypervisor = hypervisor
        self._vms = vms
        self._lifecycle = lifecycle
        self._stale_after_s = stale_after_s
        self._round = 0
        self._was_nearly_full = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Maintenance goes on while the block runs."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(min(_INTERVAL_S, self._stale_after_s or _INTERVAL_S))
            current_op_id.set(new_op_id())
            try:
                await self.once()
            except Exception:
                # A supervisor's boundary: it must go on whatever one round met with.
                get_logger().exception("maintenance failed")

    async def once(self) -> None:
        """One round."""
        vms = await self._vms.all()
        running = [vm for vm in vms if vm.runtime.state is VmState.RUNNING]
        await asyncio.to_thread(machine_logs.bound, self._paths, vms)
        if self._round % _ASK_EVERY == 0:
            await asyncio.gather(*(self._drain(vm) for vm in running))
        # A guest that boots may be held, too.
        await self._resume_held([vm for vm in vms if self._vms.has_machine(vm)])
        await self._stop_stale(running)

    async def _drain(self, vm: Vm) -> None:
        try:
            await self._hypervisor.drain(Path(vm.runtime.api_socket))
        except BangerError as error:
            get_logger().warning("counts not bounded", error=error.message, **vm_attributes(vm))

    async def _resume_held(self, vms: list[Vm]) -> None:
        """Machines held at a write that found the disk full run on once there is room."""
        nearly_full = self._free(_NEARLY_FULL_BYTES) is not Level.OK
        ask = nearly_full or self._was_nearly_full or self._round % _ASK_EVERY == 0
        self._was_nearly_full = nearly_full
        self._round += 1
        if ask:
            await asyncio.gather(*(self._resume_if_held(vm) for vm in vms))

    async def _resume_if_held(self, vm: Vm) -> None:
        socket = Path(vm.runtime.api_socket)
        try:
            if await self._hypervisor.status(socket) is not MachineStatus.DISK_FULL:
                return
            self._was_nearly_full = True
            if self._free(_ROOM_BYTES) is Level.OK:
                await self._hypervisor.resume(socket)
                get_logger().warning("vm runs on: the disk has room", **vm_attributes(vm))
            else:
                get_logger().error("vm held: the disk is full", **vm_attributes(vm))
        except BangerError as error:
            get_logger().warning("machine not asked", error=error.message, **vm_attributes(vm))

    def _free(self, needed_bytes: int) -> Level:
        return check_free_disk(self._paths.vms_dir, needed_bytes).level

    async def _stop_stale(self, vms: list[Vm]) -> None:
        if self._stale_after_s:
            await asyncio.gather(*(self._stop_one(vm) for vm in vms if self._is_stale(vm)))

    async def _stop_one(self, vm: Vm) -> None:
        current_op_id.set(new_op_id())  # each in a task of its own
        reason = f"nobody used it for {format_age(self._stale_after_s)}"
        try:
            with OperationLog("vm.stop", reason=reason) as log:
                await self._lifecycle.stop(vm.id, log, reason=reason, check=self._check_stale)
        except (NotFound, Conflict):
            pass  # deleted or used meanwhile
        except BangerError as error:
            get_logger().error("stale vm not stopped", error=error.message)

    def _is_stale(self, vm: Vm) -> bool:
        unused = now() - (vm.touched_at or vm.created_at)
        return not self._vms.has_sessions(vm.id) and unused >= timedelta(
            seconds=self._stale_after_s
        )

    def _check_stale(self, vm: Vm) -> None:
        """Raises Conflict for a VM that was used while its lock was waited for."""
        if not self._is_stale(vm):
            raise Conflict(f'vm "{vm.name}" was used meanwhile')
