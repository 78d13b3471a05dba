"""A kernel that somebody has built: its boot image, its modules, its configuration.

All of it is untrusted input. Everything is made in a directory of the caller, who renames it when
it is complete.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from banger.base.cancellation import in_thread
from banger.base.errors import PreconditionFailed
from banger.base.files import open_regular
from banger.base.units import format_size
from banger.images import preflight
from banger.images.ext4 import MIB, fitting_shape, make_ext4
from banger.images.kernel import (
    BOOT_MODULES_DIR,
    KernelBuild,
    boot_module_order,
    built_in_modules,
    sync_kernel,
    take_boot_modules,
)
from banger.images.progress import UNKNOWN, Progress
from banger.images.userns import temporary_tree
from banger.images.vmlinux import (
    VMLINUX_MAX_BYTES,
    embedded_config,
    extract_vmlinux,
    has_pvh_entry,
    linux_version,
)

_CONFIG_MAX_BYTES = 4 * MIB
_MODULES_MAX_BYTES = 4096 * MIB
_MODULES_MAX_ENTRIES = 50_000
_BOOT_MODULE_MAX_BYTES = 64 * MIB
_DEPTH_MAX = 32
_PIECE = 1 << 20

#: In every installed tree: where its sources were on the machine that built it.
_LINKS_LEFT_OUT = ("build", "source")

#: What makes each of `BOOT_MODULES` part of the kernel, as ``CONFIG_…=y``.
_SYMBOLS = {
    "failover": "FAILOVER",
    "net_failover": "NET_FAILOVER",
    "virtio": "VIRTIO",
    "virtio_ring": "VIRTIO",
    "virtio_mmio": "VIRTIO_MMIO",
    "virtio_pci": "VIRTIO_PCI",
    "virtio_blk": "VIRTIO_BLK",
    "virtio_net": "VIRTIO_NET",
    "virtio_console": "VIRTIO_CONSOLE",
    "ext4": "EXT4_FS",
}

_VERMAGIC = re.compile(rb"vermagic=([0-9][0-9A-Za-z._+~-]{0,63}) ")


@dataclass(frozen=True)
class KernelFiles:
    """What is imported: an ELF or a bzImage, and where its modules and configuration are, if so."""

    image: Path
    modules: Path | None = None
    config: Path | None = None


async def import_kernel(files: KernelFiles, dest: Path, *, progress: Progress) -> KernelBuild:
    """Make a kernel in the directory `dest`; stages ``read``, ``modules``.

    On failure or when cancelled, no process and no mount is left, and only files in `dest`, for
    the caller to remove (`userns.remove_tree`). Raises NotFound and PreconditionFailed for what is
    not there or cannot boot a machine of ours.
    """
    progress("read", files.image.name, UNKNOWN)
    elf, version = await in_thread(partial(_read_kernel, files.image))
    config = await in_thread(partial(_read_config, files.config, elf))
    built = KernelBuild(
        version=version,
        vmlinux=dest / "vmlinux",
        config=dest / "config" if config is not None else None,
        modules=dest / "modules.ext4",
        boot_modules=dest / BOOT_MODULES_DIR,
    )
    await in_thread(partial(_write, built, elf, config))
    del elf
    progress("modules", version, UNKNOWN)
    async with temporary_tree(dest / "scratch") as scratch:
        modules = scratch / "lib" / "modules" / version
        await in_thread(partial(_collect_modules, files.modules, modules))
        order = await in_thread(partial(_boot_modules, modules, config, files))
        shape = await in_thread(lambda _: fitting_shape(modules.parent, "banger-modules"))
        await make_ext4(modules.parent, built.modules, shape)
        await in_thread(lambda _: take_boot_modules(modules, order, built.boot_modules))
    await in_thread(lambda _: sync_kernel(built))
    return built


def _read_kernel(path: Path, check: Callable[[], None]) -> tuple[bytes, str]:
    """The ELF and the version of a kernel that can be started."""
    elf = extract_vmlinux(_read(path, VMLINUX_MAX_BYTES, check), check)
    version = linux_version(elf)
    if not version:
        raise PreconditionFailed(f"{path} is not a Linux kernel: it does not say which version")
    if not has_pvh_entry(elf):
        raise PreconditionFailed(
            f"{path} cannot be started directly: it has no PVH entry",
            hint="build it with CONFIG_PVH=y",
        )
    return elf, version


def _read_config(path: Path | None, elf: bytes, check: Callable[[], None]) -> bytes | None:
    return embedded_config(elf) if path is None else _read(path, _CONFIG_MAX_BYTES, check)


def _read(path: Path, limit: int, check: Callable[[], None]) -> bytes:
    data = bytearray()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            check()
            data += piece
            if len(data) > limit:
                raise PreconditionFailed(f"{path} is larger than {format_size(limit)}")
    return bytes(data)


def _write(built: KernelBuild, elf: bytes, config: bytes | None, check: Callable[[], None]) -> None:
    preflight.ensure_free_space(built.vmlinux.parent, 2 * len(elf))
    with built.vmlinux.open("wb") as file:
        for start in range(0, len(elf), _PIECE):
            check()
            file.write(elf[start : start + _PIECE])
    if built.config is not None and config is not None:
        built.config.write_bytes(config)


def configured(config: bytes) -> frozenset[str]:
    """Those of `BOOT_MODULES`, and ext4, that this configuration makes part of the kernel."""
    lines = set(config.decode(errors="replace").splitlines())
    return frozenset(name for name, each in _SYMBOLS.items() if f"CONFIG_{each}=y" in lines)


def _boot_modules(
    modules: Path, config: bytes | None, files: KernelFiles, check: Callable[[], None]
) -> list[str]:
    built_in = configured(config or b"") | built_in_modules(modules)
    if config is None and files.modules is None:
        raise PreconditionFailed(
            f"{files.image} does not say what is built into it",
            hint="give its configuration (--config), or its modules (--modules)",
        )
    if "ext4" not in built_in:
        raise PreconditionFailed(
            f"kernel {modules.name} has no ext4 built in",
            hint="build it with CONFIG_EXT4_FS=y: machines have it on their disks",
        )
    order = boot_module_order(modules, built_in)
    for file in order:
        found = _VERMAGIC.search(_read(modules / file, _BOOT_MODULE_MAX_BYTES, check))
        if found is None or found[1].decode() != modules.name:
            other = "none" if found is None else found[1].decode()
            raise PreconditionFailed(
                f"{file} is for Linux {other}, and the kernel is {modules.name}",
                hint="give the modules that were built with it",
            )
    return order


def _collect_modules(given: Path | None, modules: Path, check: Callable[[], None]) -> None:
    """Copy what is `given`, if so, to the new directory `modules`.

    It has to have its ``modules.dep``: depmod reads every module, and these are anybody's.
    """
    modules.mkdir(parents=True)
    for directory in (modules, modules.parent):
        directory.chmod(0o755)
    if given is None:
        return
    _copy_modules(given, modules, check)
    if not (modules / "modules.dep").is_file():
        raise PreconditionFailed(
            f"{given} has no modules.dep",
            hint=f"make it where the modules are installed: depmod -b DIR {modules.name}"
            f" (for DIR/lib/modules/{modules.name})",
        )


def _copy_modules(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy a tree of regular files and directories: what is in it is ours from then on.

    `target` is there, and empty. A link in it could lead anywhere, so there may be none.
    """
    if not source.is_dir():
        raise PreconditionFailed(
            f"{source} is not a directory", hint="give a lib/modules/VERSION directory"
        )
    size = entries = 0
    waiting = [(source, target, 0)]
    while waiting:
        old, new, depth = waiting.pop()
        for entry in sorted(os.scandir(old), key=lambda each: each.name):
            check()
            entries += 1
            info = entry.stat(follow_symlinks=False)
            copy = new / entry.name
            if stat.S_ISLNK(info.st_mode) and depth == 0 and entry.name in _LINKS_LEFT_OUT:
                continue
            if not entry.name.isprintable():
                raise PreconditionFailed(f"{old} has a file whose name cannot be printed")
            if stat.S_ISDIR(info.st_mode):
                copy.mkdir()
                copy.chmod(0o755)  # whatever our umask: everybody in a guest may read them
                waiting.append((Path(entry.path), copy, depth + 1))
            elif stat.S_ISREG(info.st_mode):
                size += _copy_file(Path(entry.path), copy, check)
            else:
                raise PreconditionFailed(
                    f"{entry.path} is neither a file nor a directory",
                    hint="links are not followed: copy what they lead to into the tree",
                )
            if size > _MODULES_MAX_BYTES or entries > _MODULES_MAX_ENTRIES or depth > _DEPTH_MAX:
                raise PreconditionFailed(
                    f"{source} is too large for modules: {entries} entries,"
                    f" {format_size(size)}, {depth} levels"
                )


def _copy_file(source: Path, target: Path, check: Callable[[], None]) -> int:
    done = 0
    with open_regular(source) as old, target.open("xb") as new:
        os.fchmod(new.fileno(), 0o644)
        while piece := old.read(_PIECE):
            check()
            done += new.write(piece)
            if done > _MODULES_MAX_BYTES:
                break
    return done
