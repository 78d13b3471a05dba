"""Kernels: built, imported, pulled, found, deleted; and the initramfs of each.

Two requests for one kernel share one making. The initramfs holds the guest agent, so it is made
anew when the agent is another one than before: its name carries the agent's digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import platform
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from banger.base.errors import BadRequest, Conflict, NotFound, PreconditionFailed
from banger.base.log import OperationLog
from banger.base.model import Kernel, Operation, check_artifact_name, now
from banger.base.paths import Paths
from banger.base.url import shown
from banger.guest.binary import agent_binary
from banger.images.bundle import pack_kernel_bundle, unpack_kernel_bundle
from banger.images.catalog import load_catalog
from banger.images.download import fetched
from banger.images.initramfs import build_initramfs
from banger.images.kernel import PACKAGE, KernelBuild, build_kernel
from banger.images.kernel_import import KernelFiles, import_kernel
from banger.images.progress import Progress as Tell
from banger.services import artifacts
from banger.services.artifacts import allocated_bytes, new_id, remove_leftovers, staged
from banger.services.image_cache import ImageCache
from banger.services.locks import Locks, Rank
from banger.services.operations import Operations, Progress
from banger.services.single_flight import SingleFlight
from banger.store.store import Store, kernel_exists

#: What images boot with when they name none; banger builds it when it is first needed.
DEBIAN_KERNEL = "debian"


class KernelService:
    def __init__(
        self,
        paths: Paths,
        store: Store,
        operations: Operations,
        cache: ImageCache,
        catalog_url: str,
    ) -> None:
        self._paths = paths
        self._store = store
        self._operations = operations
        self._cache = cache
        self._catalog_url = catalog_url
        self._builds = SingleFlight(operations, "kernel.build")
        self._imports = SingleFlight(operations, "kernel.import")
        self._pulls = SingleFlight(operations, "kernel.pull")
        self._initramfs = asyncio.Lock()
        self._locks = Locks(Rank.KERNEL)

    async def all(self) -> list[Kernel]:
        return await self._store.kernels()

    async def get(self, kernel_id: str) -> Kernel:
        kernel = await self._store.get_kernel(kernel_id)
        if kernel is None:
            raise NotFound(f'kernel "{kernel_id}" not found')
        return kernel

    async def named(self, name: str) -> Kernel:
        """The kernel of this name. Raises NotFound, with what could be meant."""
        kernel = await self._store.kernel_named(check_artifact_name(name))
        if kernel is None:
            there = ", ".join(each.name for each in await self.all()) or "none"
            hint = (
                f"build it: banger kernel build {name}"
                if name == DEBIAN_KERNEL
                else f"there is: {there}; others come by `banger kernel build`, import or pull"
            )
            raise NotFound(f'kernel "{name}" not found', hint=hint)
        return kernel

    @asynccontextmanager
    async def kept(self, kernel: Kernel) -> AsyncIterator[None]:
        """While it lasts the kernel is not deleted: for who records something that needs it.

        Innermost of all locks. Raises Conflict when it is gone already.
        """
        async with self._locks.hold(kernel.id):
            if await self._store.get_kernel(kernel.id) is None:
                raise Conflict(
                    f'kernel "{kernel.name}" was deleted meanwhile', hint="begin once more"
                )
            yield

    # --- making ---

    async def begin_build(self, name: str) -> Progress:
        """Start building Debian's kernel, or join the build that runs; Conflict if it is there."""
        check_artifact_name(name)
        if name != DEBIAN_KERNEL:
            raise BadRequest(
                f'banger does not know how to build "{name}"',
                hint=f"it can build: {DEBIAN_KERNEL}; see also: banger kernel import --help",
            )
        return await self._begin(self._builds, name, name, self._build)

    async def begin_import(self, name: str, files: KernelFiles) -> Progress:
        """Start importing a kernel as `name`, or join the same import."""
        check_artifact_name(name)
        for path in (files.image, files.modules, files.config):
            if path is not None and not path.is_absolute():
                raise BadRequest(f"{path} is not an absolute path")
        key = f"{name} {files}"
        return await self._begin(self._imports, name, key, partial(self._import, name, files))

    async def begin_pull(self, name: str) -> Progress:
        """Start pulling the kernel `name` of the catalog, or join the pull that runs."""
        check_artifact_name(name)
        return await self._begin(self._pulls, name, name, partial(self._pull, name))

    async def ensure(self, tell: Tell) -> Kernel:
        """Debian's kernel, built if it is not there. Concurrent callers share one build.

        When the caller is cancelled the build goes on only if others want it.
        """

        def heard(build: Operation) -> None:
            if build.stage:
                tell(build.stage, build.detail, build.percent)

        name = DEBIAN_KERNEL
        is_there = partial(self._is_there, name)
        try:
            await self._builds.ensure(name, name, self._build, is_there, heard)
        except Conflict:
            # Somebody may have imported or pulled it meanwhile: that one will do.
            if not await is_there():
                raise
        return await self.named(name)

    async def _begin(
        self,
        flights: SingleFlight,
        name: str,
        key: str,
        work: Callable[[Progress], Awaitable[None]],
    ) -> Progress:
        making = await flights.join(key, name, work, partial(self._is_there, name))
        if making is None:
            raise kernel_exists(name)
        return making

    async def _is_there(self, name: str) -> bool:
        return await self._store.kernel_named(name) is not None

    async def _build(self, progress: Progress) -> None:
        async def make(dest: Path) -> KernelBuild:
            return await build_kernel(dest, progress=progress.stage)

        await self._make(DEBIAN_KERNEL, f"built from Debian's {PACKAGE}", make, progress)

    async def _import(self, name: str, files: KernelFiles, progress: Progress) -> None:
        async def make(dest: Path) -> KernelBuild:
            return await import_kernel(files, dest, progress=progress.stage)

        await self._make(name, f"imported from {files.image}", make, progress)

    async def _pull(self, name: str, progress: Progress) -> None:
        progress.stage("catalog", shown(self._catalog_url))
        catalog = await load_catalog(self._catalog_url)
        entry = catalog.kernel(name, platform.machine())

        async def make(dest: Path) -> KernelBuild:
            return await unpack_kernel_bundle(bundle, dest, entry.architecture, progress.stage)

        async with (
            self._cache.pulling(),
            fetched(entry.download, self._paths.downloads_dir, progress.stage) as bundle,
        ):
            await self._make(name, f"pulled from {shown(entry.url)}", make, progress)

    async def _make(
        self,
        name: str,
        source: str,
        make: Callable[[Path], Awaitable[KernelBuild]],
        progress: Progress,
    ) -> None:
        kernel_id = new_id()
        directory = self._paths.kernel_dir(kernel_id)
        async with staged(directory) as staging:
            built = await make(staging.path)
            progress.stage("finish")
            kernel = Kernel(
                id=kernel_id,
                name=name,
                version=built.version,
                architecture=platform.machine(),
                artifact_dir=str(directory),
                vmlinux_path=str(directory / built.vmlinux.name),
                boot_modules_path=str(directory / built.boot_modules.name),
                modules_path=str(directory / built.modules.name),
                config_path=str(directory / built.config.name) if built.config else "",
                size_bytes=await asyncio.to_thread(allocated_bytes, staging.path),
                created_at=now(),
                source=source,
            )
            record = msgspec.json.format(msgspec.json.encode(kernel))
            (staging.path / "kernel.json").write_bytes(record)
            await staging.publish(partial(self._store.insert_kernel, kernel))
        progress.describe(kernel_id=kernel.id, kernel_name=kernel.name)
        progress.result(kernel=kernel)

    # --- handing on ---

    async def begin_export(self, name: str, file: Path, umask: int) -> Progress:
        """Start writing the bundle of a kernel to `file` (absolute), which may be there."""
        kernel = await self.named(name)
        await artifacts.check_target(file)
        return self._operations.begin(
            "kernel.export", name, partial(self._export, kernel, file, umask)
        )

    async def _export(self, kernel: Kernel, file: Path, umask: int, progress: Progress) -> None:
        async def pack(bundle: Path) -> None:
            await pack_kernel_bundle(kernel, bundle, progress.stage)

        await artifacts.export(self._paths.kernel_dir(new_id()), pack, file, umask, progress)
        progress.result(kernel=kernel)

    # --- the end ---

    async def delete(self, name: str) -> Kernel:
        """Delete a kernel; Conflict while an image, a VM or a snapshot uses it."""
        kernel = await self.named(name)
        async with self._locks.hold(kernel.id):
            if users := await self._store.users_of_kernel(kernel.id):
                raise Conflict(
                    f'kernel "{name}" is used by {", ".join(users)}', hint="delete those first"
                )
            with OperationLog("kernel.delete", kernel_id=kernel.id, kernel_name=name) as log:
                unrecord = partial(self._store.delete_kernel, kernel.id)
                await artifacts.delete(Path(kernel.artifact_dir), unrecord, log)
        return kernel

    async def remove_leftovers(self) -> None:
        """At start-up: what interrupted makings and deletions left."""
        known = {kernel.id for kernel in await self._store.kernels()}
        await remove_leftovers(self._paths.kernels_dir, known, self._store.delete_kernel)

    async def initramfs(self, kernel: Kernel) -> Path:
        """The initramfs of this kernel with today's agent; made on first use."""
        agent = agent_binary(kernel.architecture)
        digest = hashlib.sha256(await asyncio.to_thread(agent.read_bytes)).hexdigest()[:12]
        path = Path(kernel.artifact_dir) / f"initramfs-{digest}.cpio"
        async with self._initramfs:
            await asyncio.to_thread(_make_initramfs, path, agent, kernel)
        return path


def _make_initramfs(path: Path, agent: Path, kernel: Kernel) -> None:
    if path.exists():
        return
    modules = Path(kernel.boot_modules_path)
    if not modules.is_dir():
        raise PreconditionFailed(
            f'kernel "{kernel.name}" is incomplete: {modules} is missing',
            hint="delete the image and build it again",
        )
    build_initramfs(path, agent=agent, modules=modules)
    for older in path.parent.glob("initramfs-*.cpio"):
        if older != path:  # of another agent; a machine has read its own when it runs
            older.unlink()
