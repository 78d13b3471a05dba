"""Switched connections: a client's frames joined to a stream in a guest, or to a console's log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from banger.base.cancellation import to_its_end
from banger.base.errors import ErrorCode, Unavailable
from banger.base.model import Vm
from banger.daemon.guest_sessions import GuestSessions, exec_request, explained, unless_gone
from banger.daemon.params import ConnectTo, Console, CopyIn, CopyOut, Exec, FileKind, GuestPath, Run
from banger.daemon.relay import follow_file
from banger.daemon.run_session import RunSession
from banger.guest import requests
from banger.guest.channel import AgentStream, Data
from banger.guest.channel import Exit as GuestExit
from banger.rpc.protocol import Exit, FrameType
from banger.rpc.server import Connection, error_info
from banger.services.command import in_image
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Operations
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.workspace import WorkspaceService

_KINDS = {"f": "file", "d": "directory", "l": "link", "o": "other"}

_GREETING_POLL_S = 0.1

Row = tuple[type[Any], Callable[[Any, Connection], Awaitable[None]]]


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
        self._guests = GuestSessions(vms)
        self._run = RunSession(vms, self._guests, creator, lifecycle, workspaces, operations)

    def methods(self) -> Mapping[str, Row]:
        return {
            "vm.run": (Run, self._run.run),
            "vm.exec": (Exec, self._exec),
            "vm.console": (Console, self._console),
            "vm.copy_out": (CopyOut, self._copy_out),
            "vm.copy_in": (CopyIn, self._copy_in),
            "vm.connect": (ConnectTo, self._connect),
            "vm.stat": (GuestPath, self._stat),
        }

    async def _exec(self, params: Exec, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._guests.session("vm.exec", vm):
            request = in_image(await self._vms.image_config(vm), exec_request(params.command))
            stream = await self._vms.open_stream(vm, request)
            await connection.switch({"vm": vm})
            exit_ = await self._guests.relay(connection, stream, vm)
            await connection.send_exit(explained(exit_, params.command, request))

    async def _connect(self, params: ConnectTo, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._guests.session("vm.connect", vm):
            request = requests.Connect(params.port)
            greeting = b""
            if params.greeting_timeout_s:
                greeted = self._greeted(vm, request, params.greeting_timeout_s)
                stream, greeting = await unless_gone(connection, greeted)
            else:
                stream = await self._vms.open_stream(vm, request)
            async with stream:
                await connection.switch({"vm": vm})
                if greeting:
                    await connection.send_frame(FrameType.DATA, greeting)
                exit_ = await self._guests.relay(connection, stream, vm)
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
        async with self._guests.session("vm.copy_out", vm):
            request = requests.Pack(params.path, name=params.name or None)
            await self._serve(connection, await self._vms.open_stream(vm, request), vm)

    async def _copy_in(self, params: CopyIn, connection: Connection) -> None:
        vm = await self._vms.running(params.vm)
        async with self._guests.session("vm.copy_in", vm):
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
        await connection.send_exit(await self._guests.relay(connection, stream, vm))


def _unreachable(vm: Vm, request: requests.Connect, why: str) -> Unavailable:
    return Unavailable(
        f'port {request.port} of vm "{vm.name}": {why}',
        hint=f"what listens in it: banger vm ports {vm.name}",
    )
