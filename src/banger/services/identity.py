"""Who a guest is: its host name and machine-id, stable over the life of its VM."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from banger.base.model import Vm
from banger.guest.channel import call
from banger.guest.requests import Setup
from banger.services.agents import Agents
from banger.services.capabilities import Capability, Start
from banger.services.liveness import Liveness

_RENAME_TIMEOUT_S = 10.0


class Identity(Capability):
    """The name is the VM's; a running guest learns of a new one at once."""

    name = "identity"

    def __init__(self, liveness: Liveness, agents: Agents) -> None:
        self._liveness = liveness
        self._agents = agents

    def contribute_guest(self, start: Start) -> None:
        vm = start.vm
        start.setup = replace(
            start.setup,
            # A machine that waits for a VM has no name yet.
            hostname=vm.name or None,
            machine_id=machine_id(vm.id),
            # Until it has run once its disks have the secrets of what it was copied from.
            copied=bool(vm.copied_from) and vm.started_at is None,
        )

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        if after.name != before.name and self._liveness.vm_alive(after):
            channel = await self._agents.channel(after)
            await call(channel, Setup(hostname=after.name), timeout_s=_RENAME_TIMEOUT_S)


def machine_id(vm_id: str) -> str:
    """The VM's machine-id (machine-id(5)), 32 hex digits: the same at each of its boots."""
    return hashlib.sha256(f"banger machine-id {vm_id}".encode()).hexdigest()[:32]
