"""What of a guest's frames goes on to passt. (Against passt: tests/integration.)"""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from banger.drivers.network.frame_filter import FRAME_BYTES_MAX, BadStream, passes, sift

GUEST = socket.inet_aton("172.16.0.2")
ARP = bytes(12) + b"\x08\x06" + bytes(28)


def ipv4_frame(target: str, source: bytes = GUEST, first: int = 0x45) -> bytes:
    packet = bytes([first]) + bytes(11) + source + socket.inet_aton(target) + b"payload"
    return bytes(12) + b"\x08\x00" + packet


def framed(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


@given(st.ip_addresses(v=4))
@example(ipaddress.IPv4Address("127.0.0.1"))
@example(ipaddress.IPv4Address("0.0.0.0"))
def test_ipv4_goes_to_unicast_addresses_outside_this_host(address: ipaddress.IPv4Address) -> None:
    here = address in ipaddress.ip_network("127.0.0.0/8") or address in ipaddress.ip_network(
        "0.0.0.0/8"
    )
    many = address >= ipaddress.IPv4Address("224.0.0.0")
    assert passes(ipv4_frame(str(address)), GUEST) is not (here or many)


@given(st.binary(max_size=80))
def test_nothing_but_arp_and_the_guests_own_ipv4_passes(frame: bytes) -> None:
    if passes(frame, GUEST):
        arp = frame[12:14] == b"\x08\x06"
        ipv4 = frame[12:14] == b"\x08\x00" and frame[14] >> 4 == 4 and frame[26:30] == GUEST
        assert arp or ipv4


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes(13),
        bytes(14),
        ipv4_frame("192.0.2.1")[:33],
        ipv4_frame("192.0.2.1", source=socket.inet_aton("127.0.0.1")),
        ipv4_frame("192.0.2.1", first=0x65),
        bytes(12) + b"\x86\xdd" + bytes(40),
        bytes(12) + b"\x81\x00\x00\x01" + ipv4_frame("192.0.2.1")[12:],
    ],
    ids=["empty", "short", "no type", "cut", "forged source", "version 6", "IPv6", "VLAN"],
)
def test_these_are_dropped(frame: bytes) -> None:
    assert not passes(frame, GUEST)


def test_arp_passes() -> None:
    assert passes(ARP, GUEST)


_FRAMES = st.lists(
    st.sampled_from(
        [ARP, b"", b"short", ipv4_frame("127.0.0.1"), ipv4_frame("192.0.2.1"), bytes(1500)]
    )
)


@given(_FRAMES, st.data())
def test_a_stream_is_sifted_the_same_however_it_is_cut(
    frames: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(framed(frame) for frame in frames)
    pending, out = bytearray(), b""
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        pending += stream[:cut]
        stream = stream[cut:]
        kept, done = sift(pending, GUEST)
        del pending[:done]
        out += kept
    assert not pending
    assert out == b"".join(framed(frame) for frame in frames if passes(frame, GUEST))


def test_a_length_that_no_frame_has_ends_it_and_the_longest_does_not() -> None:
    assert sift(struct.pack("!I", FRAME_BYTES_MAX), GUEST) == (b"", 0)
    with pytest.raises(BadStream, match="frame of 65550 bytes"):
        sift(struct.pack("!I", FRAME_BYTES_MAX + 1), GUEST)
