"""Published ports, into real guests: bytes, ends, many at once, and what stops and dies."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from homes import Home
from product import IMAGE, Banger, until

pytestmark = pytest.mark.guest

_TIMEOUT_S = 60.0

#: In the guest: perl is what the small image has. Port 80 answers with all it heard, once that has
#: ended; port 81 speaks first and ends, then counts what it hears into /root/heard; port 82 says
#: hello and waits.
_SERVER = r"""
use strict; use IO::Socket::INET;
$SIG{CHLD} = 'IGNORE';
sub listener { IO::Socket::INET->new(Listen => 128, LocalAddr => $_[0], LocalPort => $_[1],
                                     ReuseAddr => 1) or die "$_[1]: $!" }
sub hear { my ($from) = @_; my $all = ''; while (sysread($from, my $part, 65536)) { $all .= $part }
           $all }
sub say_all { my ($to, $what) = @_;
              for (my $at = 0; $at < length $what;) {
                  $at += syswrite($to, $what, 65536, $at) // last } }
sub serve { my ($listener, $talk) = @_;
            fork and return;
            while (1) { my $client = $listener->accept or next;
                        if (!fork) { $talk->($client); exit 0 }
                        close $client } }
serve(listener('0.0.0.0', 80), sub { say_all($_[0], hear($_[0])) });
serve(listener('127.0.0.1', 81), sub {
    say_all($_[0], 'hello'); shutdown($_[0], 1);
    my $heard = hear($_[0]);
    open my $file, '>', '/root/heard.new'; print $file length $heard; close $file;
    rename '/root/heard.new', '/root/heard' });
serve(listener('127.0.0.1', 82), sub { say_all($_[0], 'hello'); hear($_[0]) });
"""


def _serve(banger: Banger, name: str) -> None:
    """Start the server in a guest; it listens when this returns."""
    script = "cat > server.pl && setsid perl server.pl </dev/null >/dev/null 2>&1"
    banger.guest(name, script, stdin=_SERVER.encode())


def _publish(banger: Banger, name: str, port: str) -> int:
    return int(banger.ok("vm", "publish", name, port).strip().rpartition(":")[2])


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), _TIMEOUT_S)


def _receive(connection: socket.socket, count: int = -1) -> bytes:
    """What comes up to the end, or up to `count` bytes."""
    data = b""
    while count < 0 or len(data) < count:
        part = connection.recv(1 << 20)
        if not part:
            break
        data += part
    return data


def _echo(port: int, data: bytes) -> bytes:
    with _connect(port) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return _receive(connection)


def _is_closed(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture(scope="module")
def server(banger: Banger, vm: str) -> str:
    _serve(banger, vm)
    return vm


@pytest.fixture(scope="module")
def echo(banger: Banger, server: str) -> Iterator[int]:
    """A port of the host that leads to the guest's port 80."""
    port = _publish(banger, server, "0:80")
    yield port
    banger.ok("vm", "unpublish", server, str(port))


def test_twenty_megabytes_pass_both_ways_unharmed(echo: int) -> None:
    data = os.urandom(20 << 20)
    assert hashlib.sha256(_echo(echo, data)).digest() == hashlib.sha256(data).digest()


def test_a_guest_that_has_finished_still_hears(banger: Banger, server: str) -> None:
    port = _publish(banger, server, "0:81")
    with _connect(port) as connection:
        assert _receive(connection) == b"hello"
        connection.sendall(bytes(1 << 20))
    until(lambda: banger.guest(server, "cat heard || true") == str(1 << 20), "the guest has heard")
    banger.ok("vm", "unpublish", server, str(port))


def test_fifty_connections_at_once(echo: int) -> None:
    """All are open before the first says anything: none waits for another to end."""
    together = threading.Barrier(50)

    def talk(number: int) -> bool:
        data = bytes([number]) * 50_000
        with _connect(echo) as connection:
            connection.sendall(data[:1])
            together.wait(_TIMEOUT_S)
            connection.sendall(data[1:])
            connection.shutdown(socket.SHUT_WR)
            return _receive(connection) == data

    with ThreadPoolExecutor(50) as threads:
        assert all(threads.map(talk, range(50)))


def test_a_port_that_nobody_listens_on_ends_its_client_at_once_and_no_other(
    banger: Banger, server: str, echo: int
) -> None:
    refused = _publish(banger, server, "0:83")
    with _connect(echo) as other:
        other.sendall(b"before, ")
        for _ in range(20):
            # It may be told of by connect() already.
            with pytest.raises(ConnectionResetError), _connect(refused) as connection:
                connection.recv(1)
        other.sendall(b"after")
        other.shutdown(socket.SHUT_WR)
        assert _receive(other) == b"before, after"
    banger.ok("vm", "unpublish", server, str(refused))


def test_open_connections_end_with_their_port(banger: Banger, server: str, echo: int) -> None:
    port = _publish(banger, server, "127.0.0.2:0:82")
    with socket.create_connection(("127.0.0.2", port), _TIMEOUT_S) as connection:
        assert _receive(connection, 5) == b"hello"
        assert banger.ok("vm", "unpublish", server, f"127.0.0.2:{port}") == f"{server}\n"
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert _is_closed(port)
    assert _echo(echo, b"still here") == b"still here"
    assert "does not publish" in banger.fails("vm", "unpublish", server, str(port), status=1)


def test_a_port_that_is_in_use_is_not_published(banger: Banger, server: str, echo: int) -> None:
    before = banger.json("vm", "show", server)["spec"]
    with socket.create_server(("127.0.0.1", 0)) as mine:
        port = mine.getsockname()[1]
        said = banger.fails("vm", "publish", server, f"{port}:80", status=1)
    assert f"port 127.0.0.1:{port} of this host is in use by" in said
    assert f"(pid {os.getpid()})" in said
    said = banger.fails("vm", "publish", server, f"{echo}:81", status=1)
    assert f'vm "{server}" publishes 127.0.0.1:{echo} already' in said
    assert banger.json("vm", "show", server)["spec"] == before


def test_a_port_in_use_is_told_of_before_anything_is_made(
    banger: Banger, server: str, echo: int
) -> None:
    before = banger.json("vm", "list")
    with socket.create_server(("127.0.0.1", 0)) as mine:
        port = mine.getsockname()[1]
        said = banger.fails(
            "run", "--rm", "--image", IMAGE, "-p", str(port), "-p", f"{echo}:80", "--", "true",
            status=125,
        )  # fmt: skip
    assert f"port 127.0.0.1:{port} of this host is in use by" in said
    assert f'port 127.0.0.1:{echo} of this host is published by vm "{server}"' in said
    assert [each["id"] for each in banger.json("vm", "list")] == [each["id"] for each in before]


def test_what_listens_and_how_to_reach_it(banger: Banger, server: str, echo: int) -> None:
    listed = {each["guest_port"]: each for each in banger.json("vm", "ports", server)}
    assert {80, 81, 82} <= set(listed)
    assert [each["command"] for each in listed[80]["sockets"]] == ["perl"]
    assert listed[80]["sockets"][0]["address"] == "0.0.0.0"
    assert listed[80]["published"] == [{"host": "127.0.0.1", "host_port": echo, "problem": ""}]
    assert listed[81]["published"] == []
    unused = _publish(banger, server, "0:84")
    drawn = banger.ok("vm", "ports")
    assert f"127.0.0.1:{unused}: nothing listens on it in the guest" in drawn
    assert f"not published: banger vm publish {server} 8081:81" in drawn
    banger.ok("vm", "unpublish", server, str(unused))


def test_a_port_is_closed_by_stop_and_opened_by_start(
    banger: Banger, make_vm: Callable[..., str]
) -> None:
    """Of a machine without a network: the way into the guest needs none."""
    port = _free_port()
    name = make_vm("--network", "none", "-p", f"{port}:80", "--memory", "512M")
    _serve(banger, name)
    assert _echo(port, b"first") == b"first"
    with _connect(port) as connection:
        connection.sendall(b"cut short")
        banger.ok("vm", "stop", name)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert _is_closed(port)
    (listed,) = banger.json("vm", "ports", name)
    assert listed["published"][0]["problem"] == "the VM is stopped"
    banger.ok("vm", "start", name)
    _serve(banger, name)
    assert _echo(port, b"second") == b"second"
    banger.ok("vm", "delete", "--force", name)
    assert _is_closed(port)


def test_a_killed_daemons_ports_work_again_after_the_next_call(home: Home) -> None:
    banger = home.banger
    port = _free_port()
    banger.ok("run", "-d", "-q", "--image", IMAGE, "--name", "web", "-p", f"{port}:80")
    _serve(banger, "web")
    with _connect(port) as connection:
        connection.sendall(b"x")
        home.kill_daemon(signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert _is_closed(port)
    banger.ok("vm", "list")
    assert _echo(port, b"again") == b"again"
