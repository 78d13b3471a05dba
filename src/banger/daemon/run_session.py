"""`vm run`: a VM made, a command run in it, and what is left afterwards, as one session.

The session belongs to its client: when the client goes, the guest's processes get SIGHUP, and a VM
made for the session (``--rm``) is deleted.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base.cancellation import to_its_end
from banger.base.errors import (
    BadRequest,
    BangerError,
    ErrorCode,
    Internal,
    NotFound,
    Unavailable,
    from_wire,
)
from banger.base.log import OperationLog, vm_attributes
from banger.base.model import ImageConfig, OperationState, Vm
from banger.daemon.guest_sessions import (
    GuestSessions,
    exec_request,
    explained,
    of_its_user,
    unless_gone,
)
from banger.daemon.params import Command, Run
from banger.guest import requests
from banger.rpc.protocol import Exit
from banger.rpc.server import Connection, error_info
from banger.services.command import in_image, program
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Operations, Progress, raise_failure
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest
from banger.services.workspace import ExportRequest, Order, WorkspaceService


@dataclass(frozen=True)
class Launch:
    """What `vm run` was told to run."""

    command: Command
    entrypoint: str | None
    #: Whether the image has a say in which program that is.
    of_image: bool

    def request(self, config: ImageConfig) -> requests.Exec:
        command = self.command
        if self.of_image:
            argv = program(config, command.argv, self.entrypoint)
            command = msgspec.structs.replace(command, argv=argv)
        return in_image(config, exec_request(command))


class RunSession:
    """The method ``vm.run``."""

    def __init__(
        self,
        vms: VmService,
        guests: GuestSessions,
        creator: VmCreator,
        lifecycle: Lifecycle,
        workspaces: WorkspaceService,
        operations: Operations,
    ) -> None:
        self._vms = vms
        self._guests = guests
        self._creator = creator
        self._lifecycle = lifecycle
        self._workspaces = workspaces
        self._operations = operations

    async def run(self, params: Run, connection: Connection) -> None:
        """Create, the repository, the command, the patch, then (``ephemeral``) delete: one
        session."""
        _check_run(params)
        self._creator.check(params.create)
        order = await self._workspaces.look(params.workspace) if params.workspace else None
        creation = self._operations.begin(
            "vm.create",
            params.create.name,
            lambda progress: self._made(params.create, order, progress),
        )
        vm = await self._await_creation(creation, connection, ephemeral=params.create.ephemeral)
        if params.command is None:
            await connection.result({"vm": vm})
            return
        command = params.command
        # With a repository it is a shell unless somebody says otherwise, not the image's program.
        own = order is None or bool(command.argv) or params.entrypoint is not None
        if order is not None and not command.cwd:
            command = msgspec.structs.replace(command, cwd=order.directory)
        launch = Launch(command, params.entrypoint, of_image=own)
        async with self._guests.session("vm.run", vm):
            if command.detach:
                await self._detach(vm, launch, connection)
                return
            keep = not params.create.ephemeral
            exit_ = Exit()
            try:
                if params.export:  # should this daemon die, nobody has saved what is in it
                    await self._vms.keep(vm)
                exit_, lost = await self._run_command(vm, launch, connection)
                if lost and not keep and await self._vms.runs_on(vm):
                    # A guest that hangs is kept, to be looked into.
                    await self._vms.keep(vm)
                    keep, exit_ = True, _kept(exit_, vm)
            finally:
                failed = await to_its_end(self._finish(vm, params, keep=keep))
            if failed is not None:
                exit_ = Exit(error=error_info(failed))
        if connection.switched:
            await connection.send_exit(exit_)
        elif exit_.error is not None:
            raise from_wire(exit_.error.code, exit_.error.message, exit_.error.hint)

    async def _made(self, create: CreateRequest, order: Order | None, progress: Progress) -> None:
        """Create a VM and give it its repository. It is gone again when somebody takes that back;
        when the transfer fails only one that is made for its session is."""
        await self._creator.work(create, progress)
        vm = progress.record.vm
        if order is None or vm is None:
            return
        try:
            await self._workspaces.prepare(vm.id, order, progress)
            progress.result(vm=await self._vms.show(vm.id))
        except BaseException as error:
            if create.ephemeral or isinstance(error, asyncio.CancelledError):
                await to_its_end(self._end_session(vm))
            elif isinstance(error, BangerError):
                error.hint = (
                    error.hint or f"the VM runs: banger vm workspace prepare {vm.name} PATH"
                )
            raise

    async def _finish(self, vm: Vm, params: Run, *, keep: bool) -> BangerError | None:
        """Save the guest's patch, and then delete the VM, unless it is to be kept; it is when what
        is in it could not be saved, and this is why."""
        if params.export:
            hint = f"the VM is kept: banger vm workspace export {vm.name}, or banger vm cp"
            mode = 0o666 & ~params.umask
            try:
                with OperationLog("vm.workspace.export", **vm_attributes(vm)):
                    request, path = ExportRequest(vm=vm.id), Path(params.export)
                    left_out = await self._workspaces.save(request, path, mode=mode)
            except (BangerError, OSError) as error:
                return Unavailable(
                    f"the changes were not saved to {params.export}: {error}", hint=hint
                )
            if left_out and not keep:
                return Unavailable(
                    f"not all changes were saved to {params.export}: {left_out}", hint=hint
                )
        if not keep:
            await self._end_session(vm)
        return None

    async def _await_creation(
        self, creation: Progress, connection: Connection, *, ephemeral: bool
    ) -> Vm:
        """Tell the client how it goes until the VM is there. A client that goes away ends the
        creation of a VM made for its session; any other is finished without it."""
        try:
            await unless_gone(connection, _tell(creation, connection))
        except BaseException:
            if ephemeral:
                await to_its_end(self._abandon(creation))
            raise
        raise_failure(creation.record)
        if creation.record.vm is None:
            raise Internal("a VM was created, but there is none")
        return creation.record.vm

    async def _abandon(self, creation: Progress) -> None:
        state = await self._operations.cancel(creation.record.id)
        if state.state is OperationState.COMPLETED and state.vm is not None:
            await self._end_session(state.vm)

    async def _run_command(
        self, vm: Vm, launch: Launch, connection: Connection
    ) -> tuple[Exit, bool]:
        """How the command ended, and whether the guest was lost by it.

        A failure of ours is an Exit, too: --rm comes after it.
        """
        try:
            request = launch.request(await self._vms.image_config(vm))
            stream = await self._vms.open_stream(vm, request)
            await connection.switch({"vm": vm})
            exit_ = await self._guests.relay(connection, stream, vm)
            return explained(exit_, launch.command, request), False
        except BangerError as error:
            lost = error.code in (ErrorCode.TIMEOUT, ErrorCode.UNAVAILABLE)
            return Exit(error=error_info(error)), lost

    async def _detach(self, vm: Vm, launch: Launch, connection: Connection) -> None:
        """Start the command, if there is one, and leave it. One that cannot be started has a
        shell's status."""
        request = launch.request(await self._vms.image_config(vm))
        if request.login:  # of no use to anybody
            await connection.result({"vm": vm, "started": False})
            return
        try:
            exit_ = await self._vms.call(vm, request)
        except BangerError as error:
            why = of_its_user(error.code, launch.command, request)
            runs = f"the VM runs: banger vm delete --force {vm.name}"
            error.hint = error.hint or "; ".join(filter(None, (why, runs)))
            raise
        result = {"vm": vm, "exit_code": exit_.value, "message": exit_.message}
        await connection.result(result)

    async def _end_session(self, vm: Vm) -> None:
        with suppress(NotFound), OperationLog("vm.delete", **vm_attributes(vm)) as log:
            # Somebody may have deleted it meanwhile.
            await self._lifecycle.delete(vm.id, log, force=True)


def _kept(exit_: Exit, vm: Vm) -> Exit:
    assert exit_.error is not None  # the guest was lost
    hint = f"the VM is kept: banger vm logs {vm.name}, then banger vm delete --force {vm.name}"
    return msgspec.structs.replace(exit_, error=msgspec.structs.replace(exit_.error, hint=hint))


def _check_run(params: Run) -> None:
    if params.create.ephemeral and (params.command is None or params.command.detach):
        raise BadRequest("a VM that is deleted with its session cannot be detached")
    if params.export and params.workspace is None:
        raise BadRequest("without a repository there are no changes to export")
    if params.export and (params.command is None or params.command.detach):
        raise BadRequest("the changes of a detached command are not known when it begins")
    if params.export:
        _check_can_be_written(Path(params.export))
    if not params.create.start:
        raise BadRequest("a VM that is not started runs no command")


def _check_can_be_written(path: Path) -> None:
    """Raise BadRequest for what could not be written in the end: who waits should know now."""
    if not path.is_absolute():
        raise BadRequest(f'"{path}" is no absolute path')
    if not path.parent.is_dir():
        raise BadRequest(f"{path.parent} is not a directory")
    if path.exists() and not path.is_file():
        raise BadRequest(f"{path} is not a file")


async def _tell(creation: Progress, connection: Connection) -> None:
    async for state in creation.changes():
        if not state.done:
            await connection.event(state)
