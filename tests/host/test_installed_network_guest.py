"""The network of an installed banger: the helper makes the bridge, resolved asks for the names."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from guest_host import GuestHost
from product import until

# The first test may have to make the host.
pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_RUN = "banger vm run -q -d --memory 256M --vcpu 1 --name"
_SERVE = (
    "use IO::Socket::INET; my $s = IO::Socket::INET->new(Listen => 5, LocalPort => 7000,"
    " ReuseAddr => 1) or die; while (my $c = $s->accept) { print $c `hostname`; close $c }"
)


@pytest.fixture(scope="module")
def network(host: GuestHost) -> Iterator[GuestHost]:
    """A host with banger installed for alice, who has a machine on its bridge."""
    host.load("tun", "bridge", "dummy", "nft_masq")
    # As systemd-resolved.service(8) has it; the guest's agent has written a file of its own there.
    host.root("ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf")
    host.root("SUDO_UID=$(id -u alice) banger system install")
    host.alice(f"{_RUN} box")
    host.alice(f"banger vm exec box -- sh -c 'setsid perl -e \"$0\" >/dev/null 2>&1 &' '{_SERVE}'")
    yield host
    host.root("banger system uninstall --force")


def _greeting(host: GuestHost, address: str) -> str:
    return host.run(
        "timeout", "20", "bash", "-c", f"exec 3<>/dev/tcp/{address}/7000 && cat <&3", user="alice"
    ).stdout.decode()


def _checks(host: GuestHost) -> dict[str, dict[str, str]]:
    done = host.run("banger", "doctor", "--json", user="alice")
    return {each["name"]: each for each in json.loads(done.stdout)}


def test_an_ordinary_user_has_machines_on_a_bridge_with_names(network: GuestHost) -> None:
    checks = _checks(network)
    assert "bridge (auto: banger is installed on this host)" in checks["network"]["detail"]
    assert checks["network bridge"]["level"] == "ok"
    assert "systemd-resolved asks there" in checks["names"]["detail"]
    runtime = json.loads(network.alice("banger vm show box --json"))["runtime"]
    address = runtime["address"]
    assert address == runtime["guest_ip"]
    assert address.startswith("10.213.")
    # Any program finds it by its name.
    assert network.alice("getent ahostsv4 box.vm").split()[0] == address
    assert network.run("getent", "hosts", "nobody.vm", user="alice").returncode == 2
    until(lambda: _greeting(network, "box.vm") == "box\n", "the machine answers at its name")


def test_the_helper_did_it_and_says_so(network: GuestHost) -> None:
    log = network.journal("banger-helper")
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    done = [each for each in records if each["message"] == "helper rpc completed"]
    methods = {each["method"] for each in done}
    assert {"bridge_up", "open_tap", "set_guests", "route_names"} <= methods
    assert all(each["op_id"].startswith("op-") for each in done)
    assert {each["peer_uid"] for each in done} == {int(network.alice("id -u"))}


@pytest.mark.parametrize("unit", ["banger-helper", "bangerd"])
def test_a_daemon_that_is_killed_cuts_nobody_off(network: GuestHost, unit: str) -> None:
    pid = network.root(f"systemctl show -P MainPID {unit}").strip()
    network.root(f"kill -9 {pid}")
    assert _greeting(network, "box.vm") in ("box\n", "")  # by its name, once there is a daemon
    address = json.loads(network.alice("banger vm show box --json"))["runtime"]["address"]
    assert _greeting(network, address) == "box\n"
    until(
        lambda: network.root(f"systemctl show -P MainPID {unit}").strip() not in ("0", pid),
        "systemd starts it again",
    )
    network.alice("banger vm set box --egress none")
    network.alice("banger vm set box --egress all")
    until(lambda: _greeting(network, "box.vm") == "box\n", "the machine answers at its name")


def test_machines_are_kept_apart_where_netfilter_sees_the_bridge(network: GuestHost) -> None:
    """Container engines load it: what a bridge passes on goes through the chains of IP, too."""
    network.load("br_netfilter")
    assert network.root("cat /proc/sys/net/bridge/bridge-nf-call-iptables") == "1\n"
    network.alice(f"{_RUN} other")
    address = json.loads(network.alice("banger vm show box --json"))["runtime"]["address"]
    ask = f"timeout 10 bash -c 'exec 3<>/dev/tcp/{address}/7000 && cat <&3' || true"
    assert network.alice(f'banger vm exec other -- sh -c "{ask}"') == ""
    network.alice("banger vm set box --no-isolated; banger vm set other --no-isolated")
    assert network.alice(f'banger vm exec other -- sh -c "{ask}"') == "box\n"
    assert _greeting(network, address) == "box\n"
    network.alice("banger vm set box --isolated; banger vm delete -q --force other")


def test_nothing_of_it_is_left(network: GuestHost) -> None:
    """Even where the daemon could take back nothing."""
    network.alice("banger vm delete -q --force box")
    pid = network.root("systemctl show -P MainPID bangerd").strip()
    network.root(f"systemctl stop banger-helper; kill -9 {pid}")
    until(
        lambda: network.root("systemctl show -P MainPID bangerd").strip() not in ("0", pid),
        "systemd starts it again",
    )
    assert "banger0" in network.root("ip -o link")
    network.root("banger system uninstall")
    assert "banger" not in network.root("ip -o link; nft list ruleset")
    network.root("SUDO_UID=$(id -u alice) banger system install")  # what the fixture takes away
