"""What of a guest's frames goes on to passt. (Against passt: tests/integration.)"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from banger.drivers.network import frame_filter
from banger.drivers.network.frame_filter import (
    FRAME_BYTES_MAX,
    LENGTH_MAX,
    BadStream,
    Outlet,
    passes,
    sift,
)

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
@example(ipaddress.IPv4Address("169.254.169.254"))
@example(ipaddress.IPv4Address("169.253.255.255"))
@example(ipaddress.IPv4Address("169.255.0.0"))
def test_ipv4_goes_to_unicast_addresses_outside_this_host(address: ipaddress.IPv4Address) -> None:
    kept_from = [ipaddress.ip_network(name) for name in ("0.0.0.0/8", "127.0.0.0/8")]
    kept_from.append(ipaddress.ip_network("169.254.0.0/16"))
    many = address >= ipaddress.IPv4Address("224.0.0.0")
    dropped = many or any(address in network for network in kept_from)
    assert passes(ipv4_frame(str(address)), GUEST) is not dropped


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
        ipv4_frame("192.0.2.1").ljust(FRAME_BYTES_MAX + 1),
        ARP.ljust(FRAME_BYTES_MAX + 1),
    ],
    ids=[
        *("empty", "short", "no type", "cut", "forged source", "version 6", "IPv6", "VLAN"),
        *("long", "long ARP"),
    ],
)
def test_these_are_dropped(frame: bytes) -> None:
    assert not passes(frame, GUEST)


def test_arp_and_the_longest_frame_pass() -> None:
    assert passes(ARP, GUEST)
    assert passes(ipv4_frame("192.0.2.1").ljust(FRAME_BYTES_MAX), GUEST)


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
    pending: bytes = b""
    out: list[bytes] = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        pending += stream[:cut]
        stream = stream[cut:]
        kept, done = sift(pending, GUEST)
        pending = pending[done:]
        out += kept
    assert not pending
    assert out == [framed(frame) for frame in frames if passes(frame, GUEST)]


def test_a_length_that_no_frame_has_ends_it_and_the_longest_does_not() -> None:
    assert sift(struct.pack("!I", LENGTH_MAX), GUEST) == ([], 0)
    with pytest.raises(BadStream, match="frame of 65550 bytes"):
        sift(struct.pack("!I", LENGTH_MAX + 1), GUEST)


_READ_ALL = 1 << 23


@pytest.fixture
def passt() -> Iterator[tuple[Outlet, socket.socket]]:
    """A way out, and the end of it that passt would read."""
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(os.fdopen(os.open(os.devnull, os.O_RDONLY))) as null:
        theirs.settimeout(10)
        yield Outlet(ours, null.fileno()), theirs


def reads(source: socket.socket, total: int) -> Iterator[int]:
    """The sizes of the reads that take `total` bytes, each asking for all there may be."""
    while total > 0:
        size = len(source.recv(_READ_ALL))
        assert size, "ended"
        total -= size
        yield size


# 36544 bytes is where Linux cuts a long write; these are sizes whose lengths it then cuts.
@pytest.mark.parametrize("size", [60, 1044, 1218, 1260, FRAME_BYTES_MAX + 4])
def test_reads_of_passt_end_where_frames_do(passt: tuple[Outlet, socket.socket], size: int) -> None:
    """With full buffers, many times over. Otherwise a guest's payload becomes a frame."""
    outlet, theirs = passt
    frames = [framed(bytes(size - 4))] * ((8 << 20) // size)

    def send() -> None:
        for frame in frames:
            outlet.send(frame)

    sender = threading.Thread(target=send)
    sender.start()
    for got in reads(theirs, size * len(frames)):
        assert got % size == 0
        assert got <= frame_filter.MARK_BYTES + size
    sender.join()


def test_no_read_goes_past_a_mark(
    passt: tuple[Outlet, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when more is there behind it: so no read can get as much as passt asks for."""
    monkeypatch.setattr(frame_filter, "MARK_BYTES", 300)
    monkeypatch.setattr(Outlet, "_unread", lambda self: 0)
    outlet, theirs = passt
    for _ in range(9):
        outlet.send(framed(bytes(96)))
    assert list(reads(theirs, 900)) == [300, 300, 300]


def test_nothing_is_sent_after_a_mark_before_it_was_read(
    passt: tuple[Outlet, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """passt is told of what arrives once (EPOLLET): behind a mark it would stay unseen."""
    monkeypatch.setattr(frame_filter, "MARK_BYTES", 200)
    waiting = threading.Event()
    monkeypatch.setattr("time.sleep", lambda _: waiting.set())
    outlet, theirs = passt

    def send() -> None:
        for _ in range(3):
            outlet.send(framed(bytes(96)))

    sender = threading.Thread(target=send)
    sender.start()
    assert waiting.wait(10)
    assert list(reads(theirs, 300)) == [200, 100]
    sender.join()
