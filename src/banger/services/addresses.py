"""What VMs are called and where this host reaches them: `NAME.vm`, and an address of each VM's own.

The records are what lasts. This is the daemon's view of them in memory: the name server answers
from it, and an address is claimed in it before it is written, so that no two VMs get one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

import msgspec

from banger.base.errors import PreconditionFailed
from banger.base.log import get_logger, vm_attributes
from banger.base.model import NetworkMode, Vm, VmState

#: The zone of all names, and who sees it is this host.
ZONE = "vm"

#: In user networking a VM is reached at an address of the host's own loopback. This part of 127/8
#: is far from 127.0.0.1, and from the 127.0.0.53 and 127.0.1.1 that Debian and systemd use.
LOOPBACK_NETWORK = IPv4Network("127.64.0.0/10")


def dns_name(vm_name: str) -> str:
    return f"{vm_name}.{ZONE}"


def free_address(network: IPv4Network, vm_id: str, taken: Collection[str]) -> str:
    """The address of `network` for this VM: by its id, or the next one that nobody has.

    Never the first or the last of a /24, nor the first two of the network (where a bridge's host
    is). Raises PreconditionFailed when all are taken.
    """
    size = network.num_addresses
    digest = hashlib.sha256(f"banger address {vm_id}".encode()).digest()
    first = int.from_bytes(digest[:8], "big") % size
    base = int(network.network_address)
    for step in range(size):
        offset = (first + step) % size
        if offset < 2 or offset == size - 1 or (base + offset) & 0xFF in (0, 0xFF):
            continue
        address = str(IPv4Address(base + offset))
        if address not in taken:
            return address
    raise PreconditionFailed(
        f"no address of {network} is free", hint="delete VMs: banger vm list shows them"
    )


class Addresses:
    """As long as the daemon lives.

    ``networks`` has those whose guests have addresses that this host reaches; all other VMs are
    reached at its loopback. ``asked`` is told the id of each VM that somebody looks for.
    """

    def __init__(self, networks: Mapping[NetworkMode, IPv4Network]) -> None:
        self.networks = dict(networks)
        self.asked: Callable[[str], object] = lambda _: None
        #: By the VM's id; and who has an address or a name.
        self._addresses: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._by_address: dict[str, str] = {}
        self._by_name: dict[str, str] = {}

    def load(self, vms: Iterable[Vm]) -> None:
        """Know all that is recorded, before anything is claimed."""
        for vm in vms:
            address = vm.runtime.address
            if address and self._by_address.setdefault(address, vm.id) == vm.id:
                self._addresses[vm.id] = address
            elif address:
                get_logger().warning("address of another vm", address=address, **vm_attributes(vm))
            self.note(vm)

    def claimed(self, vm: Vm) -> Vm:
        """The record with its DNS name and an address that is the VM's own from now on.

        It is stable: a record that has one keeps it, unless the network is another one now. While
        it runs it has what it has.
        """
        address = self._addresses.get(vm.id, "")
        network = self.networks.get(vm.spec.network, LOOPBACK_NETWORK)
        runs = vm.runtime.state is VmState.RUNNING
        if not address or (IPv4Address(address) not in network and not runs):
            new = free_address(network, vm.id, self._by_address)
            self._by_address.pop(address, None)
            address = new
            self._addresses[vm.id] = address
            self._by_address[address] = vm.id
        runtime = msgspec.structs.replace(
            vm.runtime, address=address, dns_name=dns_name(vm.name) if vm.name else ""
        )
        return msgspec.structs.replace(vm, runtime=runtime)

    def note(self, vm: Vm) -> None:
        """The record was written: it is called that from now on."""
        before = self._names.get(vm.id)
        if before is not None and self._by_name.get(before) == vm.id:
            del self._by_name[before]
        self._names[vm.id] = vm.name
        self._by_name[vm.name] = vm.id

    def forget(self, vm_id: str) -> None:
        """The record is gone, or was not written. Idempotent."""
        address, name = self._addresses.pop(vm_id, ""), self._names.pop(vm_id, "")
        if self._by_address.get(address) == vm_id:
            del self._by_address[address]
        if self._by_name.get(name) == vm_id:
            del self._by_name[name]

    # What the name server asks.

    def address_of(self, vm_name: str) -> str:
        """Empty when there is no VM of that name."""
        if not (vm_id := self._by_name.get(vm_name, "")):
            return ""
        self.asked(vm_id)
        return self._addresses.get(vm_id, "")

    def name_of(self, address: str) -> str:
        """The VM that has this address; empty when none has."""
        return self._names.get(self._by_address.get(address, ""), "")
