"""TCP ports of the host: opening one to listen, finding a free one, and who has one that is taken.

Every failure says which port, why, and what to do; who holds a port is looked for only then.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import msgspec

from banger.base.errors import BangerError, Conflict, PermissionDenied, PreconditionFailed
from banger.base.model import PublishedPort
from banger.base.ports import PORT_MAX, format_address, overlap

_BACKLOG = 128
_PROC = Path("/proc")
#: The state LISTEN in /proc/net/tcp.
_LISTEN = "0A"
_SOCKET = re.compile(r"socket:\[([0-9]+)\]")
#: Draws of a free port before giving up: each of them was another VM's.
_DRAWS = 64


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address of the host, which does not listen yet; OSError when it cannot be.

    With SO_REUSEADDR, connections of the last listener that still wind down are not in the way.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # What "::" covers would otherwise depend on a sysctl, and clash with 0.0.0.0.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made


async def open_listener(port: PublishedPort) -> socket.socket:
    """Listen at this port of the host. Raises what `explain` makes of a failure."""
    listener = None
    try:
        listener = bind(port.host, port.host_port)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise await explain(port, error) from error
    return listener


async def probe(port: PublishedPort) -> BangerError | None:
    """Why this port of the host cannot be listened at right now; None when it can."""
    try:
        bind(port.host, port.host_port).close()
    except OSError as error:
        return await explain(port, error)
    return None


async def numbered(
    ports: Iterable[PublishedPort], claimed: Collection[PublishedPort]
) -> tuple[PublishedPort, ...]:
    """`ports` with a free port of the host for each 0, and not one of those `claimed` by others.

    Raises what `explain` makes of an address that cannot be bound; Conflict when none is free.
    """
    chosen: list[PublishedPort] = []
    for port in ports:
        if port.host_port == 0:
            port = await _drawn(port, [*chosen, *claimed])
        chosen.append(port)
    return tuple(chosen)


async def _drawn(port: PublishedPort, not_these: Collection[PublishedPort]) -> PublishedPort:
    for _ in range(_DRAWS):
        try:
            with bind(port.host, 0) as made:
                number: int = made.getsockname()[1]
        except OSError as error:
            raise await explain(port, error) from error
        drawn = msgspec.structs.replace(port, host_port=number)
        if not any(overlap(drawn, other) for other in not_these):
            return drawn
    raise Conflict(
        f"no port of {port.host} is free", hint="see what there is: banger vm ports; name one"
    )


async def explain(port: PublishedPort, error: OSError) -> BangerError:
    """What a user is told when this port cannot be bound."""
    where = format_address(port.host, port.host_port)
    if error.errno == errno.EADDRINUSE:
        holder = await asyncio.to_thread(holder_of, port)
        return Conflict(
            f"port {where} of this host is in use" + (f" by {holder}" if holder else ""),
            hint=f"end what uses it, or publish another port: {_other(port)}:{port.guest_port}",
        )
    if error.errno == errno.EACCES:
        return PermissionDenied(
            f"port {where} of this host is for root only",
            hint=f"publish one that is not: {_other(port)}:{port.guest_port}",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return PreconditionFailed(
            f"{port.host} is not an address of this host: port {port.host_port} cannot be published"
            " there",
            hint="publish at 127.0.0.1, or at 0.0.0.0 for every address",
        )
    return PreconditionFailed(f"port {where} of this host cannot be opened: {error.strerror}")


def _other(port: PublishedPort) -> int:
    """A number to propose instead: what people take for 80 is 8080."""
    return port.host_port + 8000 if port.host_port < 1024 else min(port.host_port + 1, PORT_MAX)


def holder_of(port: PublishedPort) -> str:
    """``python3 (pid 12)``: the process that listens at this port; empty when not ours to see.

    A user sees the descriptors of his own processes, root those of all.
    """
    inodes = {
        inode
        for table in ("tcp", "tcp6")
        for bound, inode in _listening(table)
        if overlap(port, bound)
    }
    for process in _PROC.iterdir() if inodes else ():
        if process.name.isdigit() and not inodes.isdisjoint(_sockets_of(process)):
            with suppress(OSError):
                command = (process / "comm").read_text(errors="replace").strip()
                return f"{command} (pid {process.name})"
    return ""


def _listening(table: str) -> Iterator[tuple[PublishedPort, str]]:
    """(where, inode) of every listening socket in /proc/net/TABLE."""
    try:
        lines = (_PROC / "net" / table).read_text().splitlines()[1:]
    except FileNotFoundError:  # a host without IPv6
        return
    for line in lines:
        words = line.split()
        if words[3] == _LISTEN:
            address, _, number = words[1].partition(":")
            yield (
                PublishedPort(host=_address(address), host_port=int(number, 16), guest_port=1),
                words[9],
            )


def _address(digits: str) -> str:
    """proc(5): the address as 32-bit words, each printed as the machine's number; x86 is little."""
    words = (bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8))
    raw = b"".join(words)
    return str(IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw))


def _sockets_of(process: Path) -> set[str]:
    """The inodes of a process's sockets; none for one that has ended or is not ours."""
    found = set()
    with suppress(OSError):
        for entry in (process / "fd").iterdir():
            with suppress(OSError):
                if match := _SOCKET.fullmatch(str(entry.readlink())):
                    found.add(match[1])
    return found
