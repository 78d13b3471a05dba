"""Conversations with QEMU over its control protocol, QMP, which its own client `qemu.qmp` speaks.

A machine's state without its memory (a few dozen KiB) is written and read by QEMU's migration, to
and from a descriptor that is handed over: under our seccomp filter it can start no process, and
what it may open is nobody's business here.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

from qemu.qmp import QMPClient, QMPError

from banger.base.errors import OperationTimeout, Unavailable
from banger.drivers.base import Disk
from banger.drivers.hypervisor.process_log import Log, how_it_ended

#: 50 to 100 ms are usual; a host that swaps may take seconds.
_LAUNCH_TIMEOUT_S = 30.0
_QMP_TIMEOUT_S = 5.0
#: For the answer to one command, however long the conversation may take: all are done in some
#: milliseconds, or go on by themselves. When one was not answered the next is hardly waited for.
_ANSWER_TIMEOUT_S = 15.0
_LATER_ANSWER_TIMEOUT_S = 1.0
#: 10 to 20 ms are usual.
_STATE_TIMEOUT_S = 30.0
_POLL_S = 0.002

#: Memory in a shared file, or in a private mapping of one, is not part of the state.
_STATE_ONLY = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_STATE_FD = "state"


class _Client(QMPClient):
    """One that waits for no answer for ever, also where a cancellation may not end the waiting."""

    _timeout_s = _ANSWER_TIMEOUT_S

    async def execute(
        self, cmd: str, arguments: Mapping[str, object] | None = None, oob: bool = False
    ) -> object:
        """Raises Unavailable when there is no answer in time."""
        timeout_s = self._timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await super().execute(cmd, arguments, oob)
        except TimeoutError as error:
            self._timeout_s = _LATER_ANSWER_TIMEOUT_S
            raise Unavailable(
                f"QEMU hangs: it does not answer {cmd} within {timeout_s:g} s",
                hint="end it: banger vm kill",
            ) from error


@asynccontextmanager
async def conversation(
    control_socket: Path, timeout_s: float | None = None
) -> AsyncIterator[QMPClient]:
    """A short conversation with QEMU: it serves one client at a time, the next one waits.

    Without `timeout_s` it has as long as a question and its answer take at most. Raises
    Unavailable when it does not answer in time, here or in the block.
    """
    client = _Client("banger")
    timeout_s = timeout_s or _QMP_TIMEOUT_S
    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(str(control_socket))
            yield client
    except TimeoutError as error:  # says nothing itself
        raise Unavailable(
            f"QEMU does not answer at {control_socket} within {timeout_s:g} s"
        ) from error
    except (QMPError, OSError) as error:
        raise Unavailable(f"QEMU does not answer at {control_socket}: {error}") from error
    finally:
        await _disconnect(client)


@asynccontextmanager
async def launching(
    ours: socket.socket, ended: asyncio.Future[int], log: Log
) -> AsyncIterator[QMPClient]:
    """The first conversation, on the socket that QEMU inherited, once it answers.

    QEMU takes its first command in its main loop, so by then all devices and sockets are there.
    Raises Unavailable, with the end of its log, when it ends or hangs, here or in the block.
    """
    client = QMPClient("banger")
    connecting = asyncio.ensure_future(client.connect(ours))
    try:
        either: list[asyncio.Future[Any]] = [connecting, ended]
        await asyncio.wait(either, timeout=_LAUNCH_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done() and not ended.done():
            raise Unavailable(
                f"QEMU did not answer within {_LAUNCH_TIMEOUT_S:g} s; inspect {log.path}"
            )
        if not connecting.done() or connecting.exception() is not None:
            raise await _ending(ended, log)
        try:
            async with asyncio.timeout(_STATE_TIMEOUT_S):
                yield client
        except TimeoutError as error:
            raise OperationTimeout(f"QEMU hangs as it starts; inspect {log.path}") from error
        except (QMPError, OSError) as error:
            raise await _ending(ended, log, str(error)) from error
    finally:
        connecting.cancel()
        await asyncio.wait({connecting})
        await _disconnect(client)


async def _ending(ended: asyncio.Future[int], log: Log, why: str = "") -> Unavailable:
    """The error for a connection that fails: mostly QEMU is ending, and its status comes next."""
    await asyncio.wait({ended}, timeout=_QMP_TIMEOUT_S if not why else _POLL_S)
    how = how_it_ended(ended.result()) if ended.done() else why or "closed its control connection"
    tail = log.tail()
    return Unavailable(f"QEMU {how}{': ' if tail else ''}{tail}; inspect {log.path}")


async def _disconnect(client: QMPClient) -> None:
    # What went wrong on the connection is reported again here, as whatever it was.
    with suppress(QMPError, EOFError, OSError, asyncio.IncompleteReadError):
        await client.disconnect()


async def save_state(client: QMPClient, state: Path) -> None:
    """Pause the machine and write its state. Raises Unavailable when QEMU cannot."""
    await client.execute("stop")
    await client.execute("migrate-set-capabilities", _STATE_ONLY)
    await _hand_over(client, state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    await client.execute("migrate", {"uri": f"fd:{_STATE_FD}"})
    await _migrated(client)


async def load_state(client: QMPClient, state: Path, disks: tuple[Disk, ...]) -> None:
    """Give an incoming machine, which is paused, its state, and larger disks where they are asked
    for."""
    await client.execute("migrate-set-capabilities", _STATE_ONLY)
    await _hand_over(client, state, os.O_RDONLY)
    await client.execute("migrate-incoming", {"uri": f"fd:{_STATE_FD}"})
    await _migrated(client)
    for disk in disks:
        if disk.size_mib:  # the guest's driver is told
            size = {"node-name": disk.name, "size": disk.size_mib << 20}
            await client.execute("block_resize", size)


async def _hand_over(client: QMPClient, state: Path, flags: int) -> None:
    """Open the file of the state, and give QEMU the descriptor."""
    descriptor = os.open(state, flags | os.O_CLOEXEC, 0o600)
    try:
        client.send_fd_scm(descriptor)
    finally:
        os.close(descriptor)
    await client.execute("getfd", {"fdname": _STATE_FD})


async def _migrated(client: QMPClient) -> None:
    """Wait until the state has been written or read."""
    while True:
        answer = cast("dict[str, Any]", await client.execute("query-migrate"))
        match answer.get("status"):
            case "completed":
                return
            case "failed" | "cancelled":
                why = answer.get("error-desc", "for no reason that it gives")
                raise Unavailable(f"QEMU cannot move the machine's state: {why}")
        await asyncio.sleep(_POLL_S)
