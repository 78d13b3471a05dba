"""Names of real guests: from the name server's answer to a server in the guest, and back."""

from __future__ import annotations

import json
import signal
import socket
import subprocess

import pytest

import suite
from homes import Home
from product import IMAGE, Banger, until

pytestmark = pytest.mark.guest

_TIMEOUT_S = 30.0

#: Listens on the ports that it is given and says its host's name; what it has on stdin closes it.
_SERVER = r"""
use strict; use IO::Socket::INET; use Sys::Hostname;
$SIG{CHLD} = 'IGNORE';
for my $where (@ARGV) {
    my ($host, $port) = split /:/, $where;
    my $listener = IO::Socket::INET->new(Listen => 16, LocalAddr => $host, LocalPort => $port,
                                         ReuseAddr => 1) or die "$where: $!";
    fork and next;
    while (1) { my $client = $listener->accept or next;
                if (!fork) { syswrite($client, hostname . " $port"); exit 0 }
                close $client }
}
"""


def serve(banger: Banger, name: str, *where: str) -> None:
    """Start servers in a guest at ``ADDRESS:PORT``; they listen when this returns."""
    script = (
        f"cat > server.pl && setsid perl server.pl {' '.join(where)} </dev/null >/dev/null 2>&1"
    )
    banger.guest(name, script, stdin=_SERVER.encode())


def stop_serving(banger: Banger, name: str) -> None:
    banger.guest(name, "pkill perl || true")


def said(address: str, port: int) -> str:
    """What the server there says; empty when nothing listens."""
    try:
        with socket.create_connection((address, port), _TIMEOUT_S) as connection:
            heard = b""
            while part := connection.recv(100):
                heard += part
            return heard.decode()
    except ConnectionError:
        return ""


def hears(address: str, port: int, text: str) -> None:
    until(lambda: said(address, port) == text, f"{text!r} at {address}:{port}", 10)


def is_silent(address: str, port: int) -> None:
    until(lambda: not said(address, port), f"nothing at {address}:{port}", 10)


def refused(address: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((address, port)) != 0


class Dns:
    """`dig`, at a home's name server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, *words: str) -> list[str]:
        """The answers to a question, each a line; TCP with ``+tcp``."""
        argv = ["dig", "@127.0.0.1", "-p", str(self.port), "+short", "+tries=1", "+time=5", *words]
        done = subprocess.run(argv, capture_output=True, timeout=20, check=True, text=True)
        return done.stdout.split()

    def status(self, name: str) -> str:
        argv = ["dig", "@127.0.0.1", "-p", str(self.port), "+tries=1", "+time=5", name]
        done = subprocess.run(argv, capture_output=True, timeout=20, check=True, text=True)
        return done.stdout.partition("status: ")[2].partition(",")[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def named_home(home: Home) -> Dns:
    """A name server of its own for a home whose daemon does not run yet."""
    port = free_port()
    home.configure(f'dns_address = "127.0.0.1:{port}"')
    return Dns(port)


def run(home: Home, name: str, *options: str) -> None:
    home.banger.ok(
        "run", "-d", "-q", "--image", IMAGE, "--memory", "512M", "--name", name, *options
    )


@suite.about_user_networking
def test_names_lead_to_servers_in_guests(home: Home) -> None:
    """Of two machines, one without a network, that have the same port."""
    dns, banger = named_home(home), home.banger
    run(home, "web")
    run(home, "db", "--network", "none")
    (web,), (db,) = dns.ask("web.vm"), dns.ask("DB.vm", "+tcp")
    assert web != db
    assert banger.json("vm", "show", "web")["runtime"]["address"] == web
    assert dns.ask("-x", web) == ["web.vm."]
    assert dns.ask("web.vm", "AAAA") == []
    assert (dns.status("web.vm"), dns.status("no.vm"), dns.status("example.org")) == (
        "NOERROR",
        "NXDOMAIN",
        "REFUSED",
    )
    serve(banger, "web", "0.0.0.0:8000", "127.0.0.1:8001", "0.0.0.0:1023")
    serve(banger, "db", "0.0.0.0:8000")
    hears(web, 8000, "web 8000")
    hears(web, 8001, "web 8001")
    hears(db, 8000, "db 8000")
    assert said(web, 1023) == said(db, 8001) == said("127.0.0.1", 8000) == ""
    listed = {each["guest_port"]: each for each in banger.json("vm", "ports", "web")}
    assert listed[8000]["automatic"] == {"host": web, "host_port": 8000, "problem": ""}
    assert listed[1023]["automatic"] is None
    drawn = banger.ok("vm", "ports", "web")
    assert f"{web}:8000 (web.vm)" in drawn
    assert "not published: banger vm publish web 9023:1023" in drawn
    assert "web.vm" in banger.ok("vm", "show", "web")

    banger.ok("vm", "set", "web", "--name", "www")
    assert (dns.ask("web.vm"), dns.ask("www.vm"), dns.ask("-x", web)) == ([], [web], ["www.vm."])
    hears(web, 8000, "www 8000")

    home.kill_daemon(signal.SIGKILL)
    assert said(web, 8000) == ""
    banger.ok("vm", "list")
    assert dns.ask("www.vm") == [web]
    hears(web, 8000, "www 8000")
    hears(db, 8000, "db 8000")

    stop_serving(banger, "www")
    is_silent(web, 8000)
    hears(db, 8000, "db 8000")
    banger.ok("vm", "stop", "db")
    assert said(db, 8000) == ""
    assert dns.ask("db.vm") == [db]
    banger.ok("vm", "start", "db")
    assert dns.ask("db.vm") == [db]
    banger.ok("vm", "delete", "--force", "db")
    assert dns.status("db.vm") == "NXDOMAIN"


@suite.about_user_networking
def test_a_connection_outlives_its_listener_and_a_port_in_use_is_told_of(home: Home) -> None:
    dns, banger = named_home(home), home.banger
    run(home, "web")
    (web,) = dns.ask("web.vm")
    taken = socket.create_server((web, 8005))
    once = (
        "setsid perl -MIO::Socket::INET -e '"
        "$l = IO::Socket::INET->new(Listen => 1, LocalPort => 8004, ReuseAddr => 1) or die;"
        "fork and exit; $c = $l->accept; close $l; syswrite($c, q(early));"
        "sysread($c, $x, 1); syswrite($c, q(late))'"
        " </dev/null >/dev/null 2>&1"
    )
    banger.guest("web", once)
    serve(banger, "web", "0.0.0.0:8005")

    def connected() -> tuple[socket.socket, ...]:
        try:
            return (socket.create_connection((web, 8004), _TIMEOUT_S),)
        except ConnectionRefusedError:
            return ()

    with until(connected, "the port is open", 10)[0] as connection:
        # It is this connection that was accepted in the guest, and not one that asks for refusal.
        assert connection.recv(10) == b"early"
        until(lambda: refused(web, 8004), "the port is closed", 10)
        connection.sendall(b"x")
        assert connection.recv(10) == b"late"

    def problem() -> str:
        ports = {each["guest_port"]: each for each in banger.json("vm", "ports", "web")}
        return str(ports[8005]["automatic"]["problem"])

    until(lambda: "is in use by" in problem(), "who has the port is told", 10)
    taken.close()
    until(lambda: said(web, 8005) == "web 8005", "the port is opened when it is free", 30)
    # What somebody publishes goes before what is open by itself.
    banger.ok("vm", "publish", "web", f"{web}:8005:8005")
    assert said(web, 8005) == "web 8005"
    banger.ok("vm", "unpublish", "web", f"{web}:8005")
    assert said(web, 8005) == ""
    until(lambda: said(web, 8005) == "web 8005", "the port is opened again", 30)


def test_a_name_servers_port_that_is_taken_is_told_of(bare_home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        bare_home.configure(f'dns_address = "{where}"')
        banger = bare_home.banger
        banger.ok("daemon", "start")
        assert banger.json("daemon", "status")["dns"] == (
            f"{where}: not open: Address already in use"
        )
        # Whatever else it finds on this host: its status is not what is asked here.
        found = json.loads(banger.run("doctor", "--json").stdout)
        checks = {each["name"]: each for each in found}
        assert checks["names"]["level"] == "warn"
        assert "set dns_address to another one" in checks["names"]["hint"]
    banger.ok("daemon", "restart")
    assert banger.json("daemon", "status")["dns"] == where
