"""Debian's cloud kernel as files a machine can boot: ELF, configuration, modules.

Everything is made in a directory of the caller, who renames it when it is complete.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from banger.base import proc
from banger.base.errors import NotFound, PreconditionFailed
from banger.base.files import open_regular, sync_file
from banger.base.units import format_size
from banger.images import preflight
from banger.images.bootstrap import Bootstrap, bootstrap, build_environment
from banger.images.ext4 import MIB, fitting_shape, make_ext4
from banger.images.initramfs import check_boot_modules
from banger.images.progress import UNKNOWN, Progress
from banger.images.userns import contained, temporary_tree
from banger.images.vmlinux import elf_problem, extract_vmlinux

PACKAGE = "linux-image-cloud-amd64"
_NEED_BYTES = 700 * MIB

#: Of a list of modules (Debian's largest has 1 MB), and how long a chain of needs may be.
_LIST_MAX_BYTES = 16 * MIB
_CHAIN_MAX = 100

_COMPONENT = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_MODULE_FILE = re.compile(
    rf"({_COMPONENT}/){{0,16}}[A-Za-z0-9_][A-Za-z0-9_-]{{0,63}}\.ko(\.[a-z0-9]+)?"
)

#: What a guest needs before it has a root: the transports (MMIO on microvm, PCI on q35), its
#: disks, its network and the port of the agent. In load order; dependencies are added.
BOOT_MODULES = (
    *("failover", "net_failover", "virtio", "virtio_ring", "virtio_mmio", "virtio_pci"),
    *("virtio_blk", "virtio_net", "virtio_console"),
)

#: What it needs where a vsock leads to the agent (Firecracker); a kernel without it is QEMU's only.
VSOCK_MODULE = "vmw_vsock_virtio_transport"
#: By it the guest gives memory back that it does not use any more (Firecracker).
_BALLOON_MODULE = "virtio_balloon"


#: The name of `KernelBuild.boot_modules`.
BOOT_MODULES_DIR = "boot-modules"


@dataclass(frozen=True)
class KernelBuild:
    """A finished kernel: the files in its directory. ``config`` is None where it is not known.

    ``modules`` is a read-only ext4 to be mounted at /lib/modules: its root has the version's
    directory. ``boot_modules`` is a directory of ``NN-name.ko``, the modules of the initramfs
    (`initramfs.build_initramfs`), which is made again when the agent has changed.
    """

    version: str
    vmlinux: Path
    config: Path | None
    modules: Path
    boot_modules: Path


async def build_kernel(dest: Path, *, progress: Progress) -> KernelBuild:
    """Make a kernel in the directory `dest`; stages ``download``, ``install``, ``kernel``.

    The package is unpacked, never installed. On failure or when cancelled, no process and no
    mount is left, and only files in `dest`, for the caller to remove (`userns.remove_tree`).
    Raises PreconditionFailed for what is missing on the host, Unavailable when the package cannot
    be fetched.
    """
    await preflight.ensure_requirements()
    preflight.ensure_free_space(dest, _NEED_BYTES)
    async with temporary_tree(dest / "scratch") as scratch:
        tree = scratch / "tree"
        await bootstrap(Bootstrap("extract", (PACKAGE,)), tree, scratch, progress)
        modules = await asyncio.to_thread(find_modules, tree)
        built = KernelBuild(
            version=modules.name,
            vmlinux=dest / "vmlinux",
            config=dest / "config",
            modules=dest / "modules.ext4",
            boot_modules=dest / BOOT_MODULES_DIR,
        )
        progress("kernel", f"{built.version}: modules", UNKNOWN)
        # The package's own script does it on installation; kmod comes as a dependency.
        await proc.run(
            contained(["chroot", tree, "depmod", built.version]),
            timeout_s=300,
            env=build_environment(scratch),
            umask=0o022,  # what it makes is for everybody in a guest
        )
        shape = await asyncio.to_thread(fitting_shape, modules.parent, "banger-modules")
        await make_ext4(modules.parent, built.modules, shape)
        progress("kernel", f"{built.version}: boot files", UNKNOWN)
        await asyncio.to_thread(_take_boot_files, tree, modules, built)
    await asyncio.to_thread(sync_kernel, built)
    return built


def sync_kernel(built: KernelBuild) -> None:
    """Have its files on the disk."""
    files = (built.vmlinux, built.modules, built.config, *sorted(built.boot_modules.iterdir()))
    for file in files:
        if file is not None:
            sync_file(file)


def find_modules(tree: Path) -> Path:
    """The module directory of the one kernel in `tree`, named as its version."""
    found = sorted(each.parent for each in tree.glob("lib/modules/*/modules.order"))
    if len(found) != 1:
        raise PreconditionFailed(f"{PACKAGE} has brought {len(found)} kernels instead of one")
    return found[0]


def _take_boot_files(tree: Path, modules: Path, built: KernelBuild) -> None:
    image = tree / "boot" / f"vmlinuz-{built.version}"
    built.vmlinux.write_bytes(extract_vmlinux(image.read_bytes()))
    assert built.config is not None  # the package has one
    shutil.copyfile(tree / "boot" / f"config-{built.version}", built.config)
    take_boot_modules(modules, boot_module_order(modules), built.boot_modules)


def take_boot_modules(modules: Path, order: list[str], dest: Path) -> None:
    """Copy the files `order`, of `boot_module_order`, to the new directory `dest`."""
    check_boot_modules(len(order), sum((modules / module).stat().st_size for module in order))
    dest.mkdir(mode=0o700)
    for position, module in enumerate(order):
        shutil.copyfile(modules / module, dest / f"{position:02}-{module_name(module)}.ko")


def boot_module_order(modules: Path, built_in: AbstractSet[str] = frozenset()) -> list[str]:
    """The files of `BOOT_MODULES`, of those of Firecracker's that can be had, and all they depend
    on, relative to `modules`, in load order.

    What is built into the kernel, by ``modules.builtin`` or `built_in`, is left out. Raises
    PreconditionFailed for one that the kernel does not have, or has compressed (the agent loads
    plain files), for more than an initramfs may have, and for lists that cannot be depmod's.
    """
    needs = _dependencies(modules)
    by_name = {module_name(file): file for file in needs}
    built_in = built_in | built_in_modules(modules)
    order: dict[str, None] = {}
    waiting: set[str] = set()

    def add(file: str) -> None:
        if file in order:
            return
        # In each file's line is all that it needs: what is left of a chain is short.
        if file in waiting or file not in needs or len(waiting) - len(order) > _CHAIN_MAX:
            raise PreconditionFailed(
                f"modules.dep of kernel {modules.name} is damaged at {file}",
                hint="make it anew, by depmod",
            )
        waiting.add(file)
        for needed in reversed(needs[file]):  # depmod lists the nearest first
            add(needed)
        order[file] = None

    for name in BOOT_MODULES:
        if name in by_name:
            add(by_name[name])
        elif name not in built_in:
            raise PreconditionFailed(
                f"kernel {modules.name} has no module {name}",
                hint="guests reach their disks, network and agent by virtio",
            )
    check_boot_modules(len(order), 0)
    compressed = [file for file in order if not file.endswith(".ko")]
    if compressed:
        raise PreconditionFailed(
            f"kernel {modules.name} has compressed modules: {compressed[0]}",
            hint="unpack them: unxz or unzstd, then depmod",
        )
    for name in (VSOCK_MODULE, _BALLOON_MODULE):
        needed = list(order)
        try:
            if name in by_name:
                add(by_name[name])
            check_boot_modules(len(order), 0)
        except PreconditionFailed:  # nobody misses it but who chooses Firecracker
            return needed
        if not all(file.endswith(".ko") for file in order):
            return needed
    return list(order)


def built_in_modules(modules: Path) -> frozenset[str]:
    """Names of what the build of the kernel has listed as part of it."""
    return frozenset(map(module_name, _list(modules / "modules.builtin").split()))


def _dependencies(modules: Path) -> dict[str, list[str]]:
    """What each file of ``modules.dep`` (modules.dep(5)) needs; none when there is no such list."""
    lines = _list(modules / "modules.dep").split("\n")
    needs = {file: rest.split() for file, _, rest in (each.partition(":") for each in lines)}
    # From outside, too: nothing but files below `modules`, with names as files of ours have.
    return {file: rest for file, rest in needs.items() if _MODULE_FILE.fullmatch(file)}


def _list(path: Path) -> str:
    """The text of one of depmod's or the build's lists; empty when there is none."""
    try:
        with open_regular(path) as file:
            data = file.read(_LIST_MAX_BYTES + 1)
    except NotFound:
        return ""
    if len(data) > _LIST_MAX_BYTES:
        raise PreconditionFailed(f"{path.name} is larger than {format_size(_LIST_MAX_BYTES)}")
    return data.decode(errors="replace")


def module_name(file: str) -> str:
    """``virtio_blk`` for ``kernel/drivers/block/virtio-blk.ko``: the kernel's own spelling."""
    return Path(file).name.partition(".")[0].replace("-", "_")


def check_vmlinux(path: Path) -> None:
    """Raise PreconditionFailed unless `path` is a whole x86-64 ELF that can be loaded.

    Reads its headers only: enough for a missing, foreign or cut off file.
    """
    try:
        with path.open("rb") as file:
            problem = elf_problem(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise PreconditionFailed(
            f"{path} cannot be used as a kernel: {problem}",
            hint="delete the image it belongs to and build it again",
        )
