"""Images from registries, folders and archives: fetched into the cache, unpacked, made a root."""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import PreconditionFailed
from banger.base.log import get_logger
from banger.base.model import ImageConfig, Kernel, check_artifact_name
from banger.base.units import format_size
from banger.images import skopeo
from banger.images.oci import (
    Configuration,
    Manifest,
    Reference,
    check_configuration,
    check_manifest,
    choose_instance,
    decode_configuration,
    decode_manifest,
    image_config,
    parse_reference,
)
from banger.images.preflight import ensure_free_space
from banger.images.root import make_root
from banger.images.unpack import BadArchive, Layer, Limits, Unpacked, unpack
from banger.images.userns import temporary_tree
from banger.services.image import ImageService, Made
from banger.services.image_bundles import CATALOG_PREFIX, ImageBundles
from banger.services.image_cache import ImageCache
from banger.services.operations import Operations, Progress
from banger.services.single_flight import SingleFlight

_MIB = 1 << 20


class PullRequest(msgspec.Struct, frozen=True, kw_only=True):
    reference: str
    #: Empty: made of the reference.
    name: str = ""
    #: The kernel that boots it; empty: Debian's, built when it is missing.
    kernel: str = ""
    #: Also from a registry without TLS, or with a certificate that nobody vouches for.
    insecure: bool = False


@dataclass(frozen=True)
class Fetched:
    """An image in the cache: its layers can be unpacked."""

    manifest: Manifest
    configuration: Configuration
    config: ImageConfig


class ImagePulls:
    def __init__(
        self,
        images: ImageService,
        operations: Operations,
        cache: ImageCache,
        bundles: ImageBundles,
        *,
        size_limit_mib: int,
    ) -> None:
        self._images = images
        self._cache = cache
        self._bundles = bundles
        self._limits = Limits(content_bytes=size_limit_mib * _MIB)
        self._pulls = SingleFlight(operations, "image.pull")

    async def begin(self, request: PullRequest) -> Progress:
        """Start a pull, or join one of the same. BadRequest for what cannot be meant."""
        reference = parse_reference(request.reference.removeprefix(CATALOG_PREFIX))
        name = check_artifact_name(request.name or reference.suggested_name())

        async def work(progress: Progress) -> None:
            await self._pull(reference, name, request, progress)

        key = msgspec.json.encode(request).decode()
        return await self._pulls.begin(key, name, work)

    async def _pull(
        self, reference: Reference, name: str, request: PullRequest, progress: Progress
    ) -> None:
        if (entry := await self._bundles.entry(request.reference, progress)) is not None:
            try:
                await self._bundles.pull(entry, name, request.kernel, progress)
            finally:
                await to_its_end(self._cache.evict())
            return
        try:
            async with self._cache.pulling() as scratch:
                await self._from_source(reference, name, request, scratch, progress)
        finally:  # what has come stays, however it ended
            await to_its_end(self._cache.evict())

    async def _from_source(
        self,
        reference: Reference,
        name: str,
        request: PullRequest,
        scratch: Path,
        progress: Progress,
    ) -> None:
        progress.stage("resolve", str(reference))
        raw = await self._manifest(reference, scratch / "asked", request, progress)
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        if (there := await self._images.find(name)) is not None:
            await self._images.up_to_date(there, digest, request.kernel, progress)
            return
        announced = decode_manifest(raw, str(reference))
        pinned = reference.pinned(digest)
        if announced.manifests and reference.is_remote:
            pinned = reference.pinned(choose_instance(announced.manifests, str(reference)))
            raw = await self._manifest(pinned, scratch / "asked", request, progress)
            announced = decode_manifest(raw, str(reference))
        kernel = await self._images.kernel(request.kernel, progress)
        async with self._images.making(name) as staging:
            self._check_size(announced, staging.path)
            for attempt in (1, 2):
                fetched = await self._fetch(
                    pinned, announced, scratch / str(attempt), request, progress
                )
                try:
                    made = await self._make(fetched, kernel, reference, staging.path, progress)
                    break
                except BadArchive as error:
                    if attempt == 2 or not await self._drop_damaged(fetched, error.layer):
                        raise
                    get_logger().warning("a layer in the cache was damaged", error=error.message)
            made = msgspec.structs.replace(made, digest=digest)
            await self._images.publish(staging, name, made, progress)

    async def _manifest(
        self, reference: Reference, scratch: Path, request: PullRequest, progress: Progress
    ) -> bytes:
        def advance(count: int) -> None:
            self._check_came(reference, count, self._limits.content_bytes)
            if count:
                progress.stage("resolve", f"{reference}: {format_size(count)}")

        async with temporary_tree(scratch):
            return await skopeo.raw_manifest(
                reference, scratch, insecure=request.insecure, advance=advance
            )

    def _check_came(self, reference: Reference, count: int, most: int) -> None:
        if count > most:
            raise PreconditionFailed(
                f"{reference} holds more than {format_size(most)}, which it may not",
                hint="at most image_size_limit, and of a registry what its manifest announces",
            )

    def _check_size(self, announced: Manifest, dest: Path) -> None:
        limit_bytes = self._limits.content_bytes
        if announced.size_bytes > limit_bytes:
            raise PreconditionFailed(
                f"its layers have {format_size(announced.size_bytes)}, the limit is"
                f" {format_size(limit_bytes)}",
                hint="raise image_size_limit in the configuration",
            )
        # Unpacked once as files and once as a file system, and rarely less than twice as large.
        ensure_free_space(dest, 4 * announced.size_bytes + 64 * _MIB)

    async def _fetch(
        self,
        reference: Reference,
        announced: Manifest,
        scratch: Path,
        request: PullRequest,
        progress: Progress,
    ) -> Fetched:
        await asyncio.to_thread(scratch.mkdir)
        blobs = self._cache.blobs
        there = [layer for layer in announced.layers if blobs.path(layer.digest).exists()]
        total = announced.size_bytes - sum(layer.size for layer in there)

        # An archive comes twice: unpacked by skopeo, and as layers.
        remote_most = 2 * total + 64 * _MIB
        most = remote_most if reference.is_remote else 2 * self._limits.content_bytes

        def advance(count: int) -> None:
            self._check_came(reference, count, most)
            of = f"of {format_size(total)}" if total else ""
            kept = f", {len(there)} of {len(announced.layers)} layers were there" if there else ""
            percent = min(100.0, 100 * count / total) if total else -1
            progress.stage("fetch", f"{format_size(count)} {of}{kept}", percent)

        manifest = await skopeo.fetch(
            reference, announced, blobs, scratch, insecure=request.insecure, advance=advance
        )
        what = str(reference)
        check_manifest(manifest, what)
        assert manifest.config is not None  # checked
        if manifest.config.size > 4 * _MIB:
            raise PreconditionFailed(f"the configuration of {what} is larger than any image needs")
        configuration = decode_configuration(
            await asyncio.to_thread(blobs.read, manifest.config), what
        )
        check_configuration(configuration, manifest, what)
        self._cache.touch([layer.digest for layer in manifest.layers])
        return Fetched(manifest, configuration, image_config(configuration, what))

    async def _make(
        self,
        fetched: Fetched,
        kernel: Kernel,
        reference: Reference,
        dest: Path,
        progress: Progress,
    ) -> Made:
        layers = fetched.manifest.layers

        def advance(number: int, read_bytes: int) -> None:
            done = sum(layer.size for layer in layers[:number]) + read_bytes
            percent = 100 * done / max(1, fetched.manifest.size_bytes)
            progress.stage("unpack", f"layer {number + 1} of {len(layers)}", min(100.0, percent))

        progress.stage("unpack", f"{len(layers)} layers", 0)
        async with temporary_tree(dest / "scratch") as scratch:
            tree = scratch / "tree"
            tree.mkdir()
            tree.chmod(0o755)  # as container engines have a root that no layer mentions
            with ExitStack() as open_files:
                opened = []
                for number, layer in enumerate(layers, start=1):
                    descriptor = os.open(
                        self._cache.blobs.path(layer.digest), os.O_RDONLY | os.O_CLOEXEC
                    )
                    open_files.callback(os.close, descriptor)
                    name = f"layer {number} of {reference}"
                    opened.append(Layer(name, descriptor, whiteouts=True, complete=False))
                content = await unpack(opened, tree, limits=self._limits, advance=advance)
            _check_digests(content, fetched.configuration, str(reference))
            files = await make_root(tree, content, dest, progress=progress.stage)
        return Made(files, kernel.id, config=fetched.config, source=str(reference))

    async def _drop_damaged(self, fetched: Fetched, number: int) -> bool:
        """Whether a layer failed because the cache had it wrong: then it is gone from there."""
        digest = fetched.manifest.layers[number].digest
        path = self._cache.blobs.path(digest)
        if f"sha256:{await asyncio.to_thread(_sha256, path)}" == digest:
            return False
        path.unlink(missing_ok=True)
        return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digests(content: Unpacked, configuration: Configuration, what: str) -> None:
    """Each layer was, decompressed, what the configuration says: not another, and not cut off."""
    wanted = configuration.rootfs.diff_ids
    for number, (digest, diff_id) in enumerate(zip(content.digests, wanted, strict=True)):
        if f"sha256:{digest}" != diff_id:
            raise BadArchive(
                f"layer {number + 1} of {what} is not what the image says: its digest is"
                f" {digest[:12]}…, not {diff_id.removeprefix('sha256:')[:12]}…",
                number,
            )
