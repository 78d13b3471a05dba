"""The disks of a VM: its system over the image's root file system, and its work disk, /root.

Both are made once, with the VM, or for its first start, and live as long as it. Those of a VM that
starts from a template begin as copies of the template's, which are a megabyte; those of one made
from a snapshot are layers over the snapshot's, whose files the VM shares. A work disk that is
smaller than the record says (the daemon died between the two) is grown by the next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from banger.base.errors import PreconditionFailed
from banger.base.model import DiskDevices, Vm, VmState
from banger.base.paths import Paths
from banger.drivers.base import Check, Disk, DiskDeviceMaker, Level, Storage
from banger.services.capabilities import Capability, Start
from banger.services.disk_room import DiskRoom
from banger.services.image import ImageService
from banger.services.layers import check_kind, disks_of
from banger.services.liveness import Liveness
from banger.services.preflight import FREE_DISK_MIN_BYTES, check_artifacts, check_free_disk

_MIB = 1 << 20


class SystemDisk(Capability):
    """The copy-on-write layer over the image."""

    name = "system disk"

    def __init__(
        self,
        paths: Paths,
        storage: Storage,
        devices: DiskDeviceMaker | None,
        liveness: Liveness,
        room: DiskRoom,
    ) -> None:
        """`devices` makes those of disks of VMs that may be of another storage than `storage`."""
        self._paths = paths
        self._storage = storage
        self._devices = devices
        self._liveness = liveness
        self._room = room

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        room_bytes = await asyncio.to_thread(_room_bytes, self._storage, start)
        return [
            *await self._storage.checks(),
            check_free_disk(self._paths.vms_dir, FREE_DISK_MIN_BYTES + room_bytes),
            *await asyncio.to_thread(check_artifacts, start.image, start.kernel),
            *_check_there(self._storage, start, "system"),
        ]

    async def create(self, start: Start) -> None:
        disk = Path(start.vm.runtime.system_overlay)
        if start.template is not None:
            made = self._paths.template(start.template.id).system_overlay
            await self._storage.copy_overlay(made, disk)
            return
        if (of := start.snapshot) is not None:
            await self._storage.branch(Path(of.directory) / of.system_disk, disk)
            return
        size_mib = start.vm.spec.system_overlay_size_mib
        await self._storage.create_overlay(Path(start.image.rootfs_path), disk, size_mib)

    async def prepare_disks(self, start: Start) -> None:
        await self._open(start, lambda _: None)
        self._room.watch(start.vm)

    async def prepare_host(self, start: Start) -> None:
        await self._open(start, partial(self._liveness.record_disk, start.vm))
        self._room.watch(start.vm)

    async def _open(self, start: Start, record: Callable[[DiskDevices], None]) -> None:
        vm, disk = start.vm, Path(start.vm.runtime.system_overlay)
        if (devices := self._devices_of(disk)) is not None:
            await devices.open(vm.id, Path(start.image.rootfs_path), disk, record)

    def _devices_of(self, disk: Path) -> DiskDeviceMaker | None:
        """Who makes the device of a disk; None for one that machines open as a file. The one
        question: whatever is opened is then what is looked after (`DiskRoom`) and closed."""
        if self._devices is None or not self._devices.serves(disk):
            return None
        return self._devices

    async def post_start(self, vm: Vm) -> None:
        self._room.watch(vm)

    def contribute_machine(self, start: Start) -> None:
        system = Path(start.vm.runtime.system_overlay)
        disk = Disk("system", system, self._storage.format)
        if (devices := self._devices_of(system)) is not None:
            disk = replace(disk, path=devices.node(start.vm.id), is_device=True)
        start.disks.append(disk)

    async def release_disks(self, start: Start) -> None:
        await self.cleanup(start.vm)

    async def cleanup(self, vm: Vm) -> None:
        await self._room.forget(vm.id)
        disk = Path(vm.runtime.system_overlay)
        if (devices := self._devices_of(disk)) is not None:
            await devices.close(vm.id, disk)


class WorkDisk(Capability):
    """The VM's own disk, over the image's work seed.

    The guest grows its file system to the disk's size when it starts, by the kernel's own online
    resize, which refuses one with errors: the start fails then, saying so. The host never looks
    into a file system that a guest has written.
    """

    name = "work disk"

    def __init__(self, paths: Paths, storage: Storage, images: ImageService) -> None:
        self._paths = paths
        self._storage = storage
        self._images = images

    async def add_start_prereqs(self, start: Start) -> list[Check]:
        return [
            *_check_there(self._storage, start, "work"),
            *await asyncio.to_thread(_check_holds_seed, start),
        ]

    async def create(self, start: Start) -> None:
        disk, size_mib = Path(start.vm.runtime.work_disk), start.vm.spec.disk_size_mib
        if start.template is not None:
            made = self._paths.template(start.template.id).work_disk
            await self._storage.copy_overlay(made, disk)
            return
        if (of := start.snapshot) is not None:
            await self._storage.branch(Path(of.directory) / of.work_disk, disk)
            return
        seed = await self._images.work_seed(start.image, size_mib)
        await self._storage.create_overlay(seed, disk, size_mib)

    async def prepare_host(self, start: Start) -> None:
        # A machine that is restored knows its disk as that was: it is enlarged when that is there.
        made_before = start.vm.runtime.state is not VmState.CREATING or start.snapshot is not None
        if made_before and start.saved is None:
            disk = Path(start.vm.runtime.work_disk)
            await self._storage.grow(disk, start.vm.spec.disk_size_mib)

    def contribute_machine(self, start: Start) -> None:
        work, size_mib = Path(start.vm.runtime.work_disk), _enlarged_mib(start)
        start.disks.append(Disk("work", work, self._storage.format, size_mib=size_mib))

    def contribute_guest(self, start: Start) -> None:
        if size_mib := _enlarged_mib(start):
            start.setup = replace(start.setup, work_size_bytes=size_mib * _MIB)

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        # A smaller size comes only when a change is taken back: the disk keeps what it has.
        if after.spec.disk_size_mib > before.spec.disk_size_mib:
            disk = Path(after.runtime.work_disk)
            check_kind(self._storage, "work", disk)
            await self._storage.grow(disk, after.spec.disk_size_mib)


def _enlarged_mib(start: Start) -> int:
    """What the work disk of a restored machine grows to; 0 when it is as large already."""
    saved, wanted_mib = start.saved, start.vm.spec.disk_size_mib
    return wanted_mib if saved is not None and wanted_mib > saved.disk_size_mib else 0


def _check_holds_seed(start: Start) -> list[Check]:
    """A new work disk is no smaller than what it begins as, or its record would be wrong."""
    seed, asked_mib = Path(start.image.work_seed_path), start.vm.spec.disk_size_mib
    if start.vm.runtime.state is not VmState.CREATING or start.snapshot or not seed.is_file():
        return []
    least_mib = -(-seed.stat().st_size // _MIB)
    if asked_mib >= least_mib:
        return []
    detail = f"{asked_mib} MiB is less than the {least_mib} MiB that image {start.image.name} needs"
    return [Check("work disk", Level.FAIL, detail, f"give it at least {least_mib}M")]


def _room_bytes(storage: Storage, start: Start) -> int:
    """What the disks of a VM that is being made take at once."""
    if start.vm.runtime.state is not VmState.CREATING:
        return 0
    if (of := start.snapshot) is not None:
        system, work = (Path(of.directory) / name for name in (of.system_disk, of.work_disk))
    else:
        system, work = Path(start.image.rootfs_path), Path(start.image.work_seed_path)
    return storage.room_bytes("system", system) + storage.room_bytes("work", work)


def _check_there(storage: Storage, start: Start, name: str) -> list[Check]:
    """A disk (``system``, ``work``) that was made must be there: an empty one in its place would
    hide the loss. What it is, or begins as, is what the storage makes such disks of."""
    vm, of = start.vm, start.snapshot
    disk = disks_of(vm)[name]
    what = f'{name} disk of vm "{vm.name}"'
    try:
        check_kind(storage, name, disk)
        if of is not None:
            begins_as = {"system": of.system_disk, "work": of.work_disk}[name]
            check_kind(storage, name, Path(of.directory) / begins_as)
    except PreconditionFailed as error:
        return [Check(what, Level.FAIL, error.message, error.hint)]
    if vm.runtime.state is VmState.CREATING or disk.is_file():
        return []
    hint = f"what was on it is lost; banger vm delete {vm.name} removes the rest"
    return [Check(what, Level.FAIL, f"{disk} is missing", hint)]
