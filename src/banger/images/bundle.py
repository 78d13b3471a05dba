"""Bundles: a kernel or an image as one file, for others to pull. ``tar+zstd`` with fixed names.

A kernel's: ``kernel.json``, ``vmlinux``, ``config``, ``modules.ext4``, ``boot-modules/NN-name.ko``.
An image's: ``image.json``, ``rootfs.ext4``, ``work-seed.ext4``. Whoever made one is not trusted:
nothing but these names is taken, of regular files, of bounded sizes, and what was taken is checked.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import zstandard

from banger.base.cancellation import in_thread
from banger.base.errors import PreconditionFailed
from banger.base.files import open_regular, sync_file
from banger.base.malformed import MALFORMED
from banger.base.model import Image, ImageConfig, InitMode, Kernel
from banger.base.units import format_size
from banger.images.bundle_tar import Member, TarReader, TarWriter, damaged, stored_bytes
from banger.images.ext4 import MIB, check_ext4
from banger.images.initramfs import BOOT_MODULES_MAX_BYTES, check_boot_modules
from banger.images.kernel import BOOT_MODULES_DIR, KernelBuild, check_vmlinux, sync_kernel
from banger.images.progress import Progress, Steps
from banger.images.vmlinux import VMLINUX_MAX_BYTES, has_pvh_entry, linux_version

_GIB = 1 << 30
_WINDOW_BYTES = 128 * MIB
_JSON_MAX_BYTES = 4 * MIB
#: The most that a bundle may unpack to, zeros in files included; holes cost nothing.
_UNPACKED_MAX_BYTES = 128 * _GIB
#: What is left of the disk for machines that run meanwhile.
_KEEP_FREE_BYTES = 256 * MIB
#: Measured with Debian's kernel (149 MB) on two busy cores: 3 gives 33.7 MB in 1.2 s, 9 gives
#: 30.0 in 4.2 s, 15 gives 29.6 in 38 s.
_LEVEL = 9

_KERNEL_FILES = {"vmlinux": VMLINUX_MAX_BYTES, "config": 4 * MIB, "modules.ext4": 4 * _GIB}
_IMAGE_FILES = {"rootfs.ext4": 16 << 40, "work-seed.ext4": 16 << 40}
_BOOT_MODULE = re.compile(rf"{BOOT_MODULES_DIR}/[0-9]{{2}}-[A-Za-z0-9_]{{1,64}}\.ko")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+~-]{0,63}")


class KernelInfo(msgspec.Struct, frozen=True):
    """``kernel.json``: the release, as uname gives it, and the machine, as uname names it."""

    version: str
    architecture: str


class ImageInfo(msgspec.Struct, frozen=True):
    """``image.json``; ``packages`` as name=version."""

    architecture: str
    init: InitMode = InitMode.MINIMAL
    config: ImageConfig = ImageConfig()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageBundle:
    """What came out of one: its files, checked and synced."""

    info: ImageInfo
    rootfs: Path
    work_seed: Path


I = TypeVar("I", KernelInfo, ImageInfo)  # noqa: E741 - the info of either


async def unpack_kernel_bundle(
    bundle: Path, dest: Path, architecture: str, progress: Progress
) -> KernelBuild:
    """Unpack a kernel into the directory `dest`; stage ``unpack``.

    On failure there are files in `dest`, for the caller to remove. Raises PreconditionFailed for
    what is no bundle of a kernel, or one for another `architecture` than this.
    """
    boot_modules = dest / BOOT_MODULES_DIR
    boot_modules.mkdir(mode=0o700)
    unpack = partial(_unpack, bundle, dest, "kernel.json", _KernelMembers())
    raw, names = await _in_thread(unpack, "unpack", progress)
    info = _info(raw, KernelInfo, "kernel.json")
    _check_architecture(info.architecture, architecture)
    if _VERSION.fullmatch(info.version) is None:
        raise damaged("kernel.json: the version is none of a kernel")
    _check_complete(names, {"vmlinux", "modules.ext4"})
    built = KernelBuild(
        version=info.version,
        vmlinux=dest / "vmlinux",
        config=dest / "config" if "config" in names else None,
        modules=dest / "modules.ext4",
        boot_modules=boot_modules,
    )
    await in_thread(partial(_check_kernel, built))
    return built


async def unpack_image_bundle(
    bundle: Path, dest: Path, architecture: str, progress: Progress, *, limit_bytes: int
) -> ImageBundle:
    """Unpack an image into the directory `dest`, no more of it than `limit_bytes`, holes left out;
    as `unpack_kernel_bundle`."""
    unpack = partial(_unpack, bundle, dest, "image.json", _ImageMembers(limit_bytes))
    raw, names = await _in_thread(unpack, "unpack", progress)
    info = _info(raw, ImageInfo, "image.json")
    _check_architecture(info.architecture, architecture)
    if info.init is InitMode.AUTO:
        raise damaged("image.json does not say what init its machines have")
    _check_complete(names, set(_IMAGE_FILES))
    found = ImageBundle(info, dest / "rootfs.ext4", dest / "work-seed.ext4")
    await in_thread(partial(_check_file_systems, (found.rootfs, found.work_seed)))
    return found


async def pack_kernel_bundle(kernel: Kernel, target: Path, progress: Progress) -> None:
    """Write the bundle of a kernel to `target`, a new file; stage ``pack``. Not synced."""
    info = KernelInfo(kernel.version, kernel.architecture)
    files = {"vmlinux": Path(kernel.vmlinux_path), "modules.ext4": Path(kernel.modules_path)}
    if kernel.config_path:
        files["config"] = Path(kernel.config_path)
    for module in await asyncio.to_thread(os.listdir, kernel.boot_modules_path):
        files[f"{BOOT_MODULES_DIR}/{module}"] = Path(kernel.boot_modules_path) / module
    content = {"kernel.json": msgspec.json.encode(info)}
    await _in_thread(partial(_pack, content, files, target), "pack", progress)


async def pack_image_bundle(
    image: Image, architecture: str, target: Path, progress: Progress
) -> None:
    """Write the bundle of an image to `target`, as `pack_kernel_bundle`."""
    info = ImageInfo(architecture, image.init, image.config, image.packages)
    files = {"rootfs.ext4": Path(image.rootfs_path), "work-seed.ext4": Path(image.work_seed_path)}
    content = {"image.json": msgspec.json.encode(info)}
    await _in_thread(partial(_pack, content, files, target), "pack", progress)


T = TypeVar("T")


async def _in_thread(
    work: Callable[[Steps, Callable[[], None]], T], stage: str, progress: Progress
) -> T:
    return await in_thread(partial(work, Steps(stage, progress)))


# --- unpacking ---


class _Unpacked:
    """What a bundle's zstd holds: whole reads, and no more of it than a bound."""

    def __init__(self, file: BinaryIO) -> None:
        context = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        self._reader = context.stream_reader(file, read_across_frames=True)
        self._left = _UNPACKED_MAX_BYTES

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise damaged(f"it unpacks to more than {_UNPACKED_MAX_BYTES // _GIB} GiB")
        pieces = []
        try:
            while size and (piece := self._reader.read(size)):
                pieces.append(piece)
                size -= len(piece)
        except zstandard.ZstdError as error:
            raise damaged(f"it is not zstd, or damaged: {error}") from None
        return b"".join(pieces)


class _KernelMembers:
    """Refuses what does not belong into the bundle of a kernel."""

    def __init__(self) -> None:
        self._modules = self._modules_bytes = 0

    def __call__(self, member: Member) -> None:
        if _BOOT_MODULE.fullmatch(member.name) is None:
            _check_member(member, _KERNEL_FILES.get(member.name))
            return
        _check_member(member, BOOT_MODULES_MAX_BYTES)
        self._modules += 1
        self._modules_bytes += member.size
        try:
            check_boot_modules(self._modules, self._modules_bytes)
        except PreconditionFailed as error:
            raise damaged(error.message) from None


class _ImageMembers:
    """Refuses what does not belong into the bundle of an image, and more than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._stored = 0

    def __call__(self, member: Member) -> None:
        _check_member(member, _IMAGE_FILES.get(member.name))
        self._stored += member.stored
        if self._stored > self._limit_bytes:
            raise PreconditionFailed(
                f"the bundle holds more than the {format_size(self._limit_bytes)} that an image"
                " may have",
                hint="raise image_size_limit in the configuration",
            )


def _unpack(
    bundle: Path,
    dest: Path,
    info_name: str,
    check_member: Callable[[Member], None],
    steps: Steps,
    check: Callable[[], None],
) -> tuple[bytes, set[str]]:
    """Unpack into `dest`; the content of the member `info_name`, and the names of the others."""
    info, names = b"", set[str]()
    with open_regular(bundle) as file:
        size = os.fstat(file.fileno()).st_size

        def tell() -> None:
            check()
            steps.say(file.tell(), size)
            if shutil.disk_usage(dest).free < _KEEP_FREE_BYTES:
                raise PreconditionFailed(
                    f"there is no room in {dest.parent} for what the bundle holds",
                    hint="free some space there, or point XDG_DATA_HOME at a larger disk",
                )

        reader = TarReader(_Unpacked(file))
        for member in reader.members():
            tell()
            if member.is_directory and member.name in (".", BOOT_MODULES_DIR):
                continue
            if member.name in names:
                raise damaged(f"{member.name} is in it twice")
            names.add(member.name)
            if member.name == info_name and not member.is_directory:
                info = reader.content(member, _JSON_MAX_BYTES)
                continue
            check_member(member)
            with (dest / member.name).open("xb") as target:
                os.fchmod(target.fileno(), 0o600)
                reader.copy(member, target, tell)
    if info_name not in names:
        raise damaged(f"it has no {info_name}: it is a bundle of something else")
    return info, names


def _check_member(member: Member, limit: int | None) -> None:
    if limit is None or member.is_directory:
        raise damaged(f"{member.name} does not belong into it")
    if member.size > limit:
        raise damaged(f"{member.name} is too large")


def _info(raw: bytes, kind: type[I], name: str) -> I:
    try:
        return msgspec.json.decode(raw, type=kind)
    except MALFORMED as error:
        raise damaged(f"{name}: {error}") from None


def _check_architecture(given: str, wanted: str) -> None:
    if given != wanted:
        raise damaged(f"it is for {given[:32]}, and this machine is {wanted}")


def _check_complete(names: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - names):
        raise damaged(f"{', '.join(missing)} is missing")


def _check_kernel(built: KernelBuild, check: Callable[[], None]) -> None:
    try:
        check_vmlinux(built.vmlinux)
        check_ext4(built.modules)
    except PreconditionFailed as error:
        raise _unusable(error, built.vmlinux.parent) from None
    with (
        built.vmlinux.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf,
    ):
        found, startable = linux_version(elf), has_pvh_entry(elf)
    if found != built.version:
        raise damaged(f"it says that it is Linux {built.version}, and is {found or 'none'}")
    if not startable:
        raise damaged("its kernel cannot be started directly: it has no PVH entry")
    check()
    sync_kernel(built)


def _check_file_systems(files: Iterable[Path], check: Callable[[], None]) -> None:
    for each in files:
        check()
        try:
            check_ext4(each)
        except PreconditionFailed as error:
            raise _unusable(error, each.parent) from None
        sync_file(each)


def _unusable(error: PreconditionFailed, directory: Path) -> PreconditionFailed:
    """The checks' own hint is for what was made here; the directory goes with the failure."""
    return damaged(error.message.replace(f"{directory}/", ""))


# --- packing ---


def _pack(
    content: Mapping[str, bytes],
    files: Mapping[str, Path],
    target: Path,
    steps: Steps,
    check: Callable[[], None],
) -> None:
    done, total = 0, sum(stored_bytes(path) for path in files.values())

    def said(count: int) -> None:
        nonlocal done
        check()
        done += count
        steps.say(done, total)

    context = zstandard.ZstdCompressor(level=_LEVEL, threads=-1, write_checksum=True)
    with target.open("xb") as raw, context.stream_writer(raw, closefd=False) as packed:
        tar = TarWriter(packed)
        for name, data in content.items():
            tar.add(name, data)
        if any(name.startswith(f"{BOOT_MODULES_DIR}/") for name in files):
            tar.add_directory(BOOT_MODULES_DIR)
        for name, path in sorted(files.items()):
            with open_regular(path) as file:
                tar.add_file(name, file, said)
        tar.end()
