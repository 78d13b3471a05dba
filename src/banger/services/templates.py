"""Templates: machines that were booted once and saved, for others to start from.

One is made on the first start of its kind and used by every later one: by the first start of a VM
only, for a VM that has run boots from its own disks. Its key is a digest of all that it was made
from, so that whatever changes leads to another one. No VM depends on a template: its disks begin
as copies of the template's, and its memory is a private mapping of a file that may be unlinked.

A template is never in the way: when there cannot be one, the reason is told in a line, and the VM
boots.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from banger.base import procfs
from banger.base.config import Config
from banger.base.errors import (
    BangerError,
    Conflict,
    NotFound,
    PreconditionFailed,
)
from banger.base.log import OperationLog, get_logger
from banger.base.model import (
    InitMode,
    Operation,
    Template,
    VmSpec,
    now,
)
from banger.base.paths import Paths, VmPaths, check_socket_path
from banger.drivers.base import Hypervisor, Networks
from banger.services import artifacts
from banger.services.artifacts import allocated_bytes, new_id, remove_leftovers, staged
from banger.services.capabilities import Capabilities, Saved, Start
from banger.services.disk_room import DiskRoom
from banger.services.kernel import KernelService
from banger.services.machine import machine_of, nobody
from banger.services.operations import Operations, Progress, Stages
from banger.services.preflight import check_free_disk, require
from banger.services.references import find
from banger.services.single_flight import SingleFlight
from banger.services.template_make import make_machine
from banger.store.store import Store

#: A kind of machine of which no template could be made or used is booted for so long.
_RETRY_AFTER_S = 300.0
_MIB = 1 << 20


@dataclass(frozen=True)
class _Plan:
    """A template that may be there: its key, and what it would be made from."""

    key: str
    start: Start
    initramfs: Path
    disk_size_mib: int


class TemplateService:
    def __init__(
        self,
        *,
        paths: Paths,
        config: Config,
        store: Store,
        hypervisor: Hypervisor,
        networks: Networks,
        capabilities: Capabilities,
        kernels: KernelService,
        operations: Operations,
        room: DiskRoom,
    ) -> None:
        self._paths = paths
        self._config = config
        self._store = store
        self._hypervisor = hypervisor
        self._networks = networks
        self._capabilities = capabilities
        self._kernels = kernels
        self._room = room
        self._flights = SingleFlight(operations, "template.make")
        self._users: Counter[str] = Counter()
        #: Those that are being removed.
        self._going: set[str] = set()
        #: Those from which a machine was started and did not come up.
        self._doubted: set[str] = set()
        #: Why there is no template of a key, and when that was found out (monotonic).
        self._refused: dict[str, tuple[float, str]] = {}

    # Starting from one.

    async def obtain(self, start: Start, initramfs: Path, stages: Stages) -> Template | None:
        """The template for the first start of this VM, made when there is none.

        None when templates are off, or, with a note, when there cannot be one. There is none of
        machines that systemd runs: while it boots it gives out identities (host keys, a boot id in
        its memory and in its journal's) that copies must not share, and until then there is little
        to save.
        """
        if not self._config.template_limit or start.vm.spec.init is InitMode.SYSTEMD:
            return None
        try:
            plan = await self._plan(start, initramfs)
            if why := self._refusal(plan.key):
                stages.note(f"no template for this machine, it boots: {why}")
                return None

            def tell(state: Operation) -> None:
                detail = f": {state.detail}" if state.detail else ""
                stages.stage("template", f"{state.stage}{detail}")

            stages.stage("template")
            await self._flights.ensure(
                plan.key,
                start.image.name,
                partial(self._make, plan),
                partial(self._is_there, plan.key),
                tell,
            )
            return await self._store.template_of_key(plan.key)
        except (BangerError, OSError) as error:
            stages.note(f"no template for this machine, it boots: {error}")
            return None

    async def key(self, start: Start, initramfs: Path) -> str:
        """The key of the template that the first start of this VM would use; there may be none."""
        return (await self._plan(start, initramfs)).key

    def start_from(self, template: Template, start: Start) -> Start:
        """The same start, from a template."""
        made = self._paths.template(template.id)
        saved = Saved(made.memory, made.machine_state, template.disk_size_mib)
        return Start(start.vm, start.image, start.kernel, template=template, saved=saved)

    @contextmanager
    def in_use(self, template: Template) -> Iterator[None]:
        """A machine is being started from it: it is not removed meanwhile.

        Raises NotFound when it was removed since it was looked up.
        """
        self._users[template.id] += 1
        try:
            memory = self._paths.template(template.id).memory
            if template.id in self._going or not memory.is_file():
                raise NotFound(f'template "{template.id}" was removed meanwhile')
            yield
        finally:
            self._users[template.id] -= 1
            if not self._users[template.id]:
                del self._users[template.id]

    async def used(self, template: Template) -> None:
        """Note that a machine runs that was started from it."""
        self._doubted.discard(template.id)
        await self._store.touch_template(template.id, now())

    async def doubt(self, template: Template, why: str) -> None:
        """A machine that was started from it did not come up: once is chance, twice is not."""
        if template.id in self._doubted:
            await self.discard(template, why)
        self._doubted.add(template.id)

    async def discard(self, template: Template, why: str) -> None:
        """No machine can be started from it: it goes, and another is not tried at once."""
        self._refused[template.key] = (time.monotonic(), why)
        if not self._users[template.id]:  # else others are being started from it
            await self._try_to_remove(template)

    # What there is.

    async def all(self) -> list[Template]:
        """All of them, the one that was used last first."""
        return await self._store.templates()

    async def resolve(self, reference: str) -> Template:
        """The template of an id or an unambiguous prefix of one."""
        return find(await self.all(), reference, noun="template", plural="templates")

    async def delete(self, reference: str) -> Template:
        """Delete a template. VMs that were started from it run on. Conflict while one starts."""
        template = await self.resolve(reference)
        if self._users[template.id]:
            raise Conflict(f'a VM is being started from template "{template.id}"', hint="try again")
        with OperationLog("template.delete", template=template.id, image_name=template.image_name):
            await self._remove(template)
        return template

    async def prune(self, *, everything: bool, dry_run: bool) -> list[Template]:
        """Delete those that no start would use any more, or all that no VM starts from just now."""
        going = [
            each
            for each in await self.all()
            if not self._users[each.id] and (everything or not await self._is_current(each))
        ]
        if dry_run:
            return going
        return [each for each in going if await self._try_to_remove(each)]

    async def forget_image(self, image_id: str) -> None:
        """Delete the templates of an image that is gone."""
        for each in await self.all():
            if each.image_id == image_id:
                await self._try_to_remove(each)

    async def remove_leftovers(self, machines: Iterable[tuple[Path, int]]) -> None:
        """At start-up: end what was being made, and remove what is left of it.

        `machines` are those that run, by control socket: one of a template has nobody any more.
        """
        runtime_dir = self._paths.templates_runtime_dir
        pids = {socket.parent: pid for socket, pid in machines}
        there = set(runtime_dir.iterdir() if runtime_dir.is_dir() else ())
        for entry in there | {each for each in pids if each.parent == runtime_dir}:
            try:
                await self._end_stray(VmPaths(entry, entry).control_socket, pids.get(entry, 0))
            except (BangerError, OSError) as error:  # by its directory the next daemon finds it
                get_logger().error("a template's machine stays", path=str(entry), error=str(error))
            else:
                shutil.rmtree(entry, ignore_errors=True)
        images = {image.id for image in await self._store.images()}
        for each in await self.all():
            if each.image_id not in images:
                await self._try_to_remove(each)
        await self._evict()  # the limits may be others than before
        known = {each.id for each in await self.all()}
        await remove_leftovers(self._paths.templates_dir, known)

    async def _end_stray(self, control_socket: Path, pid: int) -> None:
        get_logger().warning("a template was being made", pid=pid, socket=str(control_socket))
        pidfd = procfs.open_pidfd(
            pid, lambda each: self._hypervisor.control_socket(each) == control_socket
        )
        try:
            await self._hypervisor.clear(control_socket)
            if pidfd >= 0:
                await procfs.kill(pidfd)
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    # Making one.

    async def _plan(self, start: Start, initramfs: Path) -> _Plan:
        nowhere = self._nowhere()
        made = _without_identity(start, "template", nowhere, self._disk_size_mib(start))
        self._capabilities.contribute_machine(made)
        shape = await self._hypervisor.shape(
            machine_of(made, nowhere, initramfs),
            self._networks.link(made.vm.spec.network),
        )
        spec = made.vm.spec
        parts = (
            *(shape, made.image.id, made.kernel.id, initramfs.name),
            *(self._paths.system_disk_name, self._paths.work_disk_name),
            *(str(spec.system_overlay_size_mib), str(spec.disk_size_mib)),
        )
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return _Plan(key, start, initramfs, spec.disk_size_mib)

    def _nowhere(self) -> VmPaths:
        """Of a machine that there is not: its disks' files are called as those of any other, for
        their names say what they are."""
        return self._paths.machine(Path("/"), Path("/"))

    def _disk_size_mib(self, start: Start) -> int:
        """Of the work disk: a VM whose is larger grows it, so most share one template."""
        usual_mib = self._config.vm_defaults_disk_size
        if start.vm.spec.disk_size_mib >= usual_mib:
            return usual_mib
        return -(-Path(start.image.work_seed_path).stat().st_size // _MIB)

    def _refusal(self, key: str) -> str:
        when, why = self._refused.get(key, (-_RETRY_AFTER_S, ""))
        return why if time.monotonic() - when < _RETRY_AFTER_S else ""

    async def _is_there(self, key: str) -> bool:
        template = await self._store.template_of_key(key)
        if template is None:
            return False
        if await asyncio.to_thread(_is_whole, self._paths.template(template.id)):
            return True
        get_logger().warning("template is incomplete", template=template.id)
        await self._remove(template)
        return False

    async def _make(self, plan: _Plan, progress: Progress) -> None:
        try:
            template = await self._made(plan, progress)
        except (BangerError, OSError) as error:
            self._refused[plan.key] = (time.monotonic(), str(error))
            raise
        self._refused.pop(plan.key, None)
        progress.result(template=template)
        await self._evict(template.id)

    async def _made(self, plan: _Plan, progress: Progress) -> Template:
        require([check_free_disk(self._paths.templates_dir)])
        memory_mib = plan.start.vm.spec.memory_mib
        if memory_mib * _MIB > await asyncio.to_thread(procfs.total_memory_bytes):
            # A file of that size may be possible: the guest would fill the disk with it.
            raise PreconditionFailed(f"this host has less than {memory_mib} MiB of memory")
        template_id = new_id()
        final = self._paths.template(template_id)
        check_socket_path(final.control_socket)
        async with staged(final.directory) as staging:
            paths = self._paths.machine(staging.path, final.runtime)
            start = _without_identity(plan.start, template_id, paths, plan.disk_size_mib)
            await make_machine(
                start,
                paths,
                plan.initramfs,
                self._capabilities,
                self._hypervisor,
                self._networks,
                self._room,
                progress,
            )
            template = Template(
                id=template_id,
                key=plan.key,
                image_id=start.image.id,
                image_name=start.image.name,
                kernel_id=start.kernel.id,
                vcpu_count=start.vm.spec.vcpu_count,
                memory_mib=start.vm.spec.memory_mib,
                disk_size_mib=plan.disk_size_mib,
                init=start.vm.spec.init,
                network=start.vm.spec.network,
                directory=str(final.directory),
                size_bytes=await asyncio.to_thread(allocated_bytes, staging.path),
                created_at=now(),
                used_at=now(),
            )
            await staging.publish(partial(self._store.insert_template, template))
        return template

    async def _evict(self, newest: str = "") -> None:
        """Keep to the limits: those that were not used for longest go first."""
        kept, size_bytes = 0, 0
        for each in await self.all():
            over = (
                kept + 1 > self._config.template_limit
                or size_bytes + each.size_bytes > self._config.template_size_limit * _MIB
            )
            if over and each.id != newest and not self._users[each.id]:
                get_logger().info("template evicted", template=each.id, image_name=each.image_name)
                await self._try_to_remove(each)
            else:
                kept, size_bytes = kept + 1, size_bytes + each.size_bytes

    async def _is_current(self, template: Template) -> bool:
        """Whether a start could use it: what it was made from is still what starts are made of."""
        image = await self._store.get_image(template.image_id)
        kernel = await self._store.get_kernel(template.kernel_id)
        if image is None or kernel is None:
            return False
        spec = VmSpec(
            vcpu_count=template.vcpu_count,
            memory_mib=template.memory_mib,
            disk_size_mib=template.disk_size_mib,
            system_overlay_size_mib=self._config.vm_defaults_system_overlay_size,
            init=template.init,
            network=template.network,
        )
        start = Start(nobody("template", self._nowhere(), spec, image), image, kernel)
        try:
            plan = await self._plan(start, await self._kernels.initramfs(kernel))
        except (BangerError, OSError):
            return False  # what it was made from is no longer whole
        return plan.key == template.key

    async def _remove(self, template: Template) -> None:
        self._going.add(template.id)
        try:
            directory = self._paths.template(template.id).directory
            await artifacts.delete(directory, partial(self._store.delete_template, template.id))
        finally:
            self._going.discard(template.id)

    async def _try_to_remove(self, template: Template) -> bool:
        """Whether it is gone; that it is not keeps nobody from anything."""
        try:
            await self._remove(template)
        except (BangerError, OSError) as error:
            get_logger().warning("template stays", template=template.id, error=str(error))
            return False
        return True


def _without_identity(start: Start, machine_id: str, paths: VmPaths, disk_size_mib: int) -> Start:
    """A start of the same kind of machine, of a VM that there is not, with its files at `paths`."""
    spec = msgspec.structs.replace(
        start.vm.spec, disk_size_mib=disk_size_mib, ephemeral=False, published_ports=()
    )
    return Start(nobody(machine_id, paths, spec, start.image), start.image, start.kernel)


def _is_whole(paths: VmPaths) -> bool:
    needed = (paths.memory, paths.machine_state, paths.system_overlay, paths.work_disk)
    return all(path.is_file() for path in needed)
