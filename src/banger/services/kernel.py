"""Kernels: the one that images boot with today, built on first need, and its initramfs.

The initramfs holds the guest agent, so it is made anew when the agent is another one than before:
its name carries the agent's digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import platform
from functools import partial
from pathlib import Path

from banger.base.errors import NotFound, PreconditionFailed
from banger.base.model import Kernel, check_artifact_name, now
from banger.base.paths import Paths
from banger.guest.binary import agent_binary
from banger.images.initramfs import build_initramfs
from banger.images.kernel import build_kernel
from banger.images.progress import Progress
from banger.services.artifacts import allocated_bytes, new_id, remove_leftovers, staged
from banger.store.store import Store

DEBIAN_KERNEL = "debian-cloud"


class KernelService:
    def __init__(self, paths: Paths, store: Store) -> None:
        self._paths = paths
        self._store = store
        self._building = asyncio.Lock()
        self._initramfs = asyncio.Lock()

    async def all(self) -> list[Kernel]:
        return await self._store.kernels()

    async def get(self, kernel_id: str) -> Kernel:
        kernel = await self._store.get_kernel(kernel_id)
        if kernel is None:
            raise NotFound(f'kernel "{kernel_id}" not found')
        return kernel

    async def named(self, name: str) -> Kernel:
        """The kernel of this name, or NotFound."""
        kernel = await self._store.kernel_named(check_artifact_name(name))
        if kernel is None:
            raise NotFound(f'kernel "{name}" not found', hint="see: banger kernel list")
        return kernel

    async def ensure(self, progress: Progress) -> Kernel:
        """Debian's cloud kernel, built if it is not there. Concurrent callers share one build."""
        async with self._building:
            kernel = await self._store.kernel_named(DEBIAN_KERNEL)
            if kernel is not None:
                return kernel
            kernel_id = new_id()
            directory = self._paths.kernel_dir(kernel_id)
            async with staged(directory) as staging:
                built = await build_kernel(staging.path, progress=progress)
                kernel = Kernel(
                    id=kernel_id,
                    name=DEBIAN_KERNEL,
                    version=built.version,
                    architecture=platform.machine(),
                    artifact_dir=str(directory),
                    vmlinux_path=str(directory / built.vmlinux.name),
                    boot_modules_path=str(directory / built.boot_modules.name),
                    modules_path=str(directory / built.modules.name),
                    config_path=str(directory / built.config.name),
                    size_bytes=await asyncio.to_thread(allocated_bytes, staging.path),
                    created_at=now(),
                )
                await staging.publish(partial(self._store.insert_kernel, kernel))
            return kernel

    async def initramfs(self, kernel: Kernel) -> Path:
        """The initramfs of this kernel with today's agent; made on first use."""
        agent = agent_binary(kernel.architecture)
        digest = hashlib.sha256(await asyncio.to_thread(agent.read_bytes)).hexdigest()[:12]
        path = Path(kernel.artifact_dir) / f"initramfs-{digest}.cpio"
        async with self._initramfs:
            await asyncio.to_thread(_make_initramfs, path, agent, kernel)
        return path

    async def remove_leftovers(self) -> None:
        known = {kernel.id for kernel in await self._store.kernels()}
        await remove_leftovers(self._paths.kernels_dir, known)


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
