"""Start-up: make the records agree with what the kernel says runs.

A daemon may have been killed at any moment. VMs that run are kept and watched; records of running
VMs whose process is gone become stopped; half-made VMs and those of sessions that ended with the
daemon are removed; so are files and processes of banger's that no record names.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from banger.base import procfs
from banger.base.errors import BangerError
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import Vm, VmState
from banger.base.paths import Paths, VmPaths
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.vm import VmService
from banger.services.vm_create import Drivers
from banger.store.store import Store


class Reconciler:
    def __init__(
        self,
        *,
        paths: Paths,
        store: Store,
        drivers: Drivers,
        vms: VmService,
        liveness: Liveness,
        images: ImageService,
        kernels: KernelService,
    ) -> None:
        self._paths = paths
        self._store = store
        self._drivers = drivers
        self._vms = vms
        self._liveness = liveness
        self._images = images
        self._kernels = kernels

    async def run(self) -> None:
        """One pass over /proc, then each VM. A VM that cannot be reconciled stops nothing."""
        with OperationLog("reconcile") as log:
            processes = list(procfs.own_processes())
            records = await self._store.vms()
            log.stage("vms", count=len(records))
            for vm in records:
                try:
                    await self._reconcile(vm, processes, log)
                except (BangerError, OSError) as error:
                    get_logger().error("vm not reconciled", error=str(error), **vm_attributes(vm))
            log.stage("leftovers")
            await self._end_strangers({vm.id for vm in records}, processes)
            self._remove_stray_directories({vm.id for vm in records})
            await self._images.remove_leftovers()
            await self._kernels.remove_leftovers()

    async def _reconcile(
        self, vm: Vm, processes: list[tuple[int, tuple[str, ...]]], log: OperationLog
    ) -> None:
        alive = self._liveness.rediscover(vm, processes)
        half_made = vm.runtime.state is VmState.CREATING
        session_over = vm.spec.ephemeral and vm.runtime.state is not VmState.ERROR
        if half_made or session_over:
            get_logger().info("vm removed: its session is over", **vm_attributes(vm))
            await self._vms.remove(vm, log)
        elif vm.runtime.state is not VmState.RUNNING:
            return
        elif alive:
            get_logger().info("vm runs on", pid=self._liveness.pid(vm), **vm_attributes(vm))
            self._vms.watch(vm)
        else:
            get_logger().warning("vm is gone", **vm_attributes(vm))
            await self._vms.settle(vm, "its process was gone when bangerd started")

    async def _end_strangers(
        self, known: set[str], processes: list[tuple[int, tuple[str, ...]]]
    ) -> None:
        """Machines whose control socket lies in our runtime directory, but with no record."""
        parent = self._paths.vms_runtime_dir
        for entry in _entries(parent):
            vm_id = entry.name
            if vm_id in known:
                continue
            # Not by Paths.vm: whatever lies there need not have a name of our shape.
            control_socket = VmPaths(directory=entry, runtime=entry).control_socket
            is_machine = partial(self._drivers.hypervisor.owns, control_socket=control_socket)
            for pid, argv in processes:
                if is_machine(argv):
                    get_logger().warning("ending a machine without a record", vm_id=vm_id, pid=pid)
                    pidfd = procfs.open_pidfd(pid, is_machine)
                    if pidfd >= 0:
                        await procfs.kill(pidfd)
                        os.close(pidfd)

    def _remove_stray_directories(self, known: set[str]) -> None:
        for parent in (self._paths.vms_dir, self._paths.vms_runtime_dir):
            for entry in _entries(parent):
                if entry.name not in known:
                    get_logger().warning("removing leftover", path=str(entry))
                    shutil.rmtree(entry, ignore_errors=True)


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
