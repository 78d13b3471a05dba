"""The product on the Firecracker driver, with the stand-in for Firecracker: every verb the same."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

import firecrackers
import suite
from homes import Home
from product import IMAGE, Banger, finish, until

pytestmark = [
    pytest.mark.guest,
    suite.names_its_drivers,
    firecrackers.needs_description,
    firecrackers.needs_kvm_device,
]

#: The next daemon; it would wait 15 s for each answer.
STARTS_S = 10.0

SMALL = (
    *("--image", IMAGE),
    *("--memory", "192M", "--vcpu", "1", "--network", "none"),
)


@pytest.fixture
def firecracker(home: Home) -> Home:
    """A home whose daemon takes the stand-in for Firecracker."""
    firecrackers.use_stand_in(home)
    return home


def made(banger: Banger, *options: str) -> str:
    return banger.ok("vm", "run", "--detach", "--quiet", *SMALL, *options).strip()


def test_a_machine_boots_runs_commands_stops_and_starts_again(firecracker: Home) -> None:
    banger = firecracker.banger
    vm = made(banger, "--cold")
    banger.guest(vm, "echo kept > /root/kept")
    assert banger.json("vm", "health", vm)
    (stats,) = banger.json("vm", "stats", vm)
    assert stats["latest"]["host"]["disk_written_bytes_per_s"] is not None
    assert stats["latest"]["host"]["rx_bytes_per_s"] == 0, "it has no network"
    banger.ok("vm", "stop", vm)
    banger.ok("vm", "start", vm)
    assert banger.guest(vm, "cat /root/kept") == "kept\n"
    banger.ok("vm", "restart", vm)
    assert banger.guest(vm, "cat /root/kept") == "kept\n"
    banger.ok("vm", "kill", vm)
    banger.ok("vm", "delete", "--force", vm)


def test_templates_snapshots_forks_and_suspension(firecracker: Home) -> None:
    banger = firecracker.banger
    vm = made(banger)
    assert banger.json("template", "list")
    banger.guest(vm, "echo kept > /run/kept; echo disk > /root/kept")
    (fork,) = banger.json("vm", "fork", vm)
    name = fork["name"]
    assert banger.guest(name, "cat /run/kept /root/kept") == "kept\ndisk\n"
    banger.guest(vm, "echo changed > /root/kept")
    assert banger.guest(name, "cat /root/kept") == "disk\n"
    banger.ok("vm", "stop", "--suspend", vm)
    banger.ok("vm", "start", vm)
    assert banger.guest(vm, "cat /run/kept /root/kept") == "kept\nchanged\n"


def test_machines_outlive_the_daemon(firecracker: Home) -> None:
    banger = firecracker.banger
    vm = made(banger, "--cold")
    banger.guest(vm, "echo kept > /run/kept")
    firecracker.kill_daemon(9)
    assert banger.guest(vm, "cat /run/kept") == "kept\n"


def test_a_machine_whose_daemon_dies_while_it_is_written_runs_on_once_it_is(
    firecracker: Home,
) -> None:
    """The next daemon is there at once, though nobody is answered until then."""
    banger = firecracker.banger
    vm = made(banger, "--cold")
    banger.guest(vm, "echo kept > /run/kept")
    runtime = banger.json("vm", "show", vm)["runtime"]
    state = Path(runtime["vm_dir"], "machine-state")
    os.mkfifo(state)  # it waits for who reads from that
    suspending = banger.start("vm", "stop", "--suspend", vm)
    until(lambda: not answers(runtime["api_socket"]), "its state is written")
    firecracker.kill_daemon(9)
    assert finish(suspending)[0] != 0
    began = time.monotonic()
    assert banger.state(vm) == "running"
    assert time.monotonic() - began < STARTS_S
    health = json.loads(banger.run("vm", "health", vm, "--json").stdout)
    (machine,) = (each for each in health["checks"] if each["name"] == "machine")
    assert machine["detail"].startswith("paused, and its hypervisor does not answer")
    assert state.exists(), "it is written still"
    state.read_bytes()
    assert banger.guest(vm, "cat /run/kept") == "kept\n"
    assert not state.exists()
    assert not state.with_name("memory").exists()


def answers(api_socket: str) -> bool:
    """Whether Firecracker does, within a second."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(api_socket)
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        try:
            return bool(client.recv(1))
        except TimeoutError:
            return False


def test_a_network_that_it_cannot_join_is_refused(firecracker: Home) -> None:
    said = firecracker.banger.fails(
        "vm", "run", "--image", IMAGE, "--network", "user", "--", "true", status=125
    )
    assert "firecracker cannot join machines to user networking" in said
    assert "--network bridge" in said
