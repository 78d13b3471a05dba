"""A guest's network: out to the world and its names, never to the host's loopback, or none."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import pytest

import suite
from product import Banger

pytestmark = pytest.mark.guest

_GATEWAY = "172.16.0.1"
_DNS = "172.16.0.3"


def _lan_address() -> str:
    """The host's address towards the outside; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address: str = probe.getsockname()[0]
    return address


@dataclass
class Host:
    """Servers on this host: they greet who connects, and remember who came."""

    address: str
    port: int
    visits: list[str] = field(default_factory=list)


def _serve_tcp(listener: socket.socket, host: Host) -> None:
    with suppress(OSError):  # closed at the end
        while True:
            peer, _ = listener.accept()
            with peer, suppress(OSError):
                host.visits.append("tcp")
                peer.settimeout(5)
                peer.sendall(b"hello from the host\n")
                # To close with something unread would reset the connection.
                while peer.recv(100):
                    pass


def _serve_udp(server: socket.socket, host: Host) -> None:
    with suppress(OSError):
        while True:
            data, peer = server.recvfrom(2000)
            if not data:
                return
            host.visits.append("udp")
            server.sendto(b"hello from the host\n", peer)


def _serve(stack: ExitStack, address: str) -> Host:
    tcp = stack.enter_context(socket.create_server((address, 0)))
    host = Host(address, tcp.getsockname()[1])
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.bind((address, host.port))
    for serve, server in ((_serve_tcp, tcp), (_serve_udp, udp)):
        thread = threading.Thread(target=serve, args=(server, host))
        thread.start()
        stack.callback(thread.join, 10)
        # What is blocked in accept or recvfrom wakes by a shutdown only.
        stack.callback(_shut, server)
    return host


def _shut(server: socket.socket) -> None:
    with suppress(
        OSError
    ):  # a datagram socket says that it is not connected, and wakes all the same
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def lan() -> Iterator[Host]:
    with ExitStack() as stack:
        yield _serve(stack, _lan_address())


@pytest.fixture
def loopback() -> Iterator[Host]:
    with ExitStack() as stack:
        yield _serve(stack, "127.0.0.1")


def _try(banger: Banger, vm: str, protocol: str, address: str, port: int) -> str:
    """What a server at an address says to the guest, if anything."""
    script = f"exec 3<>/dev/{protocol}/{address}/{port} && echo x >&3 && timeout 2 head -c 20 <&3"
    done = banger.run("vm", "exec", vm, "--", "timeout", "4", "bash", "-c", script)
    return done.stdout.decode()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@suite.about_user_networking
def test_a_guest_reaches_servers_outside(banger: Banger, vm: str, lan: Host, protocol: str) -> None:
    assert _try(banger, vm, protocol, lan.address, lan.port) == "hello from the host\n"
    assert lan.visits == [protocol]


@suite.about_user_networking
def test_the_guest_has_its_addresses(banger: Banger, vm: str) -> None:
    assert "inet 172.16.0.2/24" in banger.guest(vm, "ip -4 addr show eth0")
    assert f"default via {_GATEWAY}" in banger.guest(vm, "ip route")
    assert banger.guest(vm, "cat /etc/resolv.conf") == f"nameserver {_DNS}\n"
    assert banger.json("vm", "show", vm)["runtime"]["guest_ip"] == "172.16.0.2"


@suite.about_user_networking
def test_names_are_asked_of_the_hosts_resolver(banger: Banger, vm: str) -> None:
    """Any answer will do: what the host's resolver says of a name is not ours to test."""
    query = "\\x12\\x34\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00"
    query += "\\x09localhost\\x00\\x00\\x01\\x00\\x01"
    script = f"""
    exec 3<>/dev/udp/{_DNS}/53
    for attempt in 1 2 3; do
        printf '{query}' >&3
        answer=$(timeout 5 dd bs=2000 count=1 <&3 2>/dev/null | od -An -tx1 -N4) && break
    done
    echo $answer
    """
    answer = banger.ok("vm", "exec", vm, "--", "bash", "-c", script).split()
    assert answer[:2] == ["12", "34"], "the answer to our question"
    assert int(answer[2], 16) & 0x80, "and it is an answer"


#: What a guest's root may do to make an address lead out of the guest, before it tries it.
_TRICKS = """
sysctl -qw net.ipv4.conf.all.route_localnet=1 net.ipv4.conf.eth0.route_localnet=1 \\
    net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0
ip route del local 127.0.0.0/8 dev lo table local
ip route del local 127.0.0.1 dev lo table local
ip addr del 127.0.0.1/8 dev lo
ip route add 127.0.0.0/8 via 172.16.0.1 dev eth0 src 172.16.0.2
ip route add 0.0.0.0/32 via 172.16.0.1 dev eth0
ip route show 127.0.0.0/8
"""


@suite.about_user_networking
def test_the_hosts_loopback_cannot_be_reached_by_any_address(
    banger: Banger, make_vm: Callable[..., str], loopback: Host
) -> None:
    vm = make_vm()
    lan_address = _lan_address()
    network = ipaddress.ip_network(f"{lan_address}/24", strict=False)
    addresses = [_GATEWAY, _DNS, lan_address, str(network[1]), "172.16.0.2", "255.255.255.255",
                 "224.0.0.1", "169.254.1.1", str(network.broadcast_address)]  # fmt: skip
    tricky = ["127.0.0.1", "127.0.0.2", "127.255.255.254", "0.0.0.0", "0.0.0.1"]
    _attack(banger, vm, addresses, loopback.port)
    assert "via 172.16.0.1" in banger.guest(vm, f"({_TRICKS}) 2>&1")
    _attack(banger, vm, [*addresses, *tricky], loopback.port)
    assert loopback.visits == []
    # The servers are there, and would have noticed.
    with socket.create_connection(("127.0.0.1", loopback.port), timeout=5) as client:
        assert client.recv(100) == b"hello from the host\n"
    assert loopback.visits == ["tcp"]


def _attack(banger: Banger, vm: str, addresses: list[str], port: int) -> None:
    """Try them all at once, by TCP and by UDP."""
    script = "\n".join(
        f"(exec 3<>/dev/{protocol}/{address}/{port} && echo x >&3 && timeout 3 cat <&3) &"
        for address in addresses
        for protocol in ("tcp", "udp")
    )
    done = banger.run("vm", "exec", vm, "--", "timeout", "5", "bash", "-c", f"{script}\nwait")
    assert b"hello" not in done.stdout


@suite.about_user_networking
def test_the_hosts_loopback_cannot_be_reached_by_ipv6(
    banger: Banger, make_vm: Callable[..., str]
) -> None:
    vm = make_vm()
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
        server.settimeout(0)
        port = server.getsockname()[1]
        setup = """
        ip -6 addr add fd00::2/64 dev eth0 nodad
        ip -6 route add default via fe80::1 dev eth0
        ip -6 route del local ::1 dev lo table local
        ip -6 route add ::1 via fe80::1 dev eth0
        """
        banger.run("vm", "exec", vm, "--", "sh", "-c", setup)
        addresses = ["::1", "fe80::1%eth0", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
        _attack(banger, vm, addresses, port)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_vm_without_a_network_has_no_interface_and_works(
    banger: Banger, make_vm: Callable[..., str]
) -> None:
    vm = make_vm("--network", "none")
    assert banger.guest(vm, "ls /sys/class/net") == "lo\n"
    assert banger.json("vm", "show", vm)["runtime"]["guest_ip"] == ""
    assert banger.guest(vm, "cat", stdin=b"x" * 100_000) == "x" * 100_000


@suite.about_user_networking
def test_what_a_guest_may_reach_is_all_or_nothing_and_changes_while_it_runs(
    banger: Banger, make_vm: Callable[..., str], lan: Host
) -> None:
    vm = make_vm("--egress", "none")
    for protocol in ("tcp", "udp"):
        assert _try(banger, vm, protocol, lan.address, lan.port) == ""
    # Nobody waits for what will not come.
    connect = f"exec 3<>/dev/tcp/{lan.address}/{lan.port}"
    assert "No route to host" in banger.guest(vm, f"bash -c '{connect}' 2>&1 || true")
    # The resolver of the C library would wait 10 s for an answer that does not come.
    assert banger.guest(vm, "timeout 9 getent hosts example.org; echo $?") == "2\n"
    assert lan.visits == []
    banger.ok("vm", "set", vm, "--egress", "all")
    assert _try(banger, vm, "tcp", lan.address, lan.port) == "hello from the host\n"
    banger.ok("vm", "set", vm, "--egress", "none")
    assert _try(banger, vm, "tcp", lan.address, lan.port) == ""
    # Its next start does not forget it.
    banger.ok("vm", "restart", vm)
    assert _try(banger, vm, "tcp", lan.address, lan.port) == ""


@suite.about_user_networking
def test_what_user_networking_cannot_do_is_refused_with_what_can(
    banger: Banger, vm: str, image: str
) -> None:
    for options, said in (
        (("--allow", "example.org"), "cannot hold a machine to what is allowed"),
        (("--no-isolated",), "machines in user networking cannot reach each other"),
    ):
        before = banger.json("vm", "list")
        error = banger.fails("vm", "run", "-d", "--image", image, *options, status=125)
        assert said in error
        assert "--network bridge" in error
        assert banger.json("vm", "list") == before
        assert said in banger.fails("vm", "set", vm, *options, status=1)
    assert banger.json("vm", "show", vm)["spec"]["reach"]["isolated"] is True
    error = banger.fails("vm", "run", "-d", "--image", image, "--allow", "a b", status=125)
    assert '"a b" is neither a network nor a name' in error


@suite.about_user_networking
def test_guests_do_not_see_each_other(banger: Banger, vm: str, make_vm: Callable[..., str]) -> None:
    """Every guest has a network to itself, with the same addresses."""
    other = make_vm()
    script = "sed -n 's/.*//; 1p' /sys/class/net/eth0/address"
    assert banger.guest(vm, script) == banger.guest(other, script)
    macs = [banger.guest(name, "cat /sys/class/net/eth0/address") for name in (vm, other)]
    assert macs[0] != macs[1]


@suite.about_user_networking
def test_a_download_arrives_with_its_end(banger: Banger, vm: str) -> None:
    """Several, from a peer that closes at once: passt used to lose the end of one in seven."""
    data = os.urandom(5 << 20)
    downloads = 5
    with socket.create_server((_lan_address(), 0)) as server:

        def send() -> None:
            for _ in range(downloads):
                peer, _ = server.accept()
                with peer:
                    peer.sendall(data)

        thread = threading.Thread(target=send)
        thread.start()
        host, port = server.getsockname()
        for _ in range(downloads):
            done = subprocess.run(
                banger.argv("vm", "exec", vm, "--", "bash", "-c", f"cat </dev/tcp/{host}/{port}"),
                stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True,
            )  # fmt: skip
            assert done.stdout == data
        thread.join(10)
