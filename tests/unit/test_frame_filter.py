"""What of a guest's frames goes on to passt. (Against passt: tests/integration.)"""

from __future__ import annotations

import ipaddress
import itertools
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
    CONNECTIONS_MAX,
    FAR_S,
    FRAME_BYTES_MAX,
    LENGTH_MAX,
    REPEAT_S,
    SHARED_S,
    WINDOW_BYTES_MIN,
    WINDOWS_BYTES,
    Backlog,
    BadStream,
    Gateway,
    Outlet,
    Pace,
    from_passt,
    passes,
    sift,
    whole_frames,
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


def refused(packet: bytes) -> bytes:
    """What the guest is told of a packet of its own, after the Ethernet header."""
    answer = Gateway("172.16.0.1", "02:62:67:00:00:01").refusal(
        framed(b"to-all" + b"us-two" + b"\x08\0" + packet)
    )
    if not answer:
        return b""
    assert framed(answer[4:]) == answer
    assert answer[4:18] == b"us-two" + bytes.fromhex("026267000001") + b"\x08\0"
    return answer[18:]


def sum_of(data: bytes) -> int:
    """The Internet checksum of what has its own in it: 0, if that is right."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


@pytest.mark.parametrize("words", [5, 15], ids=["no options", "options"])
@pytest.mark.parametrize("protocol", [6, 17])
def test_what_does_not_go_on_is_told_to_whoever_sent_it(protocol: int, words: int) -> None:
    header = (
        bytes((0x40 | words, *bytes(8), protocol, 0, 0)) + GUEST + socket.inet_aton("192.0.2.1")
    )
    header = header.ljust(4 * words, b"\1")
    packet = header + b"ports + seqno and more"
    told = refused(packet)
    assert told[:2] == b"\x45\0"
    assert struct.unpack("!H", told[2:4]) == (len(told),)
    assert told[9] == 1  # ICMP
    assert told[12:20] == socket.inet_aton("172.16.0.1") + GUEST
    assert told[20:22] == bytes((3, 13))
    assert told[28:] == header + b"ports + "
    assert sum_of(told[:20]) == sum_of(told[20:]) == 0


def test_an_error_is_not_answered_by_an_error() -> None:
    def icmp(kind: int) -> bytes:
        header = bytes((0x45, *bytes(8), 1, 0, 0)) + GUEST + socket.inet_aton("192.0.2.1")
        return header + bytes((kind, *bytes(7)))

    assert refused(icmp(8))
    assert refused(icmp(3)) == b""
    assert refused(icmp(0)) == b""


@pytest.mark.parametrize(
    "packet",
    [
        bytes((0x45, *bytes(5), 0, 1, 0, 17)) + bytes(30),
        bytes((0x45, *bytes(8), 17)) + bytes(17),
        bytes((0x41, *bytes(8), 17)) + bytes(30),
        bytes((0x45, *bytes(8), 47)) + bytes(30),
    ],
    ids=["a later fragment", "cut off", "no header", "another protocol"],
)
def test_what_has_no_answer_gets_none(packet: bytes) -> None:
    assert refused(packet) == b""


@given(st.lists(st.binary(max_size=40)), st.binary(max_size=3))
def test_only_whole_frames_are_put_between_others(frames: list[bytes], rest: bytes) -> None:
    whole = b"".join(map(framed, frames))
    assert whole_frames(whole + rest) == len(whole)
    assert whole_frames(whole + framed(b"cut off")[:-1]) == len(whole)


def test_a_stream_of_passts_that_has_no_frames_is_noticed() -> None:
    with pytest.raises(BadStream):
        whole_frames(struct.pack("!I", LENGTH_MAX + 1))


def test_a_refusal_finds_room_or_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_filter, "BACKLOG_BYTES", 10)
    backlog = Backlog()
    for each in (b"ten bytes.", b"no room"):
        backlog.offer(each)
    assert backlog.take() == b"ten bytes."


_FRAMES = st.lists(
    st.sampled_from(
        [ARP, b"", b"short", ipv4_frame("127.0.0.1"), ipv4_frame("192.0.2.1"), bytes(1500)]
    )
)


@given(_FRAMES, st.lists(st.floats(0, 1), max_size=30))
def test_a_stream_is_sifted_the_same_however_it_is_cut(
    frames: list[bytes], cuts: list[float]
) -> None:
    stream = b"".join(framed(frame) for frame in frames)
    ends = [*sorted(round(cut * len(stream)) for cut in cuts), len(stream)]
    pending: bytes = b""
    out: list[bytes] = []
    for start, end in itertools.pairwise([0, *ends]):
        pending += stream[start:end]
        kept, done = sift(pending, GUEST)
        pending = pending[done:]
        out += kept
    assert not pending
    assert out == [framed(frame) for frame in frames if passes(frame, GUEST)]


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_stream_in_the_smallest_pieces_is_sifted_as_well(step: int) -> None:
    frames = [ARP, b"", b"short", ipv4_frame("127.0.0.1"), ipv4_frame("192.0.2.1")]
    stream = b"".join(framed(frame) for frame in frames)
    pending: bytes = b""
    out: list[bytes] = []
    for start in range(0, len(stream), step):
        kept, done = sift(pending + stream[start : start + step], GUEST)
        pending = (pending + stream[start : start + step])[done:]
        out += kept
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


SYN, ACK, FIN_ACK, RST = 0x02, 0x10, 0x11, 0x04
SCALE = 7
NO_OPTIONS = b""
#: A maximum segment size, nothing, and the window scale.
SYN_OPTIONS = b"\x02\x04\x05\xb4\x01\x03\x03" + bytes([SCALE])


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071); 0 over what contains its own."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(
    flags: int, *, port: int = 40000, acknowledged: int = 1, window: int = 500,
    options: bytes = NO_OPTIONS, data: bytes = b"",
) -> bytes:  # fmt: skip
    """A frame of a segment from the guest to a peer, after its length."""
    peer = socket.inet_aton("192.0.2.1")
    words = 5 + len(options) // 4
    head = struct.pack("!HHIIBBHHH", port, 80, 7, acknowledged, words << 4, flags, window, 0, 0)
    tcp = head + options + data
    total = checksum(GUEST + peer + struct.pack("!HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
    packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0x4000, 64, 6, 0) + GUEST + peer
    return framed(bytes(12) + b"\x08\x00" + packet + tcp)


def window_of(frame: bytes) -> int:
    """The window of such a frame, whose checksum is right."""
    packet = frame[18:]
    pseudo = packet[12:20] + struct.pack("!HH", 6, len(packet) - 20)
    assert checksum(pseudo + packet[20:]) == 0
    return int.from_bytes(packet[34:36], "big")


def opened(*ports: int, after_s: float = 0.0) -> Pace:
    """Connections whose peers have answered, at the time of `after_s`; they began at 0."""
    pace = Pace()
    for port in ports:
        frame = segment(SYN, port=port, options=SYN_OPTIONS)
        assert pace.paced(frame, 0.0) == frame
    for port in ports:
        assert pace.paced(segment(ACK, port=port), after_s)
    return pace


def test_passt_is_told_of_a_smaller_window_than_a_socket_holds() -> None:
    pace = opened(40000)
    told = window_of(pace.paced(segment(ACK, acknowledged=2, window=65535), 0.1))
    assert told << SCALE == WINDOWS_BYTES
    assert window_of(pace.paced(segment(ACK, acknowledged=3, window=400), 0.1)) == 400


@given(st.integers(0, 65535), st.integers(0, 2**32 - 1), st.binary(max_size=20))
@example(0xFFFF, 0, b"")
def test_what_carries_something_goes_on_with_a_right_checksum(
    window: int, acknowledged: int, data: bytes
) -> None:
    pace = opened(40000)
    for flags in (FIN_ACK, RST, ACK | 0x08):
        for _ in range(3):
            frame = segment(flags, acknowledged=acknowledged, window=window, data=data)
            paced = pace.paced(frame, 0.0)
            assert window_of(paced) == min(window, WINDOWS_BYTES >> SCALE)
            assert (paced[:52], paced[56:]) == (frame[:52], frame[56:])


@given(st.binary(min_size=14, max_size=100), st.booleans())
def test_no_frame_upsets_it(rest: bytes, known: bool) -> None:
    frame = bytes(12) + b"\x08\x00\x45" + rest[:8] + b"\x06" + rest[8:10] + GUEST + rest[10:]
    if passes(frame, GUEST):
        pace = opened(40000) if known else Pace()
        assert len(pace.paced(framed(frame), 0.0)) in {0, 4 + len(frame)}


def test_connections_share_what_a_socket_holds() -> None:
    ports = range(40000, 40010)
    pace = opened(*ports)

    def told(port: int, now: float) -> int:
        frame = segment(ACK, port=port, acknowledged=int(now * 1000), window=65535)
        return window_of(pace.paced(frame, now)) << SCALE

    assert sum(told(port, 0.5) for port in ports) <= WINDOWS_BYTES
    assert told(40000, SHARED_S + 0.5) <= WINDOWS_BYTES / 10, "the others were there just before"
    assert told(40000, 2 * SHARED_S + 0.6) == WINDOWS_BYTES, "the others are quiet"


def test_many_connections_get_a_little_each() -> None:
    pace = opened(*range(1000, 2000))
    told = window_of(pace.paced(segment(ACK, port=1000, acknowledged=2, window=65535), 0.5))
    assert told << SCALE == WINDOW_BYTES_MIN


def test_a_far_peers_window_is_what_it_needs() -> None:
    """Or a download from far away would be slow: passt shows the peer the guest's window."""
    pace = opened(40000, after_s=0.1)
    frame = segment(ACK, acknowledged=2, window=65535)
    assert window_of(pace.paced(frame, 0.1)) << SCALE == pytest.approx(5_000_000, abs=1 << SCALE)


def test_a_loss_makes_a_far_peers_window_that_of_others() -> None:
    pace = opened(40000, after_s=2 * FAR_S)
    assert pace.paced(segment(ACK), 2 * FAR_S), "repeats what opened() said last"
    frame = segment(ACK, acknowledged=2, window=65535)
    assert window_of(pace.paced(frame, 0.2)) << SCALE == WINDOWS_BYTES


def test_a_repetition_goes_on_seldom_and_unchanged() -> None:
    """passt takes only the same window for a repetition, and answers each with all it has."""
    pace = opened(40000)
    frame = segment(ACK, acknowledged=2, window=65535)
    paced = pace.paced(frame, 1.0)
    times = [1.0 + REPEAT_S * 0.3 * step for step in range(9)]
    repetitions = [pace.paced(frame, time) for time in times]
    assert repetitions == [paced, b"", b"", b"", paced, b"", b"", b"", paced]


def test_a_window_that_seems_the_same_is_no_repetition() -> None:
    """passt would answer a guest that reads on by sending again."""
    pace = opened(40000)
    assert pace.paced(segment(ACK, acknowledged=2, window=60000), 1.0)
    assert not pace.paced(segment(ACK, acknowledged=2, window=61000), 2.0)
    assert pace.paced(segment(ACK, acknowledged=2, window=0), 2.0)
    assert pace.paced(segment(ACK, acknowledged=2, window=61000), 2.0)


@pytest.mark.parametrize(
    "frame",
    [
        framed(ARP),
        framed(ipv4_frame("192.0.2.1")),
        segment(ACK, port=40001, window=65535),
        segment(ACK, window=65535)[:24] + b"\x20" + segment(ACK, window=65535)[25:],
        segment(ACK, window=65535)[:57],
    ],
    ids=["ARP", "no TCP", "unknown", "fragment", "cut"],
)
def test_what_is_no_segment_of_a_known_connection_goes_on_as_it_is(frame: bytes) -> None:
    pace = opened(40000)
    assert [pace.paced(frame, 1.0) for _ in range(3)] == [frame] * 3


def test_a_connection_not_used_for_long_is_forgotten_before_others() -> None:
    pace = opened(1, 2)
    pace.paced(segment(ACK, port=1, acknowledged=2), 0.0)
    for port in range(1000, 1000 + CONNECTIONS_MAX - 1):
        pace.paced(segment(SYN, port=port, options=SYN_OPTIONS), 0.0)
    told = [
        window_of(pace.paced(segment(ACK, port=port, acknowledged=3, window=65535), 0.0))
        for port in (1, 2)
    ]
    assert told[0] << SCALE <= WINDOWS_BYTES
    assert told[1] == 65535


@pytest.mark.parametrize(
    ("options", "widest"),
    [
        (b"", 65535),
        (b"\x03\x03\x03\x00", WINDOWS_BYTES >> 3),
        (b"\x01\x03\x03\xff", WINDOWS_BYTES >> 14),
        (b"\x00\x03\x03\x07", 65535),
        (b"\x02\x00\x03\x03", 65535),
        (b"\x01\x01\x03\x03", 65535),
    ],
    ids=["none", "3", "too many", "after the end", "no length", "cut"],
)
def test_windows_are_read_as_the_syn_has_it(options: bytes, widest: int) -> None:
    pace = Pace()
    pace.paced(segment(SYN, options=options), 0.0)
    assert window_of(pace.paced(segment(ACK, window=65535), 0.0)) == widest


def test_passt_is_read_while_the_hypervisor_takes_nothing() -> None:
    """passt drops what does not go at once. Its socket alone holds some 200 KiB."""
    frames = framed(b"x" * 1500) * 2000
    backlog = Backlog()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = threading.Thread(target=from_passt, args=(ours, backlog))
        reader.start()
        theirs.settimeout(10)
        theirs.sendall(frames)
        theirs.shutdown(socket.SHUT_WR)
        reader.join()
    assert backlog.take() == frames


def test_a_full_backlog_waits_for_the_hypervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_filter, "BACKLOG_BYTES", 10)
    backlog = Backlog()
    backlog.put(b"ten bytes.")
    second = threading.Thread(target=backlog.put, args=(b"more",))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    assert backlog.take() == b"ten bytes."
    assert backlog.take() == b"more"
    second.join()
