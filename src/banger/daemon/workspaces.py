"""The methods of workspaces: repositories into guests, and what guests made of them out again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from banger.base.errors import BadRequest
from banger.base.log import OperationLog, vm_attributes
from banger.daemon.operate import operate
from banger.daemon.params import (
    ApplyWorkspace,
    PlanWorkspace,
    PrepareWorkspace,
)
from banger.daemon.relay import relay
from banger.rpc.protocol import Exit
from banger.rpc.server import Connection, error_info
from banger.services.operations import Operations
from banger.services.workspace import ExportRequest, WorkspaceService, exported_from
from banger.services.workspace_guest import LEFT_OUT, failure

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Workspaces:
    def __init__(self, workspaces: WorkspaceService, operations: Operations) -> None:
        self._workspaces = workspaces
        self._operations = operations

    def methods(self) -> Mapping[str, Row]:
        return {
            "vm.workspace.plan": (PlanWorkspace, self._plan),
            "vm.workspace.prepare": (PrepareWorkspace, self._prepare),
            "vm.workspace.export": (ExportRequest, self._export),
            "vm.workspace.changes": (ExportRequest, self._changes),
            "vm.workspace.apply": (ApplyWorkspace, self._apply),
        }

    async def _plan(self, params: PlanWorkspace, connection: Connection) -> None:
        await connection.result(await self._workspaces.plan(params.workspace))

    async def _prepare(self, params: PrepareWorkspace, connection: Connection) -> None:
        order = await self._workspaces.look(params.workspace)
        await operate(
            self._operations,
            connection,
            "vm.workspace.prepare",
            params.vm,
            lambda progress: self._workspaces.prepare(params.vm, order, progress),
        )

    async def _export(self, params: ExportRequest, connection: Connection) -> None:
        """Switches the connection: the patch, or the bundle, is what the guest prints."""
        async with self._workspaces.exporting(params) as (vm, stream):
            with OperationLog("vm.workspace.export", **vm_attributes(vm)):
                await connection.switch({"vm": vm})
                exit_ = await relay(connection, stream)
                if exit_.exit_code == LEFT_OUT:
                    exit_ = Exit(exit_code=0)  # what that is has gone with the stream, too
                if exit_.error is None and exit_.status != 0:
                    # Why, in the guest's own words, has gone with the stream.
                    error = failure(exit_.status, b"", exported_from(vm))
                    exit_ = Exit(error=error_info(error))
                await connection.send_exit(exit_)

    async def _changes(self, params: ExportRequest, connection: Connection) -> None:
        await connection.result(await self._workspaces.changes(_patch(params)))

    async def _apply(self, params: ApplyWorkspace, connection: Connection) -> None:
        await operate(
            self._operations,
            connection,
            "vm.workspace.apply",
            params.export.vm,
            lambda progress: self._workspaces.apply(
                _patch(params.export), params.path, params.umask, progress
            ),
        )


def _patch(request: ExportRequest) -> ExportRequest:
    if request.bundle:
        raise BadRequest("a bundle of commits is no patch")
    return request
