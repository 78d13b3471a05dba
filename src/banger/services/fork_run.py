"""One command in several forks of a VM: prepared once, run side by side, compared afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, Conflict, NotFound
from banger.base.log import OperationLog, get_logger
from banger.base.model import ForkResult, ForkState, Results, Vm
from banger.git.shipment import shown
from banger.guest.channel import AgentStream, Data, ExitKind, Stderr
from banger.guest.channel import Exit as GuestExit
from banger.guest.requests import Exec
from banger.services.command import in_image, program
from banger.services.forks import ForkService
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Progress
from banger.services.results import ResultsService, log_of, patch_of, with_fork
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest
from banger.services.workspace import ExportRequest, Order, WorkspaceService

#: What a command prints beyond that is not kept.
_LOG_LIMIT_BYTES = 256 << 20
#: The number of the fork, in the environment of its command.
NUMBER_VARIABLE = "BANGER_FORK"


@dataclass(frozen=True)
class Trial:
    """What is to be run, and where."""

    create: CreateRequest
    order: Order | None
    command: Exec
    count: int
    #: Delete the forks when their commands have ended.
    remove: bool
    #: As for `command.program`.
    entrypoint: str | None = None


class ForkRuns:
    def __init__(
        self,
        vms: VmService,
        creator: VmCreator,
        lifecycle: Lifecycle,
        forks: ForkService,
        workspaces: WorkspaceService,
        results: ResultsService,
    ) -> None:
        self._vms = vms
        self._creator = creator
        self._lifecycle = lifecycle
        self._forks = forks
        self._workspaces = workspaces
        self._results = results
        #: The names of those that are under way.
        self._active: set[str] = set()

    async def run(self, trial: Trial, progress: Progress) -> Results:
        """Make a VM, give it its repository, fork it, and run the command in each fork.

        What a command printed, its status and what it changed are kept in any case, also of those
        that were broken off. The VM itself is gone when its forks are there.
        """
        forks = await self._made(trial, progress)
        begun: Results | None = None
        try:
            begun = await self._begun(trial, forks)
            running = _Running(self._results, begun, progress)
            await running.tell()
            if trial.order is not None or not trial.remove:
                for vm in forks:  # until now they would have gone with this daemon
                    await self._vms.keep(vm)
        except BaseException:
            await to_its_end(self._take_back(forks, begun))
            raise
        self._active.add(begun.name)
        tasks = [
            asyncio.create_task(self._one(trial, vm, number, running))
            for number, vm in enumerate(forks)
        ]
        try:
            # One that goes wrong, however, is no reason to end the others.
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
            await to_its_end(_ended(tasks))
            self._active.discard(begun.name)
        return running.results

    async def _begun(self, trial: Trial, forks: Sequence[Vm]) -> Results:
        repo_root = "" if trial.order is None else shown(str(trial.order.source.root))
        name = forks[0].name.rpartition("-")[0]
        results = await self._results.begin(name, repo_root, tuple(trial.command.arguments))
        waiting = tuple(
            ForkResult(number=number, vm_id=vm.id, vm_name=vm.name)
            for number, vm in enumerate(forks)
        )
        return msgspec.structs.replace(results, forks=waiting)

    async def _take_back(self, forks: Sequence[Vm], begun: Results | None) -> None:
        await self._forks.delete(forks)
        if begun is not None:
            await self._results.delete(begun)

    async def _made(self, trial: Trial, progress: Progress) -> list[Vm]:
        """The forks, in the state that all begin with; the VM they are of is gone."""
        create = msgspec.structs.replace(trial.create, ephemeral=True)
        source = await self._creator.create(create, progress)
        forks: list[Vm] = []
        try:
            if trial.order is not None:
                await self._workspaces.prepare(source.id, trial.order, progress)
            forks = await self._forks.fork(
                source.id, trial.count, source.name, progress, ephemeral=True
            )
            await self._forks.delete([source])
        except BaseException:
            await to_its_end(self._forks.delete([source, *forks]))
            raise
        return forks

    async def _one(self, trial: Trial, vm: Vm, number: int, running: _Running) -> None:
        """Run the command in one fork; what became of it is on the results in the end."""
        began = time.monotonic()
        result = running.results.forks[number]
        try:
            exit_code = await self._command(trial, vm, number, log_of(running.results, number))
            result = msgspec.structs.replace(result, state=ForkState.DONE, exit_code=exit_code)
        except (BangerError, OSError) as error:
            result = msgspec.structs.replace(result, state=ForkState.FAILED, error=str(error))
        except asyncio.CancelledError:
            result = msgspec.structs.replace(result, state=ForkState.FAILED, error="broken off")
            raise
        finally:
            seconds = round(time.monotonic() - began, 3)
            result = msgspec.structs.replace(result, seconds=seconds)
            await to_its_end(self._finish(trial, vm, result, running))

    async def _command(self, trial: Trial, vm: Vm, number: int, log: Path) -> int:
        environment = {**(trial.command.environment or {}), NUMBER_VARIABLE: str(number)}
        directory = trial.command.directory
        if directory is None and trial.order is not None:
            directory = trial.order.directory
        config = await self._vms.image_config(vm)
        asked = Exec(
            arguments=program(config, trial.command.arguments, trial.entrypoint),
            environment=environment,
            directory=directory,
            user=trial.command.user,
        )
        request = in_image(config, asked)
        async with self._vms.in_use(vm), await self._vms.open_stream(vm, request) as stream:
            await stream.send_eof()
            with log.open("wb") as out:
                exit_ = await _kept(stream, out)
        if exit_.kind is ExitKind.FAILED:
            raise exit_.error()
        return exit_.status

    async def _finish(self, trial: Trial, vm: Vm, result: ForkResult, running: _Running) -> None:
        """Save the patch; only then the VM may go."""
        saved = True
        if trial.order is not None:
            patch = patch_of(running.results, result.number)
            try:
                left_out = await self._workspaces.save(ExportRequest(vm=vm.id), patch, plain=True)
                if left_out:
                    saved, result = False, msgspec.structs.replace(result, error=left_out)
                changes = await self._workspaces.summary(patch)
                result = msgspec.structs.replace(
                    result,
                    files=len(changes),
                    insertions=sum(change.insertions or 0 for change in changes),
                    deletions=sum(change.deletions or 0 for change in changes),
                )
            except (BangerError, OSError) as error:
                saved = False
                why = f"its changes were not all saved: {error}"
                told = f"{result.error}; {why}" if result.error else why
                result = msgspec.structs.replace(result, error=told)
        if trial.remove and saved:
            await self._forks.delete([vm])
        await running.update(result)

    async def delete(self, results: Results) -> None:
        """Delete the results of a run, and those of its machines that are still there.

        Conflict while it is under way.
        """
        if results.name in self._active:
            raise Conflict(
                f'the commands of "{results.name}" are under way',
                hint="wait for them, or interrupt banger vm run",
            )
        for fork in results.forks:
            with suppress(NotFound), OperationLog("vm.delete", vm_id=fork.vm_id) as log:
                await self._lifecycle.delete(fork.vm_id, log, force=True)
        await self._results.delete(results)


class _Running:
    """The results of a run that is under way, as they come in."""

    def __init__(self, service: ResultsService, results: Results, progress: Progress) -> None:
        self.results = results
        self._service = service
        self._progress = progress
        self._writing = asyncio.Lock()

    async def update(self, fork: ForkResult) -> None:
        self.results = with_fork(self.results, fork)
        await self.tell()

    async def tell(self) -> None:
        forks = self.results.forks
        ended = sum(fork.state is not ForkState.RUNNING for fork in forks)
        self._progress.result(results=self.results)
        self._progress.stage("run", f"{ended} of {len(forks)} have ended", 100 * ended / len(forks))
        async with self._writing:  # or an older state could come later
            await self._service.save(self.results)


async def _kept(stream: AgentStream, out: BinaryIO) -> GuestExit:
    """Write what a command prints to its end; how it ended."""
    left = _LOG_LIMIT_BYTES
    while True:
        match await stream.receive():
            case GuestExit() as exit_:
                return exit_
            case Data(data) | Stderr(data):
                out.write(data[:left])
                out.flush()
                left = max(0, left - len(data))


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for failure in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(failure, Exception):
            get_logger().error("a fork's command", error=str(failure), exc_info=failure)
