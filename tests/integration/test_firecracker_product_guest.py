"""The product on the Firecracker driver, with the stand-in for Firecracker: every verb the same."""

from __future__ import annotations

import msgspec
import pytest

import firecrackers
from banger.drivers.hypervisor import kvm
from firecracker_schema import DESCRIPTION
from homes import Home
from product import IMAGE, Banger

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(
        not DESCRIPTION.exists(), reason=f"Firecracker's description is not at {DESCRIPTION}"
    ),
    pytest.mark.skipif(
        bool(kvm._obstacle(kvm.DEVICE)), reason="needs /dev/kvm, if only to be opened"
    ),
]

SMALL = (
    *("--image", IMAGE),
    *("--memory", "192M", "--vcpu", "1", "--network", "none"),
)


@pytest.fixture
def firecracker(home: Home) -> Home:
    """A home whose daemon takes the stand-in for Firecracker."""
    program = firecrackers.stand_in(home.directory)
    # What stands in is a program of Python's, which needs more than a jail has.
    settings = f'firecracker_bin = "{program}"\njailer_enabled = false\n'
    home.configure(f'hypervisor = "firecracker"\n{settings}')
    # What underneath runs vCPUs is not KVM: this host's is believed to, though.
    cached = kvm._Cached(kvm._key(kvm.DEVICE), True, "as the test says")
    home.runtime.mkdir(mode=0o700, exist_ok=True)
    (home.runtime / "probes.json").write_bytes(msgspec.json.encode(cached))
    return home


def made(banger: Banger, *options: str) -> str:
    return banger.ok("vm", "run", "--detach", "--quiet", *SMALL, *options).strip()


def test_a_machine_boots_runs_commands_stops_and_starts_again(firecracker: Home) -> None:
    banger = firecracker.banger
    vm = made(banger, "--cold")
    banger.guest(vm, "echo kept > /root/kept")
    assert banger.json("vm", "health", vm)
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


def test_a_network_that_it_cannot_join_is_refused(firecracker: Home) -> None:
    said = firecracker.banger.fails(
        "vm", "run", "--image", IMAGE, "--network", "user", "--", "true", status=125
    )
    assert "firecracker cannot join machines to user networking" in said
    assert "--network bridge" in said
