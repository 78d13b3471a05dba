"""Forks: copies of a VM that runs, with its processes, its memory and its disks, at once.

A fork is a snapshot that nobody keeps, and VMs made from it: all that were asked for, or none. The
file with the memory goes when all have mapped it. Until all are there each belongs to the fork as
an ephemeral VM belongs to its session, so that a daemon that dies half-way leaves none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import BadRequest, BangerError, NotFound, NotRunning
from banger.base.log import OperationLog, get_logger, vm_attributes
from banger.base.model import (
    Operation,
    OperationState,
    Snapshot,
    Vm,
    VmState,
    check_vm_name,
    now,
)
from banger.base.opid import current_op_id
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Progress
from banger.services.snapshots import SnapshotService
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest

FORKS_MAX = 100
#: More at once are no faster: each wants a processor to itself for a moment.
_AT_ONCE = 4


class ForkService:
    def __init__(
        self,
        vms: VmService,
        snapshots: SnapshotService,
        creator: VmCreator,
        lifecycle: Lifecycle,
    ) -> None:
        self._vms = vms
        self._snapshots = snapshots
        self._creator = creator
        self._lifecycle = lifecycle
        #: Names of forks that are being made and may have no record yet.
        self._reserved: set[str] = set()

    async def fork(
        self,
        reference: str,
        count: int,
        prefix: str,
        progress: Progress,
        *,
        ephemeral: bool = False,
    ) -> list[Vm]:
        """`count` running copies of a running VM, called PREFIX-1 and so on (free numbers).

        Without a `prefix` it is the VM's name and ``-fork``. Raises NotRunning for a VM that has no
        processes to copy. Cancelled or failed it leaves none. Ephemeral ones go with the daemon.
        """
        if not 1 <= count <= FORKS_MAX:
            raise BadRequest(f"{count} forks are not possible (1 to {FORKS_MAX})")
        made: list[Vm] = []
        try:
            made = await self._made(reference, count, prefix, progress)
            for vm in () if ephemeral else made:
                await self._vms.keep(vm)
            return [await self._vms.show(vm.id) for vm in made]
        except BaseException:
            await to_its_end(self.delete(made))
            raise

    async def _made(self, reference: str, count: int, prefix: str, progress: Progress) -> list[Vm]:
        """The forks, each of which runs and belongs to this operation still."""
        found = await self._vms.settled(reference)
        made: list[Vm] = []
        try:
            async with AsyncExitStack() as files:
                snapshot, names = await self._taken(found, count, prefix, progress, files)
                made = await self._all(names, snapshot, progress)
        except BaseException:
            await to_its_end(self.delete(made))
            raise
        return made

    async def _taken(
        self, found: Vm, count: int, prefix: str, progress: Progress, files: AsyncExitStack
    ) -> tuple[Snapshot, list[str]]:
        """A snapshot that lasts as long as `files`, and the names of those made from it."""
        async with self._vms.locked(found, progress) as vm:
            progress.stage("preflight")
            if vm.runtime.state is not VmState.RUNNING or not self._vms.has_machine(vm):
                raise NotRunning(
                    f'vm "{vm.name}" is not running: there are no processes to fork',
                    hint=f"banger vm snapshot {vm.name} SNAP,"
                    " then banger vm create --from-snapshot SNAP",
                )
            names = await self._free_names(prefix or f"{vm.name}-fork", count)
            files.callback(self._reserved.difference_update, names)
            snapshot, staging = await files.enter_async_context(
                self._snapshots.taken(vm, vm.name, progress, forks=count)
            )
        return msgspec.structs.replace(snapshot, directory=str(staging.path)), names

    async def _free_names(self, prefix: str, count: int) -> list[str]:
        taken = {vm.name for vm in await self._vms.all()} | self._reserved
        names: list[str] = []
        number = 0
        while len(names) < count:
            number += 1
            if (name := check_vm_name(f"{prefix}-{number}")) not in taken:
                names.append(name)
        self._reserved.update(names)
        return names

    async def _all(self, names: list[str], snapshot: Snapshot, progress: Progress) -> list[Vm]:
        gate = asyncio.Semaphore(_AT_ONCE)
        done = 0

        def tell() -> None:
            progress.stage("forks", f"{done} of {len(names)}", 100 * done / len(names))

        async def one(name: str) -> Vm:
            nonlocal done
            async with gate:
                vm = await self._one(name, snapshot)
            done += 1
            tell()
            return vm

        tell()
        tasks = [asyncio.create_task(one(name)) for name in names]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            await to_its_end(self._take_back(tasks))
            raise

    async def _one(self, name: str, snapshot: Snapshot) -> Vm:
        record = Operation(
            id=current_op_id.get(),
            kind="vm.create",
            target=name,
            state=OperationState.RUNNING,
            stage="",
            detail="",
            percent=-1,
            started_at=now(),
        )
        with OperationLog("vm.create", target=name) as log:
            request = CreateRequest(name=name, ephemeral=True)
            return await self._creator.copy(
                request, snapshot, Progress(log, record), copied_from=f"vm {snapshot.vm_name}"
            )

    async def _take_back(self, tasks: list[asyncio.Task[Vm]]) -> None:
        """Delete those that were made; the others take themselves back."""
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await self.delete([made for made in ended if isinstance(made, Vm)])

    async def delete(self, made: Sequence[Vm]) -> None:
        """Delete machines that nobody is to have after all; what stays is logged."""
        for vm in made:
            try:
                with suppress(NotFound), OperationLog("vm.delete", **vm_attributes(vm)) as log:
                    await self._lifecycle.delete(vm.id, log, force=True)
            except (BangerError, OSError) as error:
                get_logger().error("vm stays", error=str(error), **vm_attributes(vm))
