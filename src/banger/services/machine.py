"""The machine of a start: what a hypervisor is told to make, and where its files are."""

from __future__ import annotations

from pathlib import Path

from banger.base.model import InitMode, VmRuntime, VmState
from banger.base.paths import VmPaths
from banger.drivers.base import Disk, DiskFormat, Machine, MemoryFile
from banger.services.capabilities import Start


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
