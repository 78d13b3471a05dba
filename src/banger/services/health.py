"""Whether a VM is well: its process, its machine, its agent, and room for its disks."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from banger.base.errors import BangerError
from banger.base.model import Record, Vm, VmState
from banger.base.paths import Paths
from banger.drivers.base import Check, Hypervisor, Level, MachineStatus, Room
from banger.guest.channel import call
from banger.guest.requests import Ping
from banger.services.agents import Agents
from banger.services.disk_room import DiskRoom
from banger.services.liveness import Liveness
from banger.services.preflight import check_free_disk
from banger.services.resumption import Resumption

#: Alone an agent answers in milliseconds; on a loaded host under emulation it may need seconds.
_AGENT_TIMEOUT_S = 10.0
#: Below this the next large write of a guest may be the one that its machine is held at.
_FREE_DISK_MIN_BYTES = 64 << 20


class VmHealth(Record, frozen=True):
    """What was found of one VM. Healthy: nothing failed."""

    vm: str
    state: VmState
    healthy: bool
    checks: tuple[Check, ...]


class Health:
    def __init__(
        self,
        paths: Paths,
        hypervisor: Hypervisor,
        liveness: Liveness,
        agents: Agents,
        room: DiskRoom,
        resumption: Resumption,
    ) -> None:
        self._paths = paths
        self._hypervisor = hypervisor
        self._liveness = liveness
        self._agents = agents
        self._room = room
        self._resumption = resumption

    async def check(self, vm: Vm) -> VmHealth:
        """Look at everything; takes no lock, and some seconds when a guest does not answer."""
        checks = [self._process(vm)]
        if checks[0].level is Level.OK:
            checks += await asyncio.gather(self._machine(vm), self._agent(vm))
            checks += self._disk(vm)
        checks.append(check_free_disk(self._paths.vms_dir, _FREE_DISK_MIN_BYTES))
        healthy = all(check.level is not Level.FAIL for check in checks)
        return VmHealth(vm=vm.name, state=vm.runtime.state, healthy=healthy, checks=tuple(checks))

    def _process(self, vm: Vm) -> Check:
        if self._liveness.vm_alive(vm):
            return Check("process", Level.OK, f"pid {self._liveness.pid(vm)}")
        why = f": {vm.runtime.last_error}" if vm.runtime.last_error else ""
        hint = f"banger vm start {vm.name}"
        return Check("process", Level.FAIL, f"the VM is {vm.runtime.state}{why}", hint)

    async def _machine(self, vm: Vm) -> Check:
        if self._resumption.is_due(vm.id):
            detail = "paused, and its hypervisor does not answer: it may be writing a copy still"
            hint = f"it runs on by itself once that is done; or: banger vm restart {vm.name}"
            return Check("machine", Level.FAIL, detail, hint)
        try:
            status = await self._hypervisor.status(Path(vm.runtime.api_socket))
        except BangerError as error:
            return Check("machine", Level.FAIL, error.message, f"banger vm restart {vm.name}")
        if status is MachineStatus.RUNNING:
            return Check("machine", Level.OK, "its vCPUs run")
        if status is MachineStatus.DISK_FULL or self._room.is_held(vm.id):
            hint = "make room on the host: the machine then runs on by itself"
            return Check("machine", Level.FAIL, "held: the host's disk is full", hint)
        return Check("machine", Level.FAIL, "its vCPUs are paused", f"banger vm restart {vm.name}")

    def _disk(self, vm: Vm) -> list[Check]:
        if self._room.room(vm.id) is not Room.LOST:
            return []
        detail = "the host's disk had no room for what the guest wrote, and takes no more of it"
        hint = f"make room on the host, then: banger vm restart {vm.name}"
        return [Check("system disk", Level.FAIL, detail, hint)]

    async def _agent(self, vm: Vm) -> Check:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(_AGENT_TIMEOUT_S):
                channel = await self._agents.channel(vm)
                await call(channel, Ping(), timeout_s=_AGENT_TIMEOUT_S)
        except (BangerError, TimeoutError) as error:
            detail = str(error) or f"no answer within {_AGENT_TIMEOUT_S:g} s"
            return Check("agent", Level.FAIL, detail, f"banger vm logs {vm.name}")
        return Check("agent", Level.OK, f"answered in {1000 * (time.monotonic() - begin):.0f} ms")
