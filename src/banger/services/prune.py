"""Deleting the VMs that do not run: what `banger vm prune` does."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from datetime import timedelta
from pathlib import Path

from banger.base.errors import BangerError, Conflict
from banger.base.log import get_logger, vm_attributes
from banger.base.model import ErrorInfo, Record, Vm, VmState, now
from banger.base.opid import current_op_id
from banger.drivers.base import Storage
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Stages
from banger.services.vm import VmService


class Pruned(Record, frozen=True):
    """One VM that was deleted, or would be, or could not be (``error``)."""

    vm: Vm
    size_bytes: int
    error: ErrorInfo | None = None


class Prune:
    def __init__(self, vms: VmService, lifecycle: Lifecycle, storage: Storage) -> None:
        self._vms = vms
        self._lifecycle = lifecycle
        self._storage = storage

    async def run(
        self,
        unused_for_s: float,
        stages: Stages,
        *,
        dry_run: bool,
        only: Container[str] | None = None,
    ) -> list[Pruned]:
        """Delete every VM that is stopped or failed and that nobody used for `unused_for_s`.

        With `only`, those of them that have these ids: what has stopped since somebody looked at
        them and agreed is none of them.

        One that cannot be deleted, or that somebody has used meanwhile, stays, with the reason.
        """
        candidates = [
            vm
            for vm in await self._vms.all()
            if _may_go(vm, unused_for_s) and (only is None or vm.id in only)
        ]
        return [await self._one(vm, unused_for_s, stages, dry_run=dry_run) for vm in candidates]

    async def _one(self, vm: Vm, unused_for_s: float, stages: Stages, *, dry_run: bool) -> Pruned:
        def check(vm: Vm) -> None:
            if not _may_go(vm, unused_for_s):
                raise Conflict(f'vm "{vm.name}" was used meanwhile')

        size_bytes = await asyncio.to_thread(self._size_bytes, vm)
        if dry_run:
            return Pruned(vm=vm, size_bytes=size_bytes)
        try:
            await self._lifecycle.delete(vm.id, stages, check=check)
        except BangerError as error:
            get_logger().warning("not pruned", error=error.message, **vm_attributes(vm))
            reason = ErrorInfo(
                code=error.code,
                message=error.message,
                hint=error.hint,
                op_id=current_op_id.get(),
            )
            return Pruned(vm=vm, size_bytes=size_bytes, error=reason)
        return Pruned(vm=vm, size_bytes=size_bytes)

    def _size_bytes(self, vm: Vm) -> int:
        disks = (Path(vm.runtime.system_overlay), Path(vm.runtime.work_disk))
        return sum(self._storage.allocated_bytes(disk) for disk in disks)


def _may_go(vm: Vm, unused_for_s: float) -> bool:
    if vm.runtime.state not in (VmState.STOPPED, VmState.ERROR):
        return False
    return now() - (vm.touched_at or vm.created_at) >= timedelta(seconds=unused_for_s)
