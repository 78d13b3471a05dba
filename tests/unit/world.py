"""A daemon's services over fake drivers, put together as the composition root does."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.base.config import load_config
from banger.base.log import OperationLog
from banger.base.model import Image, ImageConfig, Kernel, NetworkMode, Operation, Vm
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths
from banger.daemon.parts import Parts
from banger.drivers.base import Networks
from banger.services import image as image_module
from banger.services import kernel as kernel_module
from banger.services.addresses import Addresses
from banger.services.operations import Progress
from banger.services.vm_spec import ChangeRequest, CreateRequest
from banger.services.vm_start import Drivers
from banger.store.store import Store
from fakes import Agent, DiskDevicesMade, Hypervisor, Network, Processes, Storage
from records import a_kernel, an_image
from test_ext4_check import _image as make_ext4
from test_kernel_extract import make_elf


class World(Parts):
    """Everything a daemon is made of. `restarted` is the next daemon on the same files."""

    def __init__(
        self,
        paths: Paths,
        processes: Processes,
        agent: Agent,
        store: Store,
        *,
        template_limit: int = 0,
        standby_limit: int = 0,
        forward_ports: bool = False,
        layered: bool = True,
        devices: DiskDevicesMade | None = None,
        earlier: Hypervisor | None = None,
    ) -> None:
        """`earlier` is the hypervisor that was configured before this one; `devices` are those of
        system disks, if these are some."""
        self.processes = processes
        self.agent = agent
        self.hypervisor = Hypervisor(processes, agent)
        self.storage = self.hypervisor.storage = Storage(layered=layered)
        self.devices = devices
        self.network = Network(processes)
        super().__init__(
            paths,
            replace(
                load_config(paths.config_file, {}),
                template_limit=template_limit,
                standby_limit=standby_limit,
                forward_ports=forward_ports,
            ),
            Drivers(
                self.hypervisor,
                self.storage,
                Networks(NetworkMode.USER, {NetworkMode.USER: self.network}),
                (earlier,) if earlier is not None else (),
                devices,
            ),
            Addresses({}),
            store,
        )

    async def start(self, reference: str, **options: Any) -> Vm:
        with OperationLog("vm.start") as log:
            return await self.lifecycle.start(reference, log, **options)

    async def stop(self, reference: str, *, reason: str = "") -> Vm:
        with OperationLog("vm.stop") as log:
            return await self.lifecycle.stop(reference, log, reason=reason)

    async def restart(self, reference: str) -> Vm:
        with OperationLog("vm.restart") as log:
            return await self.lifecycle.restart(reference, log)

    async def kill(self, reference: str) -> Vm:
        with OperationLog("vm.kill") as log:
            return await self.lifecycle.kill(reference, log)

    async def delete(self, reference: str, *, force: bool = False) -> Vm:
        with OperationLog("vm.delete") as log:
            return await self.lifecycle.delete(reference, log, force=force)

    async def change(self, reference: str, **fields: Any) -> Vm:
        request = ChangeRequest(**fields)
        with OperationLog("vm.set") as log:
            return await self.lifecycle.change(reference, request.applied, log, hot=request.hot)

    async def close(self) -> None:
        await self.stats.close()
        await self.operations.close()
        for vm in await self.store.vms():
            self.liveness.unwatch(vm.id)
        await super().close()

    async def restarted(self, paths: Paths | None = None) -> World:
        """The next daemon, before it reconciles, with other `paths` if so; this one is gone as if
        killed."""
        await self.close()
        following = World(
            paths or self.paths,
            self.processes,
            self.agent,
            self.store,
            template_limit=self.config.template_limit,
            standby_limit=self.config.standby_limit,
            forward_ports=self.config.forward_ports,
            layered=self.storage.layered,
            devices=self.devices,
        )
        following.hypervisor.pids = self.hypervisor.pids
        following.hypervisor.tops = self.hypervisor.tops
        following.hypervisor.statuses = self.hypervisor.statuses
        following.hypervisor.idle = self.hypervisor.idle
        return following

    def begin(self, request: CreateRequest) -> Progress:
        """Start a creation as a call of its own."""
        token = current_op_id.set(new_op_id())
        try:
            return self.operations.begin(
                "vm.create", request.name, lambda progress: self.creator.work(request, progress)
            )
        finally:
            current_op_id.reset(token)

    async def create(self, name: str = "box", **fields: object) -> Vm:
        """Create a VM with success."""
        done = await ended(self.begin(CreateRequest(name=name, image="base", **fields)))  # type: ignore[arg-type]
        assert done.error is None, done.error
        assert done.vm is not None
        return done.vm

    async def configure_image(self, config: ImageConfig) -> None:
        """Let the image say that of its programs."""
        image = await self.images.get("base")
        await self.store.delete_image(image.id)
        await self.store.insert_image(msgspec.structs.replace(image, config=config))

    def files(self) -> list[str]:
        """What lies in the directories of VMs."""
        return sorted(
            str(entry.relative_to(parent.parent))
            for parent in (self.paths.vms_dir, self.paths.vms_runtime_dir)
            if parent.is_dir()
            for entry in parent.rglob("*")
        )

    async def assert_nothing_left(self) -> None:
        """No record, no file, no process, no channel, no lock."""
        assert await self.store.vms() == []
        assert self.files() == []
        assert self.processes.argv == {}
        assert self.agents._channels == {}
        assert self.handles._cache == {}
        assert self.vms.locks._locks == {}


async def ended(progress: Progress) -> Operation:
    """The last state of an operation."""
    async with asyncio.timeout(20):
        async for state in progress.changes():
            last = state
    return last


def write_image(paths: Paths, name: str = "base") -> tuple[Image, Kernel]:
    """The files of an image and its kernel, as small as the checks let them be."""
    images, kernels = paths.image_dir(f"id-{name}"), paths.kernel_dir("kernel")
    for directory in (images, kernels, kernels / "boot"):
        directory.mkdir(parents=True)
    (kernels / "vmlinux").write_bytes(make_elf())
    image = an_image(
        name,
        artifact_dir=str(images),
        rootfs_path=str(make_ext4(images / "rootfs.ext4")),
        work_seed_path=str(make_ext4(images / "work.ext4")),
    )
    kernel = a_kernel(
        artifact_dir=str(kernels),
        vmlinux_path=str(kernels / "vmlinux"),
        boot_modules_path=str(kernels / "boot"),
        modules_path=str(make_ext4(kernels / "modules.ext4")),
    )
    return image, kernel


async def copy_seed(source: Path, copy: Path, size_mib: int) -> None:
    """Growing a file system takes tools; here a copy will do."""
    await asyncio.to_thread(shutil.copyfile, source, copy)


@asynccontextmanager
async def made_world(
    root: Path,
    patch: pytest.MonkeyPatch,
    *,
    template_limit: int = 0,
    standby_limit: int = 0,
    forward_ports: bool = False,
    layered: bool = True,
    devices: DiskDevicesMade | None = None,
) -> AsyncIterator[World]:
    """A world below `root`, with an image called ``base`` and its kernel.

    Every start is a boot, and no guest is asked for its ports, unless that is asked for.
    """
    paths = Paths(root / "c", root / "d", root / "s", root / "r", root / "cache")
    paths.state_dir.mkdir(parents=True)
    processes, agent = Processes(), Agent()
    processes.install(patch)
    agent_file = root / "agent"
    agent_file.write_bytes(b"agent")
    patch.setattr(kernel_module, "agent_binary", lambda _: agent_file)
    patch.setattr(image_module, "make_larger_copy", copy_seed)
    store = await Store.open(paths.database)
    image, kernel = write_image(paths)
    await store.insert_kernel(kernel)
    await store.insert_image(image)
    world = World(
        paths,
        processes,
        agent,
        store,
        template_limit=template_limit,
        standby_limit=standby_limit,
        forward_ports=forward_ports,
        layered=layered,
        devices=devices,
    )
    try:
        yield world
    finally:
        await world.close()
        processes.close()
        await agent.close()
        await store.close()
