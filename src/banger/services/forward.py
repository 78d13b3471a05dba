"""One published port at work: its listener, and every connection joined to one in the guest.

Each connection is a CONNECT stream of the guest's agent, so it needs no network in the guest. Both
directions end on their own (EOF is passed on as such), and each side is read only as fast as the
other one takes it. What ends otherwise (the guest refuses, the agent is lost, the port is closed)
resets the client's connection: what was cut short must not look complete.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from banger.base.errors import BangerError
from banger.base.log import get_logger
from banger.base.model import PublishedPort
from banger.base.opid import current_op_id, new_op_id
from banger.guest.channel import AgentStream, Data, Eof, ExitKind, StreamEnded
from banger.guest.channel import Exit as GuestExit
from banger.services.admission import Admission

_READ_BYTES = 65_536
#: When the process has no descriptors left; nothing tells when there are some again.
_ACCEPT_RETRY_S = 1.0
#: struct linger (l_onoff, l_linger): closed by RST at once, or in good order.
_RESET = struct.pack("ii", 1, 0)
_ORDERLY = struct.pack("ii", 0, 0)


#: A client that is gone for good and was heard to finish looks like one that waits for its answer:
#: after a minute of silence it is asked whether it is there (seconds; then how many times).
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 60),
    (socket.TCP_KEEPINTVL, 15),
    (socket.TCP_KEEPCNT, 4),
)


class Breaks:
    """Tells when connections break that nobody reads or writes at that moment.

    A client that goes away while the guest takes nothing would else keep its place for ever.
    """

    def __init__(self) -> None:
        #: There while something is watched: a port without connections costs one descriptor.
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Callable[[], object]] = {}

    def watch(self, client: socket.socket, broken: Callable[[], object]) -> None:
        """Call `broken` when the kernel holds an error for `client`."""
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look, self._epoll)
        self._watched[client.fileno()] = broken
        # Errors are told unasked, and so are hang-ups: those once only, they may be in good order.
        self._epoll.register(client, select.EPOLLET)

    def forget(self, client: socket.socket) -> None:
        """It is about to be closed."""
        assert self._epoll is not None  # it was watched
        del self._watched[client.fileno()]
        self._epoll.unregister(client)
        if not self._watched:
            self.close()

    def _look(self, epoll: select.epoll) -> None:
        for descriptor, event in [] if epoll.closed else epoll.poll(0):
            if event & select.EPOLLERR and (broken := self._watched.get(descriptor)):
                broken()

    def close(self) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None


class Forward:
    """A listening socket of the host and its connections, until `close`.

    ``connect`` opens a stream to a port of the guest.
    """

    def __init__(
        self,
        port: PublishedPort,
        listener: socket.socket,
        *,
        connect: Callable[[int], Awaitable[AgentStream]],
        admission: Admission,
    ) -> None:
        self.port = port
        self._listener = listener
        self._connect = connect
        self._admission = admission
        self._breaks = Breaks()
        self._accepting: asyncio.Task[None] | None = None
        self._retired = False
        self._task = asyncio.create_task(self._run())

    async def retire(self, ended: Callable[[], object]) -> None:
        """Listen no more, and let the connections go on to their own ends: then call `ended`.

        A server may well close its listener while it still serves whom it has accepted.
        """
        self._retired = True
        self._task.add_done_callback(lambda _: ended())
        try:
            if self._accepting is not None:
                await _end(self._accepting)
        finally:
            self._listener.close()

    async def close(self) -> None:
        """Listen no more, and reset the connections. Idempotent; done even when cancelled."""
        try:
            await _end(self._task)
        finally:
            self._listener.close()
            self._breaks.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as connections:
            if not self._retired:
                self._accepting = connections.create_task(self._accept_all(connections))

    async def _accept_all(self, connections: asyncio.TaskGroup) -> None:
        while True:
            client = await self._accept()
            try:
                # One at a time: the others wait in the kernel's queue.
                await self._admission.enter()
            except BaseException:
                client.close()
                raise
            task = connections.create_task(self._serve(client))
            # A task that is cancelled before its first step never gets to a `finally`.
            task.add_done_callback(partial(self._ended, client))
            self._breaks.watch(client, task.cancel)

    async def _accept(self) -> socket.socket:
        while True:
            try:
                client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except ConnectionError:
                continue  # it went away while it waited
            except OSError as error:
                get_logger().error("cannot accept", port=str(self.port), error=str(error))
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                client.setsockopt(socket.IPPROTO_TCP, option, value)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return client

    def _ended(self, client: socket.socket, _: asyncio.Task[None]) -> None:
        self._breaks.forget(client)
        client.close()
        self._admission.leave()

    async def _serve(self, client: socket.socket) -> None:
        """One connection, to its end. Never raises: the others go on."""
        current_op_id.set(new_op_id())  # not that of the start or change that opened the port
        log = get_logger().bind(port=str(self.port))
        try:
            async with await self._connect(self.port.guest_port) as stream:
                await _join(client, stream)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDERLY)
        except* (BangerError, OSError) as ends:
            # As often as a client tries a port that nobody listens on: nothing for the log's users.
            log.debug("published connection ended", error=str(ends.exceptions[0]))
        except* Exception:
            # The connection's supervisor: a bug costs one connection.
            log.exception("published connection failed")


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end, even when cancelled."""
    task.cancel()
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        await asyncio.wait({task})  # some steps of the loop, and nothing is left open
        raise


async def _join(client: socket.socket, stream: AgentStream) -> None:
    """Carry bytes both ways until both directions have ended.

    Raises a group of what went wrong: OSError of the client's side, BangerError of the guest's.
    """
    async with asyncio.TaskGroup() as directions:
        to_guest = directions.create_task(_to_guest(client, stream))
        await _to_client(stream, client)
        to_guest.cancel()


async def _to_guest(client: socket.socket, stream: AgentStream) -> None:
    buffer = bytearray(_READ_BYTES)
    loop = asyncio.get_running_loop()
    # The stream ends before the client when the guest's side takes no more: its EXIT tells how.
    with suppress(StreamEnded), memoryview(buffer) as view:
        while count := await loop.sock_recv_into(client, buffer):
            await stream.send(view[:count])
        await stream.send_eof()


async def _to_client(stream: AgentStream, client: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        event = await stream.receive()
        if isinstance(event, Data):
            await loop.sock_sendall(client, event.data)
        elif isinstance(event, Eof):
            client.shutdown(socket.SHUT_WR)
        elif isinstance(event, GuestExit):
            if event.kind is not ExitKind.EXITED:
                raise event.error()
            return
