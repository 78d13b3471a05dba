"""A place where DNS queries come in, by UDP and by TCP at one address and port.

What is answered is another's business. Here is what anybody may do to a server and must not: send
garbage, be silent, come too often. Bounds are for each source, so that one cannot keep the others
out.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from banger.base.log import get_logger
from banger.drivers.network.dns_message import QUERY_MAX_BYTES, Query, read_query

#: (query, source address) -> the answer; empty for none.
Answer = Callable[[Query, str], Awaitable[bytes]]

#: Of one source at a time: queries by UDP that wait for their answer (more are dropped, as the
#: network might, and asked again), and TCP connections (more are closed).
_QUERIES_MAX = 64
_CONNECTIONS_MAX = 16
_CONNECTIONS_OF_ALL_MAX = 128
#: RFC 7766, 6.2.3: some seconds.
_IDLE_TIMEOUT_S = 10.0


class DnsEndpoint(asyncio.DatagramProtocol):
    """Open with `open`, then `close`. Sources that are not `admitted` get no answer."""

    def __init__(self, answer: Answer, admitted: Callable[[str], bool]) -> None:
        self._answer = answer
        self._admitted = admitted
        self._queries: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen there; the port (0 is any free one). Raises OSError when it cannot be."""
        loop = asyncio.get_running_loop()
        # The TCP side first: it draws the port where any will do. SO_REUSEADDR (the default) lets
        # a daemon listen again at once.
        self._tcp = await asyncio.start_server(
            self._connected, host, port, limit=QUERY_MAX_BYTES, family=socket.AF_INET
        )
        try:
            port = self._tcp.sockets[0].getsockname()[1]
            self._udp, _ = await loop.create_datagram_endpoint(lambda: self, (host, port))
        except BaseException:
            await self.close()
            raise
        return port

    async def close(self) -> None:
        """Idempotent."""
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tcp is not None:
            await self._tcp.wait_closed()
        self._udp = self._tcp = None

    # UDP

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        source = addr[0]
        if not self._admitted(source) or self._queries[source] >= _QUERIES_MAX:
            return
        query = read_query(data, tcp=False)
        if isinstance(query, bytes):
            self._send(query, addr)
            return
        self._queries[source] += 1
        self._keep(asyncio.create_task(self._serve_datagram(query, addr)))

    def error_received(self, exc: Exception) -> None:
        """ICMP: who asked has not waited."""

    async def _serve_datagram(self, query: Query, addr: tuple[str | Any, int]) -> None:
        source = addr[0]
        try:
            self._send(await self._answered(query, source), addr)
        finally:
            self._leave(self._queries, source)

    def _send(self, answer: bytes, addr: tuple[str | Any, int]) -> None:
        if answer and self._udp is not None:
            self._udp.sendto(answer, addr)

    # TCP: each message after its length

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio calls it in one
        self._keep(task)
        peer = writer.get_extra_info("peername")  # none when it has gone already
        source = peer[0] if peer else ""
        try:
            if (
                self._admitted(source)
                and self._connections[source] < _CONNECTIONS_MAX
                and self._connections.total() < _CONNECTIONS_OF_ALL_MAX
            ):
                self._connections[source] += 1
                try:
                    await self._serve_connection(reader, writer, source)
                finally:
                    self._leave(self._connections, source)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass  # it has ended, or was silent
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str
    ) -> None:
        while True:
            async with asyncio.timeout(_IDLE_TIMEOUT_S):
                length = int.from_bytes(await reader.readexactly(2), "big")
                if length > QUERY_MAX_BYTES:
                    return
                data = await reader.readexactly(length)
            query = read_query(data, tcp=True)
            answer = query if isinstance(query, bytes) else await self._answered(query, source)
            if not answer:
                return
            writer.write(len(answer).to_bytes(2, "big") + answer)
            async with asyncio.timeout(_IDLE_TIMEOUT_S):
                await writer.drain()

    async def _answered(self, query: Query, source: str) -> bytes:
        try:
            return await self._answer(query, source)
        except Exception:
            # A supervisor's boundary: a bug costs one answer.
            get_logger().exception("dns query failed", source=source)
            return b""

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _leave(counter: Counter[str], source: str) -> None:
        counter[source] -= 1
        if not counter[source]:
            del counter[source]
