"""Disks that are device-mapper snapshots, made and taken away: two loop devices and a mapping over
them. For `local`, as root.

Between any two of these operations a loop device of ours has a mapping over it: one that has none
is what an operation that was killed has left, whatever file it has, and goes with the next one. So
nobody has to say which devices those are. A lock of the kernel's keeps others, daemons of root's
that have no helper between them, from what is half made just then.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from banger.base.errors import BadRequest, Conflict, Unavailable
from banger.hostops import block_devices, loops, mappings
from banger.hostops.ops import MapSnapshot

#: Others make one, or take one away, which is done in milliseconds, but for what is busy.
_LOCK_TIMEOUT_S = 30.0
_LOOK_AGAIN_S = 0.01


async def make(operation: MapSnapshot, owner_uid: int) -> str:
    """See `MapSnapshot`: the name of the mapping. What fails leaves nothing."""
    async with _alone():
        try:
            under, over = await asyncio.to_thread(_attach, operation, owner_uid)
            return await mappings.create(
                operation.vm_id, operation.instance, under, over, owner_uid
            )
        except BaseException:
            await asyncio.to_thread(loops.detach_unused, owner_uid)
            raise


def _attach(operation: MapSnapshot, owner_uid: int) -> tuple[str, str]:
    if os.path.sameopenfile(operation.base, operation.changes):
        raise BadRequest("a file cannot keep its own changes")
    base = loops.attach(operation.base, owner_uid, writable=False)
    changes = loops.attach(operation.changes, owner_uid, writable=True)
    mappings.check_header(os.pread(operation.changes, mappings.HEADER.size, 0))
    loops.resize(changes, owner_uid)  # one that was there already has the size of then
    _check_sizes(block_devices.size_bytes(base), block_devices.size_bytes(changes))
    return base, changes


def _check_sizes(base_bytes: int, changes_bytes: int) -> None:
    """Raise BadRequest for changes that no disk of this size could have: for each that a file
    tells of, the kernel keeps some memory, whichever part of the disk they are of."""
    most = mappings.full_bytes(base_bytes)
    if changes_bytes > most:
        raise BadRequest(
            f"{changes_bytes} bytes are more than the changes of {base_bytes} need: {most} at most"
        )


def grow(vm_id: str, owner_uid: int) -> None:
    """See `GrowSnapshot`. Blocks. Raises Conflict where there is no such mapping of ours."""
    keeping = mappings.writable_loops(vm_id, owner_uid)
    if not keeping:
        raise Conflict(f"there is no snapshot of {vm_id} that could grow")
    for loop in keeping:
        loops.resize(loop, owner_uid)


async def take_away(vm_id: str, owner_uid: int) -> None:
    """See `UnmapSnapshot`."""
    if loops.there_may_be_any():
        async with _alone():
            await mappings.remove(vm_id, owner_uid)
            await asyncio.to_thread(loops.detach_unused, owner_uid)


async def sweep(instance: str, keep: Collection[str], owner_uid: int) -> None:
    """See `SweepSnapshots`."""
    if not loops.there_may_be_any():
        return
    in_use = []
    async with _alone():
        for vm_id in await mappings.machines(instance, owner_uid):
            if vm_id not in keep:
                try:
                    await mappings.remove(vm_id, owner_uid)
                except Conflict as error:
                    in_use.append(error.message)
        await asyncio.to_thread(loops.detach_unused, owner_uid)
    if in_use:
        raise Conflict("; ".join(in_use))


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    """Nobody else makes any of it, or takes it away, until the block ends: flock(2) of the device
    that all who make loop devices open. Raises Unavailable where somebody keeps it: a Conflict is
    what callers try again at once."""
    control = loops.open_control()
    try:
        await _lock(control)
        yield
    finally:
        os.close(control)


async def _lock(control: int) -> None:
    """flock(2) cannot be awaited, and a thread that waits in it cannot be stopped."""
    until = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(control, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise Unavailable(
                    "another banger makes devices, or takes them away", hint="try again"
                ) from None
        else:
            return
        await asyncio.sleep(_LOOK_AGAIN_S)
