"""Images: build, find, delete. Two requests for one image share one build."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from banger.base.errors import BadRequest, Conflict, NotFound, PreconditionFailed
from banger.base.files import sync_file
from banger.base.log import OperationLog, image_attributes
from banger.base.model import (
    Image,
    ImageConfig,
    InitMode,
    Kernel,
    Operation,
    Vm,
    check_artifact_name,
    now,
)
from banger.base.paths import Paths
from banger.images.build import BUILDABLE, build_image
from banger.images.ext4 import make_larger_copy
from banger.images.root import RootFiles
from banger.services import artifacts
from banger.services.artifacts import (
    Staging,
    allocated_bytes,
    new_id,
    remove_leftovers,
    staged,
)
from banger.services.kernel import KernelService
from banger.services.locks import Locks, Rank
from banger.services.operations import Operations, Progress
from banger.services.single_flight import SingleFlight
from banger.store.store import Store, image_exists

#: The root file system in an image's directory, and a copy of one that is not whole yet.
ROOTFS = "rootfs.ext4"
COPYING = "rootfs.new"


class Made(msgspec.Struct, frozen=True):
    """What a new image is to be, beside its name: its files lie in a staging directory."""

    files: RootFiles
    kernel_id: str
    init: InitMode = InitMode.MINIMAL
    packages: tuple[str, ...] = ()
    config: ImageConfig = ImageConfig()
    source: str = ""
    digest: str = ""
    registered: str = ""
    foreign_seed: bool = False


class ImageService:
    def __init__(
        self, paths: Paths, store: Store, operations: Operations, kernels: KernelService
    ) -> None:
        self._paths = paths
        self._store = store
        self._kernels = kernels
        self._builds = SingleFlight(operations, "image.build")
        self._growing = asyncio.Lock()
        #: Held while an image's set of users may grow or while it is deleted.
        self.locks = Locks(Rank.IMAGE)

    async def all(self) -> list[Image]:
        return await self._store.images()

    async def get(self, name: str) -> Image:
        """The image of this name. Raises NotFound, with what could be meant."""
        image = await self._store.image_named(check_artifact_name(name))
        if image is None:
            hint = (
                f"build it: banger image build {name}"
                if name in BUILDABLE
                else f"see: banger image list; buildable: {', '.join(BUILDABLE)}"
            )
            raise NotFound(f'image "{name}" not found', hint=hint)
        return image

    async def find(self, name: str) -> Image | None:
        return await self._store.image_named(name)

    async def of_vm(self, vm: Vm) -> Image:
        """The image that a VM's disks lie over. Raises PreconditionFailed when it is gone."""
        image = await self._store.get_image(vm.image_id)
        if image is None:
            raise PreconditionFailed(
                f'image "{vm.image_name}" of vm "{vm.name}" is gone',
                hint=f"its disks are of no use without it: banger vm delete {vm.name}",
            )
        return image

    async def begin_build(self, name: str) -> Progress:
        """Start building a Debian image, or join the build that runs; Conflict if it exists."""
        check_artifact_name(name)
        if name not in BUILDABLE:
            raise BadRequest(
                f'banger does not know how to build "{name}"',
                hint=f"it can build: {', '.join(BUILDABLE)}",
            )
        build = await self._builds.join(
            name, name, partial(self._build, name), partial(self._is_there, name)
        )
        if build is None:
            raise image_exists(name)
        return build

    async def _is_there(self, name: str) -> bool:
        return await self.find(name) is not None

    async def ensure(self, name: str, progress: Progress) -> Image:
        """The image of this name, built first when it is one banger can build and is missing.

        When the caller is cancelled the build goes on only if others want it.
        """
        if check_artifact_name(name) in BUILDABLE:

            def tell(build: Operation) -> None:
                progress.stage("image", f"{build.stage}: {build.detail}", build.percent)

            await self._builds.ensure(
                name, name, partial(self._build, name), partial(self._is_there, name), tell
            )
        return await self.get(name)

    async def _build(self, name: str, progress: Progress) -> None:
        kernel = await self.kernel("", progress)
        async with self.making(name) as staging:
            built = await build_image(name, staging.path, progress=progress.stage)
            made = Made(built.files, kernel.id, packages=built.packages, source="Debian's packages")
            await self.publish(staging, name, made, progress)

    async def kernel(self, name: str, progress: Progress) -> Kernel:
        """The kernel that a new image is to boot with: this one, or by default Debian's, built
        when it is missing."""
        if name:
            return await self._kernels.named(name)
        return await self._kernels.ensure(
            lambda stage, detail, percent: progress.stage(f"kernel {stage}", detail, percent)
        )

    async def ensure_free(self, name: str) -> None:
        """Raise Conflict for a name that is taken."""
        if await self._is_there(name):
            raise image_exists(name)

    async def up_to_date(self, there: Image, digest: str, kernel: str, progress: Progress) -> None:
        """Somebody wants to pull what has the name of an image: that is all if it is the same, and
        boots with the kernel that was asked for, if one was. Conflict otherwise."""
        what = "is another" if there.digest != digest else ""
        if kernel and (await self._kernels.named(kernel)).id != there.kernel_id:
            what = what or "boots with another kernel"
        if what:
            raise Conflict(
                f'image "{there.name}" already exists, and {what}',
                hint=f"pull it under another --name, or first: banger image delete {there.name}",
            )
        progress.note(f"image {there.name} is up to date")
        progress.result(image=there)

    @asynccontextmanager
    async def making(self, name: str) -> AsyncIterator[Staging]:
        """A directory for the files of a new image; they are removed unless it is published.

        Raises Conflict for a name that is taken.
        """
        await self.ensure_free(name)
        async with staged(self._paths.image_dir(new_id())) as staging:
            yield staging

    async def publish(self, staging: Staging, name: str, made: Made, progress: Progress) -> Image:
        """Make the files in a staging directory an image; stage ``finish``."""
        progress.stage("finish", "writing it to the disk")
        directory, kernel = staging.final, await self._kernels.get(made.kernel_id)
        rootfs = made.files.rootfs if made.registered else directory / made.files.rootfs.name
        for file in (made.files.rootfs, made.files.work_seed):
            await asyncio.to_thread(sync_file, file)
        image = Image(
            id=directory.name,
            name=name,
            kernel_id=made.kernel_id,
            artifact_dir=str(directory),
            rootfs_path=str(rootfs),
            work_seed_path=str(directory / made.files.work_seed.name),
            init=made.init,
            size_bytes=await asyncio.to_thread(allocated_bytes, staging.path),
            created_at=now(),
            packages=made.packages,
            config=made.config,
            source=made.source,
            digest=made.digest,
            registered=made.registered,
            foreign_seed=made.foreign_seed,
        )
        record = msgspec.json.format(msgspec.json.encode(image))
        (staging.path / "image.json").write_bytes(record)
        async with self._kernels.kept(kernel):
            await staging.publish(partial(self._store.insert_image, image))
        progress.describe(**image_attributes(image))
        progress.result(image=image)
        return image

    async def work_seed(self, image: Image, size_mib: int) -> Path:
        """The image's work seed at this size: what a work disk of the size lies over.

        Made on first use and kept with the image (a megabyte), so that no guest spends its boot
        on growing a file system. A size below the seed's own gives the seed; so does an image whose
        seed was made elsewhere: its guests grow it, for tools of the host would have to read it.
        """
        seed = Path(image.work_seed_path)
        if image.foreign_seed:
            return seed
        sized = seed.with_name(f"{seed.stem}-{size_mib}{seed.suffix}")
        async with self._growing:
            if await asyncio.to_thread(_size_of, seed) >= size_mib << 20:
                return seed
            if not await asyncio.to_thread(sized.exists):
                await make_larger_copy(seed, sized, size_mib)
        return sized

    @asynccontextmanager
    async def alone(self, image: Image) -> AsyncIterator[Image]:
        """The image, unused and to remain so until the block ends. Conflict while a VM or a
        snapshot uses it."""
        async with self.locks.hold(image.id):
            image = await self.again(image)
            await self._check_unused(image)
            yield image

    async def adopt(self, image: Image, rootfs: Path) -> Image:
        """From now on a registered image is this file in its directory. The caller has it alone."""
        await asyncio.to_thread(sync_file, rootfs)
        size = await asyncio.to_thread(allocated_bytes, rootfs.parent)
        image = msgspec.structs.replace(
            image, rootfs_path=str(rootfs), registered="", size_bytes=size
        )
        await self._store.update_image(image)
        return image

    async def delete(self, name: str) -> Image:
        """Delete an image; Conflict while a VM or a snapshot uses it."""
        async with self.alone(await self.get(name)) as image:
            with OperationLog("image.delete", **image_attributes(image)) as log:
                unrecord = partial(self._store.delete_image, image.id)
                await artifacts.delete(Path(image.artifact_dir), unrecord, log)
        return image

    async def _check_unused(self, image: Image) -> None:
        vms = await self._store.vms_of_image(image.id)
        snapshots = await self._store.snapshots_of_image(image.id)
        if vms or snapshots:
            users = [*vms, *(f"snapshot {name}" for name in snapshots)]
            raise Conflict(
                f'image "{image.name}" is used by {", ".join(users)}',
                hint=f"delete {'those VMs' if not snapshots else 'those'} first",
            )

    async def again(self, image: Image) -> Image:
        """The same image, which may be gone by now: NotFound then."""
        return await self._store.get_image(image.id) or await self.get(image.name)

    async def remove_leftovers(self) -> None:
        """At start-up: what interrupted builds and deletions left."""
        images = await self._store.images()
        known = {image.id for image in images}
        await remove_leftovers(self._paths.images_dir, known, self._store.delete_image)
        for image in images:
            if not image.managed:  # a copy that was to be its own was not finished
                for left in (COPYING, ROOTFS):
                    (Path(image.artifact_dir) / left).unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    return path.stat().st_size
