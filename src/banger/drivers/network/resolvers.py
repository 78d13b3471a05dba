"""The host's resolvers: which they are, and a question put to them.

An answer is believed when it comes from the address that was asked, to the port (random, of the
kernel's choice) and with the id (random) of this one question, and repeats it. All else is waited
past.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

from banger.drivers.network.dns_message import Rcode

#: Where to ask: (address, port).
Server = tuple[str, int]

_PORT = 53
#: resolv.conf(5), MAXNS.
_SERVERS_MAX = 3
#: Of one server; libc gives up after 5 s and asks again.
_UDP_TIMEOUT_S = 2.0
_TCP_TIMEOUT_S = 4.0
_ANSWER_MAX_BYTES = 65_535
#: What resolvers and libc take as: ask the next one.
_ASK_NEXT = (Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED)
_QR_AND_OPCODE, _TC = 0xF8, 0x02

#: systemd-resolved's stub, and the file in which it names the servers behind it.
_STUB = "127.0.0.53"
_RESOLV_CONF = Path("/etc/resolv.conf")
_BEHIND_STUB = Path("/run/systemd/resolve/resolv.conf")


def parse_resolv_conf(text: str) -> tuple[str, ...]:
    """The first three servers of a resolv.conf(5) that are addresses."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                ip_address(words[1])
            except ValueError:
                continue
            found.append(words[1])
    return tuple(found[:_SERVERS_MAX])


class HostResolvers:
    """What /etc/resolv.conf names; read again when it has changed."""

    def __init__(self, file: Path = _RESOLV_CONF, behind_stub: Path = _BEHIND_STUB) -> None:
        self._files = (file, behind_stub)
        self._seen: list[tuple[int, ...]] = []
        self._servers: tuple[Server, ...] = ()

    def __call__(self) -> Sequence[Server]:
        seen = [_identity(each) for each in self._files]
        if seen != self._seen:
            self._seen = seen
            names = _servers_in(self._files[0])
            if names == (_STUB,):
                # With what it routes elsewhere, as names of VMs, guests have nothing to do.
                names = _servers_in(self._files[1]) or names
            self._servers = tuple((name, _PORT) for name in names)
        return self._servers


def _identity(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _servers_in(file: Path) -> tuple[str, ...]:
    try:
        return parse_resolv_conf(file.read_text(errors="replace"))
    except OSError:
        return ()


class Upstream:
    """Asks the servers that `servers` gives, one after the other."""

    def __init__(self, servers: Callable[[], Sequence[Server]]) -> None:
        self._servers = servers

    async def ask(self, message: bytes, *, whole: bool) -> bytes:
        """The answer to a query, with the query's id; empty when nobody has one.

        `whole`: not one that was cut short (TC), but all of it, by TCP.
        """
        question = question_of(message)
        if question is None:
            return b""
        answer = b""
        for server in self._servers():
            query_id = secrets.token_bytes(2)
            asked = query_id + message[2:]
            try:
                answer = await _by_udp(server, asked, question)
                if whole and answer[2] & _TC:
                    answer = await _by_tcp(server, asked, question)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                continue
            if answer[3] & 0x0F not in _ASK_NEXT:
                break
        return message[:2] + answer[2:] if answer else b""


def question_of(message: bytes) -> bytes | None:
    """The one question as it stands in a message, its name in lower case; None for no such."""
    if len(message) < 12 or message[4:6] != b"\0\1":
        return None
    at = 12
    while at < len(message) and message[at]:
        if message[at] > 63:  # a pointer: there is nothing before it to point at
            return None
        at += 1 + message[at]
    if at + 5 > len(message):
        return None
    # Types and classes are not text: a lower 65 would be 97.
    return message[12:at].lower() + message[at : at + 5]


def _answers(answer: bytes, asked: bytes, question: bytes) -> bool:
    return (
        answer[:2] == asked[:2]
        and len(answer) >= 12
        and answer[2] & _QR_AND_OPCODE == 0x80
        and question_of(answer) == question
    )


async def _by_udp(server: Server, asked: bytes, question: bytes) -> bytes:
    """Raises OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)) as sock:
        sock.connect(server)  # from now on the kernel takes nothing from anybody else
        await loop.sock_sendall(sock, asked)
        async with asyncio.timeout(_UDP_TIMEOUT_S):
            while True:
                answer = await loop.sock_recv(sock, _ANSWER_MAX_BYTES)
                if _answers(answer, asked, question):
                    return answer


async def _by_tcp(server: Server, asked: bytes, question: bytes) -> bytes:
    """Raises OSError, TimeoutError, IncompleteReadError."""
    async with asyncio.timeout(_TCP_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*server)
        try:
            writer.write(struct.pack(">H", len(asked)) + asked)
            (length,) = struct.unpack(">H", await reader.readexactly(2))
            answer = await reader.readexactly(length)
        finally:
            writer.transport.abort()
    if not _answers(answer, asked, question):
        raise OSError(f"{server[0]} answered something else")
    return answer
