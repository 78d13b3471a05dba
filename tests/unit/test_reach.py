"""What a machine may reach, as people write it."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import BadRequest
from banger.base.model import Egress, Reach
from banger.base.reach import check_reach, name_matches, names, networks
from banger.hostops.ops import disjoint


def allowing(*allow: str) -> Reach:
    return check_reach(Reach(egress=Egress.ALLOWLIST, allow=allow))


def test_networks_and_names_are_told_apart_and_written_in_one_way() -> None:
    reach = allowing(" 10.0.0.0/8", "192.0.2.7", "Example.ORG.", "*.example.org", "example.org")
    assert reach.allow == ("10.0.0.0/8", "192.0.2.7/32", "example.org", "*.example.org")
    assert networks(reach) == ("10.0.0.0/8", "192.0.2.7/32")
    assert names(reach) == ("example.org", "*.example.org")
    assert check_reach(reach) == reach


def test_networks_within_others_are_left_out() -> None:
    assert networks(allowing("10.1.0.0/16", "10.0.0.0/8", "192.0.2.0/25", "192.0.2.128/25")) == (
        "10.0.0.0/8",
        "192.0.2.0/24",
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("10.0.0.1/8", "host bits"),
        ("10.0.0.0/33", "is not a network"),
        ("2001:db8::/32", "is of IPv6"),
        ("[2001:db8::1]", "is of IPv6"),
        ("https://example.org/", "is a URL"),
        ("*.*.example.org", "neither a network nor a name"),
        ("exa mple.org", "neither a network nor a name"),
        ("-x.org", "neither a network nor a name"),
        ("", "neither a network nor a name"),
        ("münchen.example", "neither a network nor a name"),
    ],
)
def test_what_is_neither_is_refused(entry: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        allowing(entry)


def test_an_allowlist_says_what_is_allowed_and_nothing_else_does() -> None:
    with pytest.raises(BadRequest, match="nothing on it") as caught:
        allowing()
    assert "--allow" in caught.value.hint
    with pytest.raises(BadRequest, match="where egress is none"):
        check_reach(Reach(egress=Egress.NONE, allow=("10.0.0.0/8",)))
    with pytest.raises(BadRequest, match="too many"):
        allowing(*(f"10.{number // 256}.{number % 256}.1" for number in range(257)))


@given(st.lists(st.text(max_size=30) | st.ip_addresses(v=4).map(str), max_size=5))
def test_whatever_is_written_is_refused_or_in_normal_form(entries: list[str]) -> None:
    try:
        reach = allowing(*entries)
    except BadRequest:
        return
    assert check_reach(reach) == reach
    assert disjoint([IPv4Network(each) for each in networks(reach)])
    assert len(names(reach)) + len(networks(reach)) <= len(reach.allow)


def test_a_pattern_is_a_name_or_all_below_one() -> None:
    patterns = ("example.org", "*.example.com")
    for name in ("example.org", "EXAMPLE.org.", "a.example.com", "a.b.example.com."):
        assert name_matches(name, patterns)
    for name in ("a.example.org", "example.com", "badexample.com", "example.org.evil", ""):
        assert not name_matches(name, patterns)
