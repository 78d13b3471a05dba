"""Start-up: make the records agree with what the kernel says runs.

A daemon may have been killed at any moment. VMs that run are kept and watched; records of running
VMs whose process is gone become stopped; half-made VMs and those of sessions that ended with the
daemon are removed. What no record names is reported and left alone: a row goes last, so nothing of
ours is ever without one, unless somebody moved the database away, and then it is all they have.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from banger.base import procfs
from banger.base.errors import BangerError, PreconditionFailed
from banger.base.jail import HIDDEN, HIDDEN_HINT, is_vm_id
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import Vm, VmState
from banger.base.paths import Paths, VmPaths
from banger.drivers.base import DiskDeviceMaker, Hypervisor
from banger.services.capabilities import Capabilities
from banger.services.disk_room import DiskRoom
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.machine import nobody
from banger.services.network import Networking
from banger.services.resumption import Resumption
from banger.services.snapshots import SnapshotService
from banger.services.standby import MARKER
from banger.services.templates import TemplateService
from banger.services.vm import VmService
from banger.store.store import Store


class Reconciler:
    def __init__(
        self,
        *,
        paths: Paths,
        store: Store,
        capabilities: Capabilities,
        networking: Networking,
        vms: VmService,
        liveness: Liveness,
        images: ImageService,
        kernels: KernelService,
        templates: TemplateService,
        hypervisor: Hypervisor,
        hypervisor_reason: str,
        devices: DiskDeviceMaker | None,
        disk_room: DiskRoom,
        resumption: Resumption,
        others: Sequence[Hypervisor],
        snapshots: SnapshotService,
    ) -> None:
        self._paths = paths
        self._store = store
        self._capabilities = capabilities
        self._networking = networking
        self._vms = vms
        self._liveness = liveness
        self._images = images
        self._kernels = kernels
        self._templates = templates
        self._hypervisor = hypervisor
        self._hypervisor_reason = hypervisor_reason
        self._devices = devices
        self._disk_room = disk_room
        self._resumption = resumption
        self._others = others
        self._snapshots = snapshots

    async def run(self) -> None:
        """One pass over /proc, then each VM. A VM that cannot be reconciled stops nothing.

        Raises PreconditionFailed, with nothing done, while another hypervisor runs any, and while
        any cannot be seen.
        """
        with OperationLog("reconcile") as log:
            records = await self._store.vms()
            names = {vm.id: vm.name for vm in records}
            self._check_sight(names)
            processes = list(procfs.own_processes())
            machines = self._liveness.machines(processes)
            self._check_hypervisor(processes, names)
            # Before a VM is taken for ended: what cannot be found is ended first.
            await self._hypervisor.end_strays(self._looked_after(machines, names))
            log.stage("vms", f"{len(records)} records")
            found = [
                (vm, alive) for vm in records if (alive := self._alive(vm, machines)) is not None
            ]
            running = [vm for vm, alive in found if alive and vm.runtime.state is VmState.RUNNING]
            # All at once, before any is looked at: a bridge lets through only those it is told of.
            await self._networking.resume_all(running)
            # Before any runs on that is held for want of room.
            await self._disk_room.adopt(running)
            for vm, alive in found:
                try:
                    await self._reconcile(vm, log, alive=alive)
                except Exception:
                    # A supervisor's boundary: one VM's trouble must not keep the daemon down.
                    get_logger().exception("vm not reconciled", **vm_attributes(vm))
            await self._resumption.adopt(running)
            log.stage("leftovers")
            await self._end_standbys({vm.id for vm in records}, machines)
            self._report_strangers({vm.id for vm in records}, machines)
            await self._images.remove_leftovers()
            await self._kernels.remove_leftovers()
            await self._templates.remove_leftovers(machines.items())
            await self._snapshots.remove_leftovers()
            await self._sweep_disks(machines)
            shutil.rmtree(self._paths.scratch_dir, ignore_errors=True)

    async def _sweep_disks(self, machines: Mapping[Path, int]) -> None:
        """Devices of machines that are gone, of which no record tells any more: of templates that
        were being made, of standbys. Whichever storage is configured: it may have been another."""
        if self._devices is None:
            return
        running = {vm.id for vm in await self._store.vms() if self._liveness.vm_alive(vm)}
        running |= {
            vm_id
            for socket, pid in machines.items()
            if is_vm_id(vm_id := socket.parent.name) and procfs.look_at(pid) != procfs.UNKNOWN
        }
        try:
            await self._devices.sweep(running)
        except (BangerError, OSError) as error:
            get_logger().error("devices stay", error=str(error))

    def _check_sight(self, names: Mapping[str, str]) -> None:
        """Machines that cannot be seen would be taken for gone, and ended as what is left of them.

        Those of another home's daemon, which the user's jails have, too, are its own affair.
        """
        ours = [
            names.get(vm_id, vm_id)
            for vm_id in procfs.hidden_machines()
            if vm_id in names or (self._paths.jails_dir / vm_id).exists()
        ]
        if ours:
            raise PreconditionFailed(
                f"it cannot be seen how {', '.join(sorted(ours))} fares: {HIDDEN}",
                hint=HIDDEN_HINT,
            )

    def _looked_after(self, machines: Iterable[Path], names: Container[str]) -> set[str]:
        """The ids of machines that a record leads to, or one of our directories. What was started
        with another runtime directory, and was a template's in the making, nothing leads to."""
        return {
            socket.parent.name
            for socket in machines
            if socket.parent.name in names or socket.parent.parent in self._machine_dirs
        }

    @property
    def _machine_dirs(self) -> tuple[Path, ...]:
        return self._paths.vms_runtime_dir, self._paths.templates_runtime_dir

    def _check_hypervisor(
        self, processes: Sequence[tuple[int, procfs.Process]], names: Mapping[str, str]
    ) -> None:
        """Machines of another hypervisor would be taken for gone, and run on beside their next."""
        for other in self._others:
            found = (other.control_socket(process) for _, process in processes)
            ours = self._looked_after(filter(None, found), names)
            if ours:
                vms = ", ".join(sorted(names.get(vm_id, vm_id) for vm_id in ours))
                chosen = f"{self._hypervisor.name} ({self._hypervisor_reason})"
                raise PreconditionFailed(
                    f"{other.name} runs {vms}, and the hypervisor is {chosen}",
                    hint="have the settings as they were, stop what runs, then change them",
                )

    def _alive(self, vm: Vm, machines: Mapping[Path, int]) -> bool | None:
        """Whether the VM's machine runs; None when that cannot be dealt with."""
        try:
            return self._liveness.rediscover(vm, machines)
        except Exception:  # see `run`
            get_logger().exception("vm not reconciled", **vm_attributes(vm))
            return None

    async def _reconcile(self, vm: Vm, log: OperationLog, *, alive: bool) -> None:
        half_made = vm.runtime.state is VmState.CREATING
        session_over = vm.spec.ephemeral and vm.runtime.state is not VmState.ERROR
        if half_made or session_over:
            get_logger().info("vm removed: its session is over", **vm_attributes(vm))
            await self._vms.remove(vm, log)
        elif vm.runtime.state is VmState.STARTING and self._vms.memory_is_good(vm):
            get_logger().warning("vm was about to go on", **vm_attributes(vm))
            await self._vms.mark_suspended_again(vm)
        elif vm.runtime.state is VmState.STARTING:
            # Its guest may not have its identity yet: nobody has been told that it runs.
            get_logger().warning("vm was being started", **vm_attributes(vm))
            await self._vms.mark_ended(vm, "bangerd ended while it was being started")
        elif vm.runtime.state is not VmState.RUNNING:
            if alive:
                # Its clean-up failed, or somebody has put an older database back.
                get_logger().warning("a machine of a vm that does not run", **vm_attributes(vm))
                await self._vms.end_stray(vm)
        elif alive:
            get_logger().info("vm runs on", pid=self._liveness.pid(vm), **vm_attributes(vm))
            self._vms.watch(vm)
            vm = await self._addressed(vm)
            await self._capabilities.resume(vm)
        else:
            get_logger().warning("vm is gone", **vm_attributes(vm))
            await self._vms.mark_ended(vm, "its process was gone when bangerd started")

    async def _end_standbys(self, known: set[str], machines: Mapping[Path, int]) -> None:
        """Those that waited for a VM when their daemon died: they have a marker, and no record."""
        for entry in _strangers(self._paths.vms_dir, known):
            try:
                if (entry / MARKER).is_file():
                    get_logger().warning("a standby of a daemon that is gone", path=str(entry))
                    vm = nobody(entry.name, self._paths.vm(entry.name))
                    self._liveness.rediscover(vm, machines)
                    await self._vms.remove_unrecorded(vm, MARKER)
                elif entry.is_dir() and not any(entry.iterdir()):
                    entry.rmdir()  # it died before it had its marker
            except Exception:
                # A supervisor's boundary: what cannot be ended must not keep the daemon down.
                get_logger().exception("standby stays", path=str(entry))

    async def _addressed(self, vm: Vm) -> Vm:
        """The VM with an address: a banger that knew of none may have made its record."""
        try:
            return await self._vms.addressed(vm)
        except (BangerError, OSError) as error:
            get_logger().error("vm without an address", error=str(error), **vm_attributes(vm))
            return vm

    def _report_strangers(self, known: set[str], machines: Mapping[Path, int]) -> None:
        """VM directories and machines without a record; sockets of nobody's are removed."""
        for entry in _strangers(self._paths.vms_dir, known):
            get_logger().warning("not in the database, left alone", path=str(entry))
        for entry in _strangers(self._paths.vms_runtime_dir, known):
            # Not by Paths.vm: whatever lies there need not have a name of our shape.
            control_socket = VmPaths(directory=entry, runtime=entry).control_socket
            if pid := machines.get(control_socket):
                get_logger().warning(
                    "a machine without a record, left alone", vm_id=entry.name, pid=pid
                )
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _strangers(directory: Path, known: set[str]) -> list[Path]:
    """What is in `directory` under other names than those."""
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(entry for entry in entries if entry.name not in known)
