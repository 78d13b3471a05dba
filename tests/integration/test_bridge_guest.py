"""Machines on a bridge, with real guests: on a host of their own, with a world to reach."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import leftovers
import suite
from homes import copy_artifacts
from lab import ELSEWHERE, PUBLIC, UPLINK, WORLD, HostedBanger, HostedHome, Lab, lab, names
from product import IMAGE, Banger, until

pytestmark = pytest.mark.guest

_PORT = 8000
#: As it is by default; other homes of the session may have another.
_BRIDGE = 'bridge_name = "banger0"\nbridge_cidr = "10.213.0.0/16"\n'
_ZONE = f"""
www.example.org. 60 IN CNAME cdn.example.net.
cdn.example.net. 60 IN A {PUBLIC}
www.example.com. 60 IN A {PUBLIC}
example.org. 60 IN A {PUBLIC}
inside.example.org. 60 IN A {WORLD}
"""
_SERVE = (
    "use IO::Socket::INET; my $s = IO::Socket::INET->new(Listen => 5, LocalPort => 7000,"
    " ReuseAddr => 1) or die; while (my $c = $s->accept) { print $c `hostname`; close $c }"
)


@contextmanager
def _greeter(port: int) -> Iterator[list[str]]:
    """A server at all addresses of where this thread is; who came, in order."""
    visitors: list[str] = []
    listener = socket.create_server(("0.0.0.0", port))

    def serve() -> None:
        with suppress(OSError):  # closed at the end
            while True:
                peer, (address, _) = listener.accept()
                with peer, suppress(OSError):
                    visitors.append(address)
                    peer.sendall(b"hello\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield visitors
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture(scope="module")
def town() -> Iterator[Lab]:
    with lab(f"bg{os.getpid()}") as made, names(made, _ZONE):
        yield made


@pytest.fixture(scope="module")
def world(town: Lab) -> Iterator[list[str]]:
    with town.inside(town.world), _greeter(_PORT) as visitors:
        yield visitors


@pytest.fixture(scope="module")
def home(
    town: Lab, private_home: object, image: str, tmp_path_factory: object
) -> Iterator[HostedHome]:
    directory = Path(os.environ["HOME"]) / "br"
    (directory / "run").mkdir(parents=True, mode=0o700)
    made = HostedHome(directory, namespace=town.host)
    made.configure(f'network = "bridge"\n{_BRIDGE}[vm_defaults]\nmemory = "256M"')
    copy_artifacts(Path(os.environ["HOME"]), made)
    yield made
    made.close()


@pytest.fixture
def hosted(home: HostedHome) -> Banger:
    return home.banger


@pytest.fixture
def make_vm(hosted: Banger, keep_guest: Callable[[], bool]) -> Iterator[Callable[..., str]]:
    made: list[str] = []

    def make(*options: str) -> str:
        name = hosted.ok("vm", "run", "-d", "-q", "--image", IMAGE, *options).strip()
        made.append(name)
        return name

    yield make
    if not keep_guest():
        for name in made:
            hosted.run("vm", "delete", "--force", name)


def _address(banger: Banger, vm: str) -> str:
    return str(banger.json("vm", "show", vm)["runtime"]["guest_ip"])


def _reaches(banger: Banger, vm: str, address: str, port: int = _PORT) -> bool:
    """Whether a connection from the guest is greeted."""
    script = f"exec 3<>/dev/tcp/{address}/{port} && read -r line <&3 && echo $line"
    done = banger.run("vm", "exec", vm, "--", "timeout", "3", "bash", "-c", script)
    return done.returncode == 0 and done.stdout != b""


def _resolved(banger: Banger, vm: str, name: str) -> str:
    """The address that the guest finds; empty when it finds none."""
    done = banger.run("vm", "exec", vm, "--", "getent", "ahostsv4", name)
    return done.stdout.decode().partition(" ")[0].strip()


def _serve(banger: Banger, vm: str) -> None:
    """Have a server at port 7000 of a guest, for as long as that runs."""
    banger.ok("vm", "exec", vm, "--", "sh", "-c", f"setsid perl -e '{_SERVE}' >/dev/null 2>&1 &")
    until(lambda: ":1B58" in banger.guest(vm, "cat /proc/net/tcp"), "a server in the guest")


def test_a_machine_reaches_the_world_and_not_the_host(
    town: Lab, hosted: Banger, world: list[str], make_vm: Callable[..., str]
) -> None:
    vm = make_vm()
    assert _reaches(hosted, vm, WORLD)
    assert world[-1] == UPLINK  # nobody sees the guest's own address
    with town.inside(town.host), _greeter(9999) as visitors:
        for address in (UPLINK, _address(hosted, vm).rpartition(".")[0] + ".1", "10.213.0.1"):
            assert not _reaches(hosted, vm, address, 9999)
    assert visitors == []
    shown = hosted.json("vm", "show", vm)
    assert shown["spec"]["network"] == "bridge"
    assert shown["spec"]["reach"] == {"egress": "all", "allow": [], "isolated": True}


def test_what_it_may_reach_changes_while_it_runs(
    hosted: Banger, world: list[str], make_vm: Callable[..., str]
) -> None:
    vm = make_vm("--egress", "none")
    assert not _reaches(hosted, vm, WORLD)
    hosted.ok("vm", "set", vm, "--allow", "198.18.1.0/24")
    assert (_reaches(hosted, vm, WORLD), _reaches(hosted, vm, ELSEWHERE)) == (False, True)
    hosted.ok("vm", "set", vm, "--egress", "all")
    assert (_reaches(hosted, vm, WORLD), _reaches(hosted, vm, ELSEWHERE)) == (True, True)
    hosted.ok("vm", "set", vm, "--egress", "none")
    assert not _reaches(hosted, vm, WORLD)
    hosted.ok("vm", "restart", vm)
    assert not _reaches(hosted, vm, WORLD)


def test_machines_reach_each_other_when_both_were_asked_to(
    hosted: Banger, make_vm: Callable[..., str]
) -> None:
    server = make_vm("--no-isolated")
    friend, stranger = make_vm("--no-isolated", "--egress", "none"), make_vm()
    _serve(hosted, server)
    address = _address(hosted, server)
    assert _reaches(hosted, friend, address, 7000)
    assert not _reaches(hosted, stranger, address, 7000)
    hosted.ok("vm", "set", stranger, "--no-isolated")
    assert _reaches(hosted, stranger, address, 7000)
    hosted.ok("vm", "set", server, "--isolated")
    assert not _reaches(hosted, friend, address, 7000)


def test_a_name_opens_what_it_leads_to_for_the_machine_that_asked(
    hosted: Banger, world: list[str], make_vm: Callable[..., str]
) -> None:
    vm, other = (make_vm("--allow", "*.example.org") for _ in range(2))
    assert not _reaches(hosted, vm, PUBLIC)
    assert _resolved(hosted, vm, "www.example.org") == PUBLIC
    assert _reaches(hosted, vm, PUBLIC)
    # Neither for others, nor by what is not allowed, nor where a name may not lead.
    assert not _reaches(hosted, other, PUBLIC)
    assert not _reaches(hosted, vm, WORLD)
    for name in ("www.example.com", "inside.example.org", "example.org"):
        assert _resolved(hosted, vm, name) == ""
    # Nobody else is asked: not even the server that the host asks.
    assert not _reaches(hosted, vm, WORLD, 53)
    hosted.ok("vm", "set", vm, "--allow", "www.example.com")
    assert not _reaches(hosted, vm, PUBLIC)
    assert _resolved(hosted, vm, "www.example.com") == PUBLIC
    assert _reaches(hosted, vm, PUBLIC)


def test_machines_on_a_bridge_have_names(
    town: Lab, hosted: Banger, make_vm: Callable[..., str]
) -> None:
    friend, other, alone = make_vm("--no-isolated"), make_vm("--no-isolated"), make_vm()
    address = _address(hosted, other)
    shown = hosted.json("vm", "show", other)["runtime"]
    assert (shown["dns_name"], shown["address"]) == (f"{other}.vm", address)
    dig = ("dig", "+short", "@127.0.0.1", "-p", "5354")
    assert town.run(town.host, *dig, f"{other}.vm").split() == [address]
    assert town.run(town.host, *dig, "-x", address).split() == [f"{other}.vm."]
    assert _resolved(hosted, friend, f"{other}.vm") == address
    assert _resolved(hosted, alone, f"{other}.vm") == ""
    assert _resolved(hosted, alone, f"{alone}.vm") == _address(hosted, alone)
    assert _resolved(hosted, alone, "www.example.com") == PUBLIC
    hosted.ok("vm", "set", alone, "--egress", "none")
    assert _resolved(hosted, alone, "www.example.com") == ""


@suite.about_user_networking
def test_the_host_and_nobody_else_reaches_a_machine_at_its_address(
    town: Lab, hosted: Banger, world: list[str], make_vm: Callable[..., str]
) -> None:
    vm = make_vm()
    _serve(hosted, vm)
    address = _address(hosted, vm)
    with town.inside(town.host), socket.create_connection((address, 7000), 10) as peer:
        assert peer.recv(100).decode().strip() == vm
    (port,) = (each for each in hosted.json("vm", "ports", vm) if each["guest_port"] == 7000)
    assert port["automatic"] == {"host": address, "host_port": 7000, "problem": ""}
    assert port["problem"] == ""
    # A machine in user networking has connections of the host's own: not there.
    other = make_vm("--network", "user")
    assert _reaches(hosted, other, WORLD)
    assert not _reaches(hosted, other, address, 7000)


def test_forks_and_machines_that_go_on_have_addresses_of_their_own(
    hosted: Banger, world: list[str], make_vm: Callable[..., str]
) -> None:
    source = make_vm("--allow", "198.18.0.0/24")
    forks = hosted.ok("vm", "fork", source, "--count", "2", "-q").split()
    try:
        addresses = {_address(hosted, each) for each in (source, *forks)}
        assert len(addresses) == 3
        for each in (source, *forks):
            assert (_reaches(hosted, each, WORLD), _reaches(hosted, each, ELSEWHERE)) == (
                True,
                False,
            )
    finally:
        hosted.ok("vm", "delete", "--force", *forks)
    hosted.ok("vm", "stop", "--suspend", source)
    hosted.ok("vm", "start", source)
    assert _address(hosted, source) in addresses
    assert (_reaches(hosted, source, WORLD), _reaches(hosted, source, ELSEWHERE)) == (True, False)


def test_killed_daemons_cut_nobody_off(
    town: Lab, home: HostedHome, hosted: Banger, world: list[str], make_vm: Callable[..., str]
) -> None:
    open_, closed = make_vm(), make_vm("--egress", "none")
    rules = town.state()["rules"]
    home.kill_daemon(signal.SIGKILL)
    assert _reaches(hosted, open_, WORLD)  # the first call starts the next one
    assert not _reaches(hosted, closed, WORLD)
    assert town.state()["rules"] == rules
    hosted.ok("vm", "set", closed, "--egress", "all")
    assert _reaches(hosted, closed, WORLD)
    # Killed while nobody runs: the next one takes the bridge down.
    hosted.ok("vm", "delete", "--force", open_, closed)
    home.kill_daemon(signal.SIGKILL)
    assert "banger0" in town.state()["links"]
    hosted.ok("vm", "list")
    assert "banger0" not in town.state()["links"]


@pytest.mark.parametrize("stage", ["prepare", "restore", "setup"])
def test_a_daemon_that_is_killed_while_a_machine_starts_leaves_nothing(
    town: Lab, home: HostedHome, stage: str
) -> None:
    home.banger.ok("vm", "run", "--rm", "-q", "--image", IMAGE, "--", "true")  # a template is there
    home.banger.ok("daemon", "stop")
    before = town.state()
    fault = HostedBanger(
        home.banger.environment | {"BANGER_FAULT": f"SIGKILL@vm.create:{stage}"}, home.namespace
    )
    fault.fails("vm", "run", "-d", "-q", "--image", IMAGE, status=125)
    assert home.banger.json("vm", "list") == []
    assert home.machines() == []
    home.banger.ok("daemon", "stop")
    assert town.state() == before


def test_twenty_machines_come_and_go_and_the_host_is_as_before(town: Lab, home: HostedHome) -> None:
    banger = home.banger
    banger.ok("daemon", "stop")
    before = town.state()
    for _ in range(20):
        banger.ok("vm", "run", "--rm", "-q", "--image", IMAGE, "--", "true")
    # The bridge waits for the next machine, with the taps that do; nothing is left of those before.
    until(lambda: len(_taps(town)) == 2, "two taps wait")
    rules = town.state()["rules"].splitlines()
    assert "10.213." not in "".join(line for line in rules if "elements" in line)
    banger.ok("daemon", "stop")
    assert town.state() == before
    # (Others may mount things meanwhile: what is ours names our home.)
    assert list(leftovers.mounts_and_loops_of(home.directory)) == []


def _taps(town: Lab) -> list[str]:
    return [each for each in town.state()["links"] if each.startswith("banger0-")]
