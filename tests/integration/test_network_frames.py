"""The network of a guest: what a hostile one reaches through it, and how its processes end.

No VM is needed: the tests hold the end of the socket that QEMU would have, and speak raw frames.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path

import pytest

import ethernet
from banger.base import procfs
from banger.base.errors import Unavailable
from banger.base.model import Reach
from banger.drivers.base import Plug
from banger.drivers.network.user import DNS, GATEWAY, GUEST_ADDRESS, PasstNetwork

KEPT_FROM = IPv4Network("10.213.0.0/16")
VM_ID = "vm-0123456789ab"
LOOPBACKS = ("127.0.0.1", "127.9.8.7")
ROUNDS = 60


class Guest:
    """The guest's end of its network: frames, each after its length."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(False)
        self._pending = b""

    async def send(self, *frames: bytes) -> None:
        data = b"".join(struct.pack("!I", len(frame)) + frame for frame in frames)
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self) -> bytes:
        """The next frame; an empty one when the other side has ended."""
        while True:
            length = int.from_bytes(self._pending[:4], "big")
            if len(self._pending) >= 4 and len(self._pending) >= 4 + length:
                frame, self._pending = self._pending[4 : 4 + length], self._pending[4 + length :]
                return frame
            data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 18)
            if not data:
                return b""
            self._pending += data

    async def gateway_mac(self) -> bytes:
        await self.send(ethernet.arp_request(GUEST_ADDRESS, GATEWAY))
        return (await self.receive())[6:12]


class Visits:
    """Servers on this host, all at one port, and a queue of who was visited."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.port = 0

    async def serve(self, stack: AsyncExitStack, address: str) -> None:
        async def tcp(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.queue.put_nowait(("tcp", address))
            writer.close()

        queue = self.queue

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, sender: object) -> None:
                queue.put_nowait(("udp", address))

        server = await stack.enter_async_context(
            await asyncio.start_server(tcp, address, self.port)
        )
        self.port = server.sockets[0].getsockname()[1]
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Datagrams, local_addr=(address, self.port)
        )
        stack.callback(transport.close)


def lan_address() -> str:
    """This host's own address towards the world. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))
        address: str = probe.getsockname()[0]
        return address


@asynccontextmanager
async def attached(log: Path) -> AsyncIterator[Guest]:
    attachment = await PasstNetwork(KEPT_FROM).attach(Plug(VM_ID, log, Reach()))
    with socket.socket(fileno=os.dup(attachment.fd)):
        guest = Guest(attachment.fd)
        try:
            yield guest
        finally:
            guest.socket.close()
    await ended(log)


def processes(log: Path) -> dict[str, int]:
    """The pids of the filter and of passt, those that live."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            argv = procfs.command_line(int(entry.name))
            if PasstNetwork(KEPT_FROM).owns(argv, VM_ID):
                found["filter"] = int(entry.name)
            elif "--log-file" in argv and str(log) in argv:
                found["passt"] = int(entry.name)
    return found


async def ended(log: Path) -> None:
    """Both processes end within 5 s."""
    for pid in processes(log).values():
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert await procfs.wait_exit(pidfd, 5), f"pid {pid} lives on"
        finally:
            os.close(pidfd)
    assert processes(log) == {}


def hostile_packets(port: int, lan: str) -> Iterator[bytes]:
    """Whatever a guest could try: (almost) no frame of these may lead to a socket of the host."""
    sources = (GUEST_ADDRESS, *LOOPBACKS, "0.0.0.0", lan, GATEWAY)
    broadcasts = ("127.255.255.255", "172.16.0.255", "255.255.255.255", "224.0.0.1")
    targets = (*LOOPBACKS, "0.0.0.0", "0.1.2.3", GATEWAY, DNS, GUEST_ADDRESS, *broadcasts)
    ports = 40000
    for source in sources:
        for target in targets:
            ports += 1
            yield ethernet.tcp_syn(source, target, (ports, port))
            yield ethernet.udp(source, target, (ports, port), b"hostile")
            yield ethernet.echo_request(source, target)
            yield ethernet.tcp_syn(source, target, (ports, 53))


def hostile_ipv6_packets(port: int) -> Iterator[bytes]:
    targets = ("::1", "::", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1", "::127.0.0.1", "fe80::1")
    ports = 50000
    for source in ("fe80::2", "::1", "::ffff:172.16.0.2"):
        for target in targets:
            ports += 1
            yield ethernet.tcp_syn(source, target, (ports, port))
            yield ethernet.udp(source, target, (ports, port), b"hostile")


async def test_no_frame_of_a_guest_reaches_the_hosts_loopback(tmp_path: Path) -> None:
    """A server bound to a loopback address; control: one bound to the host's own address."""
    lan = lan_address()
    visits = Visits()
    async with AsyncExitStack() as stack:
        for address in (*LOOPBACKS, "::1", lan):
            await visits.serve(stack, address)
        guest = await stack.enter_async_context(attached(tmp_path / "network.log"))
        mac = await guest.gateway_mac()
        for packet in hostile_packets(visits.port, lan):
            await guest.send(ethernet.ethernet(mac, ethernet.IPV4, packet))
            # An IPv4 packet under a wrong name, and behind a VLAN tag.
            await guest.send(ethernet.ethernet(mac, ethernet.IPV6, packet))
            tagged = struct.pack("!HH", 1, ethernet.IPV4) + packet
            await guest.send(ethernet.ethernet(mac, ethernet.VLAN, tagged))
        for packet in hostile_ipv6_packets(visits.port):
            await guest.send(ethernet.ethernet(mac, ethernet.IPV6, packet))
        await guest.send(b"", b"short", bytes(14))
        # passt takes frames in order: when these have arrived, whatever came before has, too.
        for packet in (
            ethernet.tcp_syn(GUEST_ADDRESS, lan, (39000, visits.port)),
            ethernet.udp(GUEST_ADDRESS, lan, (39001, visits.port), b"hello"),
        ):
            await guest.send(ethernet.ethernet(mac, ethernet.IPV4, packet))
        async with asyncio.timeout(20):
            first = [await visits.queue.get() for _ in range(2)]
        assert sorted(first) == [("tcp", lan), ("udp", lan)]
        assert visits.queue.empty()


def carrier(size: int, port: int) -> bytes:
    """A frame of `size` bytes, its length among them, that passt must never look into.

    Read from its fifth byte on, after a length that was lost, its destination is the length of
    a frame that ends where its payload begins. There a frame for the host's loopback waits.
    """
    packet = ethernet.udp(GUEST_ADDRESS, LOOPBACKS[0], (41000, port), b"hostile")
    hidden = ethernet.ethernet(bytes.fromhex("026267000001"), ethernet.IPV4, packet)
    payload = (struct.pack("!I", len(hidden)) + hidden).ljust(size - 4 - 34, b"\0")
    outside = ethernet.ip(GUEST_ADDRESS, "198.51.100.1", 253, payload)
    frame = ethernet.ethernet(struct.pack("!I", 30) + bytes(2), ethernet.IPV4, outside)
    assert 4 + len(frame) == size
    return frame


@pytest.mark.parametrize("size", [1260, 1218, 1044])
async def test_what_is_inside_a_packet_never_becomes_a_frame(tmp_path: Path, size: int) -> None:
    """passt 2023-03-09 loses track when a read of it ends within a length; a guest may not do that.

    passt is stopped again and again, so that the buffers before it fill up. A filter that joins
    frames is caught by chance: with 1218 in about half of all runs. What makes it impossible is
    tested without chance in `test_frame_filter.py`.
    """
    visits = Visits()
    log = tmp_path / "network.log"
    async with AsyncExitStack() as stack:
        await visits.serve(stack, LOOPBACKS[0])
        guest = await stack.enter_async_context(attached(log))
        assert await guest.gateway_mac()
        passt = processes(log)["passt"]
        frames = [carrier(size, visits.port)] * 900
        async with asyncio.timeout(20):
            for _ in range(ROUNDS):
                os.kill(passt, signal.SIGSTOP)
                sending = asyncio.create_task(guest.send(*frames))
                await asyncio.wait({sending}, timeout=0.01)
                os.kill(passt, signal.SIGCONT)
                await sending
            # It still answers, so it is still in step; and takes frames in order.
            assert await guest.gateway_mac()
        assert visits.queue.empty()


async def test_network_processes_know_nothing_of_the_users_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "a secret")
    log = tmp_path / "network.log"
    async with attached(log) as guest:
        assert await guest.gateway_mac()
        found = processes(log)
        assert set(found) == {"filter", "passt"}
        for pid in found.values():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {line.partition(b"=")[0] for line in environment if line}
            assert names <= {b"PATH", b"HOME", b"LC_ALL"}


@pytest.mark.parametrize("victim", ["filter", "passt"])
async def test_kill_9_of_one_network_process_ends_the_other(tmp_path: Path, victim: str) -> None:
    log = tmp_path / "network.log"
    async with attached(log) as guest:
        assert await guest.gateway_mac()
        os.kill(processes(log)[victim], signal.SIGKILL)
        async with asyncio.timeout(5):
            assert await guest.receive() == b"", "the hypervisor sees the end of its network"


async def test_the_network_ends_with_the_hypervisors_end_of_it(tmp_path: Path) -> None:
    log = tmp_path / "network.log"
    async with attached(log) as guest:
        # An answer came through both, so both have become what they were started as.
        assert await guest.gateway_mac()
        assert set(processes(log)) == {"filter", "passt"}
    assert processes(log) == {}


_DIES_ATTACHED = """
import asyncio, os, signal, sys
from pathlib import Path
from banger.base.model import (Reach)
from banger.drivers.base import (Plug)
from banger.drivers.network.user import PasstNetwork
from ipaddress import IPv4Network

async def main():
    network = PasstNetwork(IPv4Network("10.213.0.0/16"))
    await network.attach(Plug(sys.argv[1], Path(sys.argv[2]), Reach()))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_nothing_is_left_when_the_daemon_dies_before_the_hypervisor_starts(
    tmp_path: Path,
) -> None:
    log = tmp_path / "network.log"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _DIES_ATTACHED, VM_ID, str(log)
    )
    assert await process.wait() == -signal.SIGKILL
    await ended(log)


async def test_a_stream_without_frames_ends_the_network_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "network.log"
    async with attached(log) as guest:
        await asyncio.get_running_loop().sock_sendall(guest.socket, b"\xff\xff\xff\xff")
        async with asyncio.timeout(5):
            assert await guest.receive() == b""
    assert "network ended: the hypervisor sent a frame of 4294967295 bytes" in log.read_text()


async def test_passt_that_does_not_start_is_an_error_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "passt"
    fake.write_text("#!/bin/sh\necho cannot make a namespace >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    log = tmp_path / "network.log"
    with pytest.raises(Unavailable, match="passt does not start: cannot make a namespace; inspect"):
        await PasstNetwork(KEPT_FROM).attach(Plug(VM_ID, log, Reach()))
    assert processes(log) == {}
