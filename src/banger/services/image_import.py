"""Images from files of this machine: copied (`import`), or used where they lie (`register`)."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from banger.base import proc
from banger.base.errors import BadRequest, BangerError, Conflict, PreconditionFailed
from banger.base.log import image_attributes
from banger.base.model import Image, check_artifact_name
from banger.base.units import format_size
from banger.images.ext4 import check_ext4, file_identity, is_ext4
from banger.images.preflight import ensure_free_space
from banger.images.root import RootFiles, make_empty_seed, make_root
from banger.images.tar_stream import is_archive
from banger.images.unpack import Layer, Limits, unpack
from banger.images.userns import mortal, temporary_tree
from banger.services.image import COPYING, ROOTFS, ImageService, Made
from banger.services.operations import Operations, Progress
from banger.services.preflight import REGISTER_ANEW, changed
from banger.services.single_flight import SingleFlight

_MIB = 1 << 20
_COPY_TIMEOUT_S = 4 * 3600

#: What people have instead of a root file system, by what it begins with: place, bytes, name.
_OTHERS = (
    (0, b"QFI\xfb", "a qcow2 disk", "convert it: qemu-img convert -O raw"),
    (0, b"KDMV", "a VMDK disk", "convert it: qemu-img convert -O raw"),
    (0, b"hsqs", "a squashfs", "make a tar of it: unsquashfs, then tar"),
    (512, b"EFI PART", "a disk with partitions", "give the partition of the root alone"),
    (510, b"\x55\xaa", "a disk with partitions", "give the partition of the root alone"),
)


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`path` is absolute: a tar archive, compressed or not, or a raw ext4 file system."""

    path: str
    name: str
    #: The kernel that boots it; empty: Debian's, built when it is missing.
    kernel: str = ""


class ImageImports:
    def __init__(
        self,
        images: ImageService,
        operations: Operations,
        forget: Callable[[Image], Awaitable[None]],
        *,
        size_limit_mib: int,
    ) -> None:
        self._images = images
        #: Deletes what was saved of machines of an image.
        self._forget = forget
        self._operations = operations
        self._limits = Limits(content_bytes=size_limit_mib * _MIB)
        self._imports = SingleFlight(operations, "image.import")

    async def begin(self, request: ImportRequest) -> Progress:
        """Start to import a file, or join an import of the same."""
        path = _checked(request)

        async def work(progress: Progress) -> None:
            await self._import(path, request, progress)

        key = msgspec.json.encode(request).decode()
        return await self._imports.begin(key, request.name, work)

    def begin_register(self, request: ImportRequest) -> Progress:
        """Start to record a file system that stays where it is."""
        path = _checked(request)
        return self._operations.begin(
            "image.register", request.name, lambda progress: self._register(path, request, progress)
        )

    async def begin_promote(self, name: str) -> Progress:
        """Start to copy a registered image's file system, which makes it one of banger's own."""
        image = await self._images.get(name)
        if image.managed:
            raise Conflict(f'image "{name}" is banger\'s own already')
        return self._operations.begin(
            "image.promote", name, lambda progress: self._promote(image, progress)
        )

    async def _import(self, path: Path, request: ImportRequest, progress: Progress) -> None:
        await self._images.ensure_free(request.name)
        kernel = await self._images.kernel(request.kernel, progress)
        async with self._images.making(request.name) as staging:
            if await asyncio.to_thread(_is_file_system, path):
                files = await self._copy(path, staging.path, progress)
            else:
                files = await self._unpack(path, staging.path, progress)
            made = Made(files, kernel.id, source=str(path))
            await self._images.publish(staging, request.name, made, progress)

    async def _register(self, path: Path, request: ImportRequest, progress: Progress) -> None:
        await self._images.ensure_free(request.name)
        if not await asyncio.to_thread(_is_file_system, path):
            raise BadRequest(
                f"{path} is not an ext4 file system: only that can be used where it lies",
                hint=f"banger image import {path} makes one of an archive",
            )
        await asyncio.to_thread(_check_file_system, path)
        kernel = await self._images.kernel(request.kernel, progress)
        async with self._images.making(request.name) as staging:
            files = RootFiles(path, staging.path / "work-seed.ext4")
            progress.stage("filesystem")
            await make_empty_seed(files.work_seed)
            made = Made(files, kernel.id, source=str(path), registered=file_identity(path))
            await self._images.publish(staging, request.name, made, progress)

    async def _promote(self, image: Image, progress: Progress) -> None:
        progress.describe(**image_attributes(image))
        async with self._images.alone(image) as image:
            _check_unchanged(image)
            # What machines of it were saved lies over the file where it was.
            await self._forget(image)
            directory = Path(image.artifact_dir)
            files = await self._copy(Path(image.rootfs_path), directory, progress, seed=False)
            try:
                _check_unchanged(image)  # the copy is of one file, not of two
            except BangerError:
                files.rootfs.unlink(missing_ok=True)
                raise
            progress.result(image=await self._images.adopt(image, files.rootfs))

    async def _copy(
        self, path: Path, dest: Path, progress: Progress, *, seed: bool = True
    ) -> RootFiles:
        """Copy a file system, holes and all; by reference where the disk can do that."""
        await asyncio.to_thread(_check_file_system, path)
        info = await asyncio.to_thread(os.stat, path)
        await asyncio.to_thread(self._check_size, info.st_blocks * 512, dest)
        files = RootFiles(dest / ROOTFS, dest / "work-seed.ext4")
        progress.stage("copy", f"{format_size(info.st_blocks * 512)}")
        beside = dest / COPYING
        argv: list[str | Path] = ["cp", "--sparse=always", "--reflink=auto", "--", path, beside]
        try:
            await proc.run(mortal(argv), timeout_s=_COPY_TIMEOUT_S)
        except proc.ProcessFailed as error:
            beside.unlink(missing_ok=True)
            raise PreconditionFailed(f"cannot copy {path}: {error.message}") from error
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        await asyncio.to_thread(beside.chmod, 0o600)
        await asyncio.to_thread(beside.rename, files.rootfs)
        if seed:
            progress.stage("filesystem")
            await make_empty_seed(files.work_seed)
        return files

    async def _unpack(self, path: Path, dest: Path, progress: Progress) -> RootFiles:
        size = (await asyncio.to_thread(os.stat, path)).st_size
        self._check_size(size, dest)
        ensure_free_space(dest, 2 * size + 64 * _MIB)

        def advance(_: int, read_bytes: int) -> None:
            of = f"{format_size(read_bytes)} of {format_size(size)}"
            progress.stage("unpack", of, 100 * read_bytes / max(1, size))

        progress.stage("unpack", str(path), 0)
        async with temporary_tree(dest / "scratch") as scratch:
            tree = scratch / "tree"
            tree.mkdir()
            tree.chmod(0o755)  # as container engines have a root that no layer mentions
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                layer = Layer(str(path), descriptor)
                content = await unpack([layer], tree, limits=self._limits, advance=advance)
            finally:
                os.close(descriptor)
            return await make_root(tree, content, dest, progress=progress.stage)

    def _check_size(self, need_bytes: int, dest: Path) -> None:
        if need_bytes > self._limits.content_bytes:
            limit = format_size(self._limits.content_bytes)
            raise PreconditionFailed(
                f"it has {format_size(need_bytes)}, the limit is {limit}",
                hint="raise image_size_limit in the configuration",
            )
        ensure_free_space(dest, need_bytes + 64 * _MIB)


def _check_file_system(path: Path) -> None:
    try:
        check_ext4(path)
    except PreconditionFailed as error:
        raise PreconditionFailed(error.message, hint="look at it: e2fsck -n") from error


def _check_unchanged(image: Image) -> None:
    if problem := changed(image):
        raise PreconditionFailed(problem, hint=REGISTER_ANEW.format(name=image.name))


def _checked(request: ImportRequest) -> Path:
    check_artifact_name(request.name)
    path = Path(request.path)
    if not path.is_absolute():
        raise BadRequest(f'"{path}" is no absolute path')
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise BadRequest(f"{path} is a directory", hint="give a tar of it, or for an OCI layout:"
                         f" banger image pull oci:{path}")  # fmt: skip
    if not stat.S_ISREG(mode):
        raise BadRequest(f"{path} is not a file")
    if not os.access(path, os.R_OK):
        raise BadRequest(f"{path} cannot be read")
    return path


def _is_file_system(path: Path) -> bool:
    """Whether it is an ext4, and no archive. BadRequest for what is clearly neither."""
    with path.open("rb") as file:
        begin = file.read(1024)
    # Two bytes are all that tells an ext4, and some others: compressed data may have them, too.
    if is_archive(begin):
        return False
    if is_ext4(path):
        return True
    for place, magic, what, hint in _OTHERS:
        if begin[place : place + len(magic)] == magic:
            raise BadRequest(f"{path} is {what}", hint=hint)
    return False
