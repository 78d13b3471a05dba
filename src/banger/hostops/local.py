"""Privileged operations, performed by this process: root, in the daemon or in the helper.

One at a time: they read what is there and change it. (But for those that keep machines going,
which wait for no other.)
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, PreconditionFailed, Unavailable
from banger.hostops import firewall, mappings, resolved, snapshots
from banger.hostops.ops import (
    URGENT,
    AllowResolved,
    Bridge,
    BridgeDown,
    BridgeUp,
    CheckJail,
    Done,
    EndJail,
    GrowSnapshot,
    LaunchJail,
    LookAtSnapshot,
    MapSnapshot,
    OpenTap,
    Operation,
    RouteNames,
    SetGuests,
    SweepSnapshots,
    UnmapSnapshot,
    UnrouteNames,
)

if TYPE_CHECKING:
    from banger.hostops.jails import Jails

NFT = "nft"
_NFT_TIMEOUT_S = 20.0
_GROWING = ThreadPoolExecutor(4, "grow-snapshot")


class LocalHost:
    """Implements `HostOps`."""

    problem = ""
    hint = ""
    installed = False

    def __init__(
        self,
        owner_uid: int | None = None,
        *,
        firecracker: str = "firecracker",
        jailer: str = "jailer",
    ) -> None:
        """For this user, whose files and devices alone are touched: our own, if none is named.

        The programs are for jails: names to be found on PATH, or paths.
        """
        self._owner_uid = os.getuid() if owner_uid is None else owner_uid
        self._programs = (firecracker, jailer)
        self._jails: Jails | None = None
        self._one_at_a_time = asyncio.Lock()

    async def perform(self, operation: Operation) -> Done:
        """See `HostOps.perform`. Once begun it is done, or fails, whoever cancels it."""
        operation.check()
        if isinstance(operation, URGENT):
            return await self._to_its_end(operation)
        async with self._one_at_a_time:
            return await self._to_its_end(operation)

    async def _to_its_end(self, operation: Operation) -> Done:
        done: list[Done] = []

        async def work() -> Done:
            done.append(await self._perform(operation))
            return done[0]

        try:
            return await to_its_end(work())
        except asyncio.CancelledError:
            for each in done:  # nobody gets what came of it
                if each.fd >= 0:
                    os.close(each.fd)
            raise

    async def _perform(self, operation: Operation) -> Done:
        try:
            return await self._jail(operation) or await _perform(operation, self._owner_uid)
        except BangerError:
            raise
        except Exception as error:  # of netlink or of the system: told without a stack trace
            name = type(operation).__name__
            raise Unavailable(f"{name} failed: {error}") from error

    async def _jail(self, operation: Operation) -> Done | None:
        """None for another operation."""
        match operation:
            case CheckJail():
                return Done(name=await self._of_jails().check())
            case LaunchJail():
                return await self._of_jails().launch(operation)
            case EndJail(vm_id=vm_id):
                await self._of_jails().end(vm_id)
                return Done()
        return None

    def _of_jails(self) -> Jails:
        """Imported when it is needed first, for it imports `links`: see `_links`."""
        from banger.hostops.jails import Jails

        if self._jails is None:
            self._jails = Jails(self._owner_uid, *self._programs)
        return self._jails


async def _perform(operation: Operation, owner_uid: int) -> Done:
    match operation:
        case BridgeUp():
            await _bridge_up(operation, owner_uid)
        case BridgeDown():
            await _bridge_down(operation, owner_uid)
        case OpenTap(bridge=name):
            tap, fd = await asyncio.to_thread(_links().open_tap, name, owner_uid)
            return Done(name=tap, fd=fd)
        case SetGuests():
            await _set_guests(operation, owner_uid)
        case AllowResolved(bridge=bridge, guest=guest, addresses=addresses):
            await _check_up(bridge, owner_uid)
            await _nft_of(bridge, firewall.resolved(bridge, guest, addresses))
        case RouteNames():
            await _route_names(operation)
        case UnrouteNames():
            # What resolved was told of the link goes with it.
            await asyncio.to_thread(_links().take_down_names)
        case MapSnapshot():
            return Done(name=await snapshots.make(operation, owner_uid))
        case GrowSnapshot(vm_id=vm_id):
            # In no thread of those that all share: in a daemon of root's they copy whole disks.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(_GROWING, snapshots.grow, vm_id, owner_uid)
        case LookAtSnapshot(vm_id=vm_id):
            return Done(name=await mappings.state(vm_id, owner_uid))
        case UnmapSnapshot(vm_id=vm_id):
            await snapshots.take_away(vm_id, owner_uid)
        case SweepSnapshots(instance=instance, keep=keep):
            await snapshots.sweep(instance, keep, owner_uid)
        case _:
            raise AssertionError(f"no way to perform {type(operation).__name__}")
    return Done()


async def _bridge_up(operation: BridgeUp, owner_uid: int) -> None:
    """The tables come before the bridge: no packet is forwarded that they have not seen.

    They are set each time: whatever reloaded the firewall has taken them away, an earlier version
    has set others. Guests that they know stay.
    """
    bridge = operation.bridge
    # Before the tables, which would filter an interface of somebody else's with this name.
    await asyncio.to_thread(_links().check_free, bridge, owner_uid)
    rules = firewall.tables(bridge, operation.resolver_port, owner_uid)
    try:
        await _nft(rules)
    except PreconditionFailed:  # sets of an earlier version, perhaps, which cannot be changed
        await _nft(firewall.no_tables(bridge.name) + rules)
    try:
        await asyncio.to_thread(_links().bring_up, bridge, owner_uid)
    except BaseException:
        if not await asyncio.to_thread(_links().is_up, bridge.name, owner_uid, bridge.instance):
            await _nft(firewall.no_tables(bridge.name))
        raise


async def _bridge_down(operation: BridgeDown, owner_uid: int) -> None:
    """The tables go last, for the same reason."""
    name = operation.bridge
    await asyncio.to_thread(_links().take_down, name, owner_uid, operation.instance)
    await _nft(firewall.no_tables(name))


async def _set_guests(operation: SetGuests, owner_uid: int) -> None:
    bridge, guests = operation.bridge, operation.guests
    await _check_up(bridge, owner_uid)
    keep = {each.address for each in guests} - set(operation.forget)
    forget = [pair for pair in await _resolved_pairs(bridge) if pair[0] not in keep]
    await _nft_of(bridge, firewall.guests(bridge, guests, forget))


async def _check_up(bridge: Bridge, owner_uid: int) -> None:
    """Raise Conflict for a bridge of somebody else's, PreconditionFailed for none."""
    if not await asyncio.to_thread(_links().is_up, bridge.name, owner_uid, bridge.instance):
        raise _no_rules(bridge.name)


async def _route_names(operation: RouteNames) -> None:
    resolved.check_runs()
    await asyncio.to_thread(_links().bring_up_names)
    await resolved.route(_links().NAMES, operation.server, operation.port)


async def _resolved_pairs(bridge: Bridge) -> list[tuple[str, str]]:
    argv = [NFT, "-j", "list", "set", "inet", bridge.name, "resolved"]
    try:
        listing = await proc.run(argv, timeout_s=_NFT_TIMEOUT_S, env=proc.BARE_ENVIRONMENT)
    except proc.ProcessFailed as error:
        raise _no_rules(bridge.name) from error
    return firewall.resolved_pairs(listing.stdout)


async def _nft_of(bridge: Bridge, rules: str) -> None:
    """Rules that are about the tables of a bridge that is up."""
    try:
        await _nft(rules)
    except PreconditionFailed as error:
        if await _has_tables(bridge.name):
            raise
        raise _no_rules(bridge.name) from error


async def _has_tables(name: str) -> bool:
    listing = await proc.run(
        [NFT, "list", "tables"], timeout_s=_NFT_TIMEOUT_S, env=proc.BARE_ENVIRONMENT
    )
    there = listing.stdout.decode().splitlines()
    return all(f"table {family} {name}" in there for family in firewall.FAMILIES)


def _no_rules(name: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"the rules of {name} are not there: it is down, or the firewall was loaded anew",
        hint="restart the daemon, which sets them: banger daemon restart",
    )


async def _nft(rules: str) -> None:
    """One transaction: all of it or nothing."""
    try:
        await proc.run(
            [NFT, "-f", "-"],
            timeout_s=_NFT_TIMEOUT_S,
            stdin=rules.encode(),
            env=proc.BARE_ENVIRONMENT,
        )
    except proc.ProcessFailed as error:
        raise PreconditionFailed(
            f"the rules of a bridge cannot be set: {error.message}",
            hint="the kernel needs nf_tables, with nft_nat, nft_masq, nft_ct and the bridge family",
        ) from error


def _links() -> ModuleType:
    """Imported when it is needed first: pyroute2 takes a sixth of a second."""
    from banger.hostops import links

    return links
