"""Everything a start needs, checked before anything is made, and reported in one error.

`banger doctor` shows the same checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from banger.base.errors import BangerError, PreconditionFailed
from banger.base.model import Image, Kernel, Vm
from banger.base.units import format_size
from banger.drivers.base import Check, Hypervisor, Level, Networks
from banger.images.ext4 import check_ext4, file_identity
from banger.images.kernel import VSOCK_MODULE, check_vmlinux

#: Below this a guest's first writes could already fail; its disks grow as it writes.
FREE_DISK_MIN_BYTES = 512 << 20

REGISTER_ANEW = "register it anew: banger image delete {name}, then banger image register"

_FileCheck = Callable[[Path], None]


def require(checks: Iterable[Check]) -> None:
    """Raise PreconditionFailed that lists every failed check, each with what to do."""
    failed = [check for check in checks if check.level is Level.FAIL]
    if not failed:
        return
    problems = "; ".join(f"{check.name}: {check.detail}" for check in failed)
    hints = list(dict.fromkeys(check.hint for check in failed if check.hint))
    raise PreconditionFailed(f"cannot start a VM here: {problems}", hint="; ".join(hints))


def link_checks(hypervisor: Hypervisor, networks: Networks, vm: Vm) -> list[Check]:
    """What keeps the VM's machine from being joined to its network, if anything does."""
    mode = vm.spec.network
    link = networks.link(mode)
    if link is None or link in hypervisor.features.links:
        return []
    detail = f"{hypervisor.name} cannot join machines to {mode} networking"
    hint = "make the VM with --network bridge, or --network none"
    return [Check("network", Level.FAIL, detail, hint)]


def vcpu_checks(hypervisor: Hypervisor, vm: Vm) -> list[Check]:
    """What keeps the VM's machine from having its vCPUs, if anything does."""
    detail = vcpu_problem(hypervisor, vm.spec.vcpu_count)
    hint = f"give it fewer: banger vm set {vm.name} --vcpu {hypervisor.features.vcpu_max}"
    return [Check("vCPUs", Level.FAIL, detail, hint)] if detail else []


def vcpu_problem(hypervisor: Hypervisor, vcpu_count: int) -> str:
    """What is wrong with so many vCPUs, empty for nothing."""
    most = hypervisor.features.vcpu_max
    if vcpu_count <= most:
        return ""
    return f"{vcpu_count} vCPUs are not possible with {hypervisor.name} (1 to {most})"


def agent_checks(hypervisor: Hypervisor, kernel: Kernel) -> list[Check]:
    """What keeps the guest's agent from being reached, if anything does."""
    if not hypervisor.features.agent_vsock_port or _has_vsock(kernel):
        return []
    detail = f"{hypervisor.name} needs a kernel with a vsock, and {kernel.name} has none"
    hint = "build another: banger kernel build; or import one that has vmw_vsock_virtio_transport"
    return [Check("kernel", Level.FAIL, detail, hint)]


def _has_vsock(kernel: Kernel) -> bool:
    """Whether it has the module to boot with, or has it built in. One whose configuration is not
    known may have."""
    if any(Path(kernel.boot_modules_path).glob(f"*-{VSOCK_MODULE}.ko")):
        return True
    if not kernel.config_path:
        return True
    return "\nCONFIG_VIRTIO_VSOCKETS=y\n" in Path(kernel.config_path).read_text(errors="replace")


def check_free_disk(directory: Path, needed_bytes: int = FREE_DISK_MIN_BYTES) -> Check:
    """Whether the file system of `directory` (or its nearest parent that exists) has room."""
    while not directory.exists():
        directory = directory.parent
    info = os.statvfs(directory)
    free = info.f_bavail * info.f_frsize
    if free >= needed_bytes:
        return Check("disk space", Level.OK, f"{format_size(free)} free in {directory}")
    return Check(
        "disk space",
        Level.FAIL,
        f"{directory} has {format_size(free)} free, {format_size(needed_bytes)} are needed",
        "make room: banger vm list and banger image list show what banger holds",
    )


def check_room_for_memory(directory: Path, memory_mib: int, disk_bytes: int = 0) -> Check:
    """Whether the memory of a machine fits there, all of it, and so much of its disks, beside what
    guests write meanwhile."""
    return check_free_disk(directory, FREE_DISK_MIN_BYTES + (memory_mib << 20) + disk_bytes)


def check_artifacts(image: Image, kernel: Kernel) -> list[Check]:
    """Whether the image's and the kernel's files are there and are what they should be."""
    return [
        *([] if image.managed else [_unchanged(image)]),
        _artifact(f'image "{image.name}"', check_ext4, image.rootfs_path),
        _artifact(f'work seed of image "{image.name}"', check_ext4, image.work_seed_path),
        _artifact(f'kernel "{kernel.name}"', check_vmlinux, kernel.vmlinux_path),
        _artifact(f'modules of kernel "{kernel.name}"', check_ext4, kernel.modules_path),
    ]


def changed(image: Image) -> str:
    """What is wrong with the file of a registered image, empty for nothing: written to since, it
    is not what the disks over it were made for."""
    try:
        if image.managed or file_identity(Path(image.rootfs_path)) == image.registered:
            return ""
    except OSError as error:
        return f"{image.rootfs_path}: {error.strerror}"
    return f"{image.rootfs_path} has changed since it was registered"


def _unchanged(image: Image) -> Check:
    name, problem = f'image "{image.name}"', changed(image)
    if problem:
        return Check(name, Level.FAIL, problem, REGISTER_ANEW.format(name=image.name))
    return Check(name, Level.OK, image.rootfs_path)


def _artifact(name: str, check: _FileCheck, path: str) -> Check:
    try:
        check(Path(path))
    except BangerError as error:
        return Check(name, Level.FAIL, error.message, error.hint)
    return Check(name, Level.OK, path)
