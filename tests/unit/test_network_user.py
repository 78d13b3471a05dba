"""The rootless network: names, addresses and command lines."""

from __future__ import annotations

import os
import socket
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.base.model import Egress, Reach
from banger.drivers.base import Level, Plug, Plugged
from banger.drivers.network import frame_filter
from banger.drivers.network.mac import mac_address
from banger.drivers.network.user import (
    PasstNetwork,
    filter_argv,
    has_default_route,
    passt_argv,
)

KEPT_FROM = IPv4Network("10.213.0.0/16")


@given(st.text(min_size=1))
def test_a_mac_address_is_unicast_and_locally_administered(vm_id: str) -> None:
    octets = bytes.fromhex(mac_address(vm_id).replace(":", ""))
    assert len(octets) == 6
    assert octets[0] & 0b11 == 0b10
    assert mac_address(vm_id) == mac_address(vm_id)


def test_machines_have_different_mac_addresses() -> None:
    assert len({mac_address(f"vm-{number}") for number in range(1000)}) == 1000


def test_passt_is_kept_from_the_hosts_loopback_and_listens_nowhere() -> None:
    line = " ".join(passt_argv(5, Path("/v/network.log"), uplink=True))
    for option in ("--fd 5", "--no-map-gw", "--tcp-ports none", "--udp-ports none", "--ipv4-only"):
        assert option in line


def test_passt_binds_udp_to_the_loopback_only_where_there_is_no_uplink(tmp_path: Path) -> None:
    routes = tmp_path / "route"
    heading = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    local = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    routes.write_text(heading + local)
    assert not has_default_route(routes)
    assert "--interface lo" in " ".join(passt_argv(5, tmp_path, uplink=False))
    routes.write_text(heading + local + default)
    assert has_default_route(routes)
    assert "--interface" not in passt_argv(5, tmp_path, uplink=True)


def test_the_filter_is_recognised_by_the_vms_id() -> None:
    owns = PasstNetwork(KEPT_FROM).owns
    argv = tuple(filter_argv("vm-1", 5, 6, Egress.ALL, KEPT_FROM))
    assert owns(argv, "vm-1")
    assert owns(argv[:8], "vm-1")  # of a version that knew no more words
    assert not owns(argv, "vm-12")
    assert not owns(argv, "vm-")
    assert not owns(("tail", "-f", "vm-1", "5", "6"), "vm-1")
    assert not owns((), "vm-1")


async def test_without_passt_there_is_a_failed_check_and_no_attachment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("banger.base.proc.which", lambda tool: None)
    (check,) = await PasstNetwork(KEPT_FROM).checks()
    assert check.level is Level.FAIL
    assert check.hint == "install it with: apt-get install passt"
    with pytest.raises(PreconditionFailed, match="passt is not installed"):
        await PasstNetwork(KEPT_FROM).attach(Plug("vm-1", tmp_path / "network.log", Reach()))


@pytest.mark.parametrize("egress", ["all", "none"])
def test_a_machine_is_kept_from_those_on_a_bridge(egress: str) -> None:
    """passt's sockets are the host's own, which get to every machine there."""
    gate = frame_filter.Gate("172.16.0.2", egress, str(KEPT_FROM))

    def passes(destination: str, ethertype: bytes = b"\x08\x00") -> bool:
        packet = bytes(16) + socket.inet_aton(destination)
        return gate.passes(bytes(4) + bytes(12) + ethertype + packet)

    assert not passes("10.213.0.1")
    assert not passes("10.213.255.254")
    for other in ("10.212.255.255", "10.214.0.0", "192.0.2.1"):
        assert passes(other) is (egress == "all")
    assert passes("10.213.0.1", b"\x08\x06")
    gate.set("all")
    assert passes("192.0.2.1")
    gate.set("none")
    assert not passes("192.0.2.1")


async def test_a_filter_that_cannot_be_changed_is_told_of() -> None:
    network = PasstNetwork(KEPT_FROM)
    machine = Plugged("vm-1", Reach(egress=Egress.NONE), pids=(os.getpid(),))
    with pytest.raises(PreconditionFailed, match="another version of banger") as caught:
        await network.apply(machine)
    assert caught.value.hint.startswith("restart the VM")
    await network.resume([machine])  # a daemon starts all the same
    await network.apply(Plugged("vm-1", Reach(), pids=(os.getpid(),)))  # as it was started
