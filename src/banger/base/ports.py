"""Published ports as people write them, and what `vm ports` answers.

``[HOST:]PORT[:GUEST]``, TCP only: the port of the host, and the guest's when it is another one.
Without a host it is 127.0.0.1: only this machine gets in. IPv6 addresses stand in brackets. The
host's port 0 means any that is free; the number is chosen when the port is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NoReturn

from banger.base.errors import BadRequest
from banger.base.model import PublishedPort, Record

DEFAULT_HOST = "127.0.0.1"
PORT_MAX = 65535
#: How many ports one VM may publish: each is a socket of the daemon's.
PUBLISHED_MAX = 64
#: Lower ones are root's on the host: they are not opened by themselves.
AUTOMATIC_MIN = 1024

_NUMBER = re.compile(r"[0-9]{1,5}")
_BRACKETED = re.compile(r"\[([^\]]*)\]:(.*)", re.DOTALL)
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
_FORM = "write it as PORT, PORT:GUEST or HOST:PORT:GUEST, like 8080:80 or 127.0.0.2:8080:80"


class GuestSocket(Record, frozen=True):
    """A TCP socket that listens in a guest. ``pid`` 0 and no command: whose it is is not known."""

    address: str
    port: int
    pid: int
    command: str

    @property
    def reachable(self) -> bool:
        """Whether a connection to the guest's loopback gets there, as published ones do."""
        address = ip_address(self.address)
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        return str(address) in (*WILDCARDS, "127.0.0.1", "::1")


class HostPort(Record, frozen=True):
    """Where a port of a guest is published; ``problem`` says why the host does not listen there."""

    host: str
    host_port: int
    problem: str = ""


class GuestPort(Record, frozen=True):
    """A port of a guest: who listens, where it is published, and what is wrong with it, if so."""

    vm_id: str
    vm_name: str
    guest_port: int
    sockets: tuple[GuestSocket, ...] = ()
    published: tuple[HostPort, ...] = ()
    #: The same port at the VM's own address, where it is open by itself.
    automatic: HostPort | None = None
    problem: str = ""


def parse_port(text: str) -> PublishedPort:
    """``[HOST:]PORT[:GUEST]``. Raises BadRequest that says what to write instead."""
    host, numbers = _split(text)
    if not 1 <= len(numbers) <= 2:
        _refuse(text, _FORM)
    host_port = _number(numbers[0], text)
    if len(numbers) == 1 and host_port == 0:
        _refuse(text, f"say which port of the guest any free one leads to: {text}:80")
    guest_port = _number(numbers[-1], text)
    return check_port(
        PublishedPort(host=host or DEFAULT_HOST, host_port=host_port, guest_port=guest_port)
    )


def parse_host_port(text: str) -> tuple[str, int]:
    """``[HOST:]PORT`` as (host, port), the host empty when there is none. Raises BadRequest."""
    host, numbers = _split(text)
    if len(numbers) != 1:
        _refuse(text, "give the host's port alone, like 8080 or 127.0.0.2:8080")
    port = _number(numbers[0], text)
    if port == 0:
        _refuse(text, "give the port that was chosen: banger vm ports shows it")
    return (check_host(host) if host else "", port)


def check_port(port: PublishedPort) -> PublishedPort:
    """`port` with its host in normal form. Raises BadRequest."""
    if not 0 <= port.host_port <= PORT_MAX:
        raise BadRequest(f"{port.host_port} is not a TCP port (0 to {PORT_MAX})")
    if not 1 <= port.guest_port <= PORT_MAX:
        raise BadRequest(f"{port.guest_port} is not a TCP port of a guest (1 to {PORT_MAX})")
    host = check_host(port.host)
    return PublishedPort(host=host, host_port=port.host_port, guest_port=port.guest_port)


def check_host(host: str) -> str:
    """An address to listen at, in normal form; ``localhost`` is 127.0.0.1. Raises BadRequest."""
    if host == "localhost":
        return DEFAULT_HOST
    try:
        address = ip_address(host)
    except ValueError:
        raise BadRequest(
            f'"{host}" is not an address to publish a port at',
            hint="give an IP address of this host: 127.0.0.1, or 0.0.0.0 for all of them",
        ) from None
    if isinstance(address, IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise BadRequest(
            f'"{host}" is not an address to publish a port at',
            hint="give it without a scope, and IPv4 addresses as such",
        )
    if address.is_multicast or address == IPv4Address("255.255.255.255"):
        raise BadRequest(f"{host} is not the address of one machine")
    return str(address)


def is_loopback(host: str) -> bool:
    """Whether only this machine gets to a port at this address."""
    return ip_address(host).is_loopback


def overlap(one: PublishedPort, other: PublishedPort) -> bool:
    """Whether the two cannot be open at once: equal ports at addresses that cover each other."""
    return one.host_port == other.host_port and (
        one.host == other.host
        or (
            ip_address(one.host).version == ip_address(other.host).version
            and (one.host in WILDCARDS or other.host in WILDCARDS)
        )
    )


def check_ports(ports: Iterable[PublishedPort]) -> tuple[PublishedPort, ...]:
    """All that one VM publishes, each in normal form. Raises BadRequest, also for overlaps."""
    checked: list[PublishedPort] = []
    for port in map(check_port, ports):
        if clash := next(
            (each for each in checked if port.host_port and overlap(each, port)), None
        ):
            raise BadRequest(
                f"{format_address(port.host, port.host_port)} is to be published twice: for ports"
                f" {clash.guest_port} and {port.guest_port} of the guest"
            )
        checked.append(port)
    if len(checked) > PUBLISHED_MAX:
        raise BadRequest(f"one VM can publish {PUBLISHED_MAX} ports, not {len(checked)}")
    return tuple(checked)


def format_address(host: str, port: int) -> str:
    """``127.0.0.1:80``, ``[::1]:80``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(text: str) -> tuple[str, list[str]]:
    """The host (empty for none) and the rest's parts, which should be numbers."""
    match = _BRACKETED.fullmatch(text)
    if match is not None and match[1]:
        return match[1], match[2].split(":")
    parts = text.split(":")
    if len(parts) > 3 or text.startswith("["):
        _refuse(text, "an IPv6 address stands in brackets: [::1]:8080:80")
    if len(parts) == 3 or (len(parts) == 2 and not parts[0].isdigit()):
        if not parts[0]:
            _refuse(text, _FORM)
        return parts[0], parts[1:]
    return "", parts


def _number(digits: str, text: str) -> int:
    if "/" in digits:
        _refuse(text, "only TCP ports can be published: leave out what follows the number")
    if "-" in digits:
        _refuse(text, "publish ports one by one: a range cannot be given")
    if _NUMBER.fullmatch(digits) is None or int(digits) > PORT_MAX:
        _refuse(text, _FORM)
    return int(digits)


def _refuse(text: str, hint: str) -> NoReturn:
    raise BadRequest(f'"{text}" is not a port to publish', hint=hint)
