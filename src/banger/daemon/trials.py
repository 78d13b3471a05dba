"""The methods of one command in several forks, and of what came of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from banger.base.errors import BadRequest, NotFound
from banger.daemon.guest_sessions import exec_request
from banger.daemon.operate import operate
from banger.daemon.params import ApplyResult, Nothing, ResultsReference, RunForks
from banger.rpc.server import Connection
from banger.services.fork_run import ForkRuns, Trial
from banger.services.operations import Operations
from banger.services.results import ResultsService, fork_of, patch_of
from banger.services.vm_create import VmCreator
from banger.services.workspace import WorkspaceService

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


class Trials:
    def __init__(
        self,
        runs: ForkRuns,
        results: ResultsService,
        workspaces: WorkspaceService,
        creator: VmCreator,
        operations: Operations,
    ) -> None:
        self._runs = runs
        self._results = results
        self._workspaces = workspaces
        self._creator = creator
        self._operations = operations

    def methods(self) -> Mapping[str, Row]:
        return {
            "vm.run_forks": (RunForks, self._run),
            "results.list": (Nothing, self._list),
            "results.show": (ResultsReference, self._show),
            "results.apply": (ApplyResult, self._apply),
            "results.delete": (ResultsReference, self._delete),
        }

    async def _run(self, params: RunForks, connection: Connection) -> None:
        self._creator.check(params.create)
        command = params.command
        if not command.argv or command.tty or command.detach:
            raise BadRequest("forks run a command, without a terminal, and are waited for")
        order = await self._workspaces.look(params.workspace) if params.workspace else None
        request = exec_request(command)
        trial = Trial(params.create, order, request, params.count, params.remove, params.entrypoint)
        await operate(
            self._operations,
            connection,
            "vm.run_forks",
            params.create.name,
            lambda progress: self._runs.run(trial, progress),
        )

    async def _list(self, _: Nothing, connection: Connection) -> None:
        await connection.result(await self._results.all())

    async def _show(self, params: ResultsReference, connection: Connection) -> None:
        await connection.result(await self._results.resolve(params.results))

    async def _apply(self, params: ApplyResult, connection: Connection) -> None:
        results = await self._results.resolve(params.results)
        fork_of(results, params.fork)
        patch = patch_of(results, params.fork)
        root = params.path or results.repo_root
        if not root or not patch.is_file():
            raise NotFound(f'fork {params.fork} of "{results.name}" has no patch')
        await operate(
            self._operations,
            connection,
            "results.apply",
            results.name,
            lambda _: self._workspaces.apply_saved(patch, Path(root), params.umask),
        )

    async def _delete(self, params: ResultsReference, connection: Connection) -> None:
        results = await self._results.resolve(params.results)
        if results.name != params.results:  # what it ends must be named in full
            raise NotFound(
                f'results "{params.results}" not found', hint=f"the whole name: {results.name}"
            )
        await operate(
            self._operations,
            connection,
            "results.delete",
            results.name,
            lambda _: self._runs.delete(results),
        )
