"""The resolver of guests: what each may ask, what is opened for it, and hostile peers on each side.

All on real sockets of the loopback; the upstream is a small server here that answers as it is told.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from dnslib import QTYPE, RR, TXT, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from banger.base.model import Egress
from banger.drivers.network import guest_dns, resolvers
from banger.drivers.network.guest_dns import GuestDns, GuestNames
from banger.drivers.network.resolvers import HostResolvers, parse_resolv_conf, question_of
from test_dns_server import Names, framed, read_framed

_TIMEOUT_S = 5.0

#: (the query, over TCP) -> datagrams or messages to send back.
Behaviour = Callable[[Any, bool], Sequence[bytes]]


class Upstream(asyncio.DatagramProtocol):
    """A resolver that is as good or as bad as a test wants."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = lambda _, __: []
        self.asked: list[Any] = []
        self.raw: list[bytes] = []

    async def open(self) -> None:
        self.tcp = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self.tcp.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        self.udp, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", self.port))

    async def close(self) -> None:
        self.udp.close()
        self.tcp.close()
        await self.tcp.wait_closed()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.raw.append(data)
        self.asked.append(query := DNSRecord.parse(data))
        for answer in self.behaviour(query, False):
            self.udp.sendto(answer, addr)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        query = DNSRecord.parse(await reader.readexactly(length))
        for answer in self.behaviour(query, True):
            writer.write(framed(answer))
        writer.close()
        await writer.wait_closed()


class Scene:
    """A guest at 127.0.0.1, and its resolver."""

    def __init__(self) -> None:
        self.port = 0
        self.last_asker: Any = None
        self.guest: GuestNames | None = GuestNames(Egress.ALL, "web")
        self.opened: list[tuple[str, list[tuple[str, int]]]] = []
        self.fail: Exception | None = None
        self.upstream = Upstream()
        self.servers: list[tuple[str, int]] = []
        self.dns = GuestDns(
            names=Names(),
            networks=[IPv4Network("127.64.0.0/10")],
            policy=lambda source: self.guest if source == "127.0.0.1" else None,
            resolved=self._resolved,
            servers=lambda: self.servers,
        )

    async def _resolved(
        self, source: str, asked: GuestNames, addresses: Sequence[tuple[str, int]]
    ) -> None:
        assert asked == self.guest
        if self.fail:
            raise self.fail
        self.opened.append((source, list(addresses)))

    def allow(self, *patterns: str) -> None:
        self.guest = GuestNames(Egress.ALLOWLIST, "web", allowed=patterns)

    def answers(self, *zone: str) -> None:
        """The upstream answers any question with these records."""

        def behave(query: Any, _: bool) -> list[bytes]:
            answer = query.reply()
            for line in zone:
                answer.add_answer(*RR.fromZone(line))
            return [bytes(answer.pack())]

        self.upstream.behaviour = behave

    async def ask(self, name: str, qtype: str = "A", source: str = "127.0.0.1") -> Any:
        return DNSRecord.parse(await self.send(DNSRecord.question(name, qtype).pack(), source))

    async def send(self, data: bytes, source: str = "127.0.0.1") -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.bind((source, 0))
            sock.connect(("127.0.0.1", self.port))
            await loop.sock_sendall(sock, data)
            async with asyncio.timeout(_TIMEOUT_S):
                return await loop.sock_recv(sock, 65535)


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(resolvers, "_UDP_TIMEOUT_S", 0.2)
    made = Scene()
    await made.upstream.open()
    made.servers = [("127.0.0.1", made.upstream.port)]
    made.port = await made.dns.open("127.0.0.1", 0)
    yield made
    await made.dns.close()
    await made.upstream.close()


def addresses(answer: Any) -> list[str]:
    return [str(each.rdata) for each in answer.rr if each.rtype == QTYPE.A]


async def test_all_names_are_asked_of_the_host_with_an_id_of_their_own(scene: Scene) -> None:
    scene.answers("example.org 60 A 10.0.0.1")
    data = DNSRecord.question("Example.ORG", "TXT").pack()
    answer = DNSRecord.parse(await scene.send(bytes(data)))
    assert answer.header.id == DNSRecord.parse(data).header.id
    assert addresses(answer) == ["10.0.0.1"]
    for _ in range(3):
        await scene.ask("example.org")
    assert scene.upstream.raw[0][2:] == data[2:]
    assert len({each.header.id for each in scene.upstream.asked}) > 1
    assert scene.opened == []


async def test_who_is_no_guest_gets_no_answer(scene: Scene) -> None:
    scene.answers("example.org 60 A 10.0.0.1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await scene.ask("example.org", source="127.0.0.2")
    reader, writer = await asyncio.open_connection(
        "127.0.0.1",
        scene.port,
        local_addr=("127.0.0.2", 0),
    )
    async with asyncio.timeout(_TIMEOUT_S):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert scene.upstream.asked == []


async def test_nothing_is_asked_for_a_guest_that_may_not(scene: Scene) -> None:
    scene.guest = GuestNames(Egress.NONE, "web")
    assert (await scene.ask("example.org")).header.rcode == 5
    scene.allow("example.org", "*.example.net")
    for name in ("example.com", "a.example.org", "example.net", "xexample.net", "example.org.com"):
        assert (await scene.ask(name)).header.rcode == 5
    assert scene.upstream.asked == []


async def test_addresses_are_opened_before_the_guest_hears_of_them(scene: Scene) -> None:
    scene.allow("*.example.org")
    scene.answers(
        "other.example.org 60 A 1.1.1.1",
        "a.example.org 60 CNAME b.cdn.net",
        "c.cdn.net 30 A 8.8.8.8",
        "c.cdn.net 20 A 8.8.4.4",
        "b.cdn.net 60 CNAME c.cdn.net",
    )
    answer = await scene.ask("A.example.org")
    assert scene.opened == [("127.0.0.1", [("8.8.8.8", 30), ("8.8.4.4", 20)])]
    assert [str(each.rdata) for each in answer.rr] == [
        *("b.cdn.net.", "c.cdn.net.", "8.8.8.8", "8.8.4.4")
    ]
    scene.fail = OSError("no firewall")
    assert (await scene.ask("a.example.org")).header.rcode == 2


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "0.0.0.0", "10.1.2.3", "192.168.1.1", "172.16.0.1", "169.254.169.254",
     "224.0.0.1", "255.255.255.255", "100.64.0.1", "240.0.0.1"],
)  # fmt: skip
async def test_an_allowed_name_opens_no_address_that_is_not_public(
    scene: Scene, address: str
) -> None:
    scene.allow("example.org")
    scene.answers(f"example.org 60 A {address}", "example.org 60 A 8.8.8.8")
    assert addresses(await scene.ask("example.org")) == ["8.8.8.8"]
    scene.answers(f"example.org 60 A {address}")
    answer = await scene.ask("example.org")
    assert (answer.header.rcode, answer.rr) == (0, [])
    assert scene.opened == [("127.0.0.1", [("8.8.8.8", 60)])]


async def test_an_allowed_name_has_no_ipv6_and_its_other_records(scene: Scene) -> None:
    scene.allow("example.org")
    scene.answers('example.org 60 TXT "v=1"')
    for qtype in ("AAAA", "HTTPS"):
        answer = await scene.ask("example.org", qtype)
        assert (answer.header.rcode, answer.rr) == (0, [])
    assert scene.upstream.asked == []
    assert isinstance((await scene.ask("example.org", "TXT")).rr[0].rdata, TXT)


async def test_aliases_that_go_round_are_an_error(scene: Scene) -> None:
    scene.allow("example.org")
    scene.answers("example.org 60 CNAME a.net", "a.net 60 CNAME example.org")
    assert (await scene.ask("example.org")).header.rcode == 2
    assert scene.opened == []


async def test_what_is_not_there_is_told_so(scene: Scene) -> None:
    scene.allow("example.org")

    def nothing(query: Any, _: bool) -> list[bytes]:
        answer = query.reply()
        answer.header.rcode = 3
        return [bytes(answer.pack())]

    scene.upstream.behaviour = nothing
    assert (await scene.ask("example.org")).header.rcode == 3


async def test_names_of_vms_are_the_daemons(scene: Scene) -> None:
    scene.guest = GuestNames(Egress.NONE, "web")
    assert addresses(await scene.ask("web.vm")) == ["127.64.3.4"]
    assert (await scene.ask("db.vm")).header.rcode == 3
    assert (await scene.ask("5.3.64.127.in-addr.arpa", "PTR")).header.rcode == 3
    scene.guest = GuestNames(Egress.NONE, "web", sees_vms=True)
    assert addresses(await scene.ask("db.vm")) == ["127.64.3.5"]
    assert str((await scene.ask("5.3.64.127.in-addr.arpa", "PTR")).rr[0].rdata) == "db.vm."
    assert scene.upstream.asked == []


def spoiled(query: Any) -> list[bytes]:
    """Answers that are none to this question, each with an address that must not be believed."""
    good = query.reply()
    good.add_answer(RR(query.q.qname, QTYPE.A, ttl=60, rdata=A("6.6.6.6")))
    packed = bytes(good.pack())
    other_id = bytes([packed[0] ^ 1]) + packed[1:]
    other = DNSRecord.question("other.example.org").reply()
    other.header.id = query.header.id
    other.add_answer(RR(query.q.qname, QTYPE.A, ttl=60, rdata=A("6.6.6.6")))
    as_query = packed[:2] + bytes([packed[2] & 0x7F]) + packed[3:]
    return [b"", b"x", packed[:11], other_id, bytes(other.pack()), as_query]


@pytest.mark.parametrize("mode", [Egress.ALL, Egress.ALLOWLIST])
async def test_answers_to_something_else_are_waited_past(scene: Scene, mode: Egress) -> None:
    scene.guest = GuestNames(mode, "web", allowed=("example.org",))

    def behave(query: Any, _: bool) -> list[bytes]:
        answer = query.reply()
        answer.add_answer(RR("example.org", QTYPE.A, ttl=60, rdata=A("8.8.8.8")))
        return [*spoiled(query), bytes(answer.pack())]

    scene.upstream.behaviour = behave
    assert addresses(await scene.ask("example.org")) == ["8.8.8.8"]
    scene.upstream.behaviour = lambda query, _: spoiled(query)
    assert (await scene.ask("example.org")).header.rcode == 2
    assert all("6.6.6.6" not in str(each) for each in scene.opened)


async def test_a_stranger_is_not_heard(scene: Scene) -> None:
    """Not even with the right id, from the right host: the question was put to another port."""

    def behave(query: Any, _: bool) -> list[bytes]:
        answer = query.reply()
        answer.add_answer(RR("example.org", QTYPE.A, ttl=60, rdata=A("6.6.6.6")))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(bytes(answer.pack()), scene.last_asker)
        return []

    received = scene.upstream.datagram_received

    def note(data: bytes, addr: Any) -> None:
        scene.last_asker = addr
        received(data, addr)

    scene.upstream.datagram_received = note  # type: ignore[method-assign]
    scene.upstream.behaviour = behave
    assert (await scene.ask("example.org")).header.rcode == 2


async def test_the_next_server_is_asked_when_one_is_silent_or_fails(scene: Scene) -> None:
    second = Upstream()
    await second.open()
    scene.servers.append(("127.0.0.1", second.port))
    try:

        def good(query: Any, _: bool) -> list[bytes]:
            answer = query.reply()
            answer.add_answer(RR("example.org", QTYPE.A, ttl=60, rdata=A("8.8.8.8")))
            return [bytes(answer.pack())]

        def failing(query: Any, _: bool) -> list[bytes]:
            answer = query.reply()
            answer.header.rcode = 2
            return [bytes(answer.pack())]

        second.behaviour = good
        assert addresses(await scene.ask("example.org")) == ["8.8.8.8"]
        scene.upstream.behaviour = failing
        assert addresses(await scene.ask("example.org")) == ["8.8.8.8"]
        second.behaviour = failing
        assert (await scene.ask("example.org")).header.rcode == 2
    finally:
        await second.close()
    scene.servers.clear()
    assert (await scene.ask("example.org")).header.rcode == 2


async def test_what_is_cut_short_is_asked_for_by_tcp(scene: Scene) -> None:
    def behave(query: Any, tcp: bool) -> list[bytes]:
        answer = query.reply()
        if tcp:
            for number in range(100):
                answer.add_answer(RR("example.org", QTYPE.A, ttl=60, rdata=A(f"8.8.8.{number}")))
        answer.header.tc = int(not tcp)
        return [bytes(answer.pack())]

    scene.upstream.behaviour = behave
    assert (await scene.ask("example.org")).header.tc == 1
    scene.allow("example.org")
    answer = await scene.ask("example.org")
    assert (answer.header.tc, answer.rr) == (1, [])
    assert len(scene.opened[0][1]) == 100
    for guest in (scene.guest, GuestNames(Egress.ALL, "web")):
        scene.guest = guest
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.port)
        writer.write(framed(DNSRecord.question("example.org").pack()))
        assert len(addresses(await read_framed(reader))) == 100
        writer.close()
        await writer.wait_closed()


async def test_one_guest_has_so_many_questions_at_a_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_dns, "_ASKED_MAX", 3)
    monkeypatch.setattr(resolvers, "_UDP_TIMEOUT_S", 0.5)
    asked = [asyncio.create_task(scene.ask(f"n{number}.org")) for number in range(10)]
    await asyncio.wait(asked, timeout=1.5)
    assert sum(each.done() for each in asked) == len(scene.upstream.asked) == 3
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    scene.answers("example.org 60 A 8.8.8.8")
    assert addresses(await scene.ask("example.org")) == ["8.8.8.8"]


@given(st.binary(max_size=300))
def test_any_answer_is_understood_or_not_and_opens_public_addresses_only(data: bytes) -> None:
    answer = b"\0\1\x80\0\0\1\0\2\0\0\0\0\1a\2vm\0\0\1\0\1" + data
    for each in guest_dns._understood(answer, (b"a", b"vm")) or ():
        assert each.rtype in (QTYPE.A, QTYPE.CNAME)
        if each.rtype == QTYPE.A:
            assert IPv4Address(str(each.rdata)).is_global
    guest_dns._understood(data, (b"a",))


async def test_garbage_of_guests_is_survived(scene: Scene) -> None:
    scene.answers("example.org 60 A 8.8.8.8")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for size in range(200):
            sock.sendto(os.urandom(size), ("127.0.0.1", scene.port))
    reader, writer = await asyncio.open_connection("127.0.0.1", scene.port)
    writer.write(b"\xff" * 100)
    async with asyncio.timeout(_TIMEOUT_S):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert addresses(await scene.ask("example.org")) == ["8.8.8.8"]


def test_a_question_is_told_apart_by_type_and_not_by_case() -> None:
    lower = question_of(bytes(DNSRecord.question("a.example", "A").pack()))
    assert question_of(bytes(DNSRecord.question("A.eXample", "A").pack())) == lower
    head = struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 0) + b"\1a\0"
    assert question_of(head + b"\0\x41\0\1") != question_of(head + b"\0\x61\0\1")
    assert question_of(struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1") is None


def test_the_hosts_resolvers_are_read_again_when_they_change(tmp_path: Path) -> None:
    file, behind = tmp_path / "resolv.conf", tmp_path / "behind"
    known = HostResolvers(file, behind)
    assert known() == ()
    file.write_text("# x\nnameserver 192.0.2.1\nnameserver nonsense\nsearch a\nnameserver ::1\n")
    assert known() == (("192.0.2.1", 53), ("::1", 53))
    file.write_text("nameserver 127.0.0.53\n")
    os.utime(file, ns=(1, 1))
    assert known() == (("127.0.0.53", 53),)
    behind.write_text("nameserver 192.0.2.9\n")
    assert known() == (("192.0.2.9", 53),)


@given(st.text())
def test_any_text_is_a_resolv_conf_with_three_servers_at_most(text: str) -> None:
    assert len(parse_resolv_conf(text)) <= 3
