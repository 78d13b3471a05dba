"""Machines on a bridge of the host: a tap and an address for each, and a firewall that knows them.

What needs root is asked of `HostOps`; this knows what is to be so. The firewall's view of all
guests is set at once, from here, whenever one changes: there is nothing to take back when a step
of it fails, and a daemon that was killed leaves nothing that the next one does not set right. It is
set again now and then, for whoever reloads a firewall may empty all tables there are.

A tap goes with its descriptor, which only the machine has once it runs: what has ended, however it
ended, has none. A few wait open, joined to the bridge, for the next starts; the firewall lets
nothing through that it does not know. The bridge comes with the first machine, and goes when the
daemon ends or no machine has needed it for a while.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from banger.base import proc
from banger.base.errors import BangerError, Conflict, PreconditionFailed
from banger.base.log import get_logger
from banger.base.model import Egress, Reach
from banger.base.reach import names, networks
from banger.drivers.base import (
    Check,
    GuestNetwork,
    Level,
    Link,
    NetworkAttachment,
    Plug,
    Plugged,
    VmNames,
)
from banger.drivers.network.guest_dns import GuestDns, GuestNames
from banger.drivers.network.mac import UNPLUGGED_MAC, mac_address
from banger.hostops.ops import (
    RESOLVED_MAX,
    AllowResolved,
    Bridge,
    BridgeDown,
    BridgeUp,
    Guest,
    HostOps,
    OpenTap,
    SetGuests,
)

_NFT = "nft"
_WITHOUT = "or do without: --network user, which banger vm set takes, too"
_TUN = Path("/dev/net/tun")
_LINKS = Path("/sys/class/net")
#: Where the daemon answers guests that ask their gateway for names.
RESOLVER_PORT = 10053
#: How long a bridge stays that no machine is on.
_IDLE_S = 600.0
#: For how long guests may be unfiltered when somebody has emptied the tables. Setting them again
#: costs some 50 ms.
_RENEW_S = 60.0


class BridgeNetwork:
    """Implements `drivers.base.Network`."""

    name = "bridge"
    link = Link.TAP

    def __init__(self, host: HostOps, bridge: Bridge, names: VmNames, *, pool_size: int) -> None:
        """``names`` are those that guests are told of."""
        self.guests: IPv4Network | None = bridge.network
        self._network = bridge.network
        self._names = names
        self._host = host
        self._bridge = bridge
        self._pool_size = pool_size
        self._pool: list[tuple[str, int]] = []
        #: Those that are let through.
        self._machines: dict[str, Plugged] = {}
        #: Whether the firewall knows just those: not while a change of it is not known to be done.
        self._told = False
        self._up = False
        #: While the bridge is up, and its port can be had.
        self._resolver: GuestDns | None = None
        self._resolver_problem = ""
        #: Held while the host is changed: what is known here is then what is so.
        self._changing = asyncio.Lock()
        self._filling: asyncio.Task[None] | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def checks(self) -> list[Check]:
        """Who does what needs root, and what that needs."""
        name = "network bridge"
        if self._host.problem:
            return [Check(name, Level.FAIL, self._host.problem, f"{self._host.hint}; {_WITHOUT}")]
        if proc.which(_NFT) is None:
            error = proc.missing_tool(_NFT)
            return [Check(name, Level.FAIL, error.message, error.hint)]
        if not os.path.exists(_TUN):  # noqa: ASYNC240, PTH110 - a look at what is in memory
            return [Check(name, Level.FAIL, f"there is no {_TUN}", "load it: modprobe tun")]
        if self._resolver_problem:
            detail = f"its guests find no names: {self._resolver_problem}"
            hint = "end what has that port, then: banger daemon restart"
            return [Check(name, Level.WARN, detail, hint)]
        return [Check(name, Level.OK, f"{self._bridge.name}, {self._bridge.network}")]

    def refusal(self, reach: Reach) -> Check | None:  # noqa: ARG002 - part of the protocol
        """It can hold machines to anything."""
        return None

    async def resume(self, machines: Sequence[Plugged]) -> None:
        """See `Network.resume`."""
        async with self._changing:
            self._machines = {each.vm_id: each for each in machines if self._is_mine(each)}
            if self._machines:
                # A daemon may have died between a record that allows no names and what that means.
                mine = self._machines.values()
                await self._bring_up(tuple(each.address for each in mine if not names(each.reach)))
            elif (_LINKS / self._bridge.name).exists() and not self._host.problem:
                with suppress(Conflict):  # it is another banger's
                    await self._take_down()

    async def attach(self, plug: Plug) -> NetworkAttachment:
        """See `Network.attach`. Raises PermissionDenied where nobody has the privileges."""
        tap, fd = await self._tap()
        try:
            machine = Plugged(plug.vm_id, plug.reach, plug.address, tap)
            async with self._changing:
                await self._admit(machine)
        except BaseException:
            os.close(fd)
            raise
        return NetworkAttachment(
            self._guest_side(mac_address(plug.vm_id), plug.address), self.link, fd=fd, tap=tap
        )

    async def apply(self, machine: Plugged) -> None:
        """See `Network.apply`."""
        async with self._changing:
            known = self._machines.get(machine.vm_id)
            changed = not self._told or known is None or _differ(known, machine)
            if changed and self._is_mine(machine):
                await self._admit(machine)

    async def detach(self, vm_id: str) -> None:
        """See `Network.detach`. Where the firewall cannot be told now, it is with the next change:
        it knows a tap that is gone, and whose name will not come again."""
        async with self._changing:
            if self._machines.pop(vm_id, None) is None:
                return
            try:
                await self._set_guests()
            except BangerError as error:
                get_logger().warning("guest not forgotten", vm_id=vm_id, error=error.message)
            self._await_idleness()

    @asynccontextmanager
    async def unplugged(self) -> AsyncIterator[NetworkAttachment]:
        """See `Network.unplugged`: a tap that the firewall does not know."""
        tap, fd = await self._tap()
        guest = self._guest_side(UNPLUGGED_MAC, str(self._network[-2]))
        yield NetworkAttachment(guest, self.link, fd=fd, tap=tap)

    def owns(self, argv: tuple[str, ...], vm_id: str) -> bool:  # noqa: ARG002 - of the protocol
        """There are none: it is the kernel that serves."""
        return False

    async def close(self) -> None:
        """See `Network.close`. The bridge goes, unless a machine is on it."""
        for task in filter(None, (self._filling, self._waiting, self._renewing)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        async with self._changing:
            if self._up and not self._machines:
                await self._try_to_take_down()
            self._close_pool()
            await self._close_resolver()

    def _guest_side(self, mac: str, address: str) -> GuestNetwork:
        gateway = str(self._bridge.gateway)
        return GuestNetwork(mac, f"{address}/{self._network.prefixlen}", gateway, gateway)

    def _is_mine(self, machine: Plugged) -> bool:
        """Whether it is on this bridge: settings may have changed since it was started."""
        if not machine.tap:
            return False
        on_it = machine.tap.startswith(f"{self._bridge.name}-")
        if not on_it or IPv4Address(machine.address) not in self._network:
            get_logger().warning(
                "vm cut off until it is restarted: it is on another bridge than is configured",
                vm_id=machine.vm_id,
                tap=machine.tap,
            )
            return False
        return True

    # With `_changing` held.

    async def _admit(self, machine: Plugged) -> None:
        before = self._machines.get(machine.vm_id)
        self._machines[machine.vm_id] = machine
        try:
            # What names led to by then may be none of what it may reach now.
            await self._set_guests(forget=(machine.address,))
        except BaseException:
            del self._machines[machine.vm_id]
            if before is not None:
                self._machines[machine.vm_id] = before
            raise

    async def _set_guests(self, forget: tuple[str, ...] = ()) -> None:
        guests = tuple(map(_guest, self._machines.values()))
        operation = SetGuests(bridge=self._bridge, guests=guests, forget=forget)
        self._told = False
        try:
            await self._host.perform(operation)
        except BangerError as error:
            # Somebody has emptied the tables, or taken the bridge: both are made again. The taps
            # of machines that run stay cut off then, those that wait are of no use.
            get_logger().warning("bridge is to be mended", error=error.message)
            self._close_pool()
            await self._host.perform(self._bridge_up)
            await self._host.perform(operation)
        self._told = True

    @property
    def _bridge_up(self) -> BridgeUp:
        return BridgeUp(bridge=self._bridge, resolver_port=RESOLVER_PORT)

    async def _bring_up(self, forget: tuple[str, ...] = ()) -> None:
        await self._host.perform(self._bridge_up)
        self._up = True
        await self._set_guests(forget)
        await self._open_resolver()
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _try_to_take_down(self) -> None:
        try:
            await self._take_down()
        except BangerError as error:
            get_logger().error("bridge stays", error=error.message)

    async def _take_down(self) -> None:
        self._close_pool()
        await self._close_resolver()
        down = BridgeDown(bridge=self._bridge.name, instance=self._bridge.instance)
        await self._host.perform(down)
        self._up = False

    async def _renew(self) -> None:
        """Set the tables again, for as long as the bridge is up."""
        while True:
            await asyncio.sleep(_RENEW_S)
            async with self._changing:
                if not self._up:
                    return
                if not self._machines:
                    continue
                try:
                    await self._host.perform(self._bridge_up)
                    await self._set_guests()
                except BangerError as error:
                    get_logger().warning("bridge not renewed", error=error.message)

    # Taps.

    async def _tap(self) -> tuple[str, int]:
        """A tap on the bridge, which is up then: name and descriptor, which is the caller's."""
        async with self._changing:
            if not self._up or not self._machines:  # else another's machine holds it
                await self._bring_up()
            tap = self._pool.pop() if self._pool else await self._new_tap()
            self._await_idleness()
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill())
        return tap

    async def _fill(self) -> None:
        """Have taps wait for the next starts, once this one is over what it needs the host for."""
        try:
            while len(self._pool) < self._pool_size:
                async with self._changing:
                    if not self._up:
                        return
                    self._pool.append(await self._new_tap())
        except BangerError as error:
            get_logger().warning("no tap to spare", error=error.message)

    async def _new_tap(self) -> tuple[str, int]:
        done = await self._host.perform(OpenTap(bridge=self._bridge.name))
        return done.name, done.fd

    def _close_pool(self) -> None:
        while self._pool:
            os.close(self._pool.pop()[1])

    def _await_idleness(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = asyncio.create_task(self._leave_when_idle())

    async def _leave_when_idle(self) -> None:
        await asyncio.sleep(_IDLE_S)
        async with self._changing:
            if self._up and not self._machines:
                await self._try_to_take_down()

    # Names.

    async def _open_resolver(self) -> None:
        """Answer guests that ask their gateway. Where that cannot be, they have no names, and
        `checks` says why."""
        if self._resolver is not None:
            return
        resolver = GuestDns(
            names=self._names,
            networks=[self._network],
            policy=self._may_ask,
            resolved=self._let_through,
        )
        try:
            await resolver.open(str(self._bridge.gateway), RESOLVER_PORT)
        except OSError as error:
            self._resolver_problem = f"{self._bridge.gateway}:{RESOLVER_PORT}: {error.strerror}"
            get_logger().error("no resolver for guests", error=self._resolver_problem)
            return
        self._resolver, self._resolver_problem = resolver, ""

    async def _close_resolver(self) -> None:
        if self._resolver is not None:
            await self._resolver.close()
            self._resolver = None

    def _may_ask(self, address: str) -> GuestNames | None:
        for machine in self._machines.values():
            if machine.address == address:
                return GuestNames(
                    egress=machine.reach.egress,
                    own_name=self._names.name_of(address),
                    allowed=names(machine.reach),
                    sees_vms=not machine.reach.isolated,
                )
        return None

    async def _let_through(
        self, guest: str, asked: GuestNames, found: Sequence[tuple[str, int]]
    ) -> None:
        """What a name led to. For how long is not up to who owns the name (`RESOLVED_S`).

        Raises PreconditionFailed where the guest may no longer ask what it has asked: answers
        take seconds, if whoever owns the name wants them to.
        """
        addresses = tuple(dict.fromkeys(address for address, _ in found))[:RESOLVED_MAX]
        operation = AllowResolved(bridge=self._bridge, guest=guest, addresses=addresses)
        async with self._changing:
            if self._may_ask(guest) != asked:
                raise PreconditionFailed("what it may ask has changed meanwhile")
            await self._host.perform(operation)


def _guest(machine: Plugged) -> Guest:
    return Guest(
        tap=machine.tap,
        mac=mac_address(machine.vm_id),
        address=machine.address,
        everywhere=machine.reach.egress is Egress.ALL,
        allow=networks(machine.reach),
        sociable=not machine.reach.isolated,
    )


def _differ(one: Plugged, other: Plugged) -> bool:
    """Whether the firewall or the resolver treats them in different ways."""
    return (_guest(one), names(one.reach)) != (_guest(other), names(other.reach))
