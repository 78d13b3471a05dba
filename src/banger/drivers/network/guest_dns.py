"""The resolver of guests on a bridge: their questions go to the host's resolvers, if they may.

A guest is known by its source address, which the firewall vouches for. What it may ask is its
policy's: everything, nothing, or an allowlist of names. For that one the addresses of a name are
told to the firewall before the guest hears of them, and the answer is put together anew from what
was understood: the aliases from the name that was asked, and their addresses. Addresses that are
not public (RFC 1918, loopback, link-local and the like) are left out: whoever owns an allowed name
could else open the host's own network with it (DNS rebinding). Of names of VMs a guest always has
its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from dnslib import CNAME, EDNS0, QTYPE, RR, A, DNSHeader, DNSQuestion, DNSRecord

from banger.base.log import get_logger
from banger.base.model import Egress
from banger.base.reach import name_matches
from banger.drivers.base import VmNames
from banger.drivers.network.dns import Zones
from banger.drivers.network.dns_endpoint import DnsEndpoint
from banger.drivers.network.dns_message import (
    UDP_MAX_BYTES,
    Labels,
    Query,
    Rcode,
    labels_of,
    parse,
    reply,
)
from banger.drivers.network.resolvers import HostResolvers, Server, Upstream

#: Questions that are put to the host's resolvers at a time, each with a descriptor: for one guest
#: (more are dropped, and asked again), and for all (more wait for their turn).
_ASKED_MAX = 16
_ASKED_OF_ALL_MAX = 128
_ALIASES_MAX = 16
#: Of an answer that is taken apart: each record costs time.
_RECORDS_MAX = 256
_WHOLE_MAX_BYTES = 16_384
_TTL_MAX_S = 86_400
#: Types that lead to addresses nobody has opened: there is no IPv6, and hints are not looked at.
_HTTPS, _SVCB = 65, 64
_NO_DATA = (QTYPE.AAAA, _HTTPS, _SVCB)


@dataclass(frozen=True)
class GuestNames:
    """What one guest may ask."""

    egress: Egress
    #: The name of its VM.
    own_name: str
    #: Names and patterns, as `base.reach.names` gives them.
    allowed: tuple[str, ...] = ()
    #: Whether it is told of other VMs.
    sees_vms: bool = False

    def allows(self, labels: Labels) -> bool:
        name = b".".join(labels).decode(errors="replace")
        return self.egress is Egress.ALL or (
            self.egress is Egress.ALLOWLIST and name_matches(name, self.allowed)
        )


#: A guest's address, what it might ask when it did, and what the name led to: (address, for how
#: many seconds it may be used).
Resolved = Callable[[str, GuestNames, Sequence[tuple[str, int]]], Awaitable[None]]


class GuestDns:
    """``policy`` knows guests by their address: None for one that is none. ``resolved`` is awaited
    before a guest hears of addresses; when it fails the guest does not."""

    def __init__(
        self,
        *,
        names: VmNames,
        networks: Sequence[IPv4Network],
        policy: Callable[[str], GuestNames | None],
        resolved: Resolved,
        servers: Callable[[], Sequence[Server]] | None = None,
    ) -> None:
        self._names = names
        self._networks = tuple(networks)
        self._policy = policy
        self._resolved = resolved
        self._upstream = Upstream(servers or HostResolvers())
        self._asked: Counter[str] = Counter()
        self._of_all = asyncio.Semaphore(_ASKED_OF_ALL_MAX)
        self._endpoint = DnsEndpoint(self._answer, lambda source: policy(source) is not None)

    async def open(self, host: str, port: int) -> int:
        """Listen there; the port (0 is any free one). Raises OSError."""
        return await self._endpoint.open(host, port)

    async def close(self) -> None:
        """Idempotent."""
        await self._endpoint.close()

    async def _answer(self, query: Query, source: str) -> bytes:
        guest = self._policy(source)
        if guest is None:
            return b""
        zones = Zones(_Seen(self._names, guest), self._networks)
        if zones.owns(query.labels):
            return zones.answer(query)
        if not guest.allows(query.labels):
            return reply(query, Rcode.REFUSED)
        if guest.egress is Egress.ALLOWLIST and query.qtype in _NO_DATA:
            return reply(query, Rcode.NOERROR, recursion=True)
        if self._asked[source] >= _ASKED_MAX:
            return b""
        self._asked[source] += 1
        try:
            async with self._of_all:
                if guest.egress is Egress.ALL or query.qtype not in (QTYPE.A, QTYPE.ANY):
                    return await self._passed_on(query)
                return await self._opened(query, source, guest)
        finally:
            self._asked[source] -= 1
            if not self._asked[source]:
                del self._asked[source]

    async def _passed_on(self, query: Query) -> bytes:
        """The answer as it comes."""
        is_tcp = query.limit > UDP_MAX_BYTES
        answer = await self._upstream.ask(query.raw, whole=is_tcp)
        if not answer:
            return reply(query, Rcode.SERVFAIL, recursion=True)
        return answer if len(answer) <= query.limit else reply(query, Rcode.NOERROR, cut=True)

    async def _opened(self, query: Query, source: str, guest: GuestNames) -> bytes:
        """The addresses of a name, when the firewall has heard of them."""
        question = DNSQuestion(query.question.qname, QTYPE.A)
        header = DNSHeader(bitmap=0x0100)
        asked = DNSRecord(header, q=question, ar=[EDNS0(udp_len=UDP_MAX_BYTES)])
        answer = await self._upstream.ask(bytes(asked.pack()), whole=True)
        records = _understood(answer, query.labels)
        if records is None:
            return reply(query, Rcode.SERVFAIL, recursion=True)
        addresses = [(str(each.rdata), each.ttl) for each in records if each.rtype == QTYPE.A]
        if addresses:
            try:
                await self._resolved(source, guest, addresses)
            except Exception:
                # A supervisor's boundary: what could not be opened is not told of.
                get_logger().exception("addresses not opened", source=source)
                return reply(query, Rcode.SERVFAIL, recursion=True)
        rcode = Rcode.NXDOMAIN if answer[3] & 0x0F == Rcode.NXDOMAIN else Rcode.NOERROR
        return reply(query, rcode, records, recursion=True)


def _understood(answer: bytes, asked: Labels) -> list[RR] | None:
    """The aliases of a name in the order they are followed, and the last one's public addresses.

    None for an answer that is an error, or that cannot be read.
    """
    if len(answer) < 12 or answer[3] & 0x0F not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return None
    counts = (int.from_bytes(answer[at : at + 2], "big") for at in (4, 6, 8, 10))
    if len(answer) > _WHOLE_MAX_BYTES or sum(counts) > _RECORDS_MAX:
        return None
    record = parse(answer)
    if record is None:
        return None
    mine = [each for each in record.rr if each.rclass == 1]
    chain: list[RR] = []
    name: Labels | None = asked
    while name is not None and len(chain) <= _ALIASES_MAX:
        found = [_address(each) for each in mine if _is(each, QTYPE.A, name)]
        if found:
            return chain + [each for each in found if each is not None]
        alias = next((each for each in mine if _is(each, QTYPE.CNAME, name)), None)
        if alias is None:
            return chain
        ttl = min(alias.ttl, _TTL_MAX_S)
        target = alias.rdata.label
        if (name := labels_of(target)) is not None:
            chain.append(RR(alias.rname, QTYPE.CNAME, ttl=ttl, rdata=CNAME(target)))
    return None  # too many, or one of them is no name


def _is(record: Any, rtype: int, name: Labels) -> bool:
    return bool(record.rtype == rtype and labels_of(record.rname) == name)


def _address(record: Any) -> RR | None:
    """The record, of an address that a name may lead to."""
    address = IPv4Address(bytes(record.rdata.data))
    if not address.is_global or address.is_multicast or address.is_reserved:
        return None
    return RR(record.rname, QTYPE.A, ttl=min(record.ttl, _TTL_MAX_S), rdata=A(str(address)))


class _Seen:
    """Those of the VMs' names that a guest is told."""

    def __init__(self, names: VmNames, guest: GuestNames) -> None:
        self._names = names
        self._guest = guest

    def address_of(self, vm_name: str) -> str:
        return self._names.address_of(vm_name) if self._sees(vm_name) else ""

    def name_of(self, address: str) -> str:
        name = self._names.name_of(address)
        return name if self._sees(name) else ""

    def _sees(self, vm_name: str) -> bool:
        return self._guest.sees_vms or vm_name == self._guest.own_name
