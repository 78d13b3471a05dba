"""The layers of a VM's disks: each snapshot of it ends one, and what is written goes to the next.

(Where the storage has layers. Where it has none, `settle`, `bound` and `add` have nothing to do.)

A VM, and each snapshot, has all the files of its disks in its own directory, as hard links: the
file system counts who needs a layer, and whatever is deleted, nobody else misses it. Which layer
is written to is on the VM's record. The record changes first, and the machine then: what dies
between the two leaves an empty layer over one that is still written to, by this machine alone.
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, PreconditionFailed
from banger.base.model import Vm
from banger.drivers.base import Hypervisor, Layering, Level, Storage
from banger.services.liveness import Liveness
from banger.services.operations import Stages
from banger.services.preflight import check_free_disk, check_room_for_memory, require
from banger.services.vm import VmService

#: The most files that a disk may consist of: each is another place to look for what is read.
LAYERS_MAX = 8


def layer_of(disk: Path) -> Path:
    """A new layer's file, beside the disk's; no other has its name."""
    name = disk.name.partition(".")[0].partition("-")[0]
    return disk.with_name(f"{name}-{secrets.token_hex(6)}{disk.suffix}")


def check_kind(storage: Storage, name: str, disk: Path) -> None:
    """Raise PreconditionFailed for a disk (``system``, ``work``) that another storage has made.

    None may be opened as what it is not: what a guest has written on a raw disk could be the header
    of another format, which names files of the host. Nor as what another disk of the same storage
    is: one may have raw work disks, and system disks in a format that is cut to what it keeps.
    """
    if disk.suffix != Path(storage.file_name(name)).suffix:
        raise PreconditionFailed(
            f"{disk} was not made by {storage.name} storage",
            hint="set storage back to what it was then, and restart the daemon",
        )


class DiskLayers:
    """All with the VM's lock held."""

    def __init__(
        self, hypervisor: Hypervisor, storage: Storage, vms: VmService, liveness: Liveness
    ) -> None:
        self._hypervisor = hypervisor
        self._storage = storage
        self._vms = vms
        self._liveness = liveness

    async def settle(self, vm: Vm) -> Vm:
        """The VM with the disks that its machine writes to on its record; other layers go."""
        layering = self._layering(vm)
        if layering is None:
            return vm
        if self._liveness.vm_alive(vm):
            disks = await self._hypervisor.disks(Path(vm.runtime.api_socket))
            vm = await self._recorded(vm, disks)
        await self._sweep(vm, layering)
        return vm

    async def add(self, vm: Vm) -> tuple[Vm, dict[str, Path]]:
        """An empty layer over each disk, on the record: the VM, and the layers by disk.

        A machine that runs has to be told (`Hypervisor.capture`). Without layers there are none.
        """
        layering = self._layering(vm)
        if layering is None:
            return vm, {}
        overlays = {}
        for name, disk in disks_of(vm).items():
            overlay = layer_of(disk)
            await layering.add_layer(disk, overlay)
            overlays[name] = overlay
        return await self._recorded(vm, overlays), overlays

    async def bound(self, vm: Vm, stages: Stages, memory_mib: int) -> None:
        """Make room for one more layer: what would be too many become one.

        So much memory is to be written afterwards. Raises PreconditionFailed where the host's disk
        has no room for both.
        """
        layering = self._layering(vm)
        if layering is None:
            return
        try:
            for name, disk in disks_of(vm).items():
                if len(await layering.layers(disk)) >= LAYERS_MAX:
                    takes = await layering.collapse_bytes(disk)
                    require([check_room_for_memory(disk.parent, memory_mib, takes)])
                    await self._collapse(vm, layering, name, stages)
        finally:
            await to_its_end(self._sweep(vm, layering))

    async def _collapse(self, vm: Vm, layering: Layering, name: str, stages: Stages) -> None:
        stages.stage("collapse", f"the layers of its {name} disk")

        def tell(percent: float) -> None:
            stages.stage("collapse", f"the layers of its {name} disk, {percent:.0f} %")

        disk = disks_of(vm)[name]
        try:
            if self._liveness.vm_alive(vm):
                await self._hypervisor.collapse(Path(vm.runtime.api_socket), name, tell)
            else:
                await layering.collapse(disk)
        except BangerError as error:
            # Others write to that disk, too. What there was no room for has not been taken back.
            free = check_free_disk(disk.parent)
            if free.level is not Level.FAIL:
                raise
            raise PreconditionFailed(
                f"the layers of the {name} disk could not be made one, most likely for want of room"
                f" ({free.detail}): {error.message}",
                hint=free.hint,
            ) from error

    def _layering(self, vm: Vm) -> Layering | None:
        """Of the VM's disks. Raises PreconditionFailed when they are another storage's."""
        for name, disk in disks_of(vm).items():
            check_kind(self._storage, name, disk)
        return self._storage.layering

    async def _recorded(self, vm: Vm, disks: dict[str, Path]) -> Vm:
        runtime = msgspec.structs.replace(
            vm.runtime, system_overlay=str(disks["system"]), work_disk=str(disks["work"])
        )
        if runtime == vm.runtime:
            return vm
        return await self._vms.save(msgspec.structs.replace(vm, runtime=runtime))

    async def _sweep(self, vm: Vm, layering: Layering) -> None:
        """Remove the layers that no disk of this VM needs any more."""
        needed = {
            layer.name for disk in disks_of(vm).values() for layer in await layering.layers(disk)
        }
        patterns = [f"{name}*{disk.suffix}" for name, disk in disks_of(vm).items()]
        await asyncio.to_thread(_remove_others, Path(vm.runtime.vm_dir), patterns, needed)


def disks_of(vm: Vm) -> dict[str, Path]:
    """The files that are written to, by the disk's name."""
    return {"system": Path(vm.runtime.system_overlay), "work": Path(vm.runtime.work_disk)}


def _remove_others(directory: Path, patterns: list[str], needed: set[str]) -> None:
    for pattern in patterns:
        for layer in directory.glob(pattern):
            if layer.name not in needed:
                layer.unlink()
