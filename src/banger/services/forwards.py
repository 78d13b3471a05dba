"""All ports of this host that lead into guests, by the VM that has them.

Two kinds: those that somebody published, and those that are open by themselves at a VM's own
address. An automatic one goes when somebody publishes what is in its way, and never the other way
round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager

from banger.base.errors import Conflict
from banger.base.log import get_logger, vm_attributes
from banger.base.model import PublishedPort, Vm
from banger.base.ports import format_address, overlap
from banger.guest.channel import AgentStream
from banger.guest.requests import Connect
from banger.services.admission import CONNECTIONS_MAX, Admission
from banger.services.agents import Agents
from banger.services.forward import Forward
from banger.services.listeners import open_listener


class _Open:
    """What is open of one VM."""

    def __init__(self, vm: Vm, admission: Admission) -> None:
        self.vm = vm
        self.admission = admission
        self.published: dict[PublishedPort, Forward] = {}
        self.automatic: dict[PublishedPort, Forward] = {}
        #: They listen no more, and still have connections.
        self.retired: set[Forward] = set()

    def all(self) -> list[Forward]:
        return [*self.published.values(), *self.automatic.values(), *self.retired]


class Forwards:
    """``in_use`` is entered while a VM's ports have connections."""

    def __init__(
        self, agents: Agents, in_use: Callable[[Vm], AbstractAsyncContextManager[None]]
    ) -> None:
        self._agents = agents
        self._in_use = in_use
        self._of_all = asyncio.Semaphore(CONNECTIONS_MAX)
        self._vms: dict[str, _Open] = {}

    def published(self, vm_id: str) -> Collection[PublishedPort]:
        return found.published.keys() if (found := self._vms.get(vm_id)) else ()

    def automatic(self, vm_id: str) -> Collection[PublishedPort]:
        return found.automatic.keys() if (found := self._vms.get(vm_id)) else ()

    @property
    def automatic_count(self) -> int:
        """Of all VMs."""
        return sum(len(each.automatic) for each in self._vms.values())

    def renamed(self, vm: Vm) -> None:
        if found := self._vms.get(vm.id):
            found.vm = vm

    def taken(self, vm: Vm, port: PublishedPort) -> Conflict | None:
        """What is said when another VM has published this: the kernel only knows our process."""
        for found in self._vms.values():
            other = next((each for each in found.published if overlap(each, port)), None)
            if other is not None and (found.vm.id != vm.id or other != port):
                where = format_address(other.host, other.host_port)
                return Conflict(
                    f'port {where} of this host is published by vm "{found.vm.name}"',
                    hint=f"stop that, or: banger vm unpublish {found.vm.name} {where}",
                )
        return None

    def gives_way(self, port: PublishedPort) -> bool:
        """Whether an automatic port is where this one is to be: it goes when that is opened."""
        return any(overlap(each, port) for found in self._vms.values() for each in found.automatic)

    async def publish(self, vm: Vm, port: PublishedPort) -> None:
        """Open a port. Raises Conflict, PermissionDenied or PreconditionFailed. Idempotent."""
        found = self._of(vm)
        if port in found.published:
            return
        if taken := self.taken(vm, port):
            raise taken
        for other in list(self._vms.values()):
            for each in [each for each in other.automatic if overlap(each, port)]:
                await self._retire(other, each)
        found.published[port] = await self._opened(found, port)
        get_logger().info("port published", port=str(port), **vm_attributes(vm))

    async def open_automatic(self, vm: Vm, port: PublishedPort) -> None:
        """As `publish`, of a port that nobody has asked for: it takes nobody's."""
        found = self._of(vm)
        if port in found.automatic:
            return
        if taken := self.taken(vm, port):
            raise taken
        found.automatic[port] = await self._opened(found, port)
        get_logger().debug("port opened", port=str(port), **vm_attributes(vm))

    async def unpublish(self, vm_id: str, port: PublishedPort) -> None:
        """Close a published port, with its connections. Idempotent."""
        if (found := self._vms.get(vm_id)) and (forward := found.published.pop(port, None)):
            await forward.close()
            get_logger().info("port closed", vm_id=vm_id, port=str(port))

    async def close_automatic(self, vm_id: str, port: PublishedPort) -> None:
        """Listen at it no more; its connections go on to their own ends. Idempotent."""
        if (found := self._vms.get(vm_id)) and port in found.automatic:
            await self._retire(found, port)
            get_logger().debug("port closed", vm_id=vm_id, port=str(port))

    async def close_vm(self, vm_id: str) -> None:
        """Close all ports of a VM, with their connections. Idempotent."""
        if found := self._vms.pop(vm_id, None):
            await asyncio.gather(*(forward.close() for forward in found.all()))
            await found.admission.close()

    async def close(self) -> None:
        """Close everything: the daemon ends. The VMs run on."""
        for vm_id in list(self._vms):
            await self.close_vm(vm_id)

    def _of(self, vm: Vm) -> _Open:
        if (found := self._vms.get(vm.id)) is None:
            admission = Admission(self._of_all, lambda: self._in_use(vm))
            found = self._vms[vm.id] = _Open(vm, admission)
        return found

    async def _opened(self, found: _Open, port: PublishedPort) -> Forward:
        vm, listener = found.vm, await open_listener(port)

        async def connect(guest_port: int) -> AgentStream:
            return await (await self._agents.channel(vm)).open(Connect(guest_port))

        return Forward(port, listener, connect=connect, admission=found.admission)

    async def _retire(self, found: _Open, port: PublishedPort) -> None:
        forward = found.automatic.pop(port)
        found.retired.add(forward)
        await forward.retire(lambda: found.retired.discard(forward))
