"""What every session with a guest has: a client's frames joined to a stream in it.

A session belongs to its client, as under ssh: when the client goes, the guest's processes get
SIGHUP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from banger.base.errors import BadRequest, ErrorCode, Unavailable
from banger.base.log import OperationLog, vm_attributes
from banger.base.model import Vm
from banger.daemon.params import Command
from banger.daemon.relay import relay
from banger.guest import requests
from banger.guest.channel import AgentStream
from banger.rpc.protocol import Exit
from banger.rpc.server import Connection
from banger.services.vm import VmService

T = TypeVar("T")


class GuestSessions:
    """Sessions with guests, which count as use of their VMs."""

    def __init__(self, vms: VmService) -> None:
        self._vms = vms

    @asynccontextmanager
    async def session(self, operation: str, vm: Vm) -> AsyncIterator[None]:
        with OperationLog(operation, **vm_attributes(vm)):
            async with self._vms.in_use(vm):
                yield

    async def relay(self, connection: Connection, stream: AgentStream, vm: Vm) -> Exit:
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


async def unless_gone(connection: Connection, work: Coroutine[Any, Any, T]) -> T:
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


def explained(exit_: Exit, asked: Command, request: requests.Exec) -> Exit:
    error = exit_.error
    if error is None or error.hint:
        return exit_
    hint = of_its_user(error.code, asked, request)
    return msgspec.structs.replace(exit_, error=msgspec.structs.replace(error, hint=hint))


def of_its_user(code: str, asked: Command, request: requests.Exec) -> str:
    """What to do when it is the image's user who is not known in the guest, or may not go there;
    empty when it is not."""
    if asked.user or request.user is None:
        return ""
    unknown = code == ErrorCode.NOT_FOUND and not asked.cwd
    if not unknown and code != ErrorCode.PERMISSION_DENIED:
        return ""
    return f'its image runs programs as "{request.user}"; as another user: -u root'


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
