"""The rootless network: names, addresses and command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.base.model import Egress, Reach
from banger.drivers.base import Level, Plug
from banger.drivers.network.mac import mac_address
from banger.drivers.network.user import (
    PasstNetwork,
    filter_argv,
    has_default_route,
    passt_argv,
)


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
    owns = PasstNetwork().owns
    argv = tuple(filter_argv("vm-1", 5, 6, Egress.ALL))
    assert owns(argv, "vm-1")
    assert not owns(argv, "vm-12")
    assert not owns(argv, "vm-")
    assert not owns(("tail", "-f", "vm-1", "5", "6"), "vm-1")
    assert not owns((), "vm-1")


async def test_without_passt_there_is_a_failed_check_and_no_attachment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("banger.base.proc.which", lambda tool: None)
    (check,) = await PasstNetwork().checks()
    assert check.level is Level.FAIL
    assert check.hint == "install it with: apt-get install passt"
    with pytest.raises(PreconditionFailed, match="passt is not installed"):
        await PasstNetwork().attach(Plug("vm-1", tmp_path / "network.log", Reach()))
