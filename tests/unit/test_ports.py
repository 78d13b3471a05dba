"""Ports as people write them: what they mean, and what is said of what means nothing."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import BadRequest
from banger.base.model import PublishedPort
from banger.base.ports import (
    PORT_MAX,
    PUBLISHED_MAX,
    GuestSocket,
    check_host,
    check_port,
    check_ports,
    format_address,
    is_loopback,
    overlap,
    parse_host_port,
    parse_port,
)

PORTS = st.integers(1, PORT_MAX)


def port(host: str, host_port: int, guest_port: int = 80) -> PublishedPort:
    return PublishedPort(host=host, host_port=host_port, guest_port=guest_port)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("8080", port("127.0.0.1", 8080, 8080)),
        ("8080:80", port("127.0.0.1", 8080, 80)),
        ("127.0.0.2:8080", port("127.0.0.2", 8080, 8080)),
        ("127.0.0.2:8080:80", port("127.0.0.2", 8080, 80)),
        ("0.0.0.0:8080", port("0.0.0.0", 8080, 8080)),
        ("localhost:8080", port("127.0.0.1", 8080, 8080)),
        ("localhost:8080:80", port("127.0.0.1", 8080, 80)),
        ("[::1]:8080:80", port("::1", 8080, 80)),
        ("[::1]:8080", port("::1", 8080, 8080)),
        ("[0:0::0]:8080:80", port("::", 8080, 80)),
        ("[2001:DB8::1]:1:65535", port("2001:db8::1", 1, 65535)),
        ("0:80", port("127.0.0.1", 0, 80)),
        ("127.0.0.2:0:80", port("127.0.0.2", 0, 80)),
        ("00080:00080", port("127.0.0.1", 80, 80)),
    ],
)
def test_what_a_port_means(text: str, means: PublishedPort) -> None:
    assert parse_port(text) == means


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "write it as"),
        ("web", "write it as"),
        (":8080", "write it as"),
        ("8080:", "write it as"),
        (":8080:80", "write it as"),
        ("127.0.0.1:", "write it as"),
        ("[]:8080", "an IPv6 address stands in brackets"),
        ("[::1]", "an IPv6 address stands in brackets"),
        ("[::1]8080", "an IPv6 address stands in brackets"),
        ("::1:8080:80", "an IPv6 address stands in brackets"),
        ("[::1]:1:2:3", "write it as"),
        ("65536", "write it as"),
        ("80:65536", "write it as"),
        ("123456789", "write it as"),
        ("9" * 5000, "write it as"),
        ("\u0663:80", "write it as"),
        (" 80", "write it as"),
        ("80\n", "write it as"),
        ("0", "say which port of the guest any free one leads to: 0:80"),
        ("127.0.0.1:0", "say which port of the guest"),
        ("53:53/udp", "only TCP"),
        ("8080/tcp", "only TCP"),
        ("8000-8010", "one by one"),
        ("8000-8010:9000-9010", "one by one"),
    ],
)
def test_what_is_no_port_is_refused_with_a_way_to_write_it(text: str, hint: str) -> None:
    with pytest.raises(BadRequest, match="is not a port to publish") as refused:
        parse_port(text)
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    "host",
    [
        "example.com", "*", "127.0.0", "127.0.0.1.5", "127.0.0.01", "fe80::1%eth0",
        "::ffff:127.0.0.1", "[::1]", "8080", "224.0.0.1", "ff02::1", "255.255.255.255", "",
        "\x1b[2J",
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_host_is_refused(host: str) -> None:
    with pytest.raises(BadRequest, match="is not"):
        check_host(host)


@pytest.mark.parametrize(
    ("host_port", "guest_port"), [(-1, 80), (65536, 80), (80, 0), (80, -1), (80, 65536)]
)
def test_numbers_that_are_no_ports_are_refused(host_port: int, guest_port: int) -> None:
    with pytest.raises(BadRequest, match="is not a TCP port"):
        check_port(port("127.0.0.1", host_port, guest_port))


@given(st.text(max_size=30) | st.text("0123456789.:[]af", max_size=24))
def test_any_text_is_a_port_or_refused(text: str) -> None:
    with suppress(BadRequest):
        found = parse_port(text)
        assert check_port(found) == found
        assert parse_port(f"{format_address(found.host, found.host_port)}:{found.guest_port}") == (
            found
        )


@given(st.ip_addresses(), st.integers(0, PORT_MAX), PORTS)
def test_what_is_written_in_full_means_what_it_says(
    address: IPv4Address | IPv6Address, host_port: int, guest_port: int
) -> None:
    try:
        host = check_host(str(address))
    except BadRequest:
        return
    assert parse_port(f"{format_address(host, host_port)}:{guest_port}") == port(
        host, host_port, guest_port
    )
    if host_port:
        assert parse_host_port(format_address(host, host_port)) == (host, host_port)


def test_the_hosts_port_alone() -> None:
    assert parse_host_port("8080") == ("", 8080)
    assert parse_host_port("localhost:8080") == ("127.0.0.1", 8080)
    assert parse_host_port("[::1]:8080") == ("::1", 8080)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("8080:80", "the host's port alone"),
        ("127.0.0.1:8080:80", "the host's port alone"),
        ("0", "the port that was chosen"),
        ("x", "write it as"),
    ],
)
def test_what_is_not_the_hosts_port_alone_is_refused(text: str, hint: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_host_port(text)
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        (("127.0.0.1", 80), ("127.0.0.1", 80), True),
        (("127.0.0.1", 80), ("127.0.0.1", 81), False),
        (("127.0.0.1", 80), ("127.0.0.2", 80), False),
        (("127.0.0.1", 80), ("0.0.0.0", 80), True),
        (("127.0.0.1", 80), ("0.0.0.0", 81), False),
        (("::1", 80), ("::", 80), True),
        (("127.0.0.1", 80), ("::", 80), False),
        (("0.0.0.0", 80), ("::", 80), False),
    ],
)
def test_ports_clash_where_their_addresses_cover_each_other(
    one: tuple[str, int], other: tuple[str, int], clash: bool
) -> None:
    assert overlap(port(*one), port(*other, 81)) is clash
    assert overlap(port(*other, 81), port(*one)) is clash


def test_one_vm_publishes_no_port_twice() -> None:
    with pytest.raises(BadRequest, match=r"127\.0\.0\.1:8080 is to be published twice: for"):
        check_ports([port("0.0.0.0", 8080, 80), port("localhost", 8080, 81)])


def test_any_free_port_may_be_asked_for_several_times() -> None:
    asked = [port("127.0.0.1", 0, 80), port("127.0.0.1", 0, 80)]
    assert check_ports(asked) == tuple(asked)


def test_one_vm_publishes_a_bounded_number_of_ports() -> None:
    many = [port("127.0.0.1", 1000 + number) for number in range(PUBLISHED_MAX)]
    assert len(check_ports(many)) == PUBLISHED_MAX
    with pytest.raises(BadRequest, match=f"can publish {PUBLISHED_MAX} ports, not"):
        check_ports([*many, port("127.0.0.1", 999)])


def test_loopback_is_this_host_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.255.0.2", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1")))


@pytest.mark.parametrize(
    ("address", "reachable"),
    [
        ("0.0.0.0", True),
        ("127.0.0.1", True),
        ("::", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:0.0.0.0", True),
        ("127.0.0.53", False),
        ("172.16.0.2", False),
        ("::ffff:172.16.0.2", False),
        ("fe80::1", False),
    ],
)
def test_what_the_guests_loopback_leads_to(address: str, reachable: bool) -> None:
    assert GuestSocket(address=address, port=80, pid=1, command="x").reachable is reachable
