"""What gets through a bridge: frames as a guest with root could write them, on real taps, with the
kernel's own bridge, routing and nftables. No guest is needed for that, but its side of the tap."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ethernet
from banger.base.errors import BadRequest, BangerError, Conflict
from banger.base.model import Reach
from banger.drivers.base import Plug
from banger.drivers.network import bridge
from banger.hostops.local import LocalHost
from banger.hostops.ops import (
    AllowResolved,
    BridgeDown,
    BridgeUp,
    Guest,
    OpenTap,
    SetGuests,
    bridge_of,
)
from lab import ELSEWHERE, PUBLIC, UPLINK, WORLD, Lab, lab

BRIDGE = bridge_of("banger0", "10.99.0.0/24")
GATEWAY = "10.99.0.1"
GATEWAY_MAC = bytes.fromhex("026267000001")
RESOLVER_PORT = 10053
#: The virtio header before each frame of a tap (linux/virtio_net.h), which says nothing here.
VIRTIO = bytes(10)
WAIT_S = 5.0
SYN = 0x02
SYN_ACK = 0x12
RESET = 0x14  # with ACK
#: An ICMP error's type and code (RFC 1812, 5.2.7.1).
ADMINISTRATIVELY_PROHIBITED = bytes((3, 13))


class Nobody:
    """Implements `VmNames`: there is none."""

    def address_of(self, vm_name: str) -> str:
        return ""

    def name_of(self, address: str) -> str:
        return ""


@pytest.fixture
def host() -> Iterator[Lab]:
    """This test runs on a host of its own."""
    with lab(f"bt{os.getpid()}") as made, made.inside(made.host):
        yield made


@dataclass
class Machine:
    """The guest's end of a tap. It answers ARP as an honest one does."""

    number: int
    tap: str
    fd: int
    seen: list[bytes] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"10.99.0.{self.number}"

    @property
    def mac(self) -> bytes:
        return bytes((2, 0, 0, 0, 0, self.number))

    def guest(self, **may: object) -> Guest:
        mac = ":".join(f"{octet:02x}" for octet in self.mac)
        return Guest(tap=self.tap, mac=mac, address=self.address, **may)  # type: ignore[arg-type]

    def send(self, payload: bytes, *, to: bytes = GATEWAY_MAC, kind: int = ethernet.IPV4) -> None:
        self.send_frame(to + self.mac + struct.pack("!H", kind) + payload)

    def send_frame(self, frame: bytes) -> None:
        os.write(self.fd, VIRTIO + frame)

    def arp(self, sender: str, target: str, *, mac: bytes = b"", reply: bool = False) -> bytes:
        fields = struct.pack("!HHBBH", 1, ethernet.IPV4, 6, 4, 2 if reply else 1)
        fields += (mac or self.mac) + socket.inet_aton(sender)
        return fields + bytes(6) + socket.inet_aton(target)

    def receive(self, wanted: Callable[[bytes], bool], timeout_s: float = WAIT_S) -> bytes:
        """The next frame that is `wanted`; all others go to `seen`. Fails when none comes."""
        deadline = time.monotonic() + timeout_s
        while select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
            frame = os.read(self.fd, 65536)[len(VIRTIO) :]
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1":
                if frame[38:42] == socket.inet_aton(self.address):
                    asker = socket.inet_ntoa(frame[28:32])
                    answer = self.arp(self.address, asker, reply=True)
                    self.send(answer, to=frame[6:12], kind=ethernet.ARP)
            elif wanted(frame):
                return frame
            self.seen.append(frame)
        raise AssertionError(f"machine {self.number} got nothing of that, but {self.seen}")

    def ping(self, destination: str = GATEWAY) -> bytes:
        """Send an echo request; `answered` waits for its reply."""
        packet = ethernet.echo_request(self.address, destination)
        self.send(packet)
        return packet

    def answered(self, source: str = GATEWAY) -> None:
        """What came before the reply to a ping is in `seen`: sent before it, answered before it."""
        self.receive(lambda frame: from_(frame, source) and frame[23] == ethernet.ICMP)

    def syn(self, destination: str, port: int = 8000) -> None:
        self.send(ethernet.tcp_syn(self.address, destination, (40000 + self.number, port)))

    def connected(self, source: str) -> None:
        """The answer to a SYN, from somebody who listens."""
        self.receive(lambda frame: tcp_flags(frame, source) == SYN_ACK)

    def refused(self, source: str) -> None:
        """The answer to a SYN, from the firewall (where somebody listens behind it)."""
        self.receive(lambda frame: tcp_flags(frame, source) == RESET)

    def came_from(self, source: str) -> list[bytes]:
        """What came with this source by now, but for the firewall's own refusals."""
        mine = [frame for frame in self.seen if from_(frame, source)]
        return [frame for frame in mine if tcp_flags(frame, source) != RESET]


def from_(frame: bytes, source: str) -> bool:
    return frame[12:14] == b"\x08\x00" and frame[26:30] == socket.inet_aton(source)


def tcp_flags(frame: bytes, source: str) -> int:
    """Of a segment from there, -1 for another frame."""
    return frame[47] if from_(frame, source) and frame[23] == ethernet.TCP else -1


@pytest.fixture
def ops(host: Lab) -> LocalHost:
    return LocalHost()


@pytest.fixture
async def machines(ops: LocalHost) -> AsyncIterator[list[Machine]]:
    """Three taps on a bridge, which the firewall does not know yet."""
    await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    made = []
    for number in (10, 11, 12):
        done = await ops.perform(OpenTap(bridge=BRIDGE.name))
        made.append(Machine(number, done.name, done.fd))
    yield made
    for each in made:
        os.close(each.fd)
    await ops.perform(BridgeDown(bridge=BRIDGE.name))


async def admit(ops: LocalHost, *guests: Guest, forget: tuple[str, ...] = ()) -> None:
    await ops.perform(SetGuests(bridge=BRIDGE, guests=guests, forget=forget))


@pytest.fixture
def world(host: Lab) -> Iterator[socket.socket]:
    """A server out there, at all its addresses."""
    with host.inside(host.world):
        server = socket.create_server(("0.0.0.0", 8000))
    with server:
        yield server


async def test_an_honest_machine_reaches_its_gateway(
    ops: LocalHost, machines: list[Machine]
) -> None:
    first = machines[0]
    await admit(ops, first.guest())
    first.send(first.arp(first.address, GATEWAY), to=ethernet.BROADCAST, kind=ethernet.ARP)
    answer = first.receive(lambda frame: frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2")
    assert answer[22:28] == GATEWAY_MAC
    first.ping()
    first.answered()


async def test_a_tap_that_waits_for_a_machine_passes_nothing(
    ops: LocalHost, machines: list[Machine]
) -> None:
    known, waiting, _ = machines
    await admit(ops, known.guest())
    waiting.ping()
    waiting.send(waiting.arp(waiting.address, GATEWAY), to=ethernet.BROADCAST, kind=ethernet.ARP)
    known.ping()
    known.answered()
    await admit(ops, known.guest(), waiting.guest())
    waiting.ping()
    waiting.answered()
    assert [each for each in waiting.seen if from_(each, GATEWAY)] == []


LIES = {
    "another's address": lambda m: m.send(ethernet.echo_request("10.99.0.11", GATEWAY)),
    "an address from elsewhere": lambda m: m.send(ethernet.echo_request("192.0.2.9", GATEWAY)),
    "the gateway's address": lambda m: m.send(ethernet.echo_request(GATEWAY, GATEWAY)),
    "another's MAC": lambda m: m.send_frame(
        GATEWAY_MAC
        + bytes((2, 0, 0, 0, 0, 11))
        + b"\x08\0"
        + ethernet.echo_request(m.address, GATEWAY)
    ),
    "ARP for another's address": lambda m: m.send(
        m.arp("10.99.0.11", GATEWAY, reply=True), kind=ethernet.ARP
    ),
    "ARP for the gateway's address": lambda m: m.send(
        m.arp(GATEWAY, "10.99.0.11", reply=True), to=ethernet.BROADCAST, kind=ethernet.ARP
    ),
    "ARP with another MAC in it": lambda m: m.send(
        m.arp(m.address, GATEWAY, mac=GATEWAY_MAC, reply=True), kind=ethernet.ARP
    ),
    "IPv6": lambda m: m.send(
        ethernet.ip("fe80::2", "ff02::1", ethernet.UDP, b""),
        to=ethernet.BROADCAST,
        kind=ethernet.IPV6,
    ),
    "a VLAN": lambda m: m.send(
        b"\0\1\x08\0" + ethernet.echo_request(m.address, GATEWAY), kind=ethernet.VLAN
    ),
    "a VLAN in a VLAN": lambda m: m.send(
        b"\0\1\x81\0\0\1\x08\0" + ethernet.echo_request(m.address, GATEWAY), kind=0x88A8
    ),
    "spanning tree": lambda m: m.send(
        b"\x42\x42\x03" + bytes(35), to=bytes.fromhex("0180c2000000"), kind=38
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_no_lie_of_a_machine_is_believed(
    ops: LocalHost, machines: list[Machine], lie: str
) -> None:
    """Nobody hears it: neither the host (no answer comes before that to a true ping), nor another
    machine, though both may reach each other, nor does the host learn from it."""
    liar, neighbour, _ = machines
    await admit(ops, *(each.guest(everywhere=True, sociable=True) for each in (liar, neighbour)))
    neighbour.ping()
    neighbour.answered()
    LIES[lie](liar)
    liar.ping()
    liar.answered()
    assert [each for each in liar.seen if each[12:14] != b"\x08\x06"] == []
    neighbour.ping()
    neighbour.answered()
    heard = [each for each in neighbour.seen if each[6:12] == liar.mac]
    assert [each for each in heard if each[12:14] != b"\x08\x06" or each[22:28] != liar.mac] == []


@pytest.mark.parametrize(("one", "other"), [(False, False), (True, False), (False, True)])
async def test_machines_do_not_reach_each_other(
    ops: LocalHost, machines: list[Machine], one: bool, other: bool
) -> None:
    """Neither directly nor by way of the gateway, unless both were asked for."""
    first, second, _ = machines
    guests = (
        first.guest(everywhere=True, sociable=one),
        second.guest(everywhere=True, sociable=other),
    )
    await admit(ops, *guests)
    first.send(first.arp(first.address, second.address), to=ethernet.BROADCAST, kind=ethernet.ARP)
    first.send(ethernet.echo_request(first.address, second.address), to=second.mac)
    first.send(ethernet.echo_request(first.address, second.address), to=GATEWAY_MAC)
    first.ping()
    first.answered()
    second.ping()
    second.answered()
    assert [each for each in second.seen if each[6:12] == first.mac] == []
    assert [each for each in second.seen if from_(each, first.address)] == []


async def test_two_that_are_not_isolated_reach_each_other(
    ops: LocalHost, machines: list[Machine]
) -> None:
    first, second, third = machines
    guests = [first.guest(sociable=True), second.guest(sociable=True), third.guest()]
    await admit(ops, *guests)
    first.send(ethernet.echo_request(first.address, second.address), to=second.mac)
    second.receive(lambda frame: from_(frame, first.address))
    # What a third may not, it does not because the two may.
    third.send(ethernet.echo_request(third.address, second.address), to=second.mac)
    third.ping()
    third.answered()
    second.ping()
    second.answered()
    assert [each for each in second.seen if from_(each, third.address)] == []


async def test_of_the_host_a_machine_reaches_the_resolver_and_nothing_else(
    ops: LocalHost, machines: list[Machine]
) -> None:
    first = machines[0]
    await admit(ops, first.guest(everywhere=True))
    with (
        socket.create_server(("0.0.0.0", 9999)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver,
        socket.create_server((GATEWAY, RESOLVER_PORT)) as resolver_tcp,
    ):
        resolver.bind((GATEWAY, RESOLVER_PORT))
        resolver.settimeout(WAIT_S)
        for address in (GATEWAY, UPLINK, "127.0.0.1"):
            first.syn(address, 9999)
        first.send(ethernet.udp(first.address, GATEWAY, (5000, 53), b"a question"))
        question, asker = resolver.recvfrom(512)
        assert (question, asker) == (b"a question", (first.address, 5000))
        resolver.sendto(b"an answer", asker)
        answer = first.receive(lambda frame: from_(frame, GATEWAY) and frame[23] == ethernet.UDP)
        # It comes from where the question went.
        assert answer[34:36] == struct.pack("!H", 53)
        assert answer.endswith(b"an answer")
        assert [first.came_from(each) for each in (GATEWAY, UPLINK, "127.0.0.1")] == [[], [], []]
        # Who is refused is told so: nobody waits for what will not come.
        first.syn(GATEWAY, 9998)
        first.refused(GATEWAY)
        first.send(ethernet.udp(first.address, GATEWAY, (5000, 9997), b"anybody?"))
        told = first.receive(lambda frame: from_(frame, GATEWAY) and frame[23] == ethernet.ICMP)
        assert told[34:36] == ADMINISTRATIVELY_PROHIBITED
        first.syn(GATEWAY, 53)
        first.connected(GATEWAY)
        resolver_tcp.close()


async def test_egress_is_what_it_may_be(
    host: Lab, ops: LocalHost, machines: list[Machine], world: socket.socket
) -> None:
    everywhere, some, nowhere = machines
    guests = (
        everywhere.guest(everywhere=True),
        some.guest(allow=("198.18.1.0/24",)),
        nowhere.guest(),
    )
    await admit(ops, *guests)
    for each in machines:
        each.syn(WORLD)
        each.syn(ELSEWHERE, 8000)
    everywhere.connected(WORLD)
    some.connected(ELSEWHERE)
    nowhere.ping()
    nowhere.answered()
    assert some.came_from(WORLD) == []
    assert nowhere.came_from(WORLD) + nowhere.came_from(ELSEWHERE) == []
    nowhere.syn(PUBLIC)
    nowhere.refused(PUBLIC)
    # The world sees the host's address, and none of ours.
    with host.inside(host.world), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind((WORLD, 7000))
        peer.settimeout(WAIT_S)
        everywhere.send(ethernet.udp(everywhere.address, WORLD, (5000, 7000), b"hello"))
        assert peer.recvfrom(512)[1][0] == UPLINK


async def test_what_a_name_led_to_is_open_until_it_is_to_be_forgotten(
    ops: LocalHost, machines: list[Machine], world: socket.socket
) -> None:
    first, second, _ = machines
    await admit(ops, first.guest(), second.guest())
    allow = AllowResolved(bridge=BRIDGE, guest=first.address, addresses=(WORLD,))
    await ops.perform(allow)
    await ops.perform(allow)  # again: it is there already
    first.syn(WORLD)
    first.connected(WORLD)
    second.syn(WORLD)
    second.ping()
    second.answered()
    assert second.came_from(WORLD) == []
    # Other changes leave it; its own can take it away, for connections that it has, too.
    await admit(ops, first.guest())
    first.syn(WORLD, 8000)
    first.connected(WORLD)
    await admit(ops, first.guest(), forget=(first.address,))
    first.seen.clear()
    first.send(ethernet.tcp_syn(first.address, WORLD, (40777, 8000)))
    first.ping()
    first.answered()
    assert first.came_from(WORLD) == []


async def test_of_this_hosts_processes_those_of_others_reach_no_machine(
    host: Lab, ops: LocalHost, machines: list[Machine]
) -> None:
    """User networking of another user's machines has this host's sockets: its passt is his."""
    first = machines[0]
    await admit(ops, first.guest())
    connect = ["bash", "-c", f"exec 3<>/dev/tcp/{first.address}/8000"]
    stranger = 65534
    done = subprocess.run(connect, capture_output=True, user=stranger, timeout=WAIT_S, check=False)
    assert b"refused" in done.stderr
    assert first.seen == []
    asking = subprocess.Popen(connect)
    try:
        first.receive(lambda frame: tcp_flags(frame, GATEWAY) == SYN)
    finally:
        asking.kill()
        asking.wait()


async def test_the_world_reaches_no_machine(
    host: Lab, ops: LocalHost, machines: list[Machine]
) -> None:
    first = machines[0]
    await admit(ops, first.guest(everywhere=True))
    host.run(host.world, "ip", "route", "add", "10.99.0.0/24", "via", UPLINK)
    with host.inside(host.world), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.sendto(b"hello", (first.address, 7))
    first.ping()
    first.answered()
    assert [each for each in first.seen if from_(each, WORLD)] == []


async def test_the_hosts_credentials_of_a_cloud_are_out_of_reach(
    host: Lab, ops: LocalHost, machines: list[Machine]
) -> None:
    first = machines[0]
    await admit(ops, first.guest(everywhere=True, allow=("169.254.0.0/16",)))
    host.run(host.world, "ip", "addr", "add", "169.254.169.254/32", "dev", "cable")
    with host.inside(host.world):
        server = socket.create_server(("169.254.169.254", 8000))
    with server:
        first.syn("169.254.169.254")
        first.ping()
        first.answered()
    assert first.came_from("169.254.169.254") == []


async def test_a_bridge_leaves_the_host_as_it_was(host: Lab, ops: LocalHost) -> None:
    before = host.state()
    for _ in range(2):
        await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
        done = await ops.perform(OpenTap(bridge=BRIDGE.name))
        assert done.name in host.state()["links"]
        os.close(done.fd)
        during = host.state()
        assert during["forward"].strip() == "1"
        assert before["rules"] in during["rules"]
        await ops.perform(BridgeDown(bridge=BRIDGE.name))
        assert host.state() == before
    await ops.perform(BridgeDown(bridge=BRIDGE.name))
    assert host.state() == before


async def test_forwarding_stays_on_while_another_bridge_needs_it(host: Lab, ops: LocalHost) -> None:
    other = bridge_of("banger1", "10.98.0.0/24")
    before = host.state()
    for each in (BRIDGE, other):
        await ops.perform(BridgeUp(bridge=each, resolver_port=RESOLVER_PORT))
    await ops.perform(BridgeDown(bridge=BRIDGE.name))
    assert host.state()["forward"].strip() == "1"
    await ops.perform(BridgeDown(bridge=other.name))
    assert host.state() == before


async def test_forwarding_stays_on_for_who_came_since(host: Lab, ops: LocalHost) -> None:
    """It was on when he came, so he had no reason to turn it on."""
    await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    host.run(host.host, "ip", "link", "add", "containers0", "type", "bridge")
    await ops.perform(BridgeDown(bridge=BRIDGE.name))
    assert host.state()["forward"].strip() == "1"


async def test_what_is_not_ours_is_left_alone_and_told(host: Lab, ops: LocalHost) -> None:
    host.run(host.host, "ip", "link", "add", "banger0", "type", "bridge")
    before = host.state()
    for operation in (
        BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT),
        BridgeDown(bridge="banger0"),
        OpenTap(bridge="banger0"),
    ):
        with pytest.raises(Conflict, match="which is not banger's"):
            await ops.perform(operation)
    assert host.state() == before


async def test_a_network_that_is_in_use_is_refused(host: Lab, ops: LocalHost) -> None:
    host.run(host.host, "ip", "addr", "add", "10.99.0.200/25", "dev", "uplink")
    before = host.state()
    with pytest.raises(Conflict, match=r"this host has a route to 10\.99\.0\.128/25") as caught:
        await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    assert caught.value.hint == "set bridge_cidr to another private network"
    assert host.state() == before


async def test_a_vpn_that_has_all_routes_in_two_halves_is_no_obstacle(
    host: Lab, ops: LocalHost
) -> None:
    for half in ("0.0.0.0/1", "128.0.0.0/1"):
        host.run(host.host, "ip", "route", "add", half, "via", WORLD)
    await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    await ops.perform(BridgeDown(bridge=BRIDGE.name))


async def test_daemons_of_one_user_keep_off_each_others_bridges(host: Lab, ops: LocalHost) -> None:
    mine, other = (bridge_of("banger0", "10.99.0.0/24", each * 8) for each in ("a", "b"))
    before = host.state()
    await ops.perform(BridgeUp(bridge=mine, resolver_port=RESOLVER_PORT))
    tap = await ops.perform(OpenTap(bridge="banger0"))
    there = host.state()
    for operation in (
        BridgeUp(bridge=other, resolver_port=RESOLVER_PORT),
        BridgeDown(bridge="banger0", instance=other.instance),
        SetGuests(bridge=other, guests=()),
    ):
        with pytest.raises(Conflict, match="is that of another banger") as caught:
            await ops.perform(operation)
        assert caught.value.hint == "set bridge_name and bridge_cidr to others"
    assert host.state() == there
    # One that no machine is on, nor is about to be, is free to take; and it is given back whole.
    os.close(tap.fd)
    await ops.perform(BridgeUp(bridge=other, resolver_port=RESOLVER_PORT))
    await ops.perform(SetGuests(bridge=other, guests=()))
    await ops.perform(BridgeDown(bridge="banger0", instance=other.instance))
    assert host.state() == before


async def test_tables_that_somebody_emptied_are_made_again(
    host: Lab, ops: LocalHost, machines: list[Machine]
) -> None:
    first = machines[0]
    host.run(host.host, "nft", "flush", "ruleset")
    with pytest.raises(BangerError):
        await admit(ops, first.guest())
    await ops.perform(BridgeUp(bridge=BRIDGE, resolver_port=RESOLVER_PORT))
    await admit(ops, first.guest())
    first.ping()
    first.answered()


async def test_tables_that_somebody_emptied_come_back_by_themselves(
    host: Lab, ops: LocalHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_RENEW_S", 0.1)
    network = bridge.BridgeNetwork(ops, BRIDGE, Nobody(), pool_size=0)
    attached = await network.attach(Plug("0123456789ab", Path("/nowhere"), Reach(), "10.99.0.10"))
    before = host.state()["rules"]
    assert attached.tap in before
    host.run(host.host, "nft", "flush", "ruleset")
    async with asyncio.timeout(WAIT_S):
        while host.state()["rules"] not in before:  # what was somebody else's stays away
            await asyncio.sleep(0.05)
    os.close(attached.fd)
    await network.detach("0123456789ab")
    await network.close()


async def test_what_no_operation_can_be_is_refused_before_anything_is_done(
    host: Lab, ops: LocalHost
) -> None:
    before = host.state()
    for operation in (
        BridgeUp(bridge=bridge_of("banger0", "8.8.0.0/16"), resolver_port=RESOLVER_PORT),
        BridgeUp(bridge=BRIDGE, resolver_port=53),
        BridgeDown(bridge="br0"),
        OpenTap(bridge="banger0; flush ruleset"),
    ):
        with pytest.raises(BadRequest):
            await ops.perform(operation)
    assert host.state() == before
