"""The verbs of a machine's life, on real guests: what lasts, what is new, what is refused."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import suite
from homes import Home, little_room
from product import IMAGE, Banger, finish, read_until, until

pytestmark = pytest.mark.guest

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@pytest.fixture
def box(make_vm: Callable[..., str]) -> str:
    return make_vm("--memory", "256M", "--vcpu", "1")


def test_what_a_guest_wrote_is_there_after_stop_and_start(banger: Banger, box: str) -> None:
    before = banger.guest(
        box, f"{BOOT_ID}; cat /etc/machine-id; echo kept >/root/work; echo >/sys-file"
    )
    assert banger.ok("vm", "stop", box) == f"{box}\n"
    (stopped,) = json.loads(banger.ok("vm", "stop", box, "--json"))
    assert stopped["runtime"]["state"] == "stopped"
    said = banger.fails("vm", "exec", box, "--", "true", status=125)
    assert f'vm "{box}" is stopped' in said
    assert f"hint: start it: banger vm start {box}" in said
    (started,) = json.loads(banger.ok("vm", "start", box, "--json"))
    assert started["runtime"]["state"] == "running"
    assert started["id"] == stopped["id"]
    after = banger.guest(box, f"{BOOT_ID}; cat /etc/machine-id; cat /root/work; ls /sys-file")
    assert after.split()[2:] == ["kept", "/sys-file"]
    assert after.split()[0] != before.split()[0], "another boot"
    assert after.split()[1] == before.split()[1], "the same machine"
    assert banger.ok("vm", "start", box) == f"{box}\n"  # it runs already
    assert banger.guest(box, BOOT_ID).strip() == after.split()[0]


def test_a_restart_is_another_boot_of_the_same_disks(banger: Banger, box: str) -> None:
    before = banger.guest(box, f"{BOOT_ID}; echo kept >/root/work").strip()
    assert banger.ok("vm", "restart", box) == f"{box}\n"
    boot, kept = banger.guest(box, f"{BOOT_ID}; cat /root/work").split()
    assert boot != before
    assert kept == "kept"


def test_a_killed_machine_is_gone_at_once_and_starts_again(banger: Banger, box: str) -> None:
    banger.guest(box, "echo kept >/root/work; sync")
    begin = time.monotonic()
    assert banger.ok("vm", "kill", box) == f"{box}\n"
    assert time.monotonic() - begin < 5
    shown = banger.json("vm", "show", box)
    assert (shown["runtime"]["state"], shown["runtime"]["last_error"]) == ("stopped", "killed")
    banger.ok("vm", "start", box)
    assert banger.guest(box, "cat /root/work") == "kept\n"


def test_a_machine_is_made_without_being_started(banger: Banger, image: str) -> None:
    words = ("vm", "create", "--no-start", "--image", image, "--memory", "256M", "--name", "later")
    assert banger.ok(*words) == "later\n"
    try:
        assert banger.state("later") == "stopped"
        said = banger.fails("vm", "create", "--image", image, "--name", "later", status=1)
        assert 'vm "later" already exists' in said
        banger.ok("vm", "start", "later")
        assert banger.guest("later", "hostname") == "later\n"
    finally:
        banger.ok("vm", "delete", "--force", "later")


def test_a_stopped_machine_gets_another_shape(banger: Banger, box: str) -> None:
    small = int(banger.guest(box, "df -k --output=size /root | tail -1"))
    banger.guest(box, "echo kept >/root/work")
    said = banger.fails("vm", "set", box, "--memory", "384M", status=1)
    assert f'vm "{box}" is running' in said
    assert f"hint: first: banger vm stop {box}" in said
    banger.ok("vm", "stop", box)
    changed = json.loads(
        banger.ok(
            "vm", "set", box, "--memory", "384M", "--vcpu", "2", "--disk-size", "12G", "--json"
        )
    )
    assert (changed["spec"]["memory_mib"], changed["spec"]["disk_size_mib"]) == (384, 12 << 10)
    banger.ok("vm", "start", box)
    script = "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; df -k --output=size /root | tail -1"
    vcpus, memory_kib, disk_kib = map(int, banger.guest(box, script).split())
    assert vcpus == 2
    assert 300 << 10 < memory_kib < 384 << 10
    assert disk_kib > small * 1.4
    assert banger.guest(box, "cat /root/work") == "kept\n"
    banger.ok("vm", "stop", box)
    said = banger.fails("vm", "set", box, "--disk-size", "1G", status=1)
    assert "cannot shrink from 12288 MiB to 1024 MiB" in said
    assert banger.fails("vm", "set", box, status=2)
    banger.ok("vm", "start", box)


def test_a_running_machine_gets_another_name(banger: Banger, image: str) -> None:
    banger.ok("vm", "create", "--image", image, "--memory", "256M", "--name", "before")
    try:
        assert banger.ok("vm", "set", "before", "--name", "after") == "after\n"
        assert banger.guest("after", "hostname; cat /etc/hostname") == "after\nafter\n"
        assert "not found" in banger.fails("vm", "show", "before", status=1)
    finally:
        banger.run("vm", "delete", "--force", "before")
        banger.run("vm", "delete", "--force", "after")


def test_waiting_ends_when_the_guest_powers_itself_off(banger: Banger, box: str) -> None:
    said = banger.fails("vm", "wait", box, "--timeout", "500ms", status=1)
    assert f'vm "{box}" is running, not stopped, after 0.5 s' in said
    assert banger.ok("vm", "wait", box, "--for", "healthy") == f"{box}\n"
    waiting = banger.start("vm", "wait", box)
    banger.run("vm", "exec", box, "--", "sh", "-c", suite.power_off())
    assert finish(waiting)[:2] == (0, f"{box}\n".encode())
    assert banger.json("vm", "show", box)["runtime"]["last_error"].startswith("the guest powered")
    running = banger.start("vm", "wait", box, "--for", "running")
    banger.ok("vm", "start", box)
    assert finish(running)[0] == 0


def test_pruning_deletes_what_does_not_run(home: Home) -> None:
    banger = home.banger
    for name in ("one", "two", "runs"):
        banger.ok("vm", "create", "--image", IMAGE, "--memory", "256M", "--name", name,
                  *(() if name == "runs" else ("--no-start",)))  # fmt: skip
    told = banger.json("vm", "prune", "--dry-run")
    assert [each["vm"]["name"] for each in told] == ["one", "two"]
    assert all(each["size_bytes"] > 0 for each in told)
    assert banger.json("vm", "prune", "--unused-for", "1h", "--force") == []
    said = banger.fails("vm", "prune", status=2)
    assert "--force" in said
    out = banger.ok("vm", "prune", "--force")
    assert "one" in out
    assert "two" in out
    assert [each["name"] for each in banger.json("vm", "list")] == ["runs"]


def test_health_tells_a_machine_that_hangs_from_one_that_is_well(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "--image", IMAGE, "--memory", "256M", "--name", "box")
    report = banger.json("vm", "health", "box")
    assert report["healthy"]
    assert {check["level"] for check in report["checks"]} == {"ok"}
    (machine,) = home.machines()
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        done = banger.run("vm", "health", "box")
        assert done.returncode == 1
        assert b"agent" in done.stdout
        assert b"fail" in done.stdout
        assert banger.state("box") == "running"
        # A guest that hears nothing is ended all the same, in its time.
        banger.ok("vm", "stop", "box")
    finally:
        if machine in home.machines():
            os.kill(machine.pid, signal.SIGCONT)
    assert home.machines() == []
    done = banger.run("vm", "health", "box")
    assert done.returncode == 1
    assert b"the VM is stopped" in done.stdout
    banger.ok("vm", "start", "box")
    assert banger.guest("box", "echo well") == "well\n"


def test_what_nobody_uses_is_stopped_by_itself(home: Home) -> None:
    home.configure('auto_stop_stale_after = "3s"')
    banger = home.banger
    banger.ok("daemon", "restart")
    banger.ok("vm", "create", "--image", IMAGE, "--memory", "256M", "--name", "box")
    # A command is use for as long as it runs.
    assert banger.guest("box", "sleep 8; echo done") == "done\n"
    banger.ok("vm", "wait", "box", "--timeout", "60s")
    assert banger.json("vm", "show", "box")["runtime"]["last_error"] == "nobody used it for 3s"
    assert home.machines() == []


def test_an_interrupted_start_leaves_a_stopped_machine(banger: Banger, box: str) -> None:
    banger.ok("vm", "stop", box)
    starting = banger.start("vm", "start", box)
    until(lambda: banger.state(box) == "starting", "it starts", timeout_s=20)
    starting.send_signal(signal.SIGINT)
    assert finish(starting)[0] == 130
    until(lambda: banger.state(box) == "stopped", "it is taken back")
    assert banger.json("vm", "show", box)["runtime"]["last_error"] == "its start was cancelled"
    banger.ok("vm", "start", box)


def test_after_a_reboot_of_the_host_machines_are_stopped_and_start_again(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "--image", IMAGE, "--memory", "256M", "--name", "box")
    banger.guest("box", "echo kept >/root/work; sync")
    banger.ok("daemon", "stop")
    (machine,) = home.machines()
    os.kill(machine.pid, signal.SIGKILL)
    until(lambda: home.machines() == [], "it is gone")
    (handles,) = home.state.glob("vms/*/handles.json")
    record = json.loads(handles.read_text())
    # What had this pid then is something else now: us.
    handles.write_text(json.dumps(record | {"boot_id": "another", "pid": os.getpid()}))
    assert list(home.runtime.glob("vms/*/control.sock"))
    shown = banger.json("vm", "show", "box")["runtime"]
    assert (shown["state"], shown["last_error"]) == (
        "stopped",
        "its process was gone when bangerd started",
    )
    assert not handles.exists()
    assert list(home.runtime.glob("vms/*")) == []
    banger.ok("vm", "start", "box")
    assert banger.guest("box", "cat /root/work") == "kept\n"


@pytest.fixture
def small_disk(home: Home) -> Iterator[Home]:
    """A home whose VMs have 800 MiB for their files."""
    with little_room(home.state / "vms", "800m"):
        yield home
        home.banger.run("vm", "delete", "--force", "box")


@suite.about_qemu
def test_a_machine_that_meets_a_full_disk_is_held_and_runs_on_once_there_is_room(
    small_disk: Home,
) -> None:
    banger = small_disk.banger
    banger.ok("vm", "create", "--image", IMAGE, "--memory", "256M", "--name", "box")
    filler = small_disk.state / "vms" / "filler"
    info = os.statvfs(filler.parent)
    filler.write_bytes(bytes(info.f_bavail * info.f_frsize - (16 << 20)))
    dd = ("dd", "if=/dev/zero", "of=/root/big", "bs=1M", "count=100", "conv=fsync")
    writing = banger.start("vm", "exec", "box", "--", *dd)

    def held() -> bool:
        checks = banger.run("vm", "health", "box").stdout
        return b"held: the host's disk is full" in checks

    until(held, "the machine is held", timeout_s=60)
    assert writing.poll() is None
    filler.unlink()
    status, out, err = finish(writing, timeout_s=90)
    assert (status, b"104857600 bytes" in err) == (0, True), (out, err)
    assert banger.json("vm", "health", "box")["healthy"]


def test_long_work_shows_its_stages_on_stderr_only(banger: Banger, box: str) -> None:
    banger.ok("vm", "stop", box)
    starting = banger.start("vm", "start", box)
    assert starting.stderr is not None
    read_until(starting.stderr, f"vm {box}: ".encode())
    status, out, _ = finish(starting)
    assert (status, out) == (0, f"{box}\n".encode())


def test_what_cannot_be_said_is_a_usage_error(banger: Banger) -> None:
    for words in (
        ("vm", "start"),
        ("vm", "wait", "box", "--for", "glory"),
        ("vm", "wait", "box", "--timeout", "soon"),
        ("vm", "prune", "--unused-for", "24"),
        ("vm", "set", "box", "--vcpu", "0"),
        ("vm", "set", "box", "--name", "Bad"),
    ):
        assert banger.fails(*words, status=2)
    for verb in ("start", "stop", "restart", "kill", "delete", "touch", "health", "wait"):
        assert 'vm "no-such" not found' in banger.fails("vm", verb, "no-such", status=1)


def test_one_that_fails_does_not_keep_the_others_from_their_turn(banger: Banger, box: str) -> None:
    done = banger.run("vm", "touch", "no-such", box)
    assert done.returncode == 1
    assert done.stdout.decode() == f"{box}\n"
    assert Path(banger.json("vm", "show", box)["runtime"]["vm_dir"]).is_dir()
