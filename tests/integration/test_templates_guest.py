"""Real machines from a template: each is somebody of its own, and none is in another's way."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import leftovers
import suite
from homes import Home, little_room
from product import IMAGE, Banger, finish, until

pytestmark = pytest.mark.guest

SMALL = ("--image", IMAGE, "--memory", "256M", "--vcpu", "1")
SIBLINGS = [f"sibling-{number}" for number in range(20)]

#: What nobody may share, each on a line. The last two come from the kernel's random pool.
_IDENTITY = """
hostname
cat /etc/hostname
cat /etc/machine-id
cat /sys/class/net/eth0/address
cat /proc/sys/kernel/random/boot_id
cat /proc/sys/kernel/random/uuid
head -c 16 /dev/urandom | od -An -tx1
"""
_HOST_KEY = """
until [ -s /etc/ssh/ssh_host_ed25519_key.pub ]; do sleep 0.1; done
cat /etc/ssh/ssh_host_*.pub
"""
#: What all share: the files of the image. (And not those that it gets an identity in.)
_FILES = "cd / && find bin/* usr/bin usr/lib/os-release etc/passwd -type f | sort | xargs md5sum"


@pytest.fixture(scope="module")
def siblings(banger: Banger, image: str) -> Iterator[list[str]]:
    """Twenty machines that were started at once."""
    starts = [banger.start("vm", "create", "-q", *SMALL, "--name", name) for name in SIBLINGS]
    answers = [finish(start, timeout_s=240) for start in starts]
    assert [status for status, _, _ in answers] == [0] * len(SIBLINGS), answers
    yield SIBLINGS
    banger.run("vm", "delete", "--force", *SIBLINGS)


def _asked(banger: Banger, names: list[str], script: str) -> dict[str, str]:
    """What each machine answers to a script, all at once."""
    calls = {name: banger.start("vm", "exec", name, "--", "sh", "-c", script) for name in names}
    answers = {name: finish(call, timeout_s=240) for name, call in calls.items()}
    assert all(status == 0 for status, _, _ in answers.values()), answers
    return {name: out.decode() for name, (_, out, _) in answers.items()}


@suite.about_qemu
def test_they_come_from_one_template_and_map_its_memory(
    banger: Banger, siblings: list[str]
) -> None:
    templates = [
        each
        for each in banger.json("template", "list")
        if (each["vcpu_count"], each["memory_mib"]) == (1, 256)
    ]
    (template,) = templates
    memory = Path(template["directory"]) / "memory"
    mapping = [
        process for process in leftovers.processes_naming(str(memory)) if "qemu" in process.command
    ]
    assert len(mapping) == len(siblings)
    for process in mapping:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        (mapped,) = (line for line in maps if line.endswith(str(memory)))
        assert mapped.split()[1] == "rw-p"  # written pages are its own


def test_nothing_that_tells_one_from_another_is_shared(banger: Banger, siblings: list[str]) -> None:
    answers = {
        name: answer.splitlines() for name, answer in _asked(banger, siblings, _IDENTITY).items()
    }
    for name, lines in answers.items():
        hostname, hostname_file, machine_id, mac, *_ = lines
        assert hostname == hostname_file == name
        assert re.fullmatch("[0-9a-f]{32}", machine_id)
        assert re.fullmatch("02(:[0-9a-f]{2}){5}", mac)
    for what in zip(*answers.values(), strict=True):
        assert len(set(what)) == len(siblings), what


def test_each_has_a_host_key_of_its_own(banger: Banger, siblings: list[str]) -> None:
    if banger.run("vm", "exec", siblings[0], "--", "test", "-x", "/usr/bin/ssh-keygen").returncode:
        # The small image has no sshd: then there must be no key at all.
        assert set(
            _asked(banger, siblings, "ls /etc/ssh/ssh_host_* 2>/dev/null; true").values()
        ) == {""}
        return
    keys = _asked(banger, siblings, _HOST_KEY)
    assert len(set(keys.values())) == len(siblings)


def test_the_clock_is_the_hosts(banger: Banger, siblings: list[str]) -> None:
    for answer in _asked(banger, siblings, "date +%s").values():
        assert abs(int(answer) - time.time()) < 30


def test_the_files_of_the_image_are_the_same(banger: Banger, siblings: list[str]) -> None:
    sums = _asked(banger, siblings[:4], _FILES)
    assert len(set(sums.values())) == 1
    assert len(next(iter(sums.values())).splitlines()) > 100


def test_what_one_writes_no_other_sees(banger: Banger, siblings: list[str]) -> None:
    script = "hostname >/root/mine; hostname >/mine; hostname >/run/mine; sync"
    _asked(banger, siblings, script)
    read = _asked(banger, siblings, "cat /root/mine /mine /run/mine")
    assert read == {name: f"{name}\n" * 3 for name in siblings}


@suite.about_user_networking
def test_each_has_a_network_of_its_own(banger: Banger, siblings: list[str]) -> None:
    script = "ip -4 -o addr show eth0 | grep -o 'inet [0-9.]*'; ip route | head -1"
    answers = set(_asked(banger, siblings[:4], script).values())
    assert len(answers) == 1  # the address is the same in each, for each has a network to itself
    assert "172.16.0.2" in answers.pop()


def test_a_template_can_go_while_its_machines_run(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    (template,) = banger.json("template", "list")
    assert banger.ok("template", "delete", template["id"][:6]) == f"{template['id']}\n"
    assert not Path(template["directory"]).exists()
    # Its memory is read from the file that is gone, and its disks need nothing of it.
    assert banger.guest("box", "find / -xdev -type f | wc -l; cat /proc/meminfo | head -1")
    banger.ok("vm", "restart", "-q", "box")
    assert banger.guest("box", "echo up") == "up\n"


def test_a_larger_disk_shares_the_template_and_is_all_there(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "usual")
    banger.ok("vm", "create", "-q", *SMALL, "--disk-size", "20G", "--name", "large")
    assert len(banger.json("template", "list")) == 1
    size = int(banger.guest("large", "df -k --output=size /root | tail -1"))
    assert 19 << 20 < size < 20 << 20
    banger.ok("vm", "restart", "-q", "large")
    assert int(banger.guest("large", "df -k --output=size /root | tail -1")) == size


def test_a_small_disk_is_as_small_as_asked(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--disk-size", "1G", "--name", "small")
    size = int(banger.guest("small", "df -k --output=size /root | tail -1"))
    assert 900 << 10 < size < 1 << 20


def test_cold_boots_and_a_machine_that_was_stopped_keeps_what_it_wrote(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", "--cold", *SMALL, "--name", "cold")
    assert banger.json("template", "list") == []
    banger.ok("vm", "create", "-q", *SMALL, "--name", "warm")
    for name in ("cold", "warm"):
        banger.guest(name, "echo kept >/root/file; echo kept >/file")
        banger.ok("vm", "stop", "-q", name)
        banger.ok("vm", "start", "-q", name)
        assert banger.guest(name, "cat /root/file /file") == "kept\nkept\n"
        assert banger.guest(name, "hostname") == f"{name}\n"


def test_a_damaged_template_is_a_line_and_a_boot(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "run", "-q", "--rm", *SMALL, "--", "true")
    (template,) = banger.json("template", "list")
    state = Path(template["directory"]) / "machine-state"
    state.write_bytes(state.read_bytes()[:1000])
    done = banger.run("vm", "run", "--rm", *SMALL, "--", "echo", "up")
    assert (done.returncode, done.stdout) == (0, b"up\n")
    said = done.stderr.decode()
    assert "starting from a template failed, the machine boots: " in said
    assert banger.json("template", "list") == []
    assert home.machines() == []
    # A daemon that has not seen it fail makes another.
    banger.ok("daemon", "restart")
    assert banger.ok("vm", "run", "--rm", *SMALL, "--", "echo", "up") == "up\n"
    assert len(banger.json("template", "list")) == 1


def test_a_daemon_killed_while_it_makes_a_template_leaves_nothing(home: Home) -> None:
    banger = home.banger
    banger.ok("image", "list")
    run = banger.start("vm", "run", "--rm", *SMALL, "--", "true")
    staging = home.state / "templates"
    until(lambda: list(staging.glob(".staging-*")), "a template in the making")
    until(home.machines, "its machine")
    home.kill_daemon(signal.SIGKILL)
    assert finish(run)[0] == 125
    assert banger.json("vm", "list") == []
    assert home.machines() == []
    assert list(staging.iterdir()) == []
    assert list((home.runtime / "templates").glob("*")) == []


def test_prune_takes_what_was_made_of_another_qemu(home: Home) -> None:
    banger = home.banger
    banger.ok("vm", "run", "-q", "--rm", *SMALL, "--", "true")
    done = banger.run("template", "prune")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"0 templates deleted, 0 B of disk\n"
    pruned = json.loads(banger.ok("template", "prune", "--all", "--dry-run", "--json"))
    assert [each["image_name"] for each in pruned] == [IMAGE]
    assert len(banger.json("template", "list")) == 1
    banger.ok("template", "prune", "--all")
    assert banger.json("template", "list") == []
    assert banger.fails("template", "show", "0", status=1).startswith(
        'error: template "0" not found'
    )


# Standbys


@pytest.fixture
def small_disk(home: Home) -> Iterator[Path]:
    """Where the home's templates have 1 GiB, on a file system whose files are in memory."""
    templates = home.state / "templates"
    with little_room(templates, "1g"):
        yield templates
        home.banger.run("vm", "delete", "--force", "box")


def test_a_full_disk_below_their_template_harms_no_machine(home: Home, small_disk: Path) -> None:
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    assert len(banger.json("template", "list")) == 1
    filler = small_disk / "filler"
    with suppress(OSError):
        filler.write_bytes(bytes(1 << 30))
    try:
        # Memory that the template had never used: a hole of its file.
        assert banger.guest("box", "head -c 150M /dev/zero | tail -c 120M | wc -c") == "125829120\n"
    finally:
        filler.unlink()
    assert banger.state("box") == "running"


def _standby(home: Home) -> leftovers.Process:
    """The machine that waits, once it does."""
    until(lambda: home.banger.json("daemon", "status")["standbys"], "a standby")
    known = {vm["id"] for vm in home.banger.json("vm", "list")}
    (waiting,) = (each for each in home.machines() if not any(id_ in each.command for id_ in known))
    return waiting


@suite.about_qemu
def test_a_standby_becomes_the_next_machine_and_is_as_much_somebody(home: Home) -> None:
    home.configure("standby_limit = 1")
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "first")
    waiting = _standby(home)
    assert [vm["name"] for vm in banger.json("vm", "list")] == ["first"]
    banger.ok("vm", "create", "-q", *SMALL, "--name", "second")
    second = banger.json("vm", "show", "second")
    assert second["id"] in waiting.command
    answers = _asked(banger, ["first", "second"], _IDENTITY)
    lines = {name: answer.splitlines() for name, answer in answers.items()}
    for what in zip(*lines.values(), strict=True):
        assert len(set(what)) == 2, what
    assert lines["second"][:2] == ["second", "second"]
    assert abs(int(banger.guest("second", "date +%s")) - time.time()) < 30
    # Its disks are its own, and it boots from them.
    banger.guest("second", "echo kept >/root/file")
    banger.ok("vm", "restart", "-q", "second")
    assert banger.guest("second", "cat /root/file; hostname") == "kept\nsecond\n"


@suite.about_qemu
def test_a_standby_ends_with_its_daemon_however_that_ends(home: Home) -> None:
    home.configure("standby_limit = 1")
    banger = home.banger
    banger.ok("vm", "create", "-q", *SMALL, "--name", "box")
    for ending in (signal.SIGKILL, signal.SIGTERM):
        banger.ok("vm", "run", "-q", "--rm", *SMALL, "--", "true")
        _standby(home)
        home.kill_daemon(ending)
        (vm,) = banger.json("vm", "list")
        assert vm["runtime"]["state"] == "running"
        assert [vm["id"] in each.command for each in home.machines()] == [True]
        assert [entry.name for entry in (home.state / "vms").iterdir()] == [vm["id"]]
