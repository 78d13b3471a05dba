"""Images of one's own: a VM is started from an image, packages and scripts change it, and what is
in it then becomes an image.

The VM belongs to its build as one of ``--rm`` to its session: it goes with it, however it ends, and
the next daemon removes it when this one dies. The host never reads a file system that a guest has
written: the files come as an archive, and the image is made of them anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import BadRequest, BangerError, Conflict, NotFound, Unavailable
from banger.base.files import open_regular
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import Image, InitMode, Vm, check_artifact_name
from banger.base.paths import Paths
from banger.base.units import format_size
from banger.images.build import BUILDABLE
from banger.images.depersonaliser import depersonalised
from banger.images.root import make_root
from banger.images.unpack import Limits
from banger.images.userns import temporary_tree
from banger.services.build_log import BuildLog, log_path
from banger.services.command import environment
from banger.services.image import ImageService, Made
from banger.services.image_guest import BuildGuest, Script
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Operations, Progress
from banger.services.single_flight import SingleFlight
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest
from banger.services.vm_start import GuestLost

#: All scripts of a build together: they come in one request, whose limit is 1 MiB.
SCRIPTS_MAX_BYTES = 512 << 10
_PACKAGES_MAX = 1000
_DETAIL_LENGTH = 80
#: What the log of a build has of the console of a machine that did not come up.
_CONSOLE_MAX_BYTES = 256 << 10
#: A name for any of the package managers, with a version where it takes one (``tree=2.1.0-1``).
#: Nothing that is an option, a file, or (apt's ``tree-``) a wish to remove.
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._:=~@-]{0,254}(?<!-)")

#: In the environment of the scripts: the name of the image that they make.
NAME_VARIABLE = "BANGER_IMAGE"


class MakeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say of an image of its own; the machine is as for `CreateRequest`."""

    name: str
    #: The image that it begins as.
    source: str
    packages: tuple[str, ...] = ()
    scripts: tuple[Script, ...] = ()
    vcpu_count: int | None = None
    memory_mib: int | None = None
    disk_size_mib: int | None = None

    def check(self) -> None:
        """Raise BadRequest for what can be seen to be wrong without looking further."""
        check_artifact_name(self.name)
        check_artifact_name(self.source)
        if self.name in BUILDABLE:
            raise BadRequest(
                f'"{self.name}" is the name of an image that banger builds itself',
                hint="give yours another name",
            )
        if not self.packages and not self.scripts:
            raise BadRequest(
                f'"{self.name}" would be as "{self.source}" is',
                hint="say what to change: --packages LIST, --run SCRIPT",
            )
        if len(self.packages) > _PACKAGES_MAX:
            raise BadRequest(f"{len(self.packages)} packages are too many (up to {_PACKAGES_MAX})")
        for package in self.packages:
            if _PACKAGE.fullmatch(package) is None:
                raise BadRequest(f'"{package}" cannot be the name of a package')
        if sum(len(script.content) for script in self.scripts) > SCRIPTS_MAX_BYTES:
            raise BadRequest(
                f"scripts of more than {format_size(SCRIPTS_MAX_BYTES)} together are too large",
                hint="let a script fetch what it needs",
            )

    @property
    def key(self) -> str:
        """The same for requests that make the same."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def machine(self) -> CreateRequest:
        """The VM of the build. banger's own init starts it in any case: a template is of use, and
        no system manager writes an identity of this machine."""
        plain = re.sub(r"[^a-z0-9-]", "-", self.name)[:40]
        return CreateRequest(
            name=f"build-{plain}-{secrets.token_hex(2)}",
            image=self.source,
            vcpu_count=self.vcpu_count,
            memory_mib=self.memory_mib,
            disk_size_mib=self.disk_size_mib,
            init=InitMode.MINIMAL,
            ephemeral=True,
        )


class ImageMaker:
    def __init__(
        self,
        *,
        paths: Paths,
        operations: Operations,
        images: ImageService,
        vms: VmService,
        creator: VmCreator,
        lifecycle: Lifecycle,
        size_limit_mib: int,
    ) -> None:
        self._paths = paths
        self._images = images
        self._vms = vms
        self._creator = creator
        self._lifecycle = lifecycle
        self._limits = Limits(content_bytes=size_limit_mib << 20)
        self._builds = SingleFlight(operations, "image.build")
        #: The last build of each name, and what it was asked for.
        self._last: dict[str, tuple[str, Progress]] = {}

    async def begin(self, request: MakeRequest) -> Progress:
        """Start a build, or join the one that makes the same.

        Raises BadRequest, Conflict for an image that is there or is being built in another way.
        """
        request.check()
        self._creator.check(request.machine())
        build = await self._builds.join(
            request.key,
            request.name,
            partial(self._make, request),
            partial(self._is_there, request),
        )
        if build is None:
            await self._images.ensure_free(request.name)  # it is not: this says so
            raise Conflict(f'image "{request.name}" was there, and is gone', hint="try again")
        self._last = {
            name: (key, other) for name, (key, other) in self._last.items() if not other.record.done
        } | {request.name: (request.key, build)}
        return build

    def log_of(self, build: Progress) -> Path:
        """Where what the build prints is to be read."""
        return log_path(self._paths, build.record.target, build.record.id)

    async def _is_there(self, request: MakeRequest) -> bool:
        """Whether the image is there. Conflict when it is about to be, from another request."""
        if await self._images.find(request.name) is not None:
            return True
        key, build = self._last.get(request.name, (request.key, None))
        if key != request.key and build is not None and not build.record.done:
            raise Conflict(
                f'image "{request.name}" is being built in another way',
                hint=f"wait for that, or stop it: banger operations cancel {build.record.id}",
            )
        return False

    async def _make(self, request: MakeRequest, progress: Progress) -> None:
        path = log_path(self._paths, request.name, progress.record.id)
        with BuildLog(path, lambda line: _tell(progress, line)) as log:
            async with self._images.making(request.name) as staging:
                made = await self._built(request, staging.path, log, progress)
                await self._images.publish(staging, request.name, made, progress)

    async def _built(
        self, request: MakeRequest, dest: Path, log: BuildLog, progress: Progress
    ) -> Made:
        """The files of the image, in `dest`."""
        async with temporary_tree(dest / "scratch") as scratch:
            tree = scratch / "tree"
            tree.mkdir()
            async with self._machine(request, log, progress) as vm:
                source = await self._images.of_vm(vm)
                guest = BuildGuest(self._vms, vm, log)
                try:
                    await self._change(request, source, guest, progress)
                    progress.stage("pack", "waiting for what still runs")
                    await guest.settle()
                    content = await guest.take_files(tree, self._limits, _Came(progress).add)
                except Unavailable as error:
                    if await self._vms.runs_on(vm):
                        raise
                    raise Unavailable(
                        f'vm "{vm.name}" has ended, and with it the build; inspect {log.path}'
                    ) from error
            content, packages = await depersonalised(tree, content)
            files = await make_root(tree, content, dest, progress=progress.stage)
        return Made(
            files,
            source.kernel_id,
            init=source.init,
            packages=packages,
            config=source.config,
            source=f"built from {source.name}",
        )

    async def _change(
        self, request: MakeRequest, source: Image, guest: BuildGuest, progress: Progress
    ) -> None:
        if request.packages:
            progress.stage("packages", ", ".join(request.packages)[:_DETAIL_LENGTH])
            await guest.install(request.packages)
        variables = environment(source.config) | {NAME_VARIABLE: request.name}
        for number, script in enumerate(request.scripts, start=1):
            progress.stage("script", script.name)
            await guest.run_script(number, script, variables)

    @asynccontextmanager
    async def _machine(
        self, request: MakeRequest, log: BuildLog, progress: Progress
    ) -> AsyncIterator[Vm]:
        """The VM of a build, which is gone at the end."""
        progress.stage("vm")
        with OperationLog("vm.create", target=request.name) as operation:
            creation = _Creation(operation, progress)
            try:
                vm = await self._creator.create(request.machine(), creation)
            except BaseException as error:
                # One whose guest does not come up is kept for its user to look into: that is us.
                kept = creation.record.vm
                try:
                    if kept is not None and isinstance(error, GuestLost):
                        log.heading("the console of the machine, which did not come up")
                        log.write(await asyncio.to_thread(_end_of, Path(kept.runtime.log_path)))
                        raise _did_not_come_up(error, log) from error
                    raise
                finally:
                    if kept is not None:
                        await to_its_end(self._end(kept))
        try:
            async with self._vms.in_use(vm):
                yield vm
        finally:
            await to_its_end(self._end(vm))

    async def _end(self, vm: Vm) -> None:
        """What stays is logged: the next daemon removes it."""
        try:
            with suppress(NotFound):
                await self._vms.resolve(vm.id)  # what could not be created is gone already
                with OperationLog("vm.delete", **vm_attributes(vm)) as log:
                    await self._lifecycle.delete(vm.id, log, force=True)
        except (BangerError, OSError) as error:
            get_logger().error("vm stays", error=str(error), **vm_attributes(vm))


class _Creation(Progress):
    """How making the VM goes, told as the first stage of the build."""

    def __init__(self, log: OperationLog, build: Progress) -> None:
        super().__init__(log, msgspec.structs.replace(build.record, kind="vm.create", stage=""))
        self._build = build

    def stage(self, stage: str, detail: str = "", percent: float = -1) -> None:
        super().stage(stage, detail, percent)
        self._build.stage("vm", f"{stage}: {detail}" if detail else stage, percent)

    def note(self, text: str) -> None:
        super().note(text)
        self._build.note(text)


class _Came:
    """How much of the guest's files has come."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count
        self._progress.stage("pack", format_size(self._bytes))


def _end_of(console: Path) -> bytes:
    try:
        with open_regular(console) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _CONSOLE_MAX_BYTES))
            return file.read(_CONSOLE_MAX_BYTES)
    except BangerError as error:
        return f"{error.message}\n".encode()


def _did_not_come_up(error: GuestLost, log: BuildLog) -> BangerError:
    message = f"the machine of the build did not come up: {error.reason}"
    if error.console:
        message += f"\nthe end of its console:\n{error.console}\n"
    told = BangerError(f"{message}; inspect {log.path}")
    told.code = error.code
    return told


def _tell(progress: Progress, line: str) -> None:
    if progress.record.stage in ("packages", "script"):
        progress.stage(progress.record.stage, line)
