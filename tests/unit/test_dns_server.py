"""The name server: what it answers, on real loopback sockets, and what garbage does to it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from ipaddress import IPv4Network
from typing import Any, ClassVar

import pytest
from dnslib import EDNS0, QTYPE, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.drivers.network import dns_endpoint
from banger.drivers.network.dns import DnsServer, Zones
from banger.drivers.network.dns_message import Query, read_query

_TIMEOUT_S = 5.0


class Names:
    """Two VMs."""

    known: ClassVar = {"web": "127.64.3.4", "db": "127.64.3.5"}

    def address_of(self, vm_name: str) -> str:
        return self.known.get(vm_name, "")

    def name_of(self, address: str) -> str:
        return next((name for name, has in self.known.items() if has == address), "")


NETWORKS = [IPv4Network("127.64.0.0/10")]


def ask(name: str, qtype: str = "A", *, tcp: bool = False, **header: Any) -> Any:
    """What is answered to a question, without a socket."""
    asked = DNSRecord.question(name, qtype)
    for key, value in header.items():
        setattr(asked.header, key, value)
    return answered(asked.pack(), tcp=tcp)


def answered(data: bytes, *, tcp: bool = False) -> Any:
    raw = raw_answer(data, tcp=tcp)
    return DNSRecord.parse(raw) if raw else None


def raw_answer(data: bytes, *, tcp: bool = False) -> bytes:
    query = read_query(data, tcp=tcp)
    return Zones(Names(), NETWORKS).answer(query) if isinstance(query, Query) else query


def rcode(answer: Any) -> str:
    return {0: "NOERROR", 1: "FORMERR", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}[
        answer.header.rcode
    ]


@pytest.mark.parametrize("name", ["web.vm", "WEB.vM", "web.vm."])
def test_a_name_has_its_address(name: str) -> None:
    answer = ask(name)
    assert rcode(answer) == "NOERROR"
    (record,) = answer.rr
    assert (str(record.rdata), record.ttl) == ("127.64.3.4", 0)
    assert str(record.rname).lower() == "web.vm."
    assert (answer.header.aa, answer.header.ra, answer.header.rd) == (1, 0, 1)


def test_the_question_is_repeated_as_it_was_asked() -> None:
    assert str(ask("wEb.Vm").q.qname) == "wEb.Vm."


def test_an_address_has_its_name() -> None:
    (record,) = ask("4.3.64.127.in-addr.arpa", "PTR").rr
    assert str(record.rdata) == "web.vm."
    assert ask("4.3.64.127.in-addr.arpa", "A").rr == []


@pytest.mark.parametrize("qtype", ["AAAA", "MX", "TXT", "HTTPS", "SRV", "NS"])
def test_other_types_of_a_name_that_is_there_are_no_data(qtype: str) -> None:
    answer = ask("web.vm", qtype)
    assert rcode(answer) == "NOERROR"
    assert answer.rr == []
    (authority,) = answer.auth
    assert (str(authority.rname), authority.rtype, authority.ttl) == ("vm.", QTYPE.SOA, 0)


@pytest.mark.parametrize(
    ("name", "qtype", "soa"),
    [
        ("nobody.vm", "A", "vm."),
        ("nobody.vm", "AAAA", "vm."),
        ("x.web.vm", "A", "vm."),
        ("6.3.64.127.in-addr.arpa", "PTR", "64.127.in-addr.arpa."),
    ],
)
def test_what_is_not_there_is_not_and_may_not_be_remembered(
    name: str, qtype: str, soa: str
) -> None:
    answer = ask(name, qtype)
    assert rcode(answer) == "NXDOMAIN"
    (authority,) = answer.auth
    assert str(authority.rname) == soa
    assert authority.rdata.times[-1] == authority.ttl == 0


@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        ("example.org", "A"),
        ("web.vm.example.org", "A"),
        ("", "NS"),
        ("4.3.2.192.in-addr.arpa", "PTR"),
        ("1.0.0.127.in-addr.arpa", "PTR"),
        ("127.in-addr.arpa", "PTR"),
        ("04.3.64.127.in-addr.arpa", "PTR"),
        ("999.3.64.127.in-addr.arpa", "PTR"),
        ("vm", "AXFR"),
        ("web.vm", "IXFR"),
    ],
)
def test_what_is_not_ours_is_refused(name: str, qtype: str) -> None:
    answer = ask(name, qtype)
    assert (rcode(answer), answer.rr, answer.auth) == ("REFUSED", [], [])


def test_the_zone_itself_is_there() -> None:
    assert [record.rtype for record in ask("vm", "SOA").rr] == [QTYPE.SOA]
    assert rcode(ask("vm", "A")) == rcode(ask("3.64.127.in-addr.arpa", "PTR")) == "NOERROR"


def test_edns_is_answered_and_a_later_version_told_of_ours() -> None:
    asked = DNSRecord.question("web.vm")
    asked.add_ar(EDNS0(udp_len=4096, flags="do"))
    answer = answered(asked.pack())
    assert len(answer.rr) == 1
    assert answer.ar[0].edns_len == 1232
    asked = DNSRecord.question("web.vm")
    asked.add_ar(EDNS0(udp_len=4096, version=1))
    answer = answered(asked.pack())
    assert (answer.rr, answer.ar[0].edns_rcode if answer.ar else None) == ([], 1)


def test_other_operations_classes_and_malformed_queries_are_told_so() -> None:
    assert rcode(ask("web.vm", opcode=5)) == "NOTIMP"
    chaos = DNSRecord(DNSHeader(rd=1), q=DNSQuestion("version.bind", QTYPE.TXT, 3))
    assert rcode(answered(chaos.pack())) == "REFUSED"
    two = DNSRecord(DNSHeader(rd=1), questions=[DNSQuestion("web.vm"), DNSQuestion("db.vm")])
    assert rcode(answered(two.pack())) == "FORMERR"
    cut = DNSRecord.question("web.vm").pack()[:-3]
    assert rcode(answered(cut)) == "FORMERR"
    loop = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\x01a\xc0\x0c\0\1\0\1"
    assert rcode(answered(loop)) == "FORMERR"
    assert answered(loop).header.id == 7


@pytest.mark.parametrize("data", [b"", b"\0" * 11, DNSRecord(DNSHeader(qr=1)).pack()])
def test_what_is_no_query_is_not_answered(data: bytes) -> None:
    assert raw_answer(data) == b""


def test_names_that_point_at_names_cost_no_time() -> None:
    """A message may have a thousand pointers, each to the one before, and records that use them."""
    pointers = b"\0\0" + b"".join(struct.pack(">H", 0xC000 | 12 + 2 * n) for n in range(1900))
    data = struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 2) + pointers
    assert rcode(answered(data[:4096])) == "FORMERR"


@given(st.binary(max_size=600))
def test_garbage_is_answered_by_nothing_or_by_something_that_is_dns(data: bytes) -> None:
    raw = raw_answer(data)
    if raw:
        assert raw[:2] == data[:2]
        assert raw[2] & 0x80
        DNSRecord.parse(raw)


@given(
    st.lists(st.binary(min_size=1, max_size=63), max_size=6),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFF),
    st.integers(0, 0x7FFF),
    st.binary(max_size=40),
)
def test_any_question_is_answered_and_the_answer_fits(
    labels: list[bytes], qtype: int, qclass: int, flags: int, rest: bytes
) -> None:
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    head = struct.pack(">HHHHHH", 7, flags & ~0x8000, 1, 0, 0, 1 if rest else 0)
    raw = raw_answer(head + name + struct.pack(">HH", qtype, qclass) + rest)
    assert raw[:2] == b"\0\x07"
    assert len(raw) <= 512 or rest


# On sockets


class Served:
    def __init__(self, server: DnsServer, port: int) -> None:
        self.server = server
        self.port = port

    async def udp(self, *datagrams: bytes) -> bytes:
        """Send all; what is answered to the last."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(("127.0.0.1", self.port))
            for datagram in datagrams:
                await loop.sock_sendall(sock, datagram)
            wanted = datagrams[-1][:2]
            async with asyncio.timeout(_TIMEOUT_S):
                while (got := await loop.sock_recv(sock, 65536))[:2] != wanted:
                    pass
            return got


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    port = free_port()
    server = DnsServer(("127.0.0.1", port), Names(), NETWORKS)
    await server.open()
    assert server.problem == ""
    yield Served(server, port)
    await server.close()


def framed(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


async def read_framed(reader: asyncio.StreamReader) -> Any:
    async with asyncio.timeout(_TIMEOUT_S):
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        return DNSRecord.parse(await reader.readexactly(length))


QUESTION = DNSRecord.question("web.vm").pack()


async def test_udp_and_several_queries_of_one_tcp_connection(served: Served) -> None:
    assert str(DNSRecord.parse(await served.udp(QUESTION)).rr[0].rdata) == "127.64.3.4"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    both = framed(QUESTION) + framed(DNSRecord.question("db.vm").pack())
    writer.write(both[:20])
    await writer.drain()
    writer.write(both[20:])
    assert str((await read_framed(reader)).rr[0].rdata) == "127.64.3.4"
    assert str((await read_framed(reader)).rr[0].rdata) == "127.64.3.5"
    writer.close()
    await writer.wait_closed()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_it_survives_garbage(datagrams: list[bytes]) -> None:
    async def go() -> None:
        port = free_port()
        server = DnsServer(("127.0.0.1", port), Names(), NETWORKS)
        await server.open()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join(datagrams) + b"\xff\xff")
            with suppress(ConnectionError):
                writer.write_eof()
                await reader.read()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            assert DNSRecord.parse(await Served(server, port).udp(*datagrams, QUESTION)).rr
        finally:
            await server.close()

    asyncio.run(go())


async def test_a_silent_connection_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_endpoint, "_IDLE_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"\0")
    async with asyncio.timeout(_TIMEOUT_S):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_too_many_connections_are_closed_and_leave_room_when_they_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_endpoint, "_CONNECTIONS_MAX", 2)
    kept = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
    for reader, writer in kept:
        writer.write(framed(QUESTION))
        await read_framed(reader)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    async with asyncio.timeout(_TIMEOUT_S):
        assert await reader.read() == b""
    for _, each in [*kept, (reader, writer)]:
        each.close()
        await each.wait_closed()
    async with asyncio.timeout(_TIMEOUT_S):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(framed(QUESTION))
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                if (await read_framed(reader)).rr:
                    break
            writer.close()
            await writer.wait_closed()
    writer.close()
    await writer.wait_closed()


async def test_a_port_that_is_taken_is_told_of_and_fails_nothing(served: Served) -> None:
    second = DnsServer(("127.0.0.1", served.port), Names(), NETWORKS)
    await second.open()
    assert second.problem == "Address already in use"
    await second.close()
    assert (await served.udp(QUESTION))[:2] == QUESTION[:2]


async def test_turned_off_it_does_nothing() -> None:
    server = DnsServer(None, Names(), NETWORKS)
    await server.open()
    assert (server.where, server.problem) == ("", "")
    await server.close()
