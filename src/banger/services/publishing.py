"""Published ports as a capability: open while their VM runs, wherever the record says.

The listeners are the daemon's: they end with it, and the next daemon opens them again for the VMs
that it finds running. Connections end with the daemon too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager

from banger.base.errors import BangerError, Conflict
from banger.base.log import get_logger, vm_attributes
from banger.base.model import PublishedPort, Vm
from banger.base.ports import format_address, overlap
from banger.drivers.base import Check, Level
from banger.guest.channel import AgentStream
from banger.guest.requests import Connect
from banger.services.admission import CONNECTIONS_MAX, Admission
from banger.services.agents import Agents
from banger.services.capabilities import Capability, Start
from banger.services.forward import Forward
from banger.services.listeners import open_listener, probe
from banger.services.liveness import Liveness


class _Published:
    """What is open of one VM."""

    def __init__(self, vm: Vm, admission: Admission) -> None:
        self.vm = vm
        self.admission = admission
        self.forwards: dict[PublishedPort, Forward] = {}
        #: Ports that could not be opened, and why.
        self.problems: dict[PublishedPort, str] = {}


class Publishing(Capability):
    """``in_use`` is entered while a VM's published ports have connections."""

    name = "publishing"

    def __init__(
        self,
        agents: Agents,
        liveness: Liveness,
        in_use: Callable[[Vm], AbstractAsyncContextManager[None]],
    ) -> None:
        self._agents = agents
        self._liveness = liveness
        self._in_use = in_use
        self._of_all = asyncio.Semaphore(CONNECTIONS_MAX)
        self._vms: dict[str, _Published] = {}

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        return [await self._check(start.vm, port) for port in start.vm.spec.published_ports]

    async def _check(self, vm: Vm, port: PublishedPort) -> Check:
        problem = self._taken(vm, port)
        if problem is None and port not in self._open(vm.id):
            problem = await probe(port)
        if problem is None:
            where = format_address(port.host, port.host_port)
            return Check("published port", Level.OK, f"{where} is free")
        return Check("published port", Level.FAIL, problem.message, problem.hint)

    async def post_start(self, vm: Vm) -> None:
        """Open all that can be; raises the first failure then."""
        failures = []
        for port in vm.spec.published_ports:
            try:
                await self._open_port(vm, port)
            except BangerError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        """Close what is gone, with its connections, then open what is new."""
        if published := self._vms.get(after.id):
            published.vm = after  # it may have another name now
        if not self._liveness.vm_alive(after):
            return
        old, new = before.spec.published_ports, after.spec.published_ports
        for port in old:
            if port not in new:
                await self._close_port(after.id, port)
        for port in new:
            if port not in old:
                await self._open_port(after, port)

    async def cleanup(self, vm: Vm) -> None:
        await self._close_vm(vm.id)

    async def close(self) -> None:
        """Close everything: the daemon ends. The VMs run on."""
        for vm_id in list(self._vms):
            await self._close_vm(vm_id)

    def problem(self, vm: Vm, port: PublishedPort) -> str:
        """Why the host does not listen at this port of a running VM; empty when it does."""
        if port in self._open(vm.id):
            return ""
        published = self._vms.get(vm.id)
        known = published.problems.get(port, "") if published else ""
        return known or "it is not open"

    async def _open_port(self, vm: Vm, port: PublishedPort) -> None:
        """Raises Conflict, PermissionDenied or PreconditionFailed. Idempotent."""
        if (published := self._vms.get(vm.id)) is None:
            admission = Admission(self._of_all, lambda: self._in_use(vm))
            published = self._vms[vm.id] = _Published(vm, admission)
        if port in published.forwards:
            return
        try:
            if taken := self._taken(vm, port):
                raise taken
            listener = await open_listener(port)
        except BangerError as error:
            published.problems[port] = error.message
            raise
        published.problems.pop(port, None)

        async def connect(guest_port: int) -> AgentStream:
            return await (await self._agents.channel(vm)).open(Connect(guest_port))

        published.forwards[port] = Forward(
            port, listener, connect=connect, admission=published.admission
        )
        get_logger().info("port published", port=str(port), **vm_attributes(vm))

    def _open(self, vm_id: str) -> Collection[PublishedPort]:
        published = self._vms.get(vm_id)
        return published.forwards if published else ()

    def _taken(self, vm: Vm, port: PublishedPort) -> BangerError | None:
        """What is said when another VM has this port open: the kernel only knows our process."""
        for published in self._vms.values():
            other = next((each for each in published.forwards if overlap(each, port)), None)
            if other is not None and published.vm.id != vm.id:
                where = format_address(other.host, other.host_port)
                return Conflict(
                    f'port {where} of this host is published by vm "{published.vm.name}"',
                    hint=f"stop that, or: banger vm unpublish {published.vm.name} {where}",
                )
        return None

    async def _close_port(self, vm_id: str, port: PublishedPort) -> None:
        if (published := self._vms.get(vm_id)) is None:
            return
        published.problems.pop(port, None)
        if (forward := published.forwards.pop(port, None)) is not None:
            await forward.close()
            get_logger().info("port closed", vm_id=vm_id, port=str(port))

    async def _close_vm(self, vm_id: str) -> None:
        if published := self._vms.pop(vm_id, None):
            forwards = published.forwards.values()
            await asyncio.gather(*(forward.close() for forward in forwards))
            await published.admission.close()
