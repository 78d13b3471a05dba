"""The names of VMs by DNS: `NAME.vm`, and the way back, for this host's resolver.

It knows its own zones and nothing else: A and PTR records of VMs, no data for other types of names
that are there (so that asking for AAAA first costs nothing), NXDOMAIN for names of its zones that
are not there. For all other names it answers REFUSED, and not NXDOMAIN: systemd-resolved and libc
go to the next server then, where NXDOMAIN would end the search for a name that is there. It asks
nobody. VMs come and go: nothing it says may be cached.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

from dnslib import PTR, QTYPE, RR, SOA, A

from banger.base.log import get_logger
from banger.drivers.base import VmNames
from banger.drivers.network.dns_endpoint import DnsEndpoint
from banger.drivers.network.dns_message import Labels, Query, Rcode, bad_version, reply

_ZONE: Labels = (b"vm",)
_REVERSE: Labels = (b"in-addr", b"arpa")
_TTL_S = 0
#: Transfers of a whole zone: not for a question's answer.
_TRANSFERS = (251, 252)
#: The numbers of an address as PTR names have them.
_BYTES = frozenset(b"%d" % number for number in range(256))


class Zones:
    """What is answered to a query, by these names and (backwards) in these networks."""

    def __init__(self, names: VmNames, networks: Sequence[IPv4Network]) -> None:
        self._names = names
        self._networks = tuple(networks)

    def owns(self, labels: Labels) -> bool:
        """Whether a name is in one of the zones, there or not."""
        if labels[-1:] == _ZONE:
            return True
        if labels[-2:] != _REVERSE or (asked := _network_of(labels[:-2])) is None:
            return False
        return any(asked.subnet_of(each) for each in self._networks)

    def answer(self, query: Query) -> bytes:
        if query.edns_version:
            return bad_version(query)
        if query.qtype in _TRANSFERS:
            return reply(query, Rcode.REFUSED)
        if not self.owns(query.labels):
            return reply(query, Rcode.REFUSED)
        return self._forward(query) if query.labels[-1:] == _ZONE else self._backward(query)

    def _forward(self, query: Query) -> bytes:
        if len(query.labels) == 1:
            answers = [_soa(_ZONE)] if query.qtype in (QTYPE.SOA, QTYPE.ANY) else []
            return _authoritative(query, _ZONE, answers)
        address = ""
        if len(query.labels) == 2:
            address = self._names.address_of(query.labels[0].decode(errors="replace"))
        if not address:
            return _authoritative(query, _ZONE, [], Rcode.NXDOMAIN)
        record = RR(query.question.qname, QTYPE.A, ttl=_TTL_S, rdata=A(address))
        return _authoritative(query, _ZONE, [record] if query.qtype in (1, 255) else [])

    def _backward(self, query: Query) -> bytes:
        asked = _network_of(query.labels[:-2])
        assert asked is not None  # it is ours
        # A zone is cut at whole bytes: as if each /16 were one.
        zone = query.labels[-4:]
        if asked.prefixlen < 32:
            return _authoritative(query, zone, [])  # there are names below it
        name = self._names.name_of(str(asked.network_address))
        if not name:
            return _authoritative(query, zone, [], Rcode.NXDOMAIN)
        record = RR(query.question.qname, QTYPE.PTR, ttl=_TTL_S, rdata=PTR(f"{name}.vm"))
        wanted = query.qtype in (QTYPE.PTR, QTYPE.ANY)
        return _authoritative(query, zone, [record] if wanted else [])


def _network_of(labels: Labels) -> IPv4Network | None:
    """The network of the numbers before ``in-addr.arpa``: of four, one address."""
    if not 2 <= len(labels) <= 4 or not _BYTES.issuperset(labels):
        return None
    numbers = [int(each) for each in reversed(labels)]
    base = int.from_bytes(bytes([*numbers, 0, 0])[:4], "big")
    return IPv4Network((IPv4Address(base), 8 * len(labels)))


def _authoritative(
    query: Query, zone: Labels, answers: list[RR], rcode: Rcode = Rcode.NOERROR
) -> bytes:
    """Without an answer there is the zone's SOA, which says for how long that may be believed."""
    authority = [] if answers else [_soa(zone)]
    return reply(query, rcode, answers, authority, authoritative=True)


def _soa(zone: Labels) -> RR:
    # RFC 2308, 5: what is not there may be believed for as long as the last of the numbers says.
    times = (1, 3600, 600, 86_400, _TTL_S)
    return RR(list(zone), QTYPE.SOA, ttl=_TTL_S, rdata=SOA("localhost", "nobody.invalid", times))


class DnsServer:
    """The daemon's name server. A port that somebody else has is told of, and fails nothing."""

    def __init__(
        self, address: tuple[str, int] | None, names: VmNames, networks: Sequence[IPv4Network]
    ) -> None:
        self._address = address
        self._zones = Zones(names, networks)
        self._endpoint = DnsEndpoint(self._answer, admitted=lambda _: True)
        #: Why it does not listen; empty when it does, or is not to.
        self.problem = ""
        #: ``HOST:PORT``; empty when it is turned off.
        self.where = "" if address is None else f"{address[0]}:{address[1]}"

    async def open(self) -> None:
        """Listen, if that can be. Raises nothing."""
        if self._address is None:
            return
        try:
            await self._endpoint.open(*self._address)
        except OSError as error:
            # asyncio puts the address into the text, which `where` has already.
            self.problem = os.strerror(error.errno) if error.errno else str(error)
            get_logger().warning("no name server", address=self.where, error=self.problem)
            return
        get_logger().info("name server ready", address=self.where)

    async def close(self) -> None:
        """Idempotent."""
        await self._endpoint.close()

    async def _answer(self, query: Query, _: str) -> bytes:
        return self._zones.answer(query)
