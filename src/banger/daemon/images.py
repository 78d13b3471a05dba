"""The methods of images. Those that take long only begin it: `operations.watch` tells the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from banger.base.usage import DiskUse, ShownImage
from banger.daemon.operate import begun
from banger.daemon.params import ExportImage, ImageReference, Nothing, PruneCache
from banger.rpc.server import Connection
from banger.services.image import ImageService
from banger.services.image_bundles import ImageBundles
from banger.services.image_cache import ImageCache
from banger.services.image_import import ImageImports, ImportRequest
from banger.services.image_make import ImageMaker, MakeRequest
from banger.services.image_pull import ImagePulls, PullRequest
from banger.services.standby import Standbys
from banger.services.stats import StatsService
from banger.services.templates import TemplateService
from banger.services.vm import VmService

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Images:
    def __init__(
        self,
        images: ImageService,
        maker: ImageMaker,
        bundles: ImageBundles,
        pulls: ImagePulls,
        imports: ImageImports,
        cache: ImageCache,
        vms: VmService,
        stats: StatsService,
        templates: TemplateService,
        standbys: Standbys,
    ) -> None:
        self._images = images
        self._maker = maker
        self._bundles = bundles
        self._pulls = pulls
        self._imports = imports
        self._cache = cache
        self._vms = vms
        self._stats = stats
        self._templates = templates
        self._standbys = standbys

    def methods(self) -> Mapping[str, Row]:
        return {
            "image.build.begin": (ImageReference, self._build),
            "image.make.begin": (MakeRequest, self._make),
            "image.pull.begin": (PullRequest, self._pull),
            "image.import.begin": (ImportRequest, self._import),
            "image.register.begin": (ImportRequest, self._register),
            "image.export.begin": (ExportImage, self._export),
            "image.promote.begin": (ImageReference, self._promote),
            "image.list": (Nothing, self._list),
            "image.show": (ImageReference, self._show),
            "image.delete": (ImageReference, self._delete),
            "image.cache.prune": (PruneCache, self._prune),
        }

    async def _build(self, params: ImageReference, connection: Connection) -> None:
        await begun(await self._images.begin_build(params.image), connection)

    async def _make(self, params: MakeRequest, connection: Connection) -> None:
        progress = await self._maker.begin(params)
        log = str(self._maker.log_of(progress))
        await connection.result({"operation_id": progress.record.id, "log": log})

    async def _pull(self, params: PullRequest, connection: Connection) -> None:
        await begun(await self._pulls.begin(params), connection)

    async def _import(self, params: ImportRequest, connection: Connection) -> None:
        await begun(await self._imports.begin(params), connection)

    async def _register(self, params: ImportRequest, connection: Connection) -> None:
        await begun(self._imports.begin_register(params), connection)

    async def _export(self, params: ExportImage, connection: Connection) -> None:
        progress = await self._bundles.begin_export(params.image, Path(params.file), params.umask)
        await begun(progress, connection)

    async def _promote(self, params: ImageReference, connection: Connection) -> None:
        await begun(await self._imports.begin_promote(params.image), connection)

    async def _list(self, _: Nothing, connection: Connection) -> None:
        await connection.result(await self._images.all())

    async def _show(self, params: ImageReference, connection: Connection) -> None:
        image = await self._images.get(params.image)
        over = [vm for vm in await self._vms.all() if vm.image_id == image.id]
        shown = [await self._stats.shown(vm) for vm in over]
        uses = tuple(DiskUse(vm_name=vm.name, disk_bytes=vm.disk_bytes) for vm in shown)
        await connection.result(ShownImage(**msgspec.structs.asdict(image), vms=uses))

    async def _delete(self, params: ImageReference, connection: Connection) -> None:
        image = await self._images.delete(params.image)
        await self._standbys.retire_all()
        await self._templates.forget_image(image.id)
        await connection.result(image)

    async def _prune(self, params: PruneCache, connection: Connection) -> None:
        await connection.result(await self._cache.prune(dry_run=params.dry_run))
