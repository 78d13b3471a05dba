"""The default image: a development machine, with our own init or with systemd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import firecrackers
from homes import Home, copy_artifacts
from product import Banger
from suite import names_its_drivers

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_DEFAULT = "debian-bookworm"


@pytest.fixture(scope="module")
def machine(banger: Banger, default_image: str) -> Iterator[str]:
    """A VM of the default image, which its first use builds."""
    done = banger.run("vm", "run", "-d", "--name", "workbench", timeout_s=800)
    assert done.returncode == 0, done.stderr
    yield "workbench"
    banger.ok("vm", "delete", "--force", "workbench")


def test_the_first_use_of_the_default_image_builds_it(banger: Banger, machine: str) -> None:
    assert banger.json("vm", "show", machine)["image_name"] == _DEFAULT
    image = banger.json("image", "show", _DEFAULT)
    assert image["init"] == "minimal"
    assert len(image["packages"]) > 200


def test_it_has_what_a_developer_needs(banger: Banger, machine: str) -> None:
    script = """
    for tool in git gcc make python3 curl less jq sudo ps ip /usr/sbin/sshd ssh; do
        command -v $tool >/dev/null || echo missing: $tool
    done
    test -s /etc/ssl/certs/ca-certificates.crt || echo missing: certificates
    cd /root && git init -q work && cd work
    printf 'int main(void) { return 42; }' > answer.c && make -s answer && ./answer
    test $? = 42 || echo cannot compile
    """
    assert banger.guest(machine, script) == ""


def test_our_init_starts_sshd_with_keys_of_this_vm(banger: Banger, machine: str) -> None:
    assert banger.guest(machine, "cat /proc/1/comm") == "init\n"
    script = """
    until ls /etc/ssh/ssh_host_*_key.pub >/dev/null 2>&1; do sleep 0.1; done
    exec 3<>/dev/tcp/127.0.0.1/22 && timeout 20 head -c 8 <&3
    """
    shell = ("vm", "exec", machine, "--", "timeout", "60", "bash", "-c")
    retry = f"for i in $(seq 100); do ({script}) 2>/dev/null && exit; sleep 0.2; done; exit 1"
    assert banger.ok(*shell, retry) == "SSH-2.0-"


@pytest.fixture
def systemd_machine(banger: Banger, machine: str) -> Iterator[str]:
    """A VM of the same image that systemd runs. (`machine`: the image is there.)"""
    banger.ok("vm", "run", "-q", "-d", "--init", "systemd", "--name", "with-systemd")
    yield "with-systemd"
    banger.ok("vm", "delete", "--force", "with-systemd")


def test_systemd_boots_takes_commands_and_powers_off(banger: Banger, systemd_machine: str) -> None:
    name = systemd_machine
    # Our agent answers before systemd runs, and before its bus does, which is "offline" until then.
    up = (
        "until systemctl is-system-running --wait | grep -E '^(running|degraded)'; do sleep 1; done"
    )
    state = banger.guest(name, up)
    failed = banger.guest(name, "systemctl list-units --failed --plain --no-legend")
    assert (state, failed) == ("running\n", "")
    assert banger.guest(name, "cat /proc/1/comm") == "systemd\n"
    assert banger.guest(name, "hostname; df --output=target /root | tail -1") == f"{name}\n/root\n"
    # A service outlives the command that starts it: it belongs to the machine.
    at_the_end = "-p 'ExecStop=/bin/sh -c \"echo stopped in order > /dev/console\"'"
    banger.guest(name, f"systemd-run --quiet --unit=mine {at_the_end} sleep 1000")
    assert banger.guest(name, "systemctl is-active ssh") == "active\n"
    assert banger.guest(name, "systemctl is-active mine") == "active\n"
    assert banger.ok("vm", "stop", name) == f"{name}\n"
    assert banger.state(name) == "stopped"
    assert "stopped in order" in banger.ok("vm", "logs", name)


@names_its_drivers
@firecrackers.needs_description
@firecrackers.needs_kvm_device
def test_on_firecracker_a_poweroff_by_systemd_ends_the_machine(
    machine: str, bare_home: Home
) -> None:
    """Which has no way to power off, but to reset. (`machine`: the image is there.)"""
    copy_artifacts(Path(os.environ["HOME"]), bare_home, _DEFAULT)
    firecrackers.use_stand_in(bare_home)
    banger = bare_home.banger
    new = ("--init", "systemd", "--network", "none", "--name", "box")
    banger.ok("vm", "run", "-q", "-d", "--cold", *new)
    banger.guest(
        "box", "until systemctl is-system-running --wait | grep -q running; do sleep 1; done"
    )
    shown = banger.guest("box", "systemctl show -p SuccessAction systemd-poweroff.service")
    assert shown == "SuccessAction=reboot-force\n"
    banger.run("vm", "exec", "box", "--", "systemctl", "poweroff")
    banger.ok("vm", "wait", "box", "--timeout", "120s")
    assert banger.state("box") == "stopped"
