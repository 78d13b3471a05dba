"""Moves bytes between a client's connection and a guest's stream, or from a log file."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from banger.base.errors import BadRequest, BangerError
from banger.guest.channel import AgentStream, Data, Eof, ExitKind, Stderr, StreamEnded
from banger.guest.channel import Exit as GuestExit
from banger.rpc.protocol import (
    CREDIT_BYTES,
    FRAME_MAX_BYTES,
    NUMBER,
    WINDOW_SIZE,
    Exit,
    FrameType,
)
from banger.rpc.server import Connection, error_info

#: A file tells nobody that it has grown; inotify would need a binding of our own.
_FOLLOW_INTERVAL_S = 0.2
#: Input passed on at once: a part of the credit, so that the client fills up while we wait.
_FEED_BYTES = CREDIT_BYTES // 4


async def relay(connection: Connection, stream: AgentStream) -> Exit:
    """Carry frames both ways until the guest's process ends; how it ended.

    Raises ConnectionError when the client goes first (the guest's process then gets SIGHUP),
    BangerError when the agent is lost or the client does not speak the protocol.
    """
    stdin = _Input()
    reading = asyncio.create_task(_read(connection, stream, stdin))
    feeding = asyncio.create_task(_feed(connection, stream, stdin))
    to_client = asyncio.create_task(_to_client(connection, stream))
    running: set[asyncio.Task[Any]] = {reading, feeding, to_client}
    try:
        while not to_client.done():
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running -= done
            for task in done - {to_client}:
                if not to_client.done():
                    await task  # raises when the client is gone or broke the protocol
        return await to_client
    finally:
        for task in (reading, feeding, to_client):
            task.cancel()
        await asyncio.gather(reading, feeding, to_client, return_exceptions=True)
        with suppress(BangerError):
            await stream.reset()


class _Input:
    """What the client sent for stdin and the guest has not taken yet: at most CREDIT_BYTES."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._credit = CREDIT_BYTES
        self._eof = False
        self._arrived = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Raises BadRequest for more than the client has credit for."""
        if len(data) > self._credit:
            raise BadRequest(f"unexpected frame DATA of {len(data)} bytes: the credit is spent")
        self._credit -= len(data)
        self._held += data
        self._arrived.set()

    def end(self) -> None:
        self._eof = True
        self._arrived.set()

    async def take(self) -> bytes:
        """Some of what is held, once there is any; nothing at the end."""
        while not self._held and not self._eof:
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._held[:_FEED_BYTES])
        del self._held[:_FEED_BYTES]
        return data

    def allow(self, count: int) -> None:
        """The client may send so many bytes more."""
        self._credit += count


async def _read(connection: Connection, stream: AgentStream, stdin: _Input) -> None:
    """Ends only by an error: the process's end is what ends a session.

    It never waits for the guest: a signal, or the client's end, may be behind input that nobody
    reads.
    """
    while (received := await connection.read_frame()) is not None:
        await _pass_on(stream, stdin, *received)
    raise ConnectionError("the client is gone")


async def _feed(connection: Connection, stream: AgentStream, stdin: _Input) -> None:
    """Pass input on as the guest takes it, and let the client send as much again."""
    # What still comes for a process that has ended stays here: its exit is on its way.
    with suppress(StreamEnded):
        while data := await stdin.take():
            await stream.send(data)
            stdin.allow(len(data))
            await connection.send_frame(FrameType.WINDOW, NUMBER.pack(len(data)))
        await stream.send_eof()


async def _pass_on(stream: AgentStream, stdin: _Input, kind: FrameType, payload: bytes) -> None:
    if kind is FrameType.DATA:
        stdin.put(payload)
    elif kind is FrameType.EOF:
        stdin.end()
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
