"""The privileged operations: a closed set, each with what it takes and what it may name.

An operation says *what* is to be so, never how: no command, no file of the caller's, no name that
is not of banger's own shape. `check` refuses all that can be refused without looking at the host;
whoever performs an operation calls it again, whatever the caller has done (`local`, behind `helper`
where the daemon is not root). `docs/privileges.md` lists them all, with what each changes and how
that is undone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network, NetmaskValueError
from typing import Protocol, Self, TypeAlias

import msgspec

from banger.base.bridge import check_bridge_name, check_bridge_network
from banger.base.errors import BadRequest
from banger.base.jail import is_vm_id
from banger.base.reach import ALLOWED_MAX

_TAP = re.compile(r"(banger[0-9]{1,2})-[0-9a-f]{6}")
#: Of those that nobody else gives out: locally administered, unicast (IEEE 802, 8.2).
_MAC = re.compile(r"[0-9a-f][26ae](:[0-9a-f]{2}){5}")
#: Of every bridge of ours. Given, because a bridge without one takes that of its first port, and
#: changes it with its ports.
BRIDGE_MAC = "02:62:67:00:00:01"
_INSTANCE = re.compile(r"[0-9a-f]{8}")
#: On a bridge, and of machines that are named at once.
GUESTS_MAX = 4096
#: Of all guests of a bridge together.
ALLOWED_TOTAL_MAX = 65536
RESOLVED_MAX = 64
#: Of one operation.
DESCRIPTORS_MAX = 16
VCPUS_MAX = 64
MEMORY_MIB_MAX = 1 << 22
_IN_JAIL = re.compile(r"kernel|initramfs|state|memory|disks/[a-z][a-z0-9-]{0,31}")
#: For how long an address that a name led to may be used by a guest that does not use it.
RESOLVED_S = 3600


class SnapshotState(StrEnum):
    """How a device-mapper snapshot stands."""

    ABSENT = "absent"
    GOOD = "good"
    #: There was no room for a change: from then on all writes fail. What is there is whole.
    OVERFLOWED = "overflowed"
    #: A change could not be written: what was changed cannot be told from what was not.
    INVALID = "invalid"


class Operation(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"
):
    """What is asked of whoever has the privileges. Equal operations have equal effects: all may be
    repeated."""

    def check(self) -> None:
        """Raise BadRequest for what banger would not ask for."""


class WithFiles(Operation, frozen=True):
    """An operation on files that the caller has opened: no path of his is ever followed.

    Each is a descriptor, which stays the caller's. It goes to another process as such, never as its
    number.
    """

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them, in the order in which they go, at most `DESCRIPTORS_MAX`."""
        raise NotImplementedError

    def with_descriptors(self, descriptors: tuple[int, ...]) -> Self:
        """The same with others. Raises BadRequest where there are too many or too few."""
        raise NotImplementedError


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an operation. ``fd`` is the caller's to close; -1 where there is none."""

    name: str = ""
    pid: int = 0
    fd: int = -1


class Bridge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bridge of ours. ``address`` is the host's on it, a.b.c.d/n: the gateway of its guests.

    ``instance`` tells daemons of one user apart, who may have several homes.
    """

    name: str
    address: str
    instance: str = ""

    @property
    def network(self) -> IPv4Network:
        return IPv4Interface(self.address).network

    @property
    def gateway(self) -> IPv4Address:
        return IPv4Interface(self.address).ip

    def check(self) -> None:
        check_bridge_name(self.name)
        _check_instance(self.instance)
        try:
            interface = IPv4Interface(self.address)
        except (AddressValueError, NetmaskValueError, ValueError):
            raise BadRequest(f"{self.address!r} is not an address with its prefix length") from None
        network = interface.network
        if self.address != str(interface) or interface.ip != network[1]:
            raise BadRequest(f"{self.address!r} is not the first address of a network")
        check_bridge_network(network)


class Guest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine on a bridge, and what it may reach."""

    tap: str
    mac: str
    address: str
    #: All of the outside, or (false) what ``allow`` and `AllowResolved` say.
    everywhere: bool = False
    #: Networks, a.b.c.d/n, none within another.
    allow: tuple[str, ...] = ()
    #: Whether it and others of which this is true reach each other.
    sociable: bool = False


class BridgeUp(Operation, frozen=True, tag="bridge_up"):
    """Have the bridge, its address, forwarding, and its tables, which let nobody through yet.

    Guests' questions to the gateway, port 53, go to its ``resolver_port``. The guests of a bridge
    that is there stay as they are.
    """

    bridge: Bridge
    resolver_port: int

    def check(self) -> None:
        self.bridge.check()
        if not 1024 <= self.resolver_port <= 65535:
            raise BadRequest(f"{self.resolver_port} is not a port for a resolver (1024 to 65535)")


class BridgeDown(Operation, frozen=True, tag="bridge_down"):
    """Take the bridge away, with all that `BridgeUp` made and changed.

    Without an ``instance``, whichever daemon of the user's it is of.
    """

    bridge: str
    instance: str = ""

    def check(self) -> None:
        check_bridge_name(self.bridge)
        _check_instance(self.instance)


class OpenTap(Operation, frozen=True, tag="open_tap"):
    """A new tap on a bridge that is up: its name and its descriptor. It goes with that.

    Whoever is behind it gets nowhere before `SetGuests` names it.
    """

    bridge: str

    def check(self) -> None:
        check_bridge_name(self.bridge)


class SetGuests(Operation, frozen=True, tag="set_guests"):
    """Let these guests through, as each may, and no others of the bridge. All at once or nothing.

    What `AllowResolved` let a guest reach stays, but of those that are to ``forget`` it.
    """

    bridge: Bridge
    guests: tuple[Guest, ...]
    forget: tuple[str, ...] = ()

    def check(self) -> None:
        self.bridge.check()
        if len(self.guests) > GUESTS_MAX:
            raise BadRequest(f"{len(self.guests)} guests are too many for a bridge")
        if sum(len(guest.allow) for guest in self.guests) > ALLOWED_TOTAL_MAX:
            raise BadRequest("the guests of a bridge may reach too many networks together")
        for guest in self.guests:
            _check_guest(guest, self.bridge)
        for field in ("tap", "mac", "address"):
            if len({getattr(guest, field) for guest in self.guests}) < len(self.guests):
                raise BadRequest(f"two guests have one {field}")
        if len(self.forget) > GUESTS_MAX:
            raise BadRequest(f"{len(self.forget)} guests are too many for a bridge")
        for address in self.forget:
            _check_member(address, self.bridge)


class AllowResolved(Operation, frozen=True, tag="allow_resolved"):
    """Let a guest reach what an allowed name led to, until it has not used it for `RESOLVED_S`."""

    bridge: Bridge
    guest: str
    addresses: tuple[str, ...]

    def check(self) -> None:
        self.bridge.check()
        _check_member(self.guest, self.bridge)
        if not 1 <= len(self.addresses) <= RESOLVED_MAX:
            raise BadRequest(f"{len(self.addresses)} addresses of one name")
        for address in self.addresses:
            _address(address)


class RouteNames(Operation, frozen=True, tag="route_names"):
    """Have systemd-resolved ask the server at this loopback address for names in ``vm.``.

    What it is told belongs to a dummy link that is there for this, and goes with that.
    """

    server: str
    port: int

    def check(self) -> None:
        if not _address(self.server).is_loopback or not 1 <= self.port <= 65535:
            raise BadRequest(f"{self.server}:{self.port} is not on the loopback")


class UnrouteNames(Operation, frozen=True, tag="unroute_names"):
    """Take back `RouteNames`."""


class MapSnapshot(WithFiles, frozen=True, tag="map_snapshot"):
    """A device-mapper snapshot for a machine, ``banger-`` and its id: what is in one regular file
    of the owner's, with what is written to it kept in another, which begins as zeros, or as such a
    snapshot has left it. The owner alone may open its node.

    Both files are whole sectors of 512 bytes, and open for what becomes of them. Each gets a loop
    device; who has the same ``base`` shares its. ``instance`` is for `SweepSnapshots`.
    """

    vm_id: str
    instance: str
    base: int = -1
    changes: int = -1

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.base, self.changes)

    def with_descriptors(self, descriptors: tuple[int, ...]) -> Self:
        _check_count(descriptors, 2)
        return msgspec.structs.replace(self, base=descriptors[0], changes=descriptors[1])

    def check(self) -> None:
        _check_vm_id(self.vm_id)
        if not self.instance:
            raise BadRequest("a snapshot is of some daemon's")
        _check_instance(self.instance)


class GrowSnapshot(Operation, frozen=True, tag="grow_snapshot"):
    """What a `MapSnapshot` keeps changes on is as large as that file is now: it may find room there
    that it had not."""

    vm_id: str

    def check(self) -> None:
        _check_vm_id(self.vm_id)


class LookAtSnapshot(Operation, frozen=True, tag="look_at_snapshot"):
    """What the kernel says of a `MapSnapshot`, as a name: a `SnapshotState`."""

    vm_id: str

    def check(self) -> None:
        _check_vm_id(self.vm_id)


class UnmapSnapshot(Operation, frozen=True, tag="unmap_snapshot"):
    """Take back `MapSnapshot`, with the loop devices that nobody else needs. Raises Conflict while
    somebody has it open, or its machine is in a jail."""

    vm_id: str

    def check(self) -> None:
        _check_vm_id(self.vm_id)


class SweepSnapshots(Operation, frozen=True, tag="sweep_snapshots"):
    """Take back every `MapSnapshot` of a daemon's but those of the machines to ``keep``, and what
    is left of those that were made half.

    Without an ``instance``, of whichever daemon of the user's. Raises Conflict for what is in use,
    when all others are gone.
    """

    instance: str = ""
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        _check_instance(self.instance)
        if len(self.keep) > GUESTS_MAX:
            raise BadRequest(f"{len(self.keep)} machines are too many")
        for vm_id in self.keep:
            _check_vm_id(vm_id)


class CheckJail(Operation, frozen=True, tag="check_jail"):
    """Look whether machines can be jailed here: the path of the Firecracker that runs in jails.

    Nothing changes. Raises PreconditionFailed where they cannot, with what to do.
    """


class InJail(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that is lent to a jail, by its name there."""

    name: str
    read_only: bool


class LaunchJail(WithFiles, frozen=True, tag="launch_jail"):
    """Start Firecracker in a jail, which waits there to be told of its machine: a pid and a pidfd.

    It is a user of its own, sees nothing but the files, may use no more than the machine is to
    have, and is joined to the bridge by an interface of the host with the name of the ``tap`` that
    `OpenTap` gave, and that must be gone. ``inputs`` are the descriptors of ``files``; in ``out``,
    a directory, Firecracker makes others; what it prints is added to ``console``, its own log to
    ``log``. All belong to the owner, and are open for what is asked; a file may be the device of
    the machine's mapping, too.
    """

    vm_id: str
    vcpu_count: int
    memory_mib: int
    files: tuple[InJail, ...]
    #: Empty, with ``tap``, for a machine without a network.
    bridge: str = ""
    tap: str = ""
    out: int = -1
    console: int = -1
    log: int = -1
    inputs: tuple[int, ...] = ()

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.out, self.console, self.log, *self.inputs)

    def with_descriptors(self, descriptors: tuple[int, ...]) -> Self:
        _check_count(descriptors, 3 + len(self.files))
        out, console, log, *inputs = descriptors
        return msgspec.structs.replace(
            self, out=out, console=console, log=log, inputs=tuple(inputs)
        )

    def check(self) -> None:
        _check_vm_id(self.vm_id)
        if not 1 <= self.vcpu_count <= VCPUS_MAX or not 1 <= self.memory_mib <= MEMORY_MIB_MAX:
            raise BadRequest(f"no machine has {self.vcpu_count} vCPUs and {self.memory_mib} MiB")
        _check_count(self.descriptors, 3 + len(self.files))
        if len(self.descriptors) > DESCRIPTORS_MAX:
            raise BadRequest(f"{len(self.files)} files are too many for a jail")
        names = [each.name for each in self.files]
        for name in names:
            if _IN_JAIL.fullmatch(name) is None:
                raise BadRequest(f"{name!r} is not a file that a machine is made of")
        if len(set(names)) < len(names):
            raise BadRequest("two files of a jail have one name")
        if self.bridge or self.tap:
            check_bridge_name(self.bridge)
            match = _TAP.fullmatch(self.tap)
            if match is None or match[1] != self.bridge:
                raise BadRequest(f"{self.tap!r} is not a tap of {self.bridge}")


class EndJail(Operation, frozen=True, tag="end_jail"):
    """Take back `LaunchJail`: end whoever is in the jail of a machine, and clear what it leaves."""

    vm_id: str

    def check(self) -> None:
        _check_vm_id(self.vm_id)


#: Those that keep machines going: they wait for no other, at either end. A machine whose changes
#: find no room loses them while another is put into its jail.
URGENT = (GrowSnapshot, LookAtSnapshot)

#: The set, for whoever decodes one that came over a socket.
AnyOperation: TypeAlias = (
    BridgeUp
    | BridgeDown
    | OpenTap
    | SetGuests
    | AllowResolved
    | RouteNames
    | UnrouteNames
    | MapSnapshot
    | GrowSnapshot
    | LookAtSnapshot
    | UnmapSnapshot
    | SweepSnapshots
    | CheckJail
    | LaunchJail
    | EndJail
)


class HostOps(Protocol):
    """Who performs them: this process (`local`), the helper (`client`), or nobody."""

    @property
    def problem(self) -> str:
        """Empty, or why it cannot perform any."""
        ...

    @property
    def hint(self) -> str:
        """What to do about that."""
        ...

    @property
    def installed(self) -> bool:
        """Whether somebody has set this host up for banger: its network is the one to use then."""
        ...

    async def perform(self, operation: Operation) -> Done:
        """Have it done.

        Raises BadRequest for what is refused unseen, Conflict for what is there and not ours,
        PermissionDenied and Unavailable where nobody can do it or it failed; it has then no effect
        that repeating it, or its opposite, would not mend.
        """
        ...


def bridge_of(name: str, network: str, instance: str = "") -> Bridge:
    """The bridge of a network, whose first address is the host's."""
    whole = IPv4Network(network)
    return Bridge(name=name, address=f"{whole[1]}/{whole.prefixlen}", instance=instance)


def disjoint(networks: Sequence[IPv4Network]) -> bool:
    """Whether none of them has an address of another; nftables refuses sets of others."""
    ordered = sorted(networks)
    return all(
        one.broadcast_address < other.network_address for one, other in itertools.pairwise(ordered)
    )


def _check_count(descriptors: tuple[int, ...], wanted: int) -> None:
    if len(descriptors) != wanted:
        raise BadRequest(f"{len(descriptors)} descriptors came where {wanted} belong")


def _check_vm_id(vm_id: str) -> None:
    if not is_vm_id(vm_id):
        raise BadRequest(f"{vm_id!r} is not the id of a machine")


def _check_instance(instance: str) -> None:
    if instance and _INSTANCE.fullmatch(instance) is None:
        raise BadRequest(f"{instance!r} does not name a daemon: 8 hex digits do")


def _check_guest(guest: Guest, bridge: Bridge) -> None:
    match = _TAP.fullmatch(guest.tap)
    if match is None or match[1] != bridge.name:
        raise BadRequest(f"{guest.tap!r} is not a tap of {bridge.name}")
    if _MAC.fullmatch(guest.mac) is None or guest.mac == BRIDGE_MAC:
        raise BadRequest(f"{guest.mac!r} is not a MAC address for a guest")
    _check_member(guest.address, bridge)
    if len(guest.allow) > ALLOWED_MAX:
        raise BadRequest(f"{len(guest.allow)} networks are too many for one guest")
    if not disjoint([_network(each) for each in guest.allow]):
        raise BadRequest("networks that a guest may reach overlap")


def _check_member(address: str, bridge: Bridge) -> None:
    parsed = _address(address)
    network = bridge.network
    reserved = (network.network_address, network.broadcast_address, bridge.gateway)
    if parsed not in network or parsed in reserved:
        raise BadRequest(f"{address} is not an address for a guest of {bridge.address}")


def _address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError:
        raise BadRequest(f"{text!r} is not an IPv4 address") from None


def _network(text: str) -> IPv4Network:
    try:
        network = IPv4Network(text)
    except ValueError:
        raise BadRequest(f"{text!r} is not an IPv4 network") from None
    if str(network) != text:
        raise BadRequest(f"{text!r} is not an IPv4 network in its usual form")
    return network
