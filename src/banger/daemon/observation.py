"""The method that looks at what VMs use: once, or again and again while its client stays; and the
list of VMs, which has what was seen last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from msgspec import Meta

from banger.daemon.params import Nothing, Params
from banger.rpc.server import Connection
from banger.services.stats import StatsService

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class StatsQuery(Params, frozen=True):
    """A VM, or (empty) all that run; `watch`: an event every ``interval_s`` seconds, no result."""

    vm: str = ""
    watch: bool = False
    interval_s: Annotated[float, Meta(ge=0.5, le=3600)] = 2.0


class Observation:
    """The methods; they answer by themselves."""

    def __init__(self, stats: StatsService) -> None:
        self._stats = stats

    def methods(self) -> Mapping[str, Row]:
        return {
            "vm.list": (Nothing, self._vm_list),
            "vm.stats": (StatsQuery, self._vm_stats),
        }

    async def _vm_list(self, _: Nothing, connection: Connection) -> None:
        await connection.result(await self._stats.listed())

    async def _vm_stats(self, params: StatsQuery, connection: Connection) -> None:
        if not params.watch:
            await connection.result(await self._stats.collect(params.vm))
            return
        leaving = asyncio.create_task(connection.wait_disconnect())
        try:
            await self._watch(params, connection, leaving)
        finally:
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def _watch(
        self, params: StatsQuery, connection: Connection, leaving: asyncio.Task[None]
    ) -> None:
        loop = asyncio.get_running_loop()
        reference = params.vm
        while not leaving.done():
            due = loop.time() + params.interval_s
            found = await self._stats.collect(reference)
            if reference:
                reference = found[0].id  # from now on this one, whatever else the text may match
            await connection.event(found)
            await asyncio.wait({leaving}, timeout=max(due - loop.time(), 0))
