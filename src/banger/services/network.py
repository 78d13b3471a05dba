"""The network of a VM, by whichever driver the daemon works with."""

from __future__ import annotations

from dataclasses import replace

from banger.base.model import NetworkMode, Vm
from banger.base.paths import Paths
from banger.drivers.base import Check, Network
from banger.services.capabilities import Capability, Start
from banger.services.liveness import Liveness


class Networking(Capability):
    """A VM made without a network has none."""

    name = "network"

    def __init__(self, paths: Paths, network: Network, liveness: Liveness) -> None:
        self._paths = paths
        self._network = network
        self._liveness = liveness

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        return await self._network.checks() if _wanted(start.vm) else []

    async def prepare_host(self, start: Start) -> None:
        # The machine's end is what keeps the network's processes alive: when a launch fails, or
        # the daemon dies before it, that end is closed and they end.
        if _wanted(start.vm):
            log = self._paths.vm(start.vm.id).network_log
            start.network = await self._network.attach(start.vm.id, log)

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

    async def cleanup(self, vm: Vm) -> None:
        await self._liveness.end_network(vm)


def _wanted(vm: Vm) -> bool:
    return vm.spec.network is NetworkMode.USER
