"""The network of a VM: joined to it, by the driver of its kind, with what it may reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from banger.base.errors import BangerError, PreconditionFailed
from banger.base.log import get_logger
from banger.base.model import Egress, Reach, Vm
from banger.base.paths import Paths
from banger.drivers.base import Check, Network, Networks, Plug, Plugged
from banger.services.addresses import Addresses
from banger.services.capabilities import Capability, Start
from banger.services.liveness import Liveness

#: Of a machine that waits for a VM, whose own wishes nobody knows yet.
_NOTHING = Reach(egress=Egress.NONE)


class Networking(Capability):
    """A VM made without a network has none."""

    name = "network"

    def __init__(
        self,
        paths: Paths,
        networks: Networks,
        liveness: Liveness,
        addresses: Addresses,
    ) -> None:
        self._paths = paths
        self._networks = networks
        self._liveness = liveness
        self._addresses = addresses

    async def resume_all(self, running: Iterable[Vm]) -> None:
        """A daemon has started, and these are all VMs that run. Failures are logged: VMs go on."""
        vms = list(running)
        for mode, network in self._networks.by_mode.items():
            mine = [vm for vm in vms if vm.spec.network is mode]
            try:
                await network.resume([self._plugged(vm) for vm in mine])
            except BangerError as error:
                names = [vm.name for vm in mine]
                get_logger().error("network not resumed", error=error.message, vms=names)

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        network = self._network(start.vm)
        if network is None:
            return []
        refused = network.refusal(start.vm.spec.reach)
        return [*await network.checks(), *([refused] if refused is not None else [])]

    async def prepare_host(self, start: Start) -> None:
        # The machine's end is what keeps the network's processes alive: when a launch fails, or
        # the daemon dies before it, that end is closed and they end.
        vm = start.vm
        if (network := self._network(vm)) is not None:
            plug = Plug(
                vm_id=vm.id,
                log=self._paths.vm(vm.id).network_log,
                reach=vm.spec.reach if vm.name else _NOTHING,
                address=self._address(vm, network),
            )
            start.network = await network.attach(plug)

    def contribute_guest(self, start: Start) -> None:
        if start.network is not None:
            guest = start.network.guest
            start.setup = replace(
                start.setup,
                address=guest.address,
                gateway=guest.gateway,
                dns=guest.dns,
                mac=guest.mac,
            )

    async def post_start(self, vm: Vm) -> None:
        """A machine that has waited for a VM may now reach what that may."""
        if (network := self._network(vm)) is not None:
            await network.apply(self._plugged(vm))

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        network = self._network(after)
        same = (before.spec.network, before.spec.reach) == (after.spec.network, after.spec.reach)
        if network is None or same:
            return
        if (refused := network.refusal(after.spec.reach)) is not None:
            raise PreconditionFailed(refused.detail, hint=refused.hint)
        if self._liveness.vm_alive(after):
            await network.apply(self._plugged(after))

    async def cleanup(self, vm: Vm) -> None:
        for network in self._networks.by_mode.values():  # it may have been joined to another
            await network.detach(vm.id)
        await self._liveness.end_network(vm)

    def _network(self, vm: Vm) -> Network | None:
        return self._networks.of(vm.spec.network)

    def _plugged(self, vm: Vm) -> Plugged:
        handles = self._liveness.handles(vm)
        return Plugged(
            vm_id=vm.id,
            reach=vm.spec.reach,
            address=vm.runtime.address,
            tap=handles.tap,
            pids=tuple(each.pid for each in handles.network),
        )

    def _address(self, vm: Vm, network: Network) -> str:
        """The guest's, which a machine that waits for a VM has before there is a record."""
        return self._addresses.claimed(vm).runtime.address if network.guests is not None else ""
