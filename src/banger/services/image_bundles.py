"""Images from a catalog, and bundles for one: an image's files in one archive."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path

from banger.base.model import Image, is_artifact_name
from banger.base.paths import Paths
from banger.base.url import shown
from banger.images.bundle import pack_image_bundle, unpack_image_bundle
from banger.images.catalog import ImageEntry, load_catalog
from banger.images.download import fetched
from banger.images.root import RootFiles
from banger.services.artifacts import check_target, export, new_id
from banger.services.image import ImageService, Made
from banger.services.image_cache import ImageCache
from banger.services.operations import Operations, Progress

#: What says that the rest is a name in the catalog.
CATALOG_PREFIX = "catalog:"


class ImageBundles:
    def __init__(
        self,
        paths: Paths,
        images: ImageService,
        operations: Operations,
        cache: ImageCache,
        catalog_url: str,
        *,
        size_limit_mib: int,
    ) -> None:
        self._paths = paths
        self._images = images
        self._operations = operations
        self._cache = cache
        self._catalog_url = catalog_url
        self._limit_bytes = size_limit_mib << 20

    async def entry(self, reference: str, progress: Progress) -> ImageEntry | None:
        """What the catalog has by this reference; None for one of a registry.

        ``catalog:NAME`` must be in it (NotFound), a plain NAME may be.
        """
        name = reference.removeprefix(CATALOG_PREFIX)
        explicit = name != reference
        if not explicit and not (self._catalog_url and is_artifact_name(reference)):
            return None
        progress.stage("catalog", shown(self._catalog_url))
        catalog = await load_catalog(self._catalog_url)
        if not explicit and all(each.name != name for each in catalog.images):
            return None
        return catalog.image(name, platform.machine())

    async def pull(self, entry: ImageEntry, name: str, kernel: str, progress: Progress) -> None:
        """Make an image of a catalog's bundle; what has come of it is kept when it fails."""
        if (there := await self._images.find(name)) is not None:
            await self._images.up_to_date(there, f"sha256:{entry.sha256}", kernel, progress)
            return
        booted_by = await self._images.kernel(kernel or entry.kernel, progress)
        async with (
            self._cache.pulling(),
            fetched(entry.download, self._paths.downloads_dir, progress.stage) as file,
            self._images.making(name) as staging,
        ):
            bundle = await unpack_image_bundle(
                file,
                staging.path,
                entry.architecture,
                progress.stage,
                limit_bytes=self._limit_bytes,
            )
            made = Made(
                RootFiles(bundle.rootfs, bundle.work_seed),
                booted_by.id,
                init=bundle.info.init,
                packages=bundle.info.packages,
                config=bundle.info.config,
                source=f"pulled from {shown(entry.url)}",
                digest=f"sha256:{entry.sha256}",
                foreign_seed=True,
            )
            await self._images.publish(staging, name, made, progress)

    async def begin_export(self, name: str, file: Path, umask: int) -> Progress:
        """Start writing the bundle of an image to `file` (absolute), which may be there."""
        image = await self._images.get(name)
        await check_target(file)
        return self._operations.begin(
            "image.export", name, partial(self._export, image, file, umask)
        )

    async def _export(self, image: Image, file: Path, umask: int, progress: Progress) -> None:
        async def pack(bundle: Path) -> None:
            await pack_image_bundle(image, platform.machine(), bundle, progress.stage)

        await export(self._paths.image_dir(new_id()), pack, file, umask, progress)
        progress.result(image=image)
