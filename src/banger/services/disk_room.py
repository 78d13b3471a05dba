"""Keeps room for what machines write to disks that are devices, and holds those that run out.

Where disks are files there is nothing to do: a hypervisor that meets a full disk holds its machine
at that write. A device whose changes find no room fails for good: so it is looked after while the
machine runs, four times a second, and the machine is held before. Each by itself: one that takes
long makes no other wait. As long as the daemon lives; without such machines it takes no time.

Who pauses a machine for a purpose of his own, and lets it run on, does that in `left_alone`; who
keeps its memory asks `check_whole`, before and after.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from banger.base.errors import BangerError, Conflict, PreconditionFailed, Unavailable
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Vm
from banger.base.opid import current_op_id, new_op_id
from banger.drivers.base import DiskDeviceMaker, Hypervisor, MachineStatus, Room

_INTERVAL_S = 0.25
#: A daemon that starts waits so long for an answer: a hypervisor that is at work gives none.
_PATIENCE_S = 2.0


class _Wish(Enum):
    """What somebody may want of a machine for a while."""

    LEFT_ALONE = auto()
    #: That it is not held before it ends.
    POWERING_OFF = auto()


@dataclass
class _Watched:
    """A machine that is looked after, from its start to its end."""

    vm: Vm
    room: Room = Room.AMPLE
    #: Whether it is held by us, or was when we found it.
    held: bool = False
    #: Whether it may be held by an earlier daemon: nobody could tell us yet.
    unknown: bool = False
    #: How many want each of it.
    wishes: Counter[_Wish] = field(default_factory=Counter)
    #: What was told last of looking after it that failed.
    failure: str = ""
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None


class DiskRoom:
    def __init__(self, devices: DiskDeviceMaker | None, hypervisor: Hypervisor) -> None:
        self._devices = devices
        self._hypervisor = hypervisor
        self._watched: dict[str, _Watched] = {}
        self._runs = False

    def watch(self, vm: Vm) -> None:
        """Look after a machine from now on, if its disk is such a device. Idempotent."""
        if self._devices is None or not self._devices.serves(_disk(vm)):
            return
        if vm.id not in self._watched:
            self._watched[vm.id] = _Watched(vm)
        self._watched[vm.id].vm = vm
        self._begin(self._watched[vm.id])

    async def adopt(self, vms: Iterable[Vm]) -> None:
        """Look after machines that an earlier daemon has left, and at each of them once, before
        anybody lets them run on: one that is paused, and has too little room, is held."""
        found = list(vms)
        for vm in found:
            self.watch(vm)
        watched = [self._watched[vm.id] for vm in found if vm.id in self._watched]
        await asyncio.gather(*(self._look(each, adopted=True) for each in watched))

    async def forget(self, vm_id: str) -> None:
        """The machine has ended. When this returns nobody looks at it any more. Idempotent."""
        watched = self._watched.get(vm_id)
        if watched is None:
            return
        async with watched.looking:
            await _end(watched)
        # Not before: whoever is cancelled at that has to find it again.
        if self._watched.get(vm_id) is watched:
            del self._watched[vm_id]

    def room(self, vm_id: str) -> Room:
        """How it stood when it was last looked at."""
        watched = self._watched.get(vm_id)
        return watched.room if watched is not None else Room.AMPLE

    async def looked_at(self, vm_id: str) -> Room:
        """How it stands now, for whoever is to rely on that it is not lost. Raises Unavailable
        where nobody can tell."""
        if (watched := self._watched.get(vm_id)) is None:
            return Room.AMPLE
        failure = await self._look(watched, surely=True)
        if failure is not None and watched.room is not Room.LOST:
            raise Unavailable(
                f"nobody can tell whether the disk has all that was written: {failure}",
                hint=failure.hint if isinstance(failure, BangerError) else "",
            ) from failure
        return watched.room

    async def check_whole(self, vm: Vm) -> None:
        """Raise Conflict for a machine of whose disk something is lost: its memory is of another
        disk than the one that there is. Unavailable where nobody can tell."""
        if await self.looked_at(vm.id) is Room.LOST:
            raise Conflict(
                f'the host\'s disk had no room for what vm "{vm.name}" wrote: its memory believes'
                " in what is not there",
                hint=f"make room on the host, then: banger vm restart {vm.name}",
            )

    def is_held(self, vm_id: str) -> bool:
        """Whether its machine is held, until there is room again, or may be for all that is known
        yet."""
        watched = self._watched.get(vm_id)
        return watched is not None and (watched.held or watched.unknown)

    def left_alone(self, vm_id: str) -> AbstractAsyncContextManager[None]:
        """Nobody but the block holds the machine, or lets it run on, until it ends. What it writes
        finds room as long as there is any."""
        return self._wished(vm_id, _Wish.LEFT_ALONE)

    def powering_off(self, vm_id: str) -> AbstractAsyncContextManager[None]:
        """The machine is to end: nobody holds it until the block ends, for what it has yet to write
        may fit. One that is held already runs on as soon as there is any room for that."""
        return self._wished(vm_id, _Wish.POWERING_OFF)

    @asynccontextmanager
    async def _wished(self, vm_id: str, wish: _Wish) -> AsyncIterator[None]:
        """When the block begins what is under way is done, and the wish holds until it ends."""
        watched = self._watched.get(vm_id)
        if watched is None:
            yield
            return
        watched.wishes[wish] += 1
        try:
            async with watched.looking:
                pass
            yield
        finally:
            watched.wishes[wish] -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Machines are looked after while the block runs."""
        self._runs = True
        for each in self._watched.values():
            self._begin(each)
        try:
            yield
        finally:
            self._runs = False
            await asyncio.gather(*map(_end, self._watched.values()))

    def _begin(self, watched: _Watched) -> None:
        if self._runs and watched.task is None:
            watched.task = asyncio.create_task(self._look_again_and_again(watched))

    async def _look_again_and_again(self, watched: _Watched) -> None:
        while True:
            current_op_id.set(new_op_id())
            await self._look(watched)
            await asyncio.sleep(_INTERVAL_S)

    async def _look(
        self, watched: _Watched, *, adopted: bool = False, surely: bool = False
    ) -> Exception | None:
        """What kept it from being looked at, or from what follows. `surely` asks whether something
        is lost whatever its room says."""
        async with watched.looking:
            try:
                if adopted:
                    async with asyncio.timeout(_PATIENCE_S):
                        await self._find_out(watched)
                if watched.room is not Room.LOST:  # which it is for as long as it runs
                    await self._tend(watched)
                if surely and watched.room is not Room.LOST:
                    await self._ask_if_lost(watched)
                if watched.unknown:
                    await self._find_out(watched)
                if adopted and _may_run(watched):  # it is for others to say whether it does
                    watched.held = False
                await self._act(watched)
            except Exception as error:  # a supervisor's boundary: it is looked at again
                if str(error) != watched.failure:
                    watched.failure = str(error)  # each is told once
                    get_logger().error(
                        "disk not looked after", error=str(error), **vm_attributes(watched.vm)
                    )
                return error
            return None

    async def _find_out(self, watched: _Watched) -> None:
        """Whether an earlier daemon holds it: where that cannot be told, the next look does."""
        watched.unknown = True
        watched.held = await self._is(watched, MachineStatus.PAUSED)
        watched.unknown = False

    async def _tend(self, watched: _Watched) -> None:
        assert self._devices is not None  # or nothing would be watched
        vm = watched.vm
        try:
            watched.room = await self._devices.tend(vm.id, _disk(vm))
        except PreconditionFailed as error:
            watched.room = Room.LOST
            get_logger().error("disk lost", error=error.message, **vm_attributes(vm))
        else:
            if watched.room is Room.LOST:
                get_logger().error("disk overflowed", **vm_attributes(vm))

    async def _ask_if_lost(self, watched: _Watched) -> None:
        assert self._devices is not None  # or nothing would be watched
        if await self._devices.is_lost(watched.vm.id):
            watched.room = Room.LOST
            get_logger().error("disk overflowed", **vm_attributes(watched.vm))

    async def _act(self, watched: _Watched) -> None:
        """Hold the machine, or let it run on. One that is paused for another reason (a standby) is
        left to that; one that somebody else has let run on is held again."""
        if watched.wishes[_Wish.LEFT_ALONE]:
            return
        vm, socket = watched.vm, Path(watched.vm.runtime.api_socket)
        if watched.room is Room.SHORT:
            if watched.wishes[_Wish.POWERING_OFF]:
                return
            if not await self._is(watched, MachineStatus.RUNNING):
                return
            watched.held = True  # also when nobody hears that it is
            await self._hypervisor.pause(socket)
            get_logger().error("vm held: the disk is full", **vm_attributes(vm))
        elif watched.held and _may_run(watched):
            if await self._is(watched, MachineStatus.PAUSED):
                await self._hypervisor.resume(socket)
                why = "is lost" if watched.room is Room.LOST else "has room"
                get_logger().warning(f"vm runs on: the disk {why}", **vm_attributes(vm))
            watched.held = False

    async def _is(self, watched: _Watched, status: MachineStatus) -> bool:
        return await self._hypervisor.status(Path(watched.vm.runtime.api_socket)) is status


def _may_run(watched: _Watched) -> bool:
    """With too little room for now it stays as it is, held or not; holding what is lost mends
    nothing. What ends needs little."""
    if watched.wishes[_Wish.POWERING_OFF] and watched.room is Room.TIGHT:
        return True
    return watched.room in (Room.AMPLE, Room.LOST)


def _disk(vm: Vm) -> Path:
    return Path(vm.runtime.system_overlay)


async def _end(watched: _Watched) -> None:
    task, watched.task = watched.task, None
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
