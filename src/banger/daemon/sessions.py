"""Switched connections: a client's frames joined to a stream in a guest.

A session belongs to its client, as under ssh: when the client goes, the guest's processes get
SIGHUP, and a VM made for the session (``--rm``) is deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from banger.daemon.params import (
    Command,
    ConnectTo,
    Console,
    CopyIn,
    CopyOut,
    Exec,
    FileKind,
    GuestPath,
    Run,
)
from banger.daemon.relay import follow_file, relay
from banger.guest import requests
from banger.guest.channel import AgentStream, Data
from banger.guest.channel import Exit as GuestExit
from banger.rpc.protocol import Exit, FrameType
from banger.rpc.server import Connection, error_info
from banger.services.command import in_image, program
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Operations, Progress, raise_failure
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest
from banger.services.workspace import ExportRequest, Order, WorkspaceService

_KINDS = {"f": "file", "d": "directory", "l": "link", "o": "other"}

_GREETING_POLL_S = 0.1

T = TypeVar("T")

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


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


class Sessions:
    """The methods that hold their connection."""

    def __init__(
        self,
        vms: VmService,
        creator: VmCreator,
        lifecycle: Lifecycle,
        workspaces: WorkspaceService,
        operations: Operations,
    ) -> None:
        self._vms = vms
        self._creator = creator
        self._lifecycle = lifecycle
        self._workspaces = workspaces
        self._operations = operations

    def methods(self) -> Mapping[str, Row]:
        return {
            "vm.run": (Run, self._run),
            "vm.exec": (Exec, self._exec),
            "vm.console": (Console, self._console),
            "vm.copy_out": (CopyOut, self._copy_out),
            "vm.copy_in": (CopyIn, self._copy_in),
            "vm.connect": (ConnectTo, self._connect),
            "vm.stat": (GuestPath, self._stat),
        }

    async def _exec(self, params: Exec, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._session("vm.exec", vm):
            request = in_image(await self._vms.image_config(vm), exec_request(params.command))
            stream = await self._vms.open_stream(vm, request)
            await connection.switch({"vm": vm})
            exit_ = await self._relay(connection, stream, vm)
            await connection.send_exit(_explained(exit_, params.command, request))

    async def _connect(self, params: ConnectTo, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._session("vm.connect", vm):
            request = requests.Connect(params.port)
            greeting = b""
            if params.greeting_timeout_s:
                greeted = self._greeted(vm, request, params.greeting_timeout_s)
                stream, greeting = await _unless_gone(connection, greeted)
            else:
                stream = await self._vms.open_stream(vm, request)
            async with stream:
                await connection.switch({"vm": vm})
                if greeting:
                    await connection.send_frame(FrameType.DATA, greeting)
                exit_ = await self._relay(connection, stream, vm)
            if exit_.error is not None and exit_.error.code == ErrorCode.UNAVAILABLE:
                error = _unreachable(vm, request, exit_.error.message)
                exit_ = Exit(error=error_info(error))
            await connection.send_exit(exit_)

    async def _greeted(
        self, vm: Vm, request: requests.Connect, timeout_s: float
    ) -> tuple[AgentStream, bytes]:
        """A connection to a server that speaks first, with what it said; tried until it does."""
        why = "it says nothing"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    stream = await self._vms.open_stream(vm, request)
                    try:
                        event = await stream.receive()
                    except BaseException:
                        await to_its_end(stream.reset())
                        raise
                    if isinstance(event, Data):
                        return stream, event.data
                    await stream.reset()
                    said = event.message if isinstance(event, GuestExit) else ""
                    why = said or "it hangs up"
                    await asyncio.sleep(_GREETING_POLL_S)
        except TimeoutError:
            raise _unreachable(vm, request, why) from None

    async def _copy_out(self, params: CopyOut, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._session("vm.copy_out", vm):
            request = requests.Pack(params.path, name=params.name or None)
            await self._serve(connection, await self._vms.open_stream(vm, request), vm)

    async def _copy_in(self, params: CopyIn, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._session("vm.copy_in", vm):
            request = requests.Unpack(params.directory, name=params.name or None)
            await self._serve(connection, await self._vms.open_stream(vm, request), vm)

    async def _stat(self, params: GuestPath, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        found = await self._vms.stat(vm, params.path)
        if found is None:
            await connection.result(FileKind(exists=False))
            return
        await connection.result(
            FileKind(
                exists=True,
                kind=_KINDS[found.type],
                mode=found.mode,
                size_bytes=found.size_bytes,
            )
        )

    async def _console(self, params: Console, connection: Connection) -> None:
        vm = await self._vms.show(params.vm)
        await connection.switch({"path": vm.runtime.log_path})
        await follow_file(connection, Path(vm.runtime.log_path), follow=params.follow)
        await connection.send_exit(Exit(exit_code=0))

    async def _serve(self, connection: Connection, stream: AgentStream, vm: Vm) -> None:
        await connection.switch({"vm": vm})
        await connection.send_exit(await self._relay(connection, stream, vm))

    async def _relay(self, connection: Connection, stream: AgentStream, vm: Vm) -> Exit:
        """`relay`; of an agent that is lost it tells when the whole machine has ended."""
        try:
            return await relay(connection, stream)
        except Unavailable as error:
            if await self._vms.runs_on(vm):
                raise
            raise Unavailable(
                f'vm "{vm.name}" has ended, and with it what ran in it',
                hint=f"why: banger vm show {vm.name}",
            ) from error

    @asynccontextmanager
    async def _session(self, operation: str, vm: Vm) -> AsyncIterator[None]:
        with OperationLog(operation, **vm_attributes(vm)):
            async with self._vms.in_use(vm):
                yield

    async def _run(self, params: Run, connection: Connection) -> None:
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
        async with self._session("vm.run", vm):
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
            await _unless_gone(connection, _tell(creation, connection))
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
            exit_ = await self._relay(connection, stream, vm)
            return _explained(exit_, launch.command, request), False
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
            why = _of_its_user(error.code, launch.command, request)
            runs = f"the VM runs: banger vm delete --force {vm.name}"
            error.hint = error.hint or "; ".join(filter(None, (why, runs)))
            raise
        result = {"vm": vm, "exit_code": exit_.value, "message": exit_.message}
        await connection.result(result)

    async def _end_session(self, vm: Vm) -> None:
        with suppress(NotFound), OperationLog("vm.delete", **vm_attributes(vm)) as log:
            # Somebody may have deleted it meanwhile.
            await self._lifecycle.delete(vm.id, log, force=True)


async def _unless_gone(connection: Connection, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to; it is cancelled, and ConnectionError raised, when the client goes."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(connection.wait_disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionError("the client is gone")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _unreachable(vm: Vm, request: requests.Connect, why: str) -> Unavailable:
    return Unavailable(
        f'port {request.port} of vm "{vm.name}": {why}',
        hint=f"what listens in it: banger vm ports {vm.name}",
    )


def _explained(exit_: Exit, asked: Command, request: requests.Exec) -> Exit:
    error = exit_.error
    if error is None or error.hint:
        return exit_
    hint = _of_its_user(error.code, asked, request)
    return msgspec.structs.replace(exit_, error=msgspec.structs.replace(error, hint=hint))


def _of_its_user(code: str, asked: Command, request: requests.Exec) -> str:
    """What to do when it is the image's user who is not known in the guest, or may not go there;
    empty when it is not."""
    if asked.user or request.user is None:
        return ""
    unknown = code == ErrorCode.NOT_FOUND and not asked.cwd
    if not unknown and code != ErrorCode.PERMISSION_DENIED:
        return ""
    return f'its image runs programs as "{request.user}"; as another user: -u root'


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


def exec_request(command: Command) -> requests.Exec:
    """What a client asked for, as a request to the agent. BadRequest for what is none."""
    return requests.Exec(
        arguments=command.argv,
        environment=dict(_assignment(pair) for pair in command.env),
        directory=command.cwd or None,
        user=command.user or None,
        pty=command.tty,
        login=not command.argv,
        detached=command.detach,
        rows=command.rows,
        columns=command.columns,
    )


def _assignment(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise BadRequest(f'"{pair}" is not K=V')
    return name, value
