"""Standbys: machines restored from a template before anybody wants one, and paused.

A restored machine runs code that nobody has run in it yet: an emulator translates it first, and the
host maps its memory page by page. A standby has that behind it. It is nobody's machine until a new
VM takes it over, with its id and its directories, and gives it its identity; so it knows no name
and no secret. One is made ready after a start from a template, a moment later, so that the machine
that was just started has the processors first; and it goes when nobody has wanted it for a while.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base import procfs
from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Unavailable
from banger.base.log import OperationLog, get_logger
from banger.base.model import Template, Vm
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths, check_socket_path
from banger.drivers.base import Hypervisor
from banger.guest.channel import call
from banger.guest.requests import Exec
from banger.services.agents import Agents
from banger.services.capabilities import Start
from banger.services.disk_room import DiskRoom
from banger.services.liveness import Liveness
from banger.services.machine import new_runtime
from banger.services.templates import TemplateService
from banger.services.vm import VmService

#: After a start: its first command has the processors to itself.
_DELAY_S = 0.5
#: A standby that nobody has wanted for so long gives its memory back.
_KEEP_S = 600.0
#: Less than this free on the host, and there is none.
_HOST_MEMORY_MIN_BYTES = 1 << 30

#: What most sessions begin with, so that it has been done once. Twice: an emulator joins the pieces
#: of code that it has translated when they are run again.
_WARM_UP = Exec(["true"])
_WARM_UP_ROUNDS = 2
_WARM_UP_TIMEOUT_S = 60.0

#: In the directory of a VM that there is not: what is there is ours to remove.
MARKER = "standby"

_RESTORE_TIMEOUT_S = 60.0

#: Bring the machine of a start from a template up to its identity, within so many seconds.
Restore = Callable[[Start, Template, OperationLog, float], Awaitable[None]]


@dataclass(frozen=True)
class Standby:
    """A machine that waits, paused, with the id and the directories of the VM that it will be."""

    vm: Vm
    start: Start
    key: str


class Standbys:
    def __init__(
        self,
        *,
        paths: Paths,
        hypervisor: Hypervisor,
        vms: VmService,
        liveness: Liveness,
        agents: Agents,
        templates: TemplateService,
        room: DiskRoom,
        limit: int,
    ) -> None:
        self._paths = paths
        self._hypervisor = hypervisor
        self._vms = vms
        self._liveness = liveness
        self._agents = agents
        self._templates = templates
        self._room = room
        self._limit = limit
        #: Those that wait, the one that was made last first.
        self._waiting: list[Standby] = []
        #: Those that a VM has taken over and not yet started, by the VM's id.
        self._taken: dict[str, Standby] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._discarding: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def reserve(self, key: str, start: Start) -> Vm | None:
        """The VM of `start` with the id and the directories of a standby for this key, which is
        its own from now on; None when there is none that fits."""
        for standby in self._waiting:
            if standby.key == key and standby.vm.spec.disk_size_mib == start.vm.spec.disk_size_mib:
                self._waiting.remove(standby)
                if self._liveness.is_whole(standby.vm):
                    self._taken[standby.vm.id] = standby
                    runtime = standby.vm.runtime
                    return msgspec.structs.replace(start.vm, id=standby.vm.id, runtime=runtime)
                self._discard(standby)
                return None
        return None

    def give_back(self, vm: Vm) -> None:
        """The VM that had reserved one was not recorded: nobody knows of it."""
        if standby := self._taken.pop(vm.id, None):
            self._discard(standby)

    def take(self, vm: Vm) -> Standby | None:
        """The standby that this VM, which has a record now, has reserved."""
        standby = self._taken.pop(vm.id, None)
        if standby is not None:
            (self._paths.vm(vm.id).directory / MARKER).unlink(missing_ok=True)
        return standby

    def prepare(self, start: Start, template: Template, restore: Restore) -> None:
        """Have one ready soon for the next start like this one, unless one waits or is made."""
        if self._closed or not self._limit or self._keeper is not None:
            return
        if not self._hypervisor.features.holds_well:
            return
        if any(standby.key == template.key for standby in self._waiting):
            return
        self._keeper = asyncio.create_task(self._keep(start, template, restore))

    async def _keep(self, start: Start, template: Template, restore: Restore) -> None:
        current_op_id.set(new_op_id())  # not that of the operation which is the cause of it
        try:
            await asyncio.sleep(_DELAY_S)
            if await asyncio.to_thread(procfs.available_memory_bytes) < _HOST_MEMORY_MIN_BYTES:
                return
            standby = await self._make(start, template, restore)
        except (BangerError, OSError) as error:
            get_logger().warning("no standby", error=str(error), template=template.id)
            return
        finally:
            self._keeper = None
        self._waiting.insert(0, standby)
        for surplus in self._waiting[self._limit :]:
            self._retire(surplus)
        asyncio.get_running_loop().call_later(_KEEP_S, self._retire, standby)

    async def _make(self, start: Start, template: Template, restore: Restore) -> Standby:
        nobodys = Start(self._nobody(start.vm), start.image, start.kernel)
        made = self._templates.start_from(template, nobodys)
        vm = made.vm
        with OperationLog("standby.make", vm_id=vm.id, template=template.id) as log:
            try:
                directory = self._paths.vm(vm.id).directory
                directory.mkdir(mode=0o700, parents=True)
                (directory / MARKER).touch(mode=0o600)
                await restore(made, template, log, _RESTORE_TIMEOUT_S)
                log.stage("warm_up")
                channel = await self._agents.channel(vm)
                for _ in range(_WARM_UP_ROUNDS):
                    await call(channel, _WARM_UP, timeout_s=_WARM_UP_TIMEOUT_S)
                log.stage("pause")
                async with self._room.left_alone(vm.id):
                    if self._room.is_held(vm.id):
                        raise Unavailable("the host's disk is full")
                    await self._hypervisor.pause(Path(vm.runtime.api_socket))
            except BaseException:
                await to_its_end(self._vms.remove_unrecorded(vm, MARKER))
                raise
        return Standby(vm, made, template.key)

    def _nobody(self, vm: Vm) -> Vm:
        """A VM of the same shape that there is not (yet)."""
        vm_id = secrets.token_hex(6)
        paths = self._paths.vm(vm_id)
        check_socket_path(paths.control_socket)
        spec = msgspec.structs.replace(vm.spec, ephemeral=False, published_ports=())
        return msgspec.structs.replace(vm, id=vm_id, name="", spec=spec, runtime=new_runtime(paths))

    def _retire(self, standby: Standby) -> None:
        """End one that still waits."""
        if standby in self._waiting:
            self._waiting.remove(standby)
            self._discard(standby)

    def _discard(self, standby: Standby) -> None:
        task = asyncio.create_task(self._end(standby))
        self._discarding.add(task)
        task.add_done_callback(self._discarding.discard)

    async def _end(self, standby: Standby) -> None:
        try:
            await self._vms.remove_unrecorded(standby.vm, MARKER)
        except (BangerError, OSError) as error:
            get_logger().error("standby stays", vm_id=standby.vm.id, error=str(error))

    async def retire_all(self) -> None:
        """End all that wait, and what is being made: their image or template goes."""
        if (keeper := self._keeper) is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        for standby in list(self._waiting):
            self._retire(standby)
        await asyncio.gather(*self._discarding, return_exceptions=True)

    async def close(self) -> None:
        """End all for good: nobody would find them. VMs run on."""
        self._closed = True
        await self.retire_all()
