"""The methods of kernels."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from banger.daemon.params import Nothing
from banger.rpc.server import Connection
from banger.services.kernel import KernelService

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Kernels:
    def __init__(self, kernels: KernelService) -> None:
        self._kernels = kernels

    def methods(self) -> Mapping[str, Row]:
        return {"kernel.list": (Nothing, self._list)}

    async def _list(self, _: Nothing, connection: Connection) -> None:
        await connection.result(await self._kernels.all())
