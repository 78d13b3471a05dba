"""Connections to a guest's vsock by a Unix socket of the host's, as Firecracker has it.

Firecracker has no vhost-vsock: it listens on a Unix socket, reads ``CONNECT PORT`` and a newline,
and answers ``OK`` with a port of the host's side once a process of the guest's has accepted. Where
nobody listens it closes the connection, after 2 s at most (docs/vsock.md of its sources).
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from banger.base.files import socket_name

#: The agent's. Below 1024: in the guest, only root could take it.
AGENT_PORT = 1023

#: Nobody tells the host when a guest begins to listen: it is tried again after so long.
_AGAIN_S = 0.02

#: ``OK`` and a number of 32 bits.
_ANSWER_MAX_BYTES = 32


async def connect(path: Path, port: int) -> socket.socket:
    """A connection to `port` of the guest's, as soon as somebody listens there.

    For as long as that takes: the caller has a time limit. Raises OSError when there is no machine
    (any more).
    """
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            if await _accepted(connection, path, port):
                return connection
        except BaseException:
            connection.close()
            raise
        connection.close()
        await asyncio.sleep(_AGAIN_S)


async def _accepted(connection: socket.socket, path: Path, port: int) -> bool:
    """Whether somebody in the guest has accepted it."""
    loop = asyncio.get_running_loop()
    with socket_name(path) as name:
        await loop.sock_connect(connection, name)
    try:
        await loop.sock_sendall(connection, f"CONNECT {port}\n".encode())
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < _ANSWER_MAX_BYTES:
            # One at a time: what follows is the agent's.
            if not (byte := await loop.sock_recv(connection, 1)):
                return False
            answer += byte
    except (BrokenPipeError, ConnectionResetError):
        return False
    return is_acceptance(answer)


def is_acceptance(answer: bytes) -> bool:
    """Whether this line says that a connection was accepted."""
    word, _, number = answer.removesuffix(b"\n").partition(b" ")
    return answer.endswith(b"\n") and word == b"OK" and number.isdigit()
