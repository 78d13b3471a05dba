"""Ports of the host's loopback for tests, and clients of them: real sockets."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from banger.base.model import PublishedPort
from banger.services.listeners import numbered

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def any_port(guest_port: int = 80, host: str = "127.0.0.1") -> PublishedPort:
    (port,) = await numbered(
        [PublishedPort(host=host, host_port=0, guest_port=guest_port)], claimed=()
    )
    return port


async def dial(port: PublishedPort) -> Client:
    return await asyncio.open_connection(port.host, port.host_port)


async def hang_up(*clients: Client) -> None:
    for _, writer in clients:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def is_reset(client: Client) -> bool:
    """Whether the connection ends by RST, not in good order."""
    try:
        while await client[0].read(65536):
            pass
    except ConnectionResetError:
        return True
    return False
