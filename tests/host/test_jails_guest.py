"""Jails on a kernel that has all that they are made of: with stand-ins for Firecracker's two
programs, and with those themselves where they are to be had."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import firecrackers
from banger.base.procfs import Process
from guest_host import GuestHost, GuestHosts

# The first test may have to make the host.
pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]

_HERE = Path(__file__).parent
_PLACE = "/usr/local/bin"
_DROP_INS = "/etc/systemd/system/bangerd.service.d"
_RUN = "banger vm run -q -d --memory 256M --vcpu 1"


def _put_programs(host: GuestHost, firecracker: Path, jailer: Path) -> None:
    for source, name in ((firecracker, "firecracker"), (jailer, "jailer")):
        host.put(source, f"{_PLACE}/{name}")
        host.root(f"chown root:root {_PLACE}/{name}; chmod 755 {_PLACE}/{name}")


@pytest.fixture(scope="module")
def seen(guest_hosts: GuestHosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `jail_steps.py` has seen, with stand-ins."""
    probe = tmp_path_factory.mktemp("probe") / "firecracker"
    subprocess.run(["gcc", "-static", "-o", probe, _HERE / "jail_probe.c"], check=True)
    host = guest_hosts.new("jails")
    _put_programs(host, probe, _HERE / "stand_in_jailer.py")
    host.load("tun", "bridge", "veth", "loop", "dm_snapshot")
    python = host.root('head -n 1 "$(command -v banger)"').removeprefix("#!").strip()
    found = host.root(f"{python} -", stdin=(_HERE / "jail_steps.py").read_bytes())
    host.banger.ok("vm", "delete", "--force", host.name)
    return dict(json.loads(found))


def _said(seen: dict[str, Any]) -> dict[str, str]:
    """What the probe says that is said once."""
    return dict(line.split(": ", 1) for line in seen["said"] if ": " in line)


def test_it_is_nobody_and_can_become_nobody_else(seen: dict[str, Any]) -> None:
    said = _said(seen)
    uid = str(seen["uid"])
    assert said["uid"] == said["gid"] == f"{uid} {uid} {uid}"
    assert (said["groups"], said["capabilities"], said["no new privileges"]) == ("0", "0", "1")
    assert said["become root"] == "Operation not permitted"
    assert said["environment"] == ""
    assert "inherited" not in said


def test_it_is_alone_with_its_limits(seen: dict[str, Any]) -> None:
    said = _said(seen)
    assert (said["pid"], said["kill everybody"]) == ("1", "No such process")
    assert seen["namespaces of its own"] == ["ipc", "mnt", "net", "pid", "uts"]
    assert seen["group"] == "0::/banger-1000/0123456789ab"
    assert seen["limits"] == [str(384 << 20), "200000 100000", "17", "1"]
    assert (said["open files"], said["core"]) == ("1024", "0")


def test_its_owner_knows_it_by_its_jail(seen: dict[str, Any]) -> None:
    """Its uid and its place in its namespace are those that `procfs` expects."""
    assert seen["seen by its owner"] == f"{Process(jail='0123456789ab')}\n"


def test_it_has_its_files_and_no_others(seen: dict[str, Any]) -> None:
    inside = sorted(line.split(": ")[1] for line in seen["said"] if line.startswith("in /:"))
    names = ["dev", "disks", "firecracker", "kernel", "log", "out", "run"]
    assert inside == names
    said = _said(seen)
    for what in ("read kernel", "write disks/system", "write disks/mapped", "write log",
                 "kvm /dev/kvm", "make out/made", "socket"):  # fmt: skip
        assert said[what] == "yes", what
    assert said["write kernel"] == "Read-only file system"
    for what in ("/etc/passwd", "/proc/1/maps", "out/../../../../etc/passwd"):
        assert said[f"read {what}"] == "No such file or directory", what
    assert said["read out/link"] == "Too many levels of symbolic links"
    assert said["device"] == "Operation not permitted"
    assert said["fill"] == "no"


def test_what_it_makes_is_the_owners_and_nothing_else_changes_hands(seen: dict[str, Any]) -> None:
    lines = seen["seen from outside"].splitlines()
    assert lines == [
        "out/api.sock 1000 1000 700",
        "out/link 1000 1000 777",
        "out/made 1000 1000 600",
        *(f"{name} 1000 1000 600" for name in ("kernel", "system", "log")),
    ]


def test_it_is_joined_to_the_bridge_by_the_name_of_its_tap(seen: dict[str, Any]) -> None:
    interfaces = {line.split(": ")[1] for line in seen["said"] if line.startswith("interface:")}
    assert interfaces == {"lo", "uplink0", "tap0", "bridge0"}
    said = _said(seen)
    assert (said["tap"], said["another tap"]) == ("yes", "Operation not permitted")
    assert seen["uplink"] == ["veth", "banger7", "UP"]


def test_a_machine_has_one_jail_and_its_uid_alone(seen: dict[str, Any]) -> None:
    assert seen["twice"] == "conflict: the machine 0123456789ab is in its jail already"
    assert "has the uid that 012345ffffff would have" in seen["one with its uid"]
    assert seen["another's mapping"].startswith("permission_denied")
    assert "its machine is in a jail" in seen["unmapped"]


def test_nothing_is_left_of_one_whoever_was_killed_and_when(seen: dict[str, Any]) -> None:
    assert (seen["left"], seen["ended by itself"], seen["killed"]) == ([], [], [])
    assert seen["left after refusals"] == []


def test_who_asked_for_a_jail_clears_it_when_its_making_was_killed(seen: dict[str, Any]) -> None:
    told = [message for message, _ in seen["launcher killed"]]
    failed = [message for message in told if message != "done"]
    # Before it was in the jail's control group, and at least once in it.
    assert failed[0] == told[0]
    assert len(failed) > 1, told
    assert set(failed) == {"unavailable: a jail cannot be made: -9"}
    assert [left for _, left in seen["launcher killed"]] == [[]] * len(told)


def test_what_cannot_be_jailed_is_refused_with_what_to_do(seen: dict[str, Any]) -> None:
    assert "cannot be shown to a jail as another user's" in seen["in memory"]
    for step in ("deleted", "another"):
        assert "is not to be found where it was opened" in seen[step], step
    for wrong in ("chmod o+w", "chown 1000"):
        assert "root would run what others can change: /usr/local/bin/jailer" in seen[wrong]


# --- Firecracker itself ---


@pytest.fixture(scope="module")
def installed(guest_hosts: GuestHosts) -> Iterator[GuestHost]:
    """A host with banger installed for alice, whose machines are Firecracker's, in jails."""
    firecracker, jailer = firecrackers.real(), firecrackers.jailer()
    if firecracker is None or jailer is None:
        pytest.skip(
            "firecracker and jailer are not on PATH: put both there, or set"
            f" {firecrackers.REAL_VARIABLE} to the path of the one, with the other beside it"
        )
    host = guest_hosts.new("jailed")
    if host.run("test", "-e", "/dev/kvm").returncode != 0:
        pytest.skip(firecrackers.NO_NESTING)
    _put_programs(host, firecracker, jailer)
    host.alice("sed -i '1i hypervisor = \"firecracker\"' ~/.config/banger/config.toml")
    host.root("SUDO_UID=$(id -u alice) banger system install")
    host.alice(f"{_RUN} --name box --cold")
    yield host
    host.banger.ok("vm", "delete", "--force", host.name)


def _jailed(host: GuestHost) -> list[str]:
    """As alice sees them: her daemon looks who is in them."""
    return host.alice("ls -d /sys/fs/cgroup/banger-1000/*/ 2>/dev/null || true").split()


def test_the_doctor_says_that_machines_are_in_jails(installed: GuestHost) -> None:
    checks = {each["name"]: each for each in json.loads(installed.alice("banger doctor --json"))}
    assert (checks["jailer"]["level"], checks["hypervisor firecracker"]["level"]) == ("ok", "ok")


def test_a_jailed_machine_has_its_disks_and_its_network(installed: GuestHost) -> None:
    assert len(_jailed(installed)) == 1
    guest = installed.alice("banger vm exec box -- sh -c 'hostname; ip -br address show eth0'")
    assert guest.startswith("box\n")
    gateway = "banger vm exec box -- bash -c ': >/dev/tcp/10.213.0.1/53 && echo reached'"
    assert installed.alice(gateway) == "reached\n"
    # Rates, of two looks: what Firecracker counts comes out of its jail.
    installed.alice("banger vm stats box >/dev/null; banger vm exec box -- sync; sleep 1")
    (stats,) = json.loads(installed.alice("banger vm stats box --json"))
    used = stats["latest"]["host"]
    assert used["memory_bytes"] > 32 << 20
    for each in ("disk_read", "disk_written", "rx", "tx"):
        assert used[f"{each}_bytes_per_s"] is not None, each


def test_it_outlives_the_helper_and_a_daemon_that_is_killed(installed: GuestHost) -> None:
    pid = installed.root("pgrep -f ^/firecracker")
    installed.root("systemctl restart banger-helper; systemctl kill --signal KILL bangerd")
    assert installed.alice("banger vm exec box -- hostname") == "box\n"
    assert installed.root("pgrep -f ^/firecracker") == pid


def test_a_daemon_that_cannot_see_jailed_machines_makes_none_and_ends_none(
    installed: GuestHost,
) -> None:
    """Its unit has a /proc of its own, which the host's ``hidepid`` does not change."""
    pid = installed.root("pgrep -f ^/firecracker")
    installed.root("mount -o remount,hidepid=2 /proc")
    checks = {each["name"]: each for each in json.loads(installed.alice("banger doctor --json"))}
    assert checks["jailer"]["level"] == "ok"
    installed.root(
        "mount -o remount,hidepid=0 /proc; daemon=$(systemctl show -P MainPID bangerd);"
        " nsenter -t $daemon -m mount -o remount,hidepid=2 /proc"
    )
    try:
        found = json.loads(installed.alice("banger doctor --json || true"))
        (check,) = [each for each in found if each["name"] == "jailer"]
        assert check["level"] == "fail"
        assert "hidepid" in check["detail"]
        refused = installed.run("sh", "-c", f"{_RUN} --name more", user="alice")
        assert refused.returncode == 125
        assert b"hidepid" in refused.stderr
        # The daemon that knows it goes on with it, the next one does not start.
        assert installed.alice("banger vm exec box -- hostname") == "box\n"
        installed.root(
            f"mkdir {_DROP_INS}; cd {_DROP_INS};"
            " printf '[Service]\nProtectProc=invisible\n' >sight.conf; systemctl daemon-reload;"
            " systemctl kill --signal KILL bangerd; systemctl stop bangerd"
        )
        assert installed.run("systemctl", "start", "bangerd").returncode != 0
        assert "it cannot be seen how box fares" in installed.journal("bangerd")
        assert installed.root("pgrep -f ^/firecracker") == pid
    finally:
        installed.root(f"rm -rf {_DROP_INS}; systemctl daemon-reload")
        installed.root("systemctl stop bangerd; systemctl reset-failed bangerd || true")
        installed.root("systemctl start bangerd")
    assert installed.alice("banger vm exec box -- hostname") == "box\n"
    assert installed.root("pgrep -f ^/firecracker") == pid


def test_templates_and_snapshots_are_made_in_jails_and_leave_them(installed: GuestHost) -> None:
    assert installed.alice(f"{_RUN} --name warm; banger vm exec warm -- hostname").endswith(
        "warm\n"
    )
    installed.alice("banger vm snapshot -q warm kept; banger vm fork -q warm --count 1")
    assert len(_jailed(installed)) == 3
    installed.alice("banger vm stop -q warm; banger vm start -q warm; banger vm exec warm -- true")
    installed.alice("banger vm delete -q --force warm warm-fork-1; banger snapshot delete kept")
    assert len(_jailed(installed)) == 1
    assert installed.root("find /home/alice/.local -name jail").count("\n") == 1  # box's


def test_a_machine_that_uses_all_its_memory_is_copied_within_its_limits(
    installed: GuestHost,
) -> None:
    """The copy's pages count as the jail's, too: they are written out, and nobody is killed."""
    fill = "mount -t tmpfs -o size=180M m /mnt && head -c 180M /dev/zero >/mnt/x; wc -c </mnt/x"
    filled = installed.alice(f"{_RUN} --name full; banger vm exec full -- sh -c '{fill}'")
    assert filled.endswith(f"{180 << 20}\n")
    installed.alice("banger vm snapshot -q full kept")
    (group,) = (each for each in _jailed(installed) if _id(installed, "full") in each)
    events = dict(
        line.split() for line in installed.alice(f"cat {group}memory.events").splitlines()
    )
    assert events["oom_kill"] == "0"
    assert installed.alice("banger vm exec full -- sh -c 'wc -c </mnt/x'") == f"{180 << 20}\n"
    installed.alice("banger vm delete -q --force full; banger snapshot delete kept")


def _id(host: GuestHost, vm: str) -> str:
    return str(json.loads(host.alice(f"banger vm show {vm} --json"))["id"])


def test_nothing_is_left_of_a_machine_that_ends_by_itself(installed: GuestHost) -> None:
    installed.run("sh", "-c", "banger vm exec box -- sh -c 'sync; echo b >/proc/sysrq-trigger'",
        user="alice")  # fmt: skip
    installed.alice("banger vm wait box --for stopped 2>/dev/null || sleep 5")
    assert _jailed(installed) == []
    assert "banger0-" not in installed.root("ip -br link show type veth")
    installed.alice("banger vm start -q box; banger vm exec box -- true")


def test_without_jails_it_is_said_and_done(installed: GuestHost) -> None:
    installed.alice("banger vm stop -q box")
    installed.alice("echo 'jailer_enabled = false' >~/x; cat ~/.config/banger/config.toml >>~/x;"
        " mv ~/x ~/.config/banger/config.toml")  # fmt: skip
    installed.root("systemctl restart bangerd")
    checks = {each["name"]: each for each in json.loads(installed.alice("banger doctor --json"))}
    assert checks["jailer"]["level"] == "warn"
    installed.alice("banger vm start -q box; banger vm exec box -- true")
    assert _jailed(installed) == []
    installed.alice("sed -i 1d ~/.config/banger/config.toml")
    # It runs on as it is, and is ended as it is.
    installed.root("systemctl restart bangerd")
    assert installed.alice("banger vm exec box -- hostname; banger vm stop -q box").startswith(
        "box"
    )


def test_a_jailed_machine_has_a_device_for_its_disk(installed: GuestHost) -> None:
    """A snapshot of device-mapper's, whose node the jail has for itself."""
    settings = "/home/alice/.config/banger/config.toml"
    installed.load("loop", "dm_snapshot")
    installed.root(
        f"chown alice /srv/rootfs.ext4; sed -i '1i storage = \"dm_snapshot\"' {settings};"
        " systemctl restart bangerd"
    )
    there = "dmsetup ls; losetup --all --noheadings --output BACK-FILE"
    installed.alice(f"{_RUN} --name mapped --cold")
    jailed = _jailed(installed)
    assert len(jailed) == 1
    assert f"banger-{Path(jailed[0]).name}" in installed.root(there)
    in_it = "banger vm exec -i mapped -- sh -euc"
    installed.alice(f"{in_it} 'head -c 20M /dev/urandom >/much; md5sum /much >/sum; sync'")
    installed.alice("banger vm stop -q mapped")
    assert (installed.root(there), _jailed(installed)) == ("No devices found\n", [])
    installed.alice("banger vm start -q mapped")
    assert installed.alice(f"{in_it} 'md5sum -c /sum'") == "/much: OK\n"
    installed.alice("banger vm snapshot -q mapped kept; banger vm fork -q mapped --count 1")
    fork = "banger vm exec mapped-fork-1 -- md5sum -c /sum"
    assert installed.alice(fork) == "/much: OK\n"
    installed.alice("banger vm delete -q --force mapped mapped-fork-1; banger snapshot delete kept")
    assert (installed.root(there), _jailed(installed)) == ("No devices found\n", [])
    installed.root(f"sed -i 1d {settings}; systemctl restart bangerd")


def test_uninstalling_ends_what_is_in_jails(installed: GuestHost) -> None:
    installed.alice("banger vm start -q box")
    assert len(_jailed(installed)) == 1
    installed.root("banger system uninstall --force")
    assert installed.root("ls -d /sys/fs/cgroup/banger-* /run/banger 2>/dev/null || true") == ""
    assert installed.run("pgrep", "-f", "^/firecracker").returncode == 1
