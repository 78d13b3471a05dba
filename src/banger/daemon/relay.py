"""Moves bytes between a client's connection and a guest's stream, or from a log file."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from banger.base.errors import BadRequest, BangerError
from banger.guest.channel import AgentStream, Data, Eof, ExitKind, Stderr, StreamEnded
from banger.guest.channel import Exit as GuestExit
from banger.rpc.protocol import FRAME_MAX_BYTES, NUMBER, WINDOW_SIZE, Exit, FrameType
from banger.rpc.server import Connection, error_info

#: A file tells nobody that it has grown; inotify would need a binding of our own.
_FOLLOW_INTERVAL_S = 0.2


async def relay(connection: Connection, stream: AgentStream) -> Exit:
    """Carry frames both ways until the guest's process ends; how it ended.

    Raises ConnectionError when the client goes first (the guest's process then gets SIGHUP),
    BangerError when the agent is lost or the client does not speak the protocol.
    """
    to_guest = asyncio.create_task(_to_guest(connection, stream))
    to_client = asyncio.create_task(_to_client(connection, stream))
    try:
        await asyncio.wait({to_guest, to_client}, return_when=asyncio.FIRST_COMPLETED)
        if not to_client.done():
            await to_guest  # the client is gone, or said something that is not of the protocol
        return await to_client
    finally:
        for task in (to_guest, to_client):
            task.cancel()
        await asyncio.gather(to_guest, to_client, return_exceptions=True)
        with suppress(BangerError):
            await stream.reset()


async def _to_guest(connection: Connection, stream: AgentStream) -> None:
    """Ends only by an error: the process's end is what ends a session."""
    while True:
        received = await connection.read_frame()
        if received is None:
            raise ConnectionError("the client is gone")
        # What still comes for a process that has ended is dropped: its exit is on its way.
        with suppress(StreamEnded):
            await _pass_on(stream, *received)


async def _pass_on(stream: AgentStream, kind: FrameType, payload: bytes) -> None:
    if kind is FrameType.DATA:
        await stream.send(payload)
    elif kind is FrameType.EOF:
        await stream.send_eof()
    elif kind is FrameType.SIGNAL and len(payload) == NUMBER.size:
        await stream.signal(NUMBER.unpack(payload)[0])
    elif kind is FrameType.RESIZE and len(payload) == WINDOW_SIZE.size:
        await stream.resize(*WINDOW_SIZE.unpack(payload))
    else:
        raise BadRequest(f"unexpected frame {kind.name} of {len(payload)} bytes")


async def _to_client(connection: Connection, stream: AgentStream) -> Exit:
    while True:
        event = await stream.receive()
        if isinstance(event, Data):
            await connection.send_frame(FrameType.DATA, event.data)
        elif isinstance(event, Stderr):
            await connection.send_frame(FrameType.STDERR, event.data)
        elif isinstance(event, Eof):
            await connection.send_frame(FrameType.EOF)
        elif isinstance(event, GuestExit):
            return _as_exit(event)


def _as_exit(event: GuestExit) -> Exit:
    """The agent's word on how it ended, as the client's."""
    if event.kind is ExitKind.EXITED:
        return Exit(exit_code=event.value)
    if event.kind is ExitKind.KILLED:
        return Exit(signal=event.value)
    return Exit(error=error_info(event.error()))


async def _client_gone(connection: Connection) -> None:
    """Return when the client has gone; what it says until then is of no interest."""
    while await connection.read_frame() is not None:
        pass


async def follow_file(connection: Connection, path: Path, *, follow: bool) -> None:
    """Send a file's bytes as DATA; with `follow` go on as it grows, until the client goes."""
    leaving = asyncio.create_task(_client_gone(connection))
    try:
        with path.open("rb") as file:
            while not leaving.done():
                if chunk := file.read(FRAME_MAX_BYTES):
                    await connection.send_frame(FrameType.DATA, chunk)
                elif follow:
                    await asyncio.wait({leaving}, timeout=_FOLLOW_INTERVAL_S)
                else:
                    return
        raise ConnectionError("the client is gone")
    except FileNotFoundError:
        return  # a VM that was never started has no console
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
