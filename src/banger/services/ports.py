"""`vm publish`, `unpublish` and `ports`: what a VM publishes, and what listens in its guest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from banger.base.errors import Ambiguous, BangerError, Conflict, NotFound
from banger.base.log import get_logger, vm_attributes
from banger.base.model import NetworkMode, PublishedPort, Vm, VmState
from banger.base.ports import (
    AUTOMATIC_MIN,
    WILDCARDS,
    GuestPort,
    GuestSocket,
    HostPort,
    check_port,
    check_ports,
    format_address,
    overlap,
)
from banger.guest.channel import call
from banger.guest.requests import Sockets
from banger.services.agents import Agents
from banger.services.automatic_ports import AutomaticPorts
from banger.services.guest_sockets import SOCKETS_LIMIT_BYTES, decode_sockets
from banger.services.lifecycle import Lifecycle
from banger.services.listeners import numbered
from banger.services.operations import Stages
from banger.services.publishing import Publishing
from banger.services.vm import VmService

_SOCKETS_TIMEOUT_S = 20.0
#: Guests asked at a time, when all are.
_ASKED_AT_ONCE = 16


def with_port(vm: Vm, port: PublishedPort) -> Vm:
    """The record with one more port, or as it is when it has that. Raises Conflict, BadRequest."""
    ports = vm.spec.published_ports
    if port in ports:
        return vm
    if other := next((each for each in ports if overlap(each, port)), None):
        where = format_address(other.host, other.host_port)
        raise Conflict(
            f'vm "{vm.name}" publishes {where} already, for port {other.guest_port} of its guest',
            hint=f"first: banger vm unpublish {vm.name} {where}",
        )
    return _publishing(vm, check_ports((*ports, port)))


def without_port(vm: Vm, host: str, host_port: int) -> Vm:
    """The record without the port at this address; an empty host is any.

    Raises NotFound; Ambiguous when several hosts have it.
    """
    ports = vm.spec.published_ports
    found = [each for each in ports if each.host_port == host_port and host in ("", each.host)]
    if not found:
        all_ = ", ".join(format_address(each.host, each.host_port) for each in ports)
        what = format_address(host, host_port) if host else f"port {host_port} of the host"
        raise NotFound(
            f'vm "{vm.name}" does not publish {what}', hint=f"it publishes {all_ or 'nothing'}"
        )
    if len(found) > 1:
        all_ = ", ".join(format_address(each.host, each.host_port) for each in found)
        raise Ambiguous(
            f'vm "{vm.name}" publishes port {host_port} at several addresses',
            hint=f"say which: {all_}",
        )
    return _publishing(vm, tuple(each for each in ports if each is not found[0]))


def _publishing(vm: Vm, ports: tuple[PublishedPort, ...]) -> Vm:
    spec = msgspec.structs.replace(vm.spec, published_ports=ports)
    return msgspec.structs.replace(vm, spec=spec)


class PortService:
    def __init__(
        self,
        vms: VmService,
        lifecycle: Lifecycle,
        agents: Agents,
        publishing: Publishing,
        automatic: AutomaticPorts,
    ) -> None:
        self._vms = vms
        self._lifecycle = lifecycle
        self._agents = agents
        self._publishing = publishing
        self._automatic = automatic

    async def publish(self, reference: str, port: PublishedPort, stages: Stages) -> Vm:
        """Publish a port: at once when the VM runs, else when it starts. Idempotent.

        The host's port 0 is any free one; the record has its number, last. Raises BadRequest,
        Conflict for one that is in use, PermissionDenied for one that is for root.
        """
        port = check_port(port)
        if port.host_port == 0:
            claimed = [each for vm in await self._vms.all() for each in vm.spec.published_ports]
            (port,) = await numbered([port], claimed)
        vm = await self._lifecycle.change(
            reference, lambda vm: with_port(vm, port), stages, hot=True
        )
        async with self._vms.locked(vm) as vm:
            if port in vm.spec.published_ports:
                # It may be on the record and still be closed: in use when this daemon began.
                before = without_port(vm, port.host, port.host_port)
                await self._publishing.apply_config_changes(before, vm)
            return vm

    async def unpublish(self, reference: str, host: str, host_port: int, stages: Stages) -> Vm:
        """Close a port and its connections. Raises NotFound, or Ambiguous without a host."""
        return await self._lifecycle.change(
            reference, lambda vm: without_port(vm, host, host_port), stages, hot=True
        )

    async def show(self, reference: str = "") -> list[GuestPort]:
        """Listening and published ports of a VM, or (without a reference) of all that run.

        Takes no lock. Raises what asking the guest of a running VM raises; among all, a guest
        that cannot be asked is left with its published ports.
        """
        if reference:
            vm = await self._vms.show(reference)
            return self._joined(vm, await self._sockets(vm) if _runs(vm) else ())
        slots = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(vm: Vm) -> list[GuestPort]:
            async with slots:
                try:
                    return self._joined(vm, await self._sockets(vm))
                except BangerError as error:
                    get_logger().warning(
                        "listening sockets unknown", error=error.message, **vm_attributes(vm)
                    )
                    return self._joined(vm, (), problem="the guest does not answer")

        found = await asyncio.gather(*(ask(vm) for vm in await self._vms.all() if _runs(vm)))
        return [port for ports in found for port in ports]

    async def _sockets(self, vm: Vm) -> tuple[GuestSocket, ...]:
        answer = await call(
            await self._agents.channel(vm),
            Sockets(),
            timeout_s=_SOCKETS_TIMEOUT_S,
            limit_bytes=SOCKETS_LIMIT_BYTES,
        )
        return decode_sockets(answer.stdout)

    def _joined(self, vm: Vm, sockets: Sequence[GuestSocket], problem: str = "") -> list[GuestPort]:
        """One record for each port of the guest that is listened on or published."""
        found = {each.port for each in sockets}
        found |= {each.guest_port for each in vm.spec.published_ports}
        return [self._port(vm, number, sockets, problem) for number in sorted(found)]

    def _port(self, vm: Vm, number: int, sockets: Sequence[GuestSocket], problem: str) -> GuestPort:
        listening = tuple(each for each in sockets if each.port == number)
        published = [each for each in vm.spec.published_ports if each.guest_port == number]
        automatic = self._automatic_port(vm, number, listening)
        if _runs(vm) and not problem and automatic is None:
            problem = _guest_problem(listening)
        return GuestPort(
            vm_id=vm.id,
            vm_name=vm.name,
            guest_port=number,
            sockets=listening,
            published=tuple(
                HostPort(host=each.host, host_port=each.host_port, problem=self._problem(vm, each))
                for each in published
            ),
            automatic=automatic,
            problem=problem,
        )

    def _automatic_port(
        self, vm: Vm, number: int, listening: Sequence[GuestSocket]
    ) -> HostPort | None:
        """Where it is open by itself: at an address of ours, or at the guest's own."""
        if vm.spec.network is NetworkMode.BRIDGE:
            there = any(each.address in (*WILDCARDS, vm.runtime.address) for each in listening)
            return HostPort(host=vm.runtime.address, host_port=number) if there else None
        if number < AUTOMATIC_MIN or not any(each.reachable for each in listening):
            return None
        if not self._automatic.serves(vm):
            return None
        problem = self._automatic.problem(vm, number)
        return HostPort(host=vm.runtime.address, host_port=number, problem=problem)

    def _problem(self, vm: Vm, port: PublishedPort) -> str:
        if not _runs(vm):
            return f"the VM is {vm.runtime.state}"
        return self._publishing.problem(vm, port)


def _runs(vm: Vm) -> bool:
    return vm.runtime.state is VmState.RUNNING


def _guest_problem(listening: Sequence[GuestSocket]) -> str:
    if not listening:
        return "nothing listens on it in the guest"
    if not any(each.reachable for each in listening):
        addresses = ", ".join(dict.fromkeys(each.address for each in listening))
        return f"it listens on {addresses} of the guest only, not on its 127.0.0.1"
    return ""
