"""Debian's cloud kernel as files a machine can boot: ELF, configuration, modules.

Everything is made in a directory of the caller, who renames it when it is complete.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.base.files import sync_file
from banger.images import preflight
from banger.images.bootstrap import Bootstrap, bootstrap, build_environment
from banger.images.ext4 import MIB, fitting_shape, make_ext4
from banger.images.progress import UNKNOWN, Progress
from banger.images.userns import contained, temporary_tree
from banger.images.vmlinux import elf_problem, extract_vmlinux

PACKAGE = "linux-image-cloud-amd64"
_NEED_BYTES = 700 * MIB

#: What a guest needs before it has a root: the transports (MMIO on microvm, PCI on q35), its
#: disks, its network and the port of the agent. In load order; dependencies are added.
BOOT_MODULES = (
    *("failover", "net_failover", "virtio", "virtio_ring", "virtio_mmio", "virtio_pci"),
    *("virtio_blk", "virtio_net", "virtio_console"),
)


@dataclass(frozen=True)
class KernelBuild:
    """A finished kernel: the files in its directory.

    ``modules`` is a read-only ext4 to be mounted at /lib/modules: its root has the version's
    directory. ``boot_modules`` is a directory of ``NN-name.ko``, the modules of the initramfs
    (`initramfs.build_initramfs`), which is made again when the agent has changed.
    """

    version: str
    vmlinux: Path
    config: Path
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
            boot_modules=dest / "boot-modules",
        )
        progress("kernel", f"{built.version}: modules", UNKNOWN)
        # The package's own script does it on installation; kmod comes as a dependency.
        await proc.run(
            contained(["chroot", tree, "depmod", built.version]),
            timeout_s=300,
            env=build_environment(scratch),
        )
        shape = await asyncio.to_thread(fitting_shape, modules.parent, "banger-modules")
        await make_ext4(modules.parent, built.modules, shape)
        progress("kernel", f"{built.version}: boot files", UNKNOWN)
        await asyncio.to_thread(_take_boot_files, tree, modules, built)
    for file in (built.modules, built.vmlinux, built.config, *built.boot_modules.iterdir()):
        await asyncio.to_thread(sync_file, file)
    return built


def find_modules(tree: Path) -> Path:
    """The module directory of the one kernel in `tree`, named as its version."""
    found = sorted(each.parent for each in tree.glob("lib/modules/*/modules.order"))
    if len(found) != 1:
        raise PreconditionFailed(f"{PACKAGE} has brought {len(found)} kernels instead of one")
    return found[0]


def _take_boot_files(tree: Path, modules: Path, built: KernelBuild) -> None:
    image = tree / "boot" / f"vmlinuz-{built.version}"
    built.vmlinux.write_bytes(extract_vmlinux(image.read_bytes()))
    shutil.copyfile(tree / "boot" / f"config-{built.version}", built.config)
    built.boot_modules.mkdir()
    for position, module in enumerate(boot_module_order(modules)):
        name = f"{position:02}-{module_name(module)}.ko"
        shutil.copyfile(modules / module, built.boot_modules / name)


def boot_module_order(modules: Path) -> list[str]:
    """The files of `BOOT_MODULES` and all they depend on, relative to `modules`, in load order.

    What is built into the kernel is left out. Raises PreconditionFailed for one that the kernel
    does not have, or has compressed: the agent loads plain files.
    """
    lines = (modules / "modules.dep").read_text().splitlines()
    needs = {file: rest.split() for file, _, rest in (line.partition(":") for line in lines)}
    by_name = {module_name(file): file for file in needs}
    built_in = {module_name(line) for line in (modules / "modules.builtin").read_text().split()}
    order: dict[str, None] = {}

    def add(file: str) -> None:
        if file not in order:
            for needed in reversed(needs[file]):  # depmod lists the nearest first
                add(needed)
            order[file] = None

    for name in BOOT_MODULES:
        if name in by_name:
            add(by_name[name])
        elif name not in built_in:
            raise PreconditionFailed(f"kernel {modules.name} has no module {name}")
    compressed = [file for file in order if not file.endswith(".ko")]
    if compressed:
        raise PreconditionFailed(f"kernel {modules.name} has compressed modules: {compressed[0]}")
    return list(order)


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
