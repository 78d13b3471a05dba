"""The methods that change the life of a VM, each an operation that its client can watch.

An operation belongs to the registry: a client that goes away does not leave it half done. While
it is there it is told the stages, and then the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from banger.base.errors import BadRequest
from banger.daemon.operate import operate
from banger.daemon.params import (
    DeleteVm,
    ForkVm,
    PortsOf,
    PruneVms,
    PublishPort,
    SetVm,
    SnapshotVm,
    StartVm,
    StopVm,
    UnpublishPort,
    VmReference,
    WaitVm,
)
from banger.rpc.server import Connection
from banger.services.forks import ForkService
from banger.services.health import Health
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Operations, Progress
from banger.services.ports import PortService
from banger.services.prune import Prune
from banger.services.snapshots import SnapshotService
from banger.services.suspension import Suspension
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest
from banger.services.vm_start import check_boot_timeout
from banger.services.waiting import wait_for

T = TypeVar("T")
Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Verbs:
    def __init__(
        self,
        vms: VmService,
        creator: VmCreator,
        lifecycle: Lifecycle,
        health: Health,
        prune: Prune,
        ports: PortService,
        snapshots: SnapshotService,
        forks: ForkService,
        suspension: Suspension,
        operations: Operations,
    ) -> None:
        self._vms = vms
        self._creator = creator
        self._lifecycle = lifecycle
        self._health = health
        self._prune = prune
        self._ports = ports
        self._snapshots = snapshots
        self._forks = forks
        self._suspension = suspension
        self._operations = operations

    def methods(self) -> Mapping[str, Row]:
        return {
            "vm.create": (CreateRequest, self._create),
            "vm.start": (StartVm, self._start),
            "vm.restart": (StartVm, self._restart),
            "vm.stop": (StopVm, self._stop),
            "vm.snapshot": (SnapshotVm, self._take_snapshot),
            "vm.fork": (ForkVm, self._fork),
            "vm.kill": (VmReference, self._kill),
            "vm.delete": (DeleteVm, self._delete),
            "vm.set": (SetVm, self._set),
            "vm.touch": (VmReference, self._touch),
            "vm.wait": (WaitVm, self._wait),
            "vm.prune": (PruneVms, self._prune_vms),
            "vm.health": (VmReference, self._check),
            "vm.publish": (PublishPort, self._publish),
            "vm.unpublish": (UnpublishPort, self._unpublish),
            "vm.ports": (PortsOf, self._show_ports),
        }

    async def _create(self, params: CreateRequest, connection: Connection) -> None:
        self._creator.check(params)
        if params.ephemeral:
            raise BadRequest("only vm.run has a session that an ephemeral VM could belong to")
        await self._operate(
            connection,
            "vm.create",
            params.name,
            lambda progress: self._creator.create(params, progress),
        )

    async def _start(self, params: StartVm, connection: Connection) -> None:
        check_boot_timeout(params.boot_timeout_s)
        await self._operate(
            connection,
            "vm.start",
            params.vm,
            lambda progress: self._lifecycle.start(
                params.vm, progress, boot_timeout_s=params.boot_timeout_s, cold=params.cold
            ),
        )

    async def _restart(self, params: StartVm, connection: Connection) -> None:
        check_boot_timeout(params.boot_timeout_s)
        await self._operate(
            connection,
            "vm.restart",
            params.vm,
            lambda progress: self._lifecycle.restart(
                params.vm, progress, boot_timeout_s=params.boot_timeout_s
            ),
        )

    async def _take_snapshot(self, params: SnapshotVm, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.snapshot",
            params.vm,
            lambda progress: self._snapshots.take(params.vm, params.name, progress),
        )

    async def _fork(self, params: ForkVm, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.fork",
            params.vm,
            lambda progress: self._forks.fork(params.vm, params.count, params.name, progress),
        )

    async def _stop(self, params: StopVm, connection: Connection) -> None:
        if params.suspend:
            await self._operate(
                connection,
                "vm.suspend",
                params.vm,
                lambda progress: self._suspension.suspend(params.vm, progress),
            )
            return
        await self._operate(
            connection,
            "vm.stop",
            params.vm,
            lambda progress: self._lifecycle.stop(params.vm, progress),
        )

    async def _kill(self, params: VmReference, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.kill",
            params.vm,
            lambda progress: self._lifecycle.kill(params.vm, progress),
        )

    async def _delete(self, params: DeleteVm, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.delete",
            params.vm,
            lambda progress: self._lifecycle.delete(params.vm, progress, force=params.force),
        )

    async def _set(self, params: SetVm, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.set",
            params.vm,
            lambda progress: self._lifecycle.change(
                params.vm, params.change.applied, progress, hot=params.change.hot
            ),
        )

    async def _touch(self, params: VmReference, connection: Connection) -> None:
        vm = await self._vms.resolve(params.vm)
        await self._vms.touch(vm.id)
        await connection.result(await self._vms.show(vm.id))

    async def _wait(self, params: WaitVm, connection: Connection) -> None:
        waiting = asyncio.create_task(
            wait_for(self._vms, self._health, params.vm, params.goal, params.timeout_s)
        )
        leaving = asyncio.create_task(connection.wait_disconnect())
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ConnectionError("the client is gone")
            await connection.result(waiting.result())
        finally:
            for task in (waiting, leaving):
                task.cancel()
            await asyncio.gather(waiting, leaving, return_exceptions=True)

    async def _prune_vms(self, params: PruneVms, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.prune",
            "",
            lambda progress: self._prune.run(
                params.unused_for_s, progress, dry_run=params.dry_run, only=params.only
            ),
        )

    async def _check(self, params: VmReference, connection: Connection) -> None:
        await connection.result(await self._health.check(await self._vms.show(params.vm)))

    async def _publish(self, params: PublishPort, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.publish",
            params.vm,
            lambda progress: self._ports.publish(params.vm, params.port, progress),
        )

    async def _unpublish(self, params: UnpublishPort, connection: Connection) -> None:
        await self._operate(
            connection,
            "vm.unpublish",
            params.vm,
            lambda progress: self._ports.unpublish(
                params.vm, params.host, params.host_port, progress
            ),
        )

    async def _show_ports(self, params: PortsOf, connection: Connection) -> None:
        await connection.result(await self._ports.show(params.vm))

    async def _operate(
        self,
        connection: Connection,
        kind: str,
        target: str,
        work: Callable[[Progress], Awaitable[T]],
    ) -> None:
        await operate(self._operations, connection, kind, target, work)
