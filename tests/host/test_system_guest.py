"""`banger system` on a host that systemd runs: for an ordinary user, with machines on KVM."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from _pytest.nodes import Node

from banger import __version__
from guest_host import GuestHost, GuestHosts
from product import until

# The first test may have to make the host.
pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_numbers = itertools.count(1)

_SITE = "/opt/banger/lib/python3.11/site-packages/banger"

#: What is on the disk but what changes by itself: names, kinds, owners, modes, where links lead,
#: and of files sizes and times. Below alice's home is what the documentation says is hers.
_ALL_FILES = r"""
find / -xdev -path /var/log/journal -prune -o -path /home/alice -prune -o \
    -type f -printf '%p %m %U:%G %s %T@\n' -o -printf '%p %y %m %U:%G %l\n' | sort
ls -d /run/banger /run/bangerd /tmp/banger* 2>/dev/null || true
systemctl list-unit-files --no-legend | sort
systemctl list-units --all --no-legend --plain 'banger*'
"""
_HERS = ["/home/alice/.cache/banger", "/home/alice/.config/banger",
         "/home/alice/.local/share/banger", "/home/alice/.local/state/banger"]  # fmt: skip

_INSTALL = "SUDO_UID=$(id -u alice) banger system install"
_RUN = "banger vm run -q -d --memory 256M --vcpu 1"


@pytest.fixture(scope="module")
def bare(
    guest_hosts: GuestHosts, request: pytest.FixtureRequest, keeps: Callable[[Node], bool]
) -> Iterator[GuestHost]:
    """A host on which nothing is installed but the package."""
    host = guest_hosts.new(f"system-{next(_numbers)}")
    yield host
    if not keeps(request.node):
        host.banger.ok("vm", "delete", "--force", host.name)


@pytest.fixture(scope="module")
def installed(
    guest_hosts: GuestHosts, request: pytest.FixtureRequest, keeps: Callable[[Node], bool]
) -> Iterator[GuestHost]:
    """A host with banger installed for alice, who has a machine ``box`` that runs."""
    host = guest_hosts.new(f"system-{next(_numbers)}")
    host.root(_INSTALL)
    host.alice(f"{_RUN} --name box")
    yield host
    if not keeps(request.node):
        host.banger.ok("vm", "delete", "--force", host.name)


def _status(host: GuestHost) -> dict[str, Any]:
    return dict(json.loads(host.run("banger", "system", "status", "--json").stdout))


def _pids(host: GuestHost) -> list[int]:
    return [unit["pid"] for unit in _status(host)["units"]]


def _refusal(host: GuestHost, script: str, user: str = "root") -> str:
    """What a command says that must fail."""
    done = host.run("sh", "-c", script, user=user)
    assert done.returncode == 1, (script, done)
    return done.stderr.decode()


def test_without_an_installation_there_is_none_and_users_have_their_own(bare: GuestHost) -> None:
    done = bare.run("banger", "system", "status", "--json")
    assert (done.returncode, json.loads(done.stdout)["installed"]) == (1, False)
    assert "banger is not installed" in _refusal(bare, "banger system restart")
    assert "banger is not installed" in _refusal(bare, "banger system uninstall")


def test_who_may_not_install_is_told_why(bare: GuestHost) -> None:
    assert "only root" in _refusal(bare, "banger system install", user="alice")
    assert "--owner USER" in _refusal(bare, "banger system install")
    assert "ordinary user" in _refusal(bare, "banger system install --owner root")
    assert 'no user "nobody-here"' in _refusal(bare, "banger system install --owner nobody-here")
    assert bare.root("ls -d /etc/banger /etc/systemd/system/banger* 2>/dev/null || true") == ""


def test_root_does_not_run_what_others_can_write(bare: GuestHost) -> None:
    for spoil, mend in (
        (f"chown alice {_SITE}/base/paths.py", f"chown root {_SITE}/base/paths.py"),
        ("chmod g+w /opt", "chmod g-w /opt"),
        ("chown -h alice /opt/banger/bin/python", "chown -h root /opt/banger/bin/python"),
        ("chmod 777 /opt/banger/lib", "chmod 755 /opt/banger/lib"),
    ):
        bare.root(spoil)
        said = _refusal(bare, _INSTALL)
        assert "others can change: /opt" in said
        assert "/opt/banger/bin/pip install" in said
        bare.root(mend)


def test_two_daemons_of_one_user_are_not_to_be(bare: GuestHost) -> None:
    bare.alice("banger daemon start")
    assert "alice's own bangerd runs" in _refusal(bare, _INSTALL)
    bare.alice(f"{_RUN} --name mine; banger daemon stop")
    assert "machines of alice's own bangerd run" in _refusal(bare, _INSTALL)
    bare.alice("banger vm delete -q --force mine; banger daemon stop")


def test_nothing_is_left_of_it_but_what_is_the_users(bare: GuestHost) -> None:
    before = bare.root(_ALL_FILES)
    bare.root(_INSTALL)
    assert bare.root(_INSTALL) == f"banger {__version__} is installed for alice\n"  # again
    during = set(bare.root(_ALL_FILES).splitlines()) - set(before.splitlines())
    assert {line.split()[0] for line in during if "banger" in line} >= {
        *("/etc/banger", "/etc/banger/install.toml", "/run/banger", "/run/bangerd"),
        *("/etc/systemd/system/banger-helper.service", "/etc/systemd/system/bangerd.service"),
        "/etc/udev/rules.d/12-banger.rules",
    }
    assert bare.alice("banger vm run -q --rm --memory 256M --vcpu 1 -- echo ran") == "ran\n"
    said = bare.root("banger system uninstall").splitlines()
    assert sorted(line.strip() for line in said[1:]) == _HERS
    assert bare.root(_ALL_FILES).splitlines() == before.splitlines()


def test_all_of_it_runs_and_starts_at_boot(installed: GuestHost) -> None:
    status = _status(installed)
    assert (status["owner"], status["version"], status["helper_answers"]) == (
        "alice",
        __version__,
        True,
    )
    assert [(unit["active"], unit["enabled"]) for unit in status["units"]] == [
        ("active", "enabled")
    ] * 2
    assert status["units"][1]["status"] == f"banger {__version__}"
    assert "active" in installed.root("banger system status")
    # Anybody may look; the socket is not theirs to try.
    others = json.loads(installed.run("setpriv", "--reuid", "65534", "--clear-groups",
        "banger", "system", "status", "--json").stdout)  # fmt: skip
    assert others["helper_answers"] is None


def test_the_owners_command_finds_the_units_daemon_and_starts_no_other(
    installed: GuestHost,
) -> None:
    for setting in ("", "XDG_RUNTIME_DIR=/tmp/elsewhere "):
        told = json.loads(installed.alice(f"{setting}banger daemon status --json"))
        assert told["socket"] == "/run/bangerd/bangerd.sock"
        assert told["pid"] == _pids(installed)[1]
    assert "unit of the system" in _refusal(installed, "banger daemon stop", user="alice")
    # Another HOME is another banger, as without an installation.
    elsewhere = "mkdir -p /tmp/h; HOME=/tmp/h banger daemon start; HOME=/tmp/h banger daemon stop"
    assert "is running" in installed.alice(elsewhere)


def test_a_daemon_that_was_stopped_by_root_stays_so(installed: GuestHost) -> None:
    installed.root("systemctl stop bangerd")
    assert "sudo systemctl start bangerd" in _refusal(installed, "banger ps", user="alice")
    assert installed.run("banger", "system", "status").returncode == 1
    installed.root("systemctl start bangerd")
    assert installed.alice("banger vm exec box -- echo runs") == "runs\n"


def test_images_are_made_by_the_units_daemon(installed: GuestHost) -> None:
    """In user namespaces, which what bounds a unit may bound, too."""
    checks = json.loads(installed.alice("banger doctor --json"))
    assert [each for each in checks if each["level"] == "fail"] == []
    archive = "tar -C /usr/share/doc -cf ~/x.tar zlib1g"
    installed.alice(f"{archive}; banger image import -q ~/x.tar --name tiny --kernel debian")
    installed.alice("banger image delete tiny; rm ~/x.tar")


def test_a_killed_daemon_is_started_again_and_machines_run_on(installed: GuestHost) -> None:
    before = _pids(installed)
    installed.root(f"kill -9 {before[0]} {before[1]}")
    # Its socket is gone with it: the command waits for the next.
    assert installed.alice("banger vm exec box -- echo runs") == "runs\n"
    until(lambda: _status(installed)["helper_answers"], "the helper answers")
    assert not set(_pids(installed)) & {0, *before}


def test_a_restart_by_owner_or_root_leaves_machines_running(installed: GuestHost) -> None:
    machine = installed.root("pidof qemu-system-x86_64")
    for restart in (installed.alice, installed.root):
        before = _pids(installed)
        restart("banger daemon restart" if restart == installed.alice else "banger system restart")
        assert _pids(installed)[1] not in (0, before[1])
        assert installed.alice("banger vm exec box -- echo runs") == "runs\n"
    assert installed.root("pidof qemu-system-x86_64") == machine


def test_an_upgrade_leaves_machines_running(installed: GuestHost) -> None:
    """As by pip, which replaces the package in its place."""
    machine, before = installed.root("pidof qemu-system-x86_64"), _pids(installed)
    newer = f"{__version__}.1"
    installed.root(f'sed -i \'s/"{__version__}"/"{newer}"/\' {_SITE}/__init__.py')
    assert f"this is banger {newer}" in installed.run("banger", "system", "status").stderr.decode()
    said = installed.run("banger", "ps", user="alice").stderr.decode()
    assert f"bangerd {__version__} is running" in said
    assert installed.root("banger system install") == f"banger {newer} is installed for alice\n"
    status = _status(installed)
    assert (status["version"], status["units"][1]["status"]) == (newer, f"banger {newer}")
    assert not set(_pids(installed)) & set(before)
    assert installed.root("pidof qemu-system-x86_64") == machine
    assert installed.alice("banger vm exec box -- echo runs") == "runs\n"


def test_it_is_there_again_after_a_reboot(installed: GuestHost) -> None:
    installed.alice("banger vm exec box -- sh -c 'echo kept >/root/file; sync'")
    installed.reboot()
    assert [unit["active"] for unit in _status(installed)["units"]] == ["active", "active"]
    (box,) = json.loads(installed.alice("banger vm list --json"))
    assert box["runtime"]["state"] == "stopped"
    installed.alice("banger vm start -q box")
    assert installed.alice("banger vm exec box -- cat /root/file") == "kept\n"
    address = json.loads(installed.alice("banger vm show box --json"))["runtime"]["address"]
    assert installed.alice("getent ahostsv4 box.vm").split()[0] == address


def test_another_owner_cannot_take_it_over(installed: GuestHost) -> None:
    said = _refusal(installed, "useradd bob; banger system install --owner bob")
    assert "installed for alice" in said
    installed.root("userdel bob")


# The helper makes jails, of namespaces and mounts, and has what Firecracker's jailer then gives up:
# without them it had 3.1.
@pytest.mark.parametrize(("unit", "most"), [("banger-helper", 4.5), ("bangerd", 6.8)])
def test_the_units_are_as_hard_as_they_can_be(installed: GuestHost, unit: str, most: float) -> None:
    said = installed.root(f"systemd-analyze security --no-pager {unit}.service | tail -1")
    assert float(said.split("service:")[1].split()[0]) <= most


def test_the_helper_may_set_forwarding_and_write_nothing_else(installed: GuestHost) -> None:
    inside = f"nsenter --mount --target {_pids(installed)[0]}"
    assert installed.root(f"{inside} sh -c 'cat /proc/sys/net/ipv4/ip_forward >/tmp/x; cat /tmp/x"
        " >/proc/sys/net/ipv4/ip_forward; echo set'") == "set\n"  # fmt: skip
    for path in ("/proc/sys/kernel/sysrq", "/usr/x", "/etc/x", "/home/x", "/var/lib/x", "/boot/x"):
        done = installed.run("sh", "-c", f"{inside} sh -c 'echo 1 >{path}'")
        assert b"Read-only file system" in done.stderr, path


def test_it_is_not_taken_away_from_below_a_machine(installed: GuestHost) -> None:
    assert "machines of alice run: box" in _refusal(installed, "banger system uninstall")
    assert _status(installed)["units"][1]["active"] == "active"
    installed.root("banger system uninstall --force")
    assert installed.run("pidof", "qemu-system-x86_64").returncode == 1
    (box,) = json.loads(installed.alice("banger vm list --json"))
    assert (box["name"], box["runtime"]["state"]) == ("box", "stopped")
    # Hers again, with a daemon of her own, which has nobody to make a bridge.
    assert "--network user" in _refusal(installed, "banger vm start -q box", user="alice")
    installed.alice("banger vm set -q box --network user")
    installed.alice("banger vm start -q box; banger vm exec box -- true")
    installed.alice("banger vm delete -q --force box; banger daemon stop")
