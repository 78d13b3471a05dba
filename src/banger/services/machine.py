"""The machine of a start: what a hypervisor is told to make, and where its files are."""

from __future__ import annotations

from pathlib import Path

from banger.base.model import Image, InitMode, Vm, VmRuntime, VmSpec, VmState, now
from banger.base.paths import VmPaths
from banger.drivers.base import Disk, DiskFormat, Machine, MemoryFile
from banger.services.capabilities import Start

_LEAST = VmSpec(vcpu_count=1, memory_mib=1, disk_size_mib=1, system_overlay_size_mib=1)


def new_runtime(paths: VmPaths) -> VmRuntime:
    """Of a VM in creation that has its files at these paths."""
    return VmRuntime(
        state=VmState.CREATING,
        api_socket=str(paths.control_socket),
        agent_socket=str(paths.agent_socket),
        log_path=str(paths.console_log),
        vm_dir=str(paths.directory),
        system_overlay=str(paths.system_overlay),
        work_disk=str(paths.work_disk),
    )


def nobody(
    vm_id: str, paths: VmPaths, spec: VmSpec | None = None, image: Image | None = None
) -> Vm:
    """A VM that there is not, with its files at these paths: whose machine has no record.

    Without `spec` and `image` it is good for nothing but to be ended.
    """
    moment = now()
    return Vm(
        id=vm_id,
        name="",
        image_id=image.id if image else "",
        image_name=image.name if image else "",
        kernel_id=image.kernel_id if image else "",
        spec=spec or _LEAST,
        runtime=new_runtime(paths),
        created_at=moment,
        updated_at=moment,
    )


def machine_of(
    start: Start, paths: VmPaths, initramfs: Path, memory_file: MemoryFile | None = None
) -> Machine:
    """A machine with the devices that the capabilities have given to `start`, and the modules."""
    vm, kernel = start.vm, start.kernel
    modules = Disk("modules", Path(kernel.modules_path), DiskFormat.RAW, read_only=True)
    return Machine(
        vm_id=vm.id,
        vcpu_count=vm.spec.vcpu_count,
        memory_mib=vm.spec.memory_mib,
        kernel=Path(kernel.vmlinux_path),
        initramfs=initramfs,
        kernel_parameters=_kernel_parameters(vm.spec.init),
        disks=(*start.disks, modules),
        console_log=paths.console_log,
        hypervisor_log=paths.hypervisor_log,
        control_socket=paths.control_socket,
        agent_socket=paths.agent_socket,
        memory_file=memory_file,
    )


def _kernel_parameters(init: InitMode) -> tuple[str, ...]:
    mode = f"banger.init={init}"
    if init is not InitMode.SYSTEMD:
        return (mode,)
    # A log is no terminal to log in at; and without udev, which tells systemd that a device is
    # there, systemd 252 waits 90 s for it before its boot is complete.
    return mode, "systemd.getty_auto=no"
