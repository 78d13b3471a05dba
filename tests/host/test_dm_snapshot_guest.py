"""System disks as device-mapper snapshots, on a kernel that has them: banger is installed for an
ordinary user, whose daemon asks the helper for devices, and machines run on KVM."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.nodes import Node

from guest_host import GuestHost, GuestHosts

# The first test may have to make the host.
pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_numbers = itertools.count(1)

_STATE = "/home/alice/.local/state/banger"
_SMALL = "--memory 256M --vcpu 1"
_SETTINGS = "/home/alice/.config/banger/config.toml"
#: A loop device is made of own files only.
_SET_UP = f"""
modprobe -a loop dm_snapshot
chown alice /srv/rootfs.ext4
sed -i '1i storage = "dm_snapshot"' {_SETTINGS}
SUDO_UID=$(id -u alice) banger system install
"""
_DEVICES = "dmsetup ls; losetup --all --noheadings --output BACK-FILE; ls /dev/mapper"
_NOTHING = "No devices found\ncontrol\n"
_SLOW_S = 400


@pytest.fixture(scope="module")
def mapped(
    guest_hosts: GuestHosts, request: pytest.FixtureRequest, keeps: Callable[[Node], bool]
) -> Iterator[GuestHost]:
    """A host that is set up so."""
    host = guest_hosts.new(f"mapped-{next(_numbers)}")
    host.root(_SET_UP)
    yield host
    if not keeps(request.node):
        host.banger.ok("vm", "delete", "--force", host.name)


@pytest.fixture
def small_state(mapped: GuestHost, at_length: None) -> Iterator[GuestHost]:
    """The same, with what the daemon keeps on a file system of 1400 MiB."""
    own = f"systemctl stop bangerd; mv {_STATE} {_STATE}.away; mkdir -m 700 {_STATE}"
    make = "fallocate -l 1400M /var/tmp/small; mkfs.ext4 -q -m 0 /var/tmp/small"
    mount = f"mount -o loop /var/tmp/small {_STATE}; cp -a {_STATE}.away/banger.db {_STATE}"
    mapped.root(f"{own}; {make}; {mount}; chown -R alice: {_STATE}; systemctl start bangerd")
    yield mapped
    mapped.root(
        f"systemctl stop bangerd; umount {_STATE}; rmdir {_STATE}; mv {_STATE}.away {_STATE};"
        " rm /var/tmp/small; systemctl start bangerd"
    )


@pytest.fixture
def at_length(request: pytest.FixtureRequest) -> None:
    """Of a test that takes minutes."""
    if not request.config.getoption("--all-hosts"):
        pytest.skip("takes minutes: run with --all-hosts")


def devices(host: GuestHost) -> str:
    return host.root(_DEVICES)


def in_guest(host: GuestHost, name: str, script: str) -> str:
    return host.alice(f"banger vm exec -i {name} -- sh -eu", stdin=script.encode())


def fill(host: GuestHost, left_mib: int) -> None:
    """Take all but so much of the state's file system."""
    free = f"$(df --output=avail -m {_STATE} | tail -1)"
    host.root(f"fallocate -l $(({free} - {left_mib}))M {_STATE}/ballast")


def await_line(host: GuestHost, message: str) -> None:
    """The daemon's log says it, or has said it."""
    look = f"until grep -q '{message}' {_STATE}/bangerd.log; do sleep 0.2; done"
    host.root(f'timeout 120 sh -c "{look}"', timeout_s=_SLOW_S)


def test_killed_after_any_step_it_leaves_nothing_that_is_not_found(mapped: GuestHost) -> None:
    steps = Path(__file__).with_name("dm_snapshot_steps.py")
    mapped.put(steps, "/root/steps.py")
    python = mapped.root('head -n 1 "$(command -v banger)"').removeprefix("#!").strip()
    seen = json.loads(mapped.root(f"{python} /root/steps.py", timeout_s=_SLOW_S))
    # What was changed was written over each time: one chunk, its area and the header.
    assert seen.pop("bytes of changes") == 3 * 4096
    # Ten steps to open: two records, what is left of another looked for and taken away, three of
    # loop devices, three of the mapping. Three to close. And once to the end.
    assert {what: len(each) for what, each in seen.items()} == {
        "opening, closed": 11,
        "opening, swept": 11,
        "closing, closed": 4,
        "closing, swept": 4,
    }
    assert {each for every in seen.values() for each in every} == {_NOTHING}


@pytest.mark.usefixtures("at_length")
def test_ten_machines_share_an_image_and_nothing_else(mapped: GuestHost) -> None:
    names = [f"box-{number}" for number in range(10)]
    create = f"banger vm create -q {_SMALL} --name"
    mapped.alice(f"{create} box-0", timeout_s=_SLOW_S)  # makes the template of the others
    others = " ".join(names[1:])
    mapped.alice(f"for name in {others}; do {create} $name & done; wait", timeout_s=_SLOW_S)
    for name in names:
        in_guest(mapped, name, f"echo {name} >/mine; yes {name} | head -n 1200000 >/much; sync")
    there = devices(mapped)
    assert len(re.findall(r"^banger-[0-9a-f]{12}\t", there, re.MULTILINE)) == 10
    assert there.count("/srv/rootfs.ext4\n") == 1
    assert there.count("/system.cow\n") == 10
    drop = "echo 3 >/proc/sys/vm/drop_caches"
    for name in names:
        read = f"{drop}; cat /mine; sort -u /much; ls / | grep -c -e mine -e much"
        assert in_guest(mapped, name, read) == f"{name}\n{name}\n2\n"
    mapped.alice(f"banger vm delete -q -f {' '.join(names[1:])}")
    # The image's own file is as it was, and the one that is left has lost nothing.
    assert devices(mapped).count("/system.cow\n") == 1
    mapped.alice("banger vm stop -q box-0; banger vm start -q box-0", timeout_s=_SLOW_S)
    assert in_guest(mapped, "box-0", "cat /mine; sort -u /much") == "box-0\nbox-0\n"
    mapped.alice("banger vm delete -q -f box-0")
    assert devices(mapped) == _NOTHING


def test_copies_of_a_machine_that_runs_have_what_it_wrote(mapped: GuestHost) -> None:
    mapped.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    in_guest(mapped, "box", "head -c 20M /dev/urandom >/much; md5sum /much >/sum; echo 1 >/n; sync")
    mapped.alice("banger vm snapshot -q box snap")
    in_guest(mapped, "box", "echo 2 >/n; echo changed >>/much; sync")
    mapped.alice("banger vm create -q --cold --from-snapshot snap --name cold", timeout_s=_SLOW_S)
    mapped.alice("banger vm create -q --from-snapshot snap --name warm", timeout_s=_SLOW_S)
    mapped.alice("banger vm fork -q box --count 1", timeout_s=_SLOW_S)
    drop = "echo 3 >/proc/sys/vm/drop_caches"
    for name in ("cold", "warm"):
        assert in_guest(mapped, name, f"{drop}; cat /n; md5sum -c /sum") == "1\n/much: OK\n"
    assert in_guest(mapped, "box-fork-1", f"{drop}; cat /n; tail -c 8 /much") == "2\nchanged\n"
    mapped.alice("banger vm stop -q --suspend box; banger vm start -q box", timeout_s=_SLOW_S)
    assert in_guest(mapped, "box", f"{drop}; cat /n; tail -c 8 /much") == "2\nchanged\n"
    mapped.alice("banger vm delete -q -f box cold warm box-fork-1; banger snapshot delete snap")
    assert devices(mapped) == _NOTHING


def test_the_host_reads_nothing_that_a_guest_has_written(mapped: GuestHost) -> None:
    mapped.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    mapping = mapped.root("ls /dev/mapper | grep banger-").strip()
    name = f"dmsetup info --columns --noheadings --options blkdevname {mapping}"
    device = mapped.root(name).strip()
    loops = mapped.root(f"ls /sys/block/{device}/slaves").split()
    base, changes = sorted(
        loops, key=lambda each: mapped.root(f"cat /sys/block/{each}/ro") != "1\n"
    )
    for each in (device, base, changes):  # as whenever somebody closes it who may write it
        mapped.root(f"udevadm trigger --action=change --settle /sys/block/{each}")
    known = {
        each: mapped.root(f"udevadm info --query=property --name={each}")
        for each in (device, base, changes)
    }
    assert "ID_FS_TYPE=ext4" in known[base]  # udev does read what it is not told to leave alone
    assert "ID_FS" not in known[device] + known[changes]
    assert "DM_UDEV_DISABLE_OTHER_RULES_FLAG=1" in known[device]
    assert mapped.root(f"stat -c '%U %a' /dev/mapper/{mapping}") == "alice 600\n"
    mapped.alice("banger vm delete -q -f box")


def test_a_machine_is_looked_after_when_another_storage_is_configured(mapped: GuestHost) -> None:
    mapped.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    in_guest(mapped, "box", "echo kept >/kept; sync")
    mapped.root(f"sed -i '1s/dm_snapshot/qcow2/' {_SETTINGS}; systemctl restart bangerd")
    try:
        assert in_guest(mapped, "box", "cat /kept") == "kept\n"
        assert devices(mapped).count("/system.cow\n") == 1
        refused = mapped.run("banger", "vm", "stop", "--suspend", "box", user="alice")
        assert refused.returncode != 0
        mapped.alice("banger vm stop -q box", timeout_s=_SLOW_S)
        assert devices(mapped) == _NOTHING
        refused = mapped.run("banger", "vm", "start", "box", user="alice")
        assert b"was not made by qcow2 storage" in refused.stderr
    finally:
        mapped.root(f"sed -i '1s/qcow2/dm_snapshot/' {_SETTINGS}; systemctl restart bangerd")
    mapped.alice("banger vm start -q box", timeout_s=_SLOW_S)
    assert in_guest(mapped, "box", "cat /kept") == "kept\n"
    mapped.alice("banger vm delete -q -f box")
    assert devices(mapped) == _NOTHING


def test_a_machine_that_finds_no_room_is_held_and_runs_on(small_state: GuestHost) -> None:
    host = small_state
    host.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    fill(host, 80)
    write = "tr '\\0' x </dev/zero | dd of=/much iflag=fullblock bs=1M count=250 conv=fsync"
    in_guest(host, "box", f"({write}; md5sum /much; echo done >/done) >/log 2>&1 &")
    await_line(host, "vm held: the disk is full")
    for _ in range(2):
        health = host.run("banger", "vm", "health", "box", user="alice")
        assert health.returncode == 1
        assert "held: the host" in health.stdout.decode()
        host.root("systemctl restart bangerd")  # which looks for room before it lets any run on
    assert "good" in host.root("dmsetup status | grep -q Invalid || echo good")
    host.root(f"rm {_STATE}/ballast")
    await_line(host, "vm runs on: the disk has room")
    wait = "until [ -e /done ]; do sleep 0.2; done; echo 3 >/proc/sys/vm/drop_caches"
    count = "wc -c </much; tr -d x </much | wc -c; dmesg | grep -c 'I/O error' || true"
    assert in_guest(host, "box", f"{wait}; {count}").split() == [str(250 << 20), "0", "0"]
    host.alice("banger vm delete -q -f box")


def test_what_overflows_is_told_and_what_was_there_is_whole(small_state: GuestHost) -> None:
    """Nobody looks after it: the daemon is stopped while the guest writes more than there is."""
    host = small_state
    host.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    in_guest(host, "box", "head -c 20M /dev/urandom >/before; md5sum /before >/sum; sync")
    writes = "sleep 3; tr '\\0' x </dev/zero | dd of=/much iflag=fullblock bs=1M count=400"
    in_guest(host, "box", f"({writes}; sync) >/dev/null 2>&1 &")
    stopped = "systemctl kill --kill-whom=main -s STOP bangerd"
    full = "until dmsetup status | grep -q Overflow; do sleep 0.2; done"
    host.root(f'{stopped}; timeout 200 sh -c "{full}"', timeout_s=_SLOW_S)
    host.root("systemctl kill --kill-whom=main -s CONT bangerd")
    await_line(host, "disk overflowed")
    health = host.run("banger", "vm", "health", "box", user="alice")
    assert health.returncode == 1
    assert "had no room for what the guest wrote" in health.stdout.decode()
    host.alice("banger vm kill -q box; banger vm start -q box", timeout_s=_SLOW_S)
    assert in_guest(host, "box", "md5sum -c /sum; echo 1 >/n; sync; cat /n") == "/before: OK\n1\n"
    host.alice("banger vm health box; banger vm delete -q -f box")


@pytest.mark.usefixtures("at_length")
@pytest.mark.parametrize(
    "fault",
    ["vm.create:prepare", "vm.create:launch", "vm.create:boot", "template.make:boot"],
)
def test_a_daemon_that_is_killed_leaves_nothing_of_what_it_made(
    mapped: GuestHost, fault: str
) -> None:
    cold = "" if fault.startswith("template") else "--cold"
    with_fault(mapped, fault, f"banger vm create -q {_SMALL} {cold} --memory 300M --name box")
    mapped.alice("banger vm list")
    assert devices(mapped) == _NOTHING


@pytest.mark.usefixtures("at_length")
@pytest.mark.parametrize("fault", ["vm.start:launch", "vm.stop:cleanup", "vm.delete:end"])
def test_a_daemon_that_is_killed_finds_a_machines_disk_again(mapped: GuestHost, fault: str) -> None:
    mapped.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    in_guest(mapped, "box", "echo kept >/kept; sync")
    if fault.startswith("vm.start"):
        mapped.alice("banger vm stop -q box")
    verb = fault.partition(":")[0].removeprefix("vm.")
    with_fault(mapped, fault, f"banger vm {verb} -q {'-f' if verb == 'delete' else ''} box")
    mapped.alice("banger vm start -q box", timeout_s=_SLOW_S)
    assert in_guest(mapped, "box", "cat /kept") == "kept\n"
    assert devices(mapped).count("/system.cow\n") == 1
    mapped.alice("banger vm delete -q -f box")
    assert devices(mapped) == _NOTHING


def with_fault(host: GuestHost, fault: str, command: str) -> None:
    """Have the daemon kill itself at a stage of a command, which fails, and be started again."""
    unit = "/run/systemd/system/bangerd.service.d"
    setting = f"[Service]\\nEnvironment=BANGER_FAULT=SIGKILL@{fault}\\nRestart=no\\n"
    host.root(f"mkdir -p {unit}; printf '{setting}' >{unit}/fault.conf")
    host.root("systemctl daemon-reload; systemctl restart bangerd")
    failed = host.run("sh", "-c", command, user="alice", timeout_s=_SLOW_S)
    assert failed.returncode != 0, failed
    host.root(f"rm -r {unit}; systemctl daemon-reload; systemctl restart bangerd")


def test_uninstalling_takes_away_what_is_left(mapped: GuestHost) -> None:
    """Of a machine that ended while there was no daemon."""
    mapped.alice(f"banger vm create -q {_SMALL} --name box", timeout_s=_SLOW_S)
    mapped.root("systemctl stop bangerd; pkill -KILL qemu-system; while pgrep qemu-system; do sleep"
        " 0.1; done")  # fmt: skip
    assert "/system.cow\n" in devices(mapped)
    mapped.root("banger system uninstall", timeout_s=_SLOW_S)
    assert devices(mapped) == _NOTHING
    assert mapped.run("test", "-e", "/etc/udev/rules.d/12-banger.rules").returncode == 1
    # Hers again, as far as it can be without anybody who makes devices.
    mapped.alice("banger vm delete -q -f box; banger daemon stop")
