"""The methods of images."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from banger.daemon.params import ImageReference, Nothing
from banger.rpc.server import Connection
from banger.services.image import ImageService
from banger.services.standby import Standbys
from banger.services.templates import TemplateService

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Images:
    def __init__(
        self, images: ImageService, templates: TemplateService, standbys: Standbys
    ) -> None:
        self._images = images
        self._templates = templates
        self._standbys = standbys

    def methods(self) -> Mapping[str, Row]:
        return {
            "image.build.begin": (ImageReference, self._build),
            "image.list": (Nothing, self._list),
            "image.show": (ImageReference, self._show),
            "image.delete": (ImageReference, self._delete),
        }

    async def _build(self, params: ImageReference, connection: Connection) -> None:
        progress = await self._images.begin_build(params.image)
        await connection.result({"operation_id": progress.record.id})

    async def _list(self, _: Nothing, connection: Connection) -> None:
        await connection.result(await self._images.all())

    async def _show(self, params: ImageReference, connection: Connection) -> None:
        await connection.result(await self._images.get(params.image))

    async def _delete(self, params: ImageReference, connection: Connection) -> None:
        image = await self._images.delete(params.image)
        await self._standbys.retire_all()
        await self._templates.forget_image(image.id)
        await connection.result(image)
