"""Real machines on raw disks: every verb that touches disks, and what is left of each."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import suite
from homes import Home
from product import IMAGE, Banger, until

pytestmark = pytest.mark.guest

SMALL = ("--image", IMAGE, "--memory", "256M", "--vcpu", "1")
MIB = 1 << 20
_LOGS = ("console.log", "hypervisor.log")


@pytest.fixture
def raw(home: Home) -> Home:
    """A home whose machines have raw disks."""
    home.configure('storage = "reflink"')
    return home


def _vm(banger: Banger, name: str) -> dict[str, Any]:
    (vm,) = (each for each in banger.json("vm", "list") if each["name"] == name)
    return dict(vm)


def _is_raw(path: str) -> bool:
    """A raw disk with a file system of Linux's, by its superblock's magic."""
    with open(path, "rb") as disk:
        disk.seek(1024 + 56)
        return path.endswith(".raw") and disk.read(2) == b"\x53\xef"


def test_a_machine_lives_on_raw_disks(raw: Home) -> None:
    banger = raw.banger
    # The first is what a template is made for, the second is started from it, the third boots.
    banger.ok("vm", "create", "-q", *SMALL, "--name", "one")
    banger.ok("vm", "create", "-q", *SMALL, "--name", "two")
    banger.ok("vm", "create", "-q", *SMALL, "--name", "cold", "--cold")
    (template,) = banger.json("template", "list")
    files = {each.name for each in Path(template["directory"]).iterdir()}
    assert files == {"system.raw", "work.raw", "memory", "machine-state", *_LOGS}
    for name in ("one", "two", "cold"):
        runtime = _vm(banger, name)["runtime"]
        assert _is_raw(runtime["system_overlay"])
        assert _is_raw(runtime["work_disk"])
        banger.guest(name, f"echo {name} >/root/mine; echo {name} >/mine")
    for name in ("one", "two", "cold"):
        assert banger.guest(name, "cat /root/mine /mine") == f"{name}\n" * 2
    banger.ok("vm", "stop", "-q", "one")
    banger.ok("vm", "set", "-q", "one", "--disk-size", "9G")
    banger.ok("vm", "start", "-q", "one")
    assert banger.guest("one", "cat /root/mine /mine") == "one\n" * 2
    assert int(banger.guest("one", "df -Pm /root | awk 'END { print $2 }'")) > 8400
    banger.ok("vm", "stop", "-q", "--suspend", "two")
    banger.ok("vm", "start", "-q", "two")
    assert banger.guest("two", "cat /root/mine /mine") == "two\n" * 2
    banger.ok("vm", "delete", "-q", "-f", "one", "two", "cold")
    assert list((raw.state / "vms").iterdir()) == []


def test_copies_of_a_running_machine_have_its_disks_as_they_were(raw: Home) -> None:
    banger = raw.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    banger.guest("box", "echo before >/root/when; echo before >/when")  # not synced: in memory
    made = banger.json("vm", "snapshot", "box", "snap")
    assert made["shape"]
    assert made["paused_ms"] > 0
    banger.guest("box", "echo after >/root/when; echo after >/when; sync")
    names = banger.ok("vm", "fork", "-q", "box", "--count", "2").split()
    banger.ok("vm", "create", "-q", "--name", "from", "--from-snapshot", "snap")
    banger.ok("vm", "create", "-q", "--name", "cold", "--from-snapshot", "snap", "--cold")
    banger.ok("vm", "delete", "-q", "-f", "box")
    banger.ok("snapshot", "delete", "snap")
    for name in names:
        assert banger.guest(name, "cat /root/when /when") == "after\n" * 2
        banger.guest(name, f"echo {name} >/when; sync")
    assert banger.guest("from", "cat /root/when /when") == "before\n" * 2
    banger.guest("cold", "ls /root /bin >/dev/null")
    # Forks of a fork, and each has its own.
    (again,) = banger.ok("vm", "fork", "-q", names[0], "--name", "again").split()
    assert banger.guest(again, "cat /when") == f"{names[0]}\n"
    banger.ok("vm", "restart", "-q", names[1])
    assert banger.guest(names[1], "cat /when") == f"{names[1]}\n"
    assert list((raw.state / "snapshots").iterdir()) == []


def test_a_stopped_machine_is_a_snapshot_that_others_begin_as(raw: Home) -> None:
    banger = raw.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    banger.guest("box", "echo kept >/root/kept; echo kept >/kept")
    banger.ok("vm", "stop", "-q", "box")
    banger.ok("vm", "snapshot", "-q", "box", "snap")
    banger.ok("vm", "create", "-q", "--name", "copy", "--from-snapshot", "snap")
    banger.ok("vm", "start", "-q", "box")
    banger.guest("box", "rm /root/kept /kept; sync")
    assert banger.guest("copy", "cat /root/kept /kept") == "kept\n" * 2


def test_a_daemon_killed_in_the_pause_leaves_a_machine_that_runs_and_no_copy(raw: Home) -> None:
    banger = Banger({**raw.banger.environment, "BANGER_FAULT": "SIGKILL@vm.snapshot:freeze"})
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    before = sorted((raw.state / "vms").rglob("*"))
    assert banger.run("vm", "snapshot", "box", "snap").returncode != 0
    assert raw.banger.guest("box", "echo runs") == "runs\n"
    assert raw.banger.json("snapshot", "list") == []
    assert list((raw.state / "snapshots").iterdir()) == []
    assert sorted((raw.state / "vms").rglob("*")) == before


@suite.about_layers
def test_disks_of_another_storage_are_not_touched(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    banger.ok("vm", "create", "-q", *SMALL, "--name", "still", "--no-start")
    home.configure('storage = "reflink"')
    home.kill_daemon(signal.SIGKILL)
    assert banger.guest("box", "echo runs") == "runs\n"
    for words in (
        ("vm", "start", "still"),
        ("vm", "set", "still", "--disk-size", "20G"),
        ("vm", "snapshot", "box", "snap"),
        ("vm", "snapshot", "still", "snap"),
        ("vm", "restart", "box"),
    ):
        assert "was not made by reflink storage" in banger.fails(*words, status=1), words
    home.configure('storage = "qcow2"')
    banger.ok("daemon", "restart")
    banger.ok("vm", "start", "-q", "still")
    banger.ok("vm", "start", "-q", "box")
    assert banger.guest("box", "echo runs") == "runs\n"


@suite.about_discards
def test_sizes_are_what_a_disk_takes(raw: Home) -> None:
    banger = raw.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    disk = Path(_vm(banger, "box")["runtime"]["work_disk"])
    before = disk.stat().st_blocks * 512
    banger.guest("box", "head -c 64M /dev/urandom >/root/file; sync")
    assert disk.stat().st_blocks * 512 >= before + 64 * MIB
    banger.guest("box", "rm /root/file; sync; fstrim /root")
    until(lambda: disk.stat().st_blocks * 512 < before + 16 * MIB, "what is discarded is a hole")


def test_the_doctor_says_whether_disks_are_clones(raw: Home) -> None:
    told = json.loads(raw.banger.run("doctor", "--json").stdout)
    (check,) = (each for each in told if each["name"] == "storage reflink")
    clones = subprocess.run(["stat", "-f", "-c", "%T", raw.state], capture_output=True, check=True)
    assert check["level"] == ("ok" if clones.stdout.strip() in (b"btrfs", b"xfs") else "warn")
