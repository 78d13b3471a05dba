"""Connections to a published port, into a guest that is made up here.

The sockets are real ones on loopback addresses, with ports that the kernel chose.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self

import pytest

from banger.base.errors import BangerError, Unavailable
from banger.base.model import PublishedPort
from banger.guest.channel import AgentStream, Data, Eof, Event, ExitKind, StreamEnded
from banger.guest.channel import Exit as GuestExit
from banger.services import admission as admission_module
from banger.services.admission import Admission
from banger.services.forward import Forward
from banger.services.listeners import bind, open_listener
from fakes import descriptors
from loopback import any_port, dial, hang_up, is_reset

_TIMEOUT_S = 10.0
_WINDOW_BYTES = 262_144
_OVER = GuestExit(ExitKind.EXITED, 0, "")
_REFUSED = GuestExit(ExitKind.FAILED, errno.ECONNREFUSED, "port 80: Connection refused")


class GuestEnd:
    """A connection in the guest, as its daemon's side is used: what was sent, what comes."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.received = bytearray()
        self.finished = asyncio.Event()
        self.was_reset = asyncio.Event()
        #: Set while the guest reads.
        self.reads = asyncio.Event()
        self.reads.set()
        self.waits = asyncio.Event()
        self.over = False
        self._events: asyncio.Queue[Event | BangerError] = asyncio.Queue(4)

    async def say(self, *events: Event | BangerError) -> None:
        """Waits while the host does not take them, as credit makes an agent wait."""
        for event in events:
            await self._events.put(event)

    # As AgentStream.

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.was_reset.set()

    async def receive(self) -> Event:
        event = await self._events.get()
        if isinstance(event, BangerError):
            raise event
        return event

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        if not self.reads.is_set():
            self.waits.set()
            await self.reads.wait()
        if self.over:
            raise StreamEnded("over")
        self.received += data

    async def send_eof(self) -> None:
        self.finished.set()


class Guest:
    """Where connections are opened to. ``serve`` is what each does there."""

    def __init__(self) -> None:
        self.ends: asyncio.Queue[GuestEnd] = asyncio.Queue()
        self.error: Exception | None = None
        self.serve: Callable[[GuestEnd], Any] | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.opened = 0

    async def connect(self, port: int) -> AgentStream:
        if self.error is not None:
            raise self.error
        end = GuestEnd(port)
        self.opened += 1
        if self.serve is not None:
            self.tasks.append(asyncio.create_task(self.serve(end)))
        else:
            self.ends.put_nowait(end)
        return end  # type: ignore[return-value]


class Uses:
    """Counts entries and exits of "in use"."""

    def __init__(self) -> None:
        self.entered = 0
        self.left = 0

    @asynccontextmanager
    async def __call__(self, *_: object) -> AsyncIterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.left += 1


async def echo(end: GuestEnd) -> None:
    """Say what was heard once it is complete."""
    await end.finished.wait()
    data = bytes(end.received)
    await end.say(*(Data(data[at : at + 65536]) for at in range(0, len(data), 65536)))
    await end.say(Eof(), _OVER)


@asynccontextmanager
async def forwarding(guest: Guest, limit: int = 16) -> AsyncIterator[tuple[Forward, Uses]]:
    uses = Uses()
    admission = Admission(asyncio.Semaphore(1000), uses, limit)
    port = await any_port()
    forward = Forward(port, await open_listener(port), connect=guest.connect, admission=admission)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            yield forward, uses
    finally:
        await forward.close()
        await admission.close()
        for task in guest.tasks:
            task.cancel()
        await asyncio.gather(*guest.tasks, return_exceptions=True)


# Bytes


async def test_bytes_pass_both_ways_and_each_direction_ends_by_itself() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        reader, writer = client = await dial(forward.port)
        end = await guest.ends.get()
        assert end.port == 80
        await end.say(Data(b"hello"), Eof())
        assert await reader.read() == b"hello"
        writer.write(b"still ")
        await writer.drain()
        writer.write(b"here")
        writer.write_eof()
        await end.finished.wait()
        assert end.received == b"still here"
        await end.say(_OVER)
        await end.was_reset.wait()  # the stream's end: a reset of what is over does nothing
        await hang_up(client)


async def test_a_client_that_has_finished_still_gets_its_answer() -> None:
    guest = Guest()
    guest.serve = echo
    data = os.urandom(3 << 20)
    async with forwarding(guest) as (forward, _):
        reader, writer = client = await dial(forward.port)
        writer.write(data)
        writer.write_eof()
        assert hashlib.sha256(await reader.read()).digest() == hashlib.sha256(data).digest()
        await hang_up(client)


async def test_a_guest_that_does_not_read_stops_its_client() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        _, writer = client = await dial(forward.port)
        end = await guest.ends.get()
        end.reads.clear()
        data = os.urandom(32 << 20)  # more than both sockets' buffers hold
        writer.write(data)
        writing = asyncio.create_task(writer.drain())
        await end.waits.wait()
        assert not writing.done()
        assert not end.received
        end.reads.set()
        await writing
        writer.write_eof()
        await end.finished.wait()
        assert hashlib.sha256(end.received).digest() == hashlib.sha256(data).digest()
        await hang_up(client)


async def test_a_client_that_does_not_read_stops_its_guest() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (forward.port.host, forward.port.host_port))
        end = await guest.ends.get()
        chunk = bytes(_WINDOW_BYTES)
        talking = asyncio.create_task(end.say(*[Data(chunk)] * 200, Eof(), _OVER))
        await asyncio.wait({talking}, timeout=0.3)
        assert not talking.done()
        size = 0
        while data := await loop.sock_recv(client, 1 << 20):
            size += len(data)
        assert size == 200 * _WINDOW_BYTES
        await talking
        client.close()


# Ends


async def test_a_port_that_the_guest_refuses_resets_the_client_and_no_other() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        first = await dial(forward.port)
        end = await guest.ends.get()
        for _ in range(20):
            second = await dial(forward.port)
            refusing = await guest.ends.get()
            await refusing.say(_REFUSED)
            assert await is_reset(second)
            await refusing.was_reset.wait()
            await hang_up(second)
        await end.say(Data(b"unharmed"), Eof(), _OVER)
        assert await first[0].read() == b"unharmed"
        await hang_up(first)


async def test_an_agent_that_is_lost_resets_the_client() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        client = await dial(forward.port)
        end = await guest.ends.get()
        await end.say(Data(b"cut sh"), Unavailable("the connection to the guest agent was lost"))
        assert await is_reset(client)
        await hang_up(client)


@pytest.mark.parametrize("error", [Unavailable("no agent"), ZeroDivisionError("a bug")])
async def test_a_guest_that_cannot_be_asked_resets_the_client_and_the_port_stays(
    error: Exception,
) -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        guest.error = error
        client = await dial(forward.port)
        assert await is_reset(client)
        await hang_up(client)
        guest.error = None
        guest.serve = echo
        reader, writer = client = await dial(forward.port)
        writer.write_eof()
        assert await reader.read() == b""
        await hang_up(client)


async def test_a_client_that_breaks_off_ends_its_connection_in_the_guest() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        _, writer = client = await dial(forward.port)
        end = await guest.ends.get()
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await hang_up(client)
        await end.was_reset.wait()


@pytest.mark.parametrize("finished", [False, True])
async def test_a_client_that_breaks_off_while_the_guest_takes_nothing_is_noticed(
    finished: bool,
) -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        _, writer = client = await dial(forward.port)
        end = await guest.ends.get()
        end.reads.clear()
        writer.write(b"x")
        if finished:
            writer.write_eof()
        await end.waits.wait()
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await hang_up(client)
        await end.was_reset.wait()


async def test_a_client_that_only_waits_for_its_answer_is_not_taken_for_broken() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        reader, writer = client = await dial(forward.port)
        end = await guest.ends.get()
        end.reads.clear()
        await end.say(Eof())  # both directions are closed now, with input still on its way
        assert await reader.read() == b""
        writer.write(b"x" * 100_000)
        writer.write_eof()
        await end.waits.wait()
        await asyncio.sleep(0.1)
        end.reads.set()
        await end.finished.wait()
        assert len(end.received) == 100_000
        await end.say(_OVER)
        await hang_up(client)


async def test_what_the_guest_takes_no_more_of_ends_with_its_exit() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        reader, writer = client = await dial(forward.port)
        end = await guest.ends.get()
        end.over = True
        writer.write(b"too late")
        await end.say(Data(b"bye"), Eof(), _OVER)
        assert await reader.read() == b"bye"
        await end.was_reset.wait()
        await hang_up(client)


async def test_closing_resets_the_connections_and_frees_the_port() -> None:
    guest = Guest()
    before = descriptors()
    async with forwarding(guest) as (forward, _):
        clients = [await dial(forward.port) for _ in range(5)]
        ends = [await guest.ends.get() for _ in clients]
        await forward.close()
        assert all([await is_reset(client) for client in clients])
        assert all(end.was_reset.is_set() for end in ends)
        with pytest.raises(ConnectionRefusedError):
            await dial(forward.port)
        bind(forward.port.host, forward.port.host_port).close()
        await forward.close()
        await hang_up(*clients)
    assert descriptors() == before


async def test_a_closing_that_is_cancelled_leaves_nothing_open() -> None:
    before = descriptors()
    guest = Guest()
    async with forwarding(guest) as (forward, _):
        client = await dial(forward.port)
        await guest.ends.get()
        closing = asyncio.create_task(forward.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        bind(forward.port.host, forward.port.host_port).close()
        assert await is_reset(client)
        await hang_up(client)
    assert descriptors() == before


# How many


async def test_fifty_connections_at_once() -> None:
    guest = Guest()
    guest.serve = echo

    async def talk(number: int, port: PublishedPort) -> bool:
        reader, writer = client = await dial(port)
        data = bytes([number]) * 100_000
        writer.write(data)
        writer.write_eof()
        said = await reader.read()
        await hang_up(client)
        return said == data

    async with forwarding(guest, limit=64) as (forward, _):
        assert all(await asyncio.gather(*(talk(number, forward.port) for number in range(50))))


async def test_who_comes_when_there_are_too_many_waits_for_one_to_end() -> None:
    guest = Guest()
    async with forwarding(guest, limit=2) as (forward, _):
        clients = [await dial(forward.port) for _ in range(4)]
        ends = [await guest.ends.get() for _ in range(2)]
        await asyncio.sleep(0.05)
        assert guest.opened == 2
        await ends[0].say(Eof(), _OVER)
        ends.append(await guest.ends.get())
        await ends[1].say(_REFUSED)
        ends.append(await guest.ends.get())
        assert guest.opened == 4
        await hang_up(*clients)


async def test_a_connection_that_waits_for_room_ends_with_its_port() -> None:
    guest = Guest()
    before = descriptors()
    async with forwarding(guest, limit=1) as (forward, _):
        clients = [await dial(forward.port) for _ in range(3)]
        await guest.ends.get()
        await forward.close()
        assert all([await is_reset(client) for client in clients])
        await hang_up(*clients)
    assert descriptors() == before


async def test_one_vm_cannot_take_the_room_of_all() -> None:
    uses = Uses()
    of_all = asyncio.Semaphore(3)
    one, other = (Admission(of_all, uses, 2) for _ in range(2))
    await one.enter()
    await one.enter()
    waiting = asyncio.create_task(one.enter())
    await other.enter()
    full = asyncio.create_task(other.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert not full.done()
    full.cancel()
    await asyncio.gather(full, return_exceptions=True)
    one.leave()
    await waiting
    for admission in (one, one, other):
        admission.leave()
    assert not of_all.locked()
    async with asyncio.timeout(_TIMEOUT_S):  # who gave up waiting has given its place back
        await other.enter()
        await other.enter()
    other.leave()
    other.leave()
    await asyncio.gather(one.close(), other.close())


# Use


async def test_a_vm_is_in_use_while_it_has_connections() -> None:
    guest = Guest()
    async with forwarding(guest) as (forward, uses):
        assert uses.entered == 0
        clients = [await dial(forward.port) for _ in range(3)]
        ends = [await guest.ends.get() for _ in clients]
        assert (uses.entered, uses.left) == (1, 0)
        for end in ends:
            await end.say(Eof(), _OVER)
        while not uses.left:
            await asyncio.sleep(0.01)
        await hang_up(*clients)
        later = await dial(forward.port)
        await guest.ends.get()
        assert uses.entered == 2
        await hang_up(later)


async def test_a_use_that_cannot_be_noted_harms_no_connection() -> None:
    def full_disk() -> AbstractAsyncContextManager[None]:
        raise OSError(errno.ENOSPC, "disk full")

    admission = Admission(asyncio.Semaphore(9), full_disk)
    await admission.enter()
    await asyncio.sleep(0)
    await admission.enter()
    admission.leave()
    admission.leave()
    await admission.close()


async def test_a_vm_is_in_use_again_by_who_comes_while_the_end_of_its_use_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that lasts would else not keep its VM from being stopped as unused."""
    monkeypatch.setattr(admission_module, "_LINGER_S", 0)
    entered: asyncio.Queue[None] = asyncio.Queue()
    noting, noted = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def in_use() -> AsyncIterator[None]:
        entered.put_nowait(None)
        yield
        noting.set()
        await noted.wait()

    admission = Admission(asyncio.Semaphore(9), in_use)
    async with asyncio.timeout(_TIMEOUT_S):
        await admission.enter()
        await entered.get()
        admission.leave()
        await noting.wait()
        await admission.enter()
        noted.set()
        await entered.get()
    admission.leave()
    await admission.close()
