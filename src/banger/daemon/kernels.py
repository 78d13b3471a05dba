"""The methods of kernels."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from banger.base.errors import BadRequest
from banger.daemon.operate import begun
from banger.daemon.params import ExportKernel, ImportKernel, KernelReference, Nothing
from banger.images.kernel_import import KernelFiles
from banger.rpc.server import Connection
from banger.services.kernel import KernelService

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Kernels:
    def __init__(self, kernels: KernelService) -> None:
        self._kernels = kernels

    def methods(self) -> Mapping[str, Row]:
        return {
            "kernel.build.begin": (KernelReference, self._build),
            "kernel.import.begin": (ImportKernel, self._import),
            "kernel.pull.begin": (KernelReference, self._pull),
            "kernel.export.begin": (ExportKernel, self._export),
            "kernel.list": (Nothing, self._list),
            "kernel.show": (KernelReference, self._show),
            "kernel.delete": (KernelReference, self._delete),
        }

    async def _build(self, params: KernelReference, connection: Connection) -> None:
        await begun(await self._kernels.begin_build(params.kernel), connection)

    async def _import(self, params: ImportKernel, connection: Connection) -> None:
        files = KernelFiles(
            image=_path(params.file),
            modules=_path(params.modules) if params.modules else None,
            config=_path(params.config) if params.config else None,
        )
        await begun(await self._kernels.begin_import(params.name, files), connection)

    async def _pull(self, params: KernelReference, connection: Connection) -> None:
        await begun(await self._kernels.begin_pull(params.kernel), connection)

    async def _export(self, params: ExportKernel, connection: Connection) -> None:
        progress = await self._kernels.begin_export(params.kernel, _path(params.file), params.umask)
        await begun(progress, connection)

    async def _list(self, _: Nothing, connection: Connection) -> None:
        await connection.result(await self._kernels.all())

    async def _show(self, params: KernelReference, connection: Connection) -> None:
        await connection.result(await self._kernels.named(params.kernel))

    async def _delete(self, params: KernelReference, connection: Connection) -> None:
        await connection.result(await self._kernels.delete(params.kernel))


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise BadRequest(f"{text!r} is not a path")
    return Path(text)
