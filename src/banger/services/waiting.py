"""Waiting until a VM is as somebody wants it: told by events, never by looking again and again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from enum import StrEnum

from banger.base.errors import NotFound, OperationTimeout, PreconditionFailed
from banger.base.model import Vm, VmState
from banger.drivers.base import Level
from banger.services.health import Health
from banger.services.vm import VmService

_AGAIN_S = 1.0


class Goal(StrEnum):
    RUNNING = "running"
    HEALTHY = "healthy"
    STOPPED = "stopped"
    DELETED = "deleted"


async def wait_for(
    vms: VmService, health: Health, reference: str, goal: Goal, timeout_s: float | None
) -> Vm:
    """The VM, once it is as `goal` says (`timeout_s` None: however long it takes).

    A VM that is deleted is stopped, too: the record is then the last one seen. Raises
    OperationTimeout; PreconditionFailed when it has failed, and will not run by itself; NotFound
    when it is deleted and was to run.
    """
    vm = await vms.show(reference)
    try:
        async with asyncio.timeout(timeout_s), aclosing(vms.changes()) as changes:
            async for _ in changes:
                try:
                    vm = await vms.show(vm.id)
                except NotFound:
                    if goal in (Goal.STOPPED, Goal.DELETED):
                        return vm
                    raise NotFound(f'vm "{vm.name}" was deleted') from None
                if await _reached(vm, health, goal):
                    return vm
    except TimeoutError:
        pass
    raise OperationTimeout(
        f'vm "{vm.name}" is {vm.runtime.state}, not {goal}, after {timeout_s or 0:g} s',
        hint=f"see: banger vm show {vm.name}",
    )


async def _reached(vm: Vm, health: Health, goal: Goal) -> bool:
    state = vm.runtime.state
    if goal is Goal.DELETED:
        return False
    if goal is Goal.STOPPED:
        return state in (VmState.STOPPED, VmState.SUSPENDED, VmState.ERROR)
    if state is VmState.ERROR:
        raise PreconditionFailed(
            f'vm "{vm.name}" has failed: {vm.runtime.last_error}',
            hint=f"see: banger vm logs {vm.name}",
        )
    if state is not VmState.RUNNING:
        return False
    if goal is Goal.HEALTHY:
        # No event tells that an agent answers again, or that the host's disk has room.
        while not (found := await health.check(vm)).healthy:
            if found.checks[0].level is not Level.OK:  # its process has ended: that is an event
                return False
            await asyncio.sleep(_AGAIN_S)
    return True
