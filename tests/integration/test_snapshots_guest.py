"""Real machines copied as they run: processes go on in each, and nobody is in another's way."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import suite
from homes import Home
from product import IMAGE, Banger, finish, until

pytestmark = pytest.mark.guest

SMALL = ("--image", IMAGE, "--memory", "256M", "--vcpu", "1")
LAYERS_MAX = 8

#: A process that counts into a file on each disk.
_COUNTER = "while :; do i=$((i+1)); echo $i >/root/count; echo $i >/count; sleep 0.05; done"
_IDENTITY = """
hostname
cat /etc/machine-id
cat /sys/class/net/eth0/address
cat /proc/sys/kernel/random/uuid
head -c 16 /dev/urandom | od -An -tx1
"""
#: Whether all files of the image are there and can be read.
_FILES = "cd / && find bin/* usr/bin etc/passwd -type f | sort | xargs md5sum | md5sum"


def _counting(banger: Banger, name: str, *options: str) -> None:
    """A machine with a counter that outlives its client."""
    banger.ok("vm", "create", "-q", *SMALL, "--name", name, *options)
    script = f"setsid sh -c '{_COUNTER}' >/dev/null 2>&1 </dev/null &"
    banger.guest(name, script)
    until(lambda: _count(banger, name) > 2, "the counter counts")


def _count(banger: Banger, name: str) -> int:
    """What the counter has come to on both disks."""
    # One that is just written over is empty.
    read = "set -- $(cat /root/count /count 2>/dev/null); [ $# != 2 ] || break"
    words = banger.guest(name, f"for try in 1 2 3 4 5; do {read}; done; echo $*").split()
    return int(words[0]) if len(words) == 2 else 0


def _assert_counts(banger: Banger, *names: str) -> None:
    for name in names:
        before = _count(banger, name)
        until(lambda name=name, before=before: _count(banger, name) > before, f"{name} counts")  # type: ignore[misc]


def _layers(home: Home, name: str) -> list[Path]:
    (vm,) = (each for each in home.banger.json("vm", "list") if each["name"] == name)
    return sorted(Path(vm["runtime"]["vm_dir"]).glob("system*.qcow2"))


def _depth(vm: dict[str, Any]) -> int:
    """How many qcow2 files its system disk consists of."""
    argv = ["qemu-img", "info", "-U", "--backing-chain", "--output=json"]
    told = subprocess.run(
        [*argv, vm["runtime"]["system_overlay"]], capture_output=True, check=True
    ).stdout
    return sum(each["format"] == "qcow2" for each in json.loads(told))


@pytest.fixture
def source(home: Home) -> Banger:
    """A home with a machine called ``box``, in which a counter runs."""
    _counting(home.banger, "box")
    return home.banger


def test_processes_memory_and_disks_go_on_in_all(home: Home, source: Banger) -> None:
    source.guest("box", "mkdir /run/kept; echo memory >/run/kept/file")
    source.guest("box", "mkdir -p /etc/ssh; echo old >/etc/ssh/ssh_host_ed25519_key")
    before = _count(source, "box")
    names = source.ok("vm", "fork", "-q", "box", "--count", "3").split()
    assert names == ["box-fork-1", "box-fork-2", "box-fork-3"]
    _assert_counts(source, "box", *names)
    for name in names:
        assert _count(source, name) > before
        assert source.guest(name, "cat /run/kept/file") == "memory\n"
        # A key of the source's is nobody else's.
        assert source.guest(
            name, "ls /etc/ssh | grep -c old; cat /etc/ssh/* | grep -c old; true"
        ) == ("0\n0\n")
    told = {name: source.guest(name, _IDENTITY).splitlines() for name in ("box", *names)}
    assert [lines[0] for lines in told.values()] == ["box", *names]
    for what in zip(*told.values(), strict=True):
        assert len(set(what)) == len(told), what
    for name in ("box", *names):
        source.guest(name, f"echo {name} >/root/mine; echo {name} >/mine; sync")
    for name in ("box", *names):
        assert source.guest(name, "cat /root/mine /mine") == f"{name}\n" * 2
    assert len({source.guest(name, _FILES) for name in ("box", *names)}) == 1
    # No file of the fork itself is left, and a machine started again has its own disks.
    assert list((home.state / "snapshots").iterdir()) == []
    source.ok("vm", "restart", "-q", names[1])
    assert source.guest(names[1], "cat /mine; ls /run").startswith(names[1])
    # A fork of a fork, whose memory is in a file that is gone.
    (again,) = source.ok("vm", "fork", "-q", names[0], "--name", "again").split()
    _assert_counts(source, again, names[0])
    assert source.guest(again, _FILES) == source.guest("box", _FILES)


def test_the_source_pauses_for_a_moment_only(home: Home, source: Banger) -> None:
    made = source.json("vm", "snapshot", "box", "snap")
    assert made["shape"]
    assert 0 < made["paused_ms"] < 1000
    _assert_counts(source, "box")


@suite.about_clients
def test_a_command_of_a_client_ends_in_the_copy_and_goes_on_in_the_source(
    home: Home, source: Banger
) -> None:
    client = source.start("vm", "exec", "box", "--", "sleep", "7777")
    running = "ps ax | grep -c '[s]leep 7777'; true"
    until(lambda: source.guest("box", running) == "1\n", "the command runs")
    (fork,) = source.ok("vm", "fork", "-q", "box").split()
    until(lambda: source.guest(fork, running) == "0\n", "it ended in the copy")
    assert source.guest("box", running) == "1\n"
    source.guest("box", "pkill -f '[s]leep 7777' || kill $(ps ax | awk '/[s]leep 7777/{print $1}')")
    finish(client)


def test_whatever_goes_first_the_rest_works(home: Home, source: Banger) -> None:
    source.ok("vm", "snapshot", "-q", "box", "first")
    source.guest("box", "echo second >/root/second; sync")
    source.ok("vm", "snapshot", "-q", "box", "second")
    for name, snap in (("a", "first"), ("b", "second"), ("c", "second")):
        source.ok("vm", "create", "-q", "--name", name, "--from-snapshot", snap)
    source.ok("vm", "snapshot", "-q", "b", "third")
    source.ok("vm", "create", "-q", "--name", "d", "--from-snapshot", "third")
    source.ok("vm", "delete", "-q", "-f", "box")
    source.ok("snapshot", "delete", "second")
    source.ok("vm", "delete", "-q", "-f", "b")
    _assert_counts(source, "a", "c", "d")
    source.ok("vm", "restart", "-q", "a", "c", "d")
    assert [source.guest(name, "cat /root/second 2>/dev/null || echo none") for name in "acd"] == [
        "none\n",
        "second\n",
        "second\n",
    ]
    assert len({source.guest(name, _FILES) for name in "acd"}) == 1
    source.ok("vm", "delete", "-q", "-f", "a", "c")
    source.ok("snapshot", "delete", "first", "third")
    assert source.guest("d", "cat /root/second") == "second\n"
    assert "used by d" in source.fails("image", "delete", IMAGE, status=1)


@pytest.mark.parametrize("runs", [True, False])
@suite.about_layers
def test_the_layers_are_bounded_and_the_content_is_whole(home: Home, runs: bool) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    files = banger.guest("box", _FILES)
    for number in range(10):
        if runs:
            banger.guest("box", f"echo {number} >/root/{number}; echo {number} >/{number}; sync")
        elif number == 0:
            banger.guest("box", "echo 0 >/root/0; sync")
            banger.ok("vm", "stop", "-q", "box")
        banger.ok("vm", "snapshot", "-q", "box", f"snap-{number}")
        (vm,) = banger.json("vm", "list")
        assert _depth(vm) <= LAYERS_MAX
        assert len(_layers(home, "box")) == _depth(vm)
    banger.ok("vm", "restart", "-q", "box")
    last = 9 if runs else 0
    assert banger.guest("box", f"cat /root/0 /root/{last}") == f"0\n{last}\n"
    assert banger.guest("box", _FILES) == files
    banger.ok("vm", "create", "-q", "--name", "old", "--from-snapshot", "snap-3", "--cold")
    expected = "3\n" if runs else ""
    assert banger.guest("old", "cat /3 2>/dev/null; ls /root/4 2>/dev/null; true") == expected
    assert banger.guest("old", _FILES) == files


def test_a_suspended_machine_goes_on_where_it_was(home: Home, source: Banger) -> None:
    source.guest("box", "echo memory >/run/kept")
    before = _count(source, "box")
    source.ok("vm", "stop", "-q", "--suspend", "box")
    assert source.state("box") == "suspended"
    assert home.machines() == []
    assert "is suspended" in source.fails("vm", "restart", "box", status=1)
    source.ok("daemon", "restart")
    assert source.state("box") == "suspended"
    source.ok("vm", "start", "-q", "box")
    assert source.guest("box", "cat /run/kept") == "memory\n"
    assert _count(source, "box") >= before
    _assert_counts(source, "box")
    (vm,) = source.json("vm", "list")
    assert not (Path(vm["runtime"]["vm_dir"]) / "memory").exists()
    assert abs(int(source.guest("box", "date +%s")) - time.time()) < 30
    source.ok("vm", "stop", "-q", "--suspend", "box")
    source.ok("vm", "start", "-q", "--cold", "box")
    assert source.guest("box", "ls /run/kept 2>/dev/null; true") == ""


@pytest.mark.parametrize(
    "point",
    [
        # With Firecracker all of the memory is written in the next stage.
        pytest.param("vm.snapshot:memory", marks=suite.about_qemu),
        "vm.snapshot:freeze",
        "vm.snapshot:sync",
        "vm.fork:freeze",
        "vm.fork:forks",
        "vm.create:restore",
        "vm.suspend:freeze",
        "vm.suspend:sync",
    ],
)
def test_a_daemon_killed_at_any_stage_leaves_the_source_running_and_nothing_else(
    home: Home, source: Banger, point: str
) -> None:
    source.ok("daemon", "stop")
    words = {
        "vm.snapshot": ("vm", "snapshot", "box", "snap"),
        "vm.fork": ("vm", "fork", "box", "-n", "3"),
        "vm.create": ("vm", "fork", "box", "-n", "3"),
        "vm.suspend": ("vm", "stop", "--suspend", "box"),
    }[point.partition(":")[0]]
    faulty = Banger(source.environment | {"BANGER_FAULT": f"SIGKILL@{point}"})
    assert faulty.run(*words).returncode == 1
    (vm,) = source.json("vm", "list")
    assert (vm["name"], vm["runtime"]["state"]) == ("box", "running")
    assert source.json("snapshot", "list") == []
    assert list((home.state / "snapshots").glob("*")) == []
    assert len(home.machines()) == 1
    assert not (Path(vm["runtime"]["vm_dir"]) / "memory").exists()
    _assert_counts(source, "box")
    assert source.ok("vm", "snapshot", "-q", "box", "snap") == "snap\n"


def test_ctrl_c_takes_back_all_forks(home: Home, source: Banger) -> None:
    forking = source.start("vm", "fork", "box", "--count", "12", process_group=0)
    until(lambda: len(source.json("vm", "list")) > 3, "some forks")
    forking.send_signal(signal.SIGINT)
    status, _, _ = finish(forking)
    assert status == 130
    assert [vm["name"] for vm in source.json("vm", "list")] == ["box"]
    assert list((home.state / "snapshots").iterdir()) == []
    _assert_counts(source, "box")


def test_a_copy_may_have_a_larger_disk_and_cold_another_shape(home: Home, source: Banger) -> None:
    source.ok("vm", "snapshot", "-q", "box", "snap")
    from_it = ("vm", "create", "-q", "--from-snapshot", "snap")
    source.ok(*from_it, "--name", "large", "--disk-size", "20G")
    assert int(source.guest("large", "df -k --output=size /root | tail -1")) > 19 << 20
    _assert_counts(source, "large")
    assert "add --cold" in source.fails(*from_it, "--vcpu", "2", status=1)
    source.ok(*from_it, "--name", "cold", "--cold", "--vcpu", "2", "--memory", "384M")
    assert source.guest("cold", "nproc") == "2\n"
    done = source.run("vm", "run", "-q", "--rm", "--from-snapshot", "snap", "--", "cat", "/count")
    assert int(done.stdout) > 0
