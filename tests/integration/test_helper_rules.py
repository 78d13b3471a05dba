"""Whatever passes the checks makes rules for nft that name banger's own tables and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.base.errors import BangerError
from banger.hostops import firewall
from banger.hostops.ops import (
    AllowResolved,
    Bridge,
    BridgeUp,
    Guest,
    Operation,
    SetGuests,
)
from helper_world import JUNK, inside, network_namespace

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for the helper")


def mangled(valid: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """What is valid, and what is nearly so."""
    near = st.builds(lambda text, junk: f"{text}{junk}", valid, JUNK)
    return st.one_of(valid, valid, valid, near, JUNK)


_BRIDGES = st.builds(
    Bridge,
    name=mangled(st.from_regex(r"banger[0-9]{1,2}", fullmatch=True)),
    address=mangled(st.sampled_from(["172.30.0.1/24", "10.0.0.1/16", "100.64.0.1/29"])),
)
_ADDRESSES = mangled(st.ip_addresses(v=4).map(str))
_HEX = st.from_regex(r"[0-9a-f]{6}", fullmatch=True)


@st.composite
def _operations(draw: st.DrawFn) -> Operation:
    bridge = draw(_BRIDGES)
    kind = draw(st.sampled_from([BridgeUp, SetGuests, AllowResolved]))
    member = mangled(st.sampled_from(["172.30.0.9", "10.0.0.9", "100.64.0.3"]))
    if kind is BridgeUp:
        return BridgeUp(bridge=bridge, resolver_port=draw(st.integers(-1, 70000)))
    if kind is AllowResolved:
        addresses = draw(st.lists(_ADDRESSES, max_size=5))
        return AllowResolved(bridge=bridge, guest=draw(member), addresses=tuple(addresses))
    guest = Guest(
        tap=draw(mangled(_HEX.map(lambda digits: f"{bridge.name}-{digits}"))),
        mac=draw(mangled(_HEX.map(lambda d: f"02:62:67:{d[:2]}:{d[2:4]}:{d[4:]}"))),
        address=draw(member),
        allow=tuple(draw(st.lists(_ADDRESSES.map(lambda each: f"{each}/32"), max_size=4))),
        everywhere=draw(st.booleans()),
        sociable=draw(st.booleans()),
    )
    return SetGuests(bridge=bridge, guests=(guest,), forget=(draw(member),))


def text_of(operation: Operation) -> tuple[str, str]:
    """The bridge's name, and what nft is told."""
    match operation:
        case BridgeUp(bridge=bridge, resolver_port=port):
            return bridge.name, firewall.no_tables(bridge.name) + firewall.tables(
                bridge, port, 1000
            )
        case SetGuests(bridge=bridge, guests=guests, forget=forget):
            pairs = [(each, "192.0.2.1") for each in forget]
            return bridge.name, firewall.guests(bridge, guests, pairs)
        case AllowResolved(bridge=bridge, guest=guest, addresses=addresses):
            return bridge.name, firewall.resolved(bridge, guest, addresses)
    raise AssertionError(operation)


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    with network_namespace() as made:
        yield made


_TABLE = re.compile(r"\b(?:table|element|set|chain) (?:bridge|inet|ip|ip6|arp|netdev) (\S+)")


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operation=_operations())
def test_what_passes_the_check_names_tables_of_ours_alone(
    namespace: str, operation: Operation
) -> None:
    try:
        operation.check()
    except BangerError:
        return
    name, text = text_of(operation)
    assert set(_TABLE.findall(text)) <= {name}
    assert re.fullmatch(r"banger[0-9]{1,2}", name)
    tables = firewall.tables(Bridge(name=name, address="172.30.0.1/24"), 5353, 1000)
    whole = text if isinstance(operation, BridgeUp) else tables + text
    inside(namespace, "nft", "-c", "-f", "-", stdin=whole)
    # Not only checked: nothing else is there once it is done.
    inside(namespace, "nft", "-f", "-", stdin=whole)
    listed = inside(namespace, "nft", "list", "tables").splitlines()
    assert sorted(listed) == [f"table bridge {name}", f"table inet {name}"]
    inside(namespace, "nft", "flush", "ruleset")


def test_rules_of_one_bridge_are_not_those_of_another_with_a_longer_name(namespace: str) -> None:
    text = firewall.tables(Bridge(name="banger1", address="172.30.0.1/24"), 5353, 1000)
    patterns = set(re.findall(r'ifname "([^"]*)"', text))
    assert patterns == {"banger1", "banger1-*"}
    for other in ("banger11", "banger11-0a0b0c", "banger1x", "banger"):
        assert not any(
            other.startswith(each[:-1]) if each.endswith("*") else other == each
            for each in patterns
        )
