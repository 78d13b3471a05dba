"""Privileged operations, performed by this process: root, in the daemon or in the helper.

One at a time: they read what is there and change it.
"""

from __future__ import annotations

import asyncio
from types import ModuleType

from banger.base import proc
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, PreconditionFailed, Unavailable
from banger.hostops import firewall, resolved
from banger.hostops.ops import (
    AllowResolved,
    Bridge,
    BridgeDown,
    BridgeUp,
    Done,
    OpenTap,
    Operation,
    RouteNames,
    SetGuests,
    UnrouteNames,
)

NFT = "nft"
_NFT_TIMEOUT_S = 20.0


class LocalHost:
    """Implements `HostOps`."""

    problem = ""
    hint = ""
    installed = False

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    async def perform(self, operation: Operation) -> Done:
        """See `HostOps.perform`. Once begun it is done, or fails, whoever cancels it."""
        operation.check()
        async with self._one_at_a_time:
            return await to_its_end(_perform(operation))


async def _perform(operation: Operation) -> Done:
    try:
        match operation:
            case BridgeUp():
                await _bridge_up(operation)
            case BridgeDown(bridge=name):
                await _bridge_down(name)
            case OpenTap(bridge=name):
                tap, fd = await asyncio.to_thread(_links().open_tap, name)
                return Done(name=tap, fd=fd)
            case SetGuests():
                await _set_guests(operation)
            case AllowResolved(bridge=bridge, guest=guest, addresses=addresses):
                await _nft(firewall.resolved(bridge, guest, addresses))
            case RouteNames():
                await _route_names(operation)
            case UnrouteNames():
                await _unroute_names(operation)
            case _:
                raise AssertionError(f"no way to perform {type(operation).__name__}")
    except BangerError:
        raise
    except Exception as error:  # of netlink or of the system: told without a stack trace
        name = type(operation).__name__
        raise Unavailable(f"{name} failed: {error}") from error
    return Done()


async def _bridge_up(operation: BridgeUp) -> None:
    """The tables come first: no packet is forwarded that they have not seen."""
    bridge = operation.bridge
    was_up = await asyncio.to_thread(_links().is_up, bridge.name)  # refuses what is not ours
    if not await _has_tables(bridge.name):
        await _nft(
            firewall.no_tables(bridge.name) + firewall.tables(bridge, operation.resolver_port)
        )
    try:
        await asyncio.to_thread(_links().bring_up, bridge)
    except BaseException:
        if not was_up:
            await _nft(firewall.no_tables(bridge.name))
        raise


async def _bridge_down(name: str) -> None:
    """The tables go last, for the same reason."""
    await asyncio.to_thread(_links().take_down, name)
    await _nft(firewall.no_tables(name))


async def _set_guests(operation: SetGuests) -> None:
    bridge, guests = operation.bridge, operation.guests
    keep = {each.address for each in guests} - set(operation.forget)
    forget = [pair for pair in await _resolved_pairs(bridge) if pair[0] not in keep]
    await _nft(firewall.guests(bridge, guests, forget))


async def _route_names(operation: RouteNames) -> None:
    resolved.check_runs()
    link = operation.bridge or _links().NAMES
    if not operation.bridge:
        await asyncio.to_thread(_links().bring_up_names)
    await resolved.route(link, operation.server, operation.port)


async def _unroute_names(operation: UnrouteNames) -> None:
    if not operation.bridge:
        await asyncio.to_thread(_links().take_down_names)  # what resolved knows of it goes with it
    elif await asyncio.to_thread(_links().is_up, operation.bridge):
        resolved.check_runs()
        await resolved.unroute(operation.bridge)


async def _resolved_pairs(bridge: Bridge) -> list[tuple[str, str]]:
    argv = [NFT, "-j", "list", "set", "inet", bridge.name, "resolved"]
    listing = await proc.run(argv, timeout_s=_NFT_TIMEOUT_S, env=proc.BARE_ENVIRONMENT)
    return firewall.resolved_pairs(listing.stdout)


async def _has_tables(name: str) -> bool:
    listing = await proc.run(
        [NFT, "list", "tables"], timeout_s=_NFT_TIMEOUT_S, env=proc.BARE_ENVIRONMENT
    )
    there = listing.stdout.decode().splitlines()
    return all(f"table {family} {name}" in there for family in firewall.FAMILIES)


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
