"""What the guest host has that other machines may lack, and banger in it with a KVM that works."""

from __future__ import annotations

import json

import pytest

import firecrackers
from guest_host import GuestHost, GuestHosts
from product import IMAGE

# The first test may have to make the host.
pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


def test_systemd_runs_it_and_takes_units(host: GuestHost) -> None:
    assert host.root("cat /proc/1/comm; systemctl is-system-running") == "systemd\nrunning\n"
    unit = '[Service]\\nType=oneshot\\nExecStart=/bin/sh -c "echo it ran >/run/it-ran"\\n'
    name = "test-unit.service"
    host.root(f"printf '{unit}' >/etc/systemd/system/{name}; systemctl daemon-reload")
    host.root(f"systemctl start {name}")
    host.root(f"rm /etc/systemd/system/{name}; systemctl daemon-reload")
    assert host.root("cat /run/it-ran; rm /run/it-ran") == "it ran\n"


def test_the_resolver_routes_a_domain_to_a_server_of_a_link(host: GuestHost) -> None:
    host.load("dummy")
    host.root("ip link add test0 type dummy; ip addr add 192.0.2.1/24 dev test0")
    host.root("ip link set test0 up; resolvectl dns test0 192.0.2.1; resolvectl domain test0 '~vm'")
    assert "~vm" in host.root("resolvectl domain test0")
    host.root("ip link del test0")


#: Two snapshots over one read-only base, each with a file of its own for what differs.
_TWO_SNAPSHOTS = """
mkdir /root/dm; cd /root/dm
truncate -s 16M base cow-a cow-b
printf base | dd of=base conv=notrunc status=none
base=$(losetup --find --show --read-only base)
for each in a b; do
    cow=$(losetup --find --show cow-$each)
    dmsetup create test-$each --table "0 32768 snapshot $base $cow P 8"
done
printf mine | dd of=/dev/mapper/test-a conv=fsync status=none
head -c 4 /dev/mapper/test-a /dev/mapper/test-b base
echo
dmsetup status test-a | cut -d' ' -f3
"""
_CLEAN_UP = """
dmsetup remove test-a test-b
losetup --detach-all
rm -r /root/dm
dmsetup ls
losetup --all
"""


def test_device_mapper_has_snapshots_of_one_base(host: GuestHost) -> None:
    host.load("loop", "dm_snapshot")
    seen = host.root(_TWO_SNAPSHOTS)
    assert "test-a <==\nmine\n" in seen
    assert "test-b <==\nbase\n" in seen
    assert "base <==\nbase\n" in seen
    assert host.root(_CLEAN_UP) == "No devices found\n"


_TALK_TO_ITSELF = """
import socket
LOCAL = 1  # VMADDR_CID_LOCAL
with socket.socket(socket.AF_VSOCK) as server, socket.socket(socket.AF_VSOCK) as client:
    server.bind((LOCAL, 5000))
    server.listen()
    client.connect((LOCAL, 5000))
    client.sendall(b"heard")
    print(server.accept()[0].recv(5).decode())
"""


def test_vsock_is_there_for_machines_and_carries_data(host: GuestHost) -> None:
    host.load("vhost_vsock", "vsock_loopback")
    assert host.run("python3", "-c", _TALK_TO_ITSELF).stdout == b"heard\n"
    assert host.alice("exec 3<>/dev/vhost-vsock; echo opened") == "opened\n"


def test_the_wheel_is_installed_and_the_doctor_finds_nothing_missing(host: GuestHost) -> None:
    assert host.alice("command -v banger; command -v bangerd").split() == [
        "/usr/local/bin/banger",
        "/usr/local/bin/bangerd",
    ]
    checks = {each["name"]: each for each in json.loads(host.alice("banger doctor --json"))}
    assert [each for each in checks.values() if each["level"] == "fail"] == []
    if host.run("test", "-e", "/dev/kvm").returncode == 0:
        assert checks["accelerator"]["detail"] == "kvm: a vCPU ran a program"


@pytest.fixture
def kvm_host(host: GuestHost) -> GuestHost:
    if host.run("test", "-e", "/dev/kvm").returncode != 0:
        pytest.skip(firecrackers.NO_NESTING)
    return host


def test_an_ordinary_user_runs_machines_on_kvm(kvm_host: GuestHost) -> None:
    run = "banger vm run -q --rm --memory 512M --vcpu 1"
    assert "Debian" in kvm_host.alice(f"{run} --cold -- uname -a")
    # By a template, which KVM's state makes another thing than under emulation.
    assert kvm_host.alice(f"{run} -- cat /proc/1/comm") == "init\n"
    (template,) = json.loads(kvm_host.alice("banger template list --json"))
    assert template["image_name"] == IMAGE
    assert kvm_host.alice(f"{run} -- hostname").strip()
    assert json.loads(kvm_host.alice("banger vm list --json")) == []
    kvm_host.alice("banger template prune --all")


def test_copies_are_hosts_of_their_own(
    host: GuestHost, own_host: GuestHost, guest_hosts: GuestHosts
) -> None:
    own_host.root("rm -rf /opt/banger")
    assert host.alice("banger version").startswith("banger ")
    names = {each.root("hostname; cat /etc/machine-id") for each in (host, own_host)}
    assert len(names) == 2
