"""Published ports as a capability: open while their VM runs, wherever the record says.

The listeners are the daemon's: they end with it, and the next daemon opens them again for the VMs
that it finds running. Connections end with the daemon too.
"""

from __future__ import annotations

from collections import defaultdict

from banger.base.errors import BangerError
from banger.base.model import PublishedPort, Vm
from banger.base.ports import format_address
from banger.drivers.base import Check, Level
from banger.services.capabilities import Capability, Start
from banger.services.forwards import Forwards
from banger.services.listeners import probe
from banger.services.liveness import Liveness


class Publishing(Capability):
    name = "publishing"

    def __init__(self, forwards: Forwards, liveness: Liveness) -> None:
        self._forwards = forwards
        self._liveness = liveness
        #: By the VM's id: ports that could not be opened, and why.
        self._problems: defaultdict[str, dict[PublishedPort, str]] = defaultdict(dict)

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        return [await self._check(start.vm, port) for port in start.vm.spec.published_ports]

    async def _check(self, vm: Vm, port: PublishedPort) -> Check:
        problem: BangerError | None = self._forwards.taken(vm, port)
        ours = port in self._forwards.published(vm.id) or self._forwards.gives_way(port)
        if problem is None and not ours:
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
        self._forwards.renamed(after)
        if not self._liveness.vm_alive(after):
            return
        old, new = before.spec.published_ports, after.spec.published_ports
        for port in old:
            if port not in new:
                self._problems[after.id].pop(port, None)
                await self._forwards.unpublish(after.id, port)
        for port in new:
            if port not in old:
                await self._open_port(after, port)

    async def cleanup(self, vm: Vm) -> None:
        self._problems.pop(vm.id, None)
        await self._forwards.close_vm(vm.id)

    def problem(self, vm: Vm, port: PublishedPort) -> str:
        """Why the host does not listen at this port of a running VM; empty when it does."""
        if port in self._forwards.published(vm.id):
            return ""
        return self._problems.get(vm.id, {}).get(port, "it is not open")

    async def _open_port(self, vm: Vm, port: PublishedPort) -> None:
        """Raises Conflict, PermissionDenied or PreconditionFailed. Idempotent."""
        try:
            await self._forwards.publish(vm, port)
        except BangerError as error:
            self._problems[vm.id][port] = error.message
            raise
        self._problems[vm.id].pop(port, None)
