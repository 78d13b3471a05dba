"""The host's frame parser against what a hostile guest can send."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.guest.frames import (
    FRAME_LIMIT_BYTES,
    HEADER,
    Frame,
    FrameParser,
    FrameType,
    ProtocolViolation,
    encode,
    field,
    parse_fields,
)

_STREAMS = st.integers(1, 2**32 - 1)
_FRAMES = st.one_of(
    st.builds(
        Frame,
        st.sampled_from([FrameType.DATA, FrameType.STDERR]),
        _STREAMS,
        st.binary(min_size=1, max_size=400),
    ),
    st.builds(Frame, st.just(FrameType.EOF), _STREAMS, st.just(b"")),
    st.builds(Frame, st.just(FrameType.WINDOW), _STREAMS, st.binary(min_size=4, max_size=4)),
    st.builds(Frame, st.just(FrameType.EXIT), _STREAMS, st.binary(min_size=5, max_size=100)),
)


def wire(frames: Iterable[Frame]) -> bytes:
    return b"".join(encode(FrameType(f.type), f.stream, f.payload) for f in frames)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(_FRAMES, max_size=8), st.lists(st.integers(0, 4000), max_size=12))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: list[Frame], cuts: list[int]
) -> None:
    parser = FrameParser()
    out = [frame for piece in pieces(wire(frames), cuts) for frame in parser.feed(piece)]
    assert out == frames
    assert parser.buffered_bytes == 0


def outcome(chunks: list[bytes]) -> tuple[list[Frame], bool]:
    parser, frames = FrameParser(), list[Frame]()
    for chunk in chunks:
        try:
            frames += parser.feed(chunk)
        except ProtocolViolation:
            return frames, True
        assert parser.buffered_bytes <= HEADER.size + FRAME_LIMIT_BYTES
    return frames, False


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=8))
def test_any_bytes_give_frames_or_a_violation_and_nothing_else(
    data: bytes, cuts: list[int]
) -> None:
    assert outcome([data])[1] == outcome(pieces(data, cuts))[1]


@given(
    st.lists(_FRAMES, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_mutated_frames_give_frames_or_a_violation(
    frames: list[Frame], changes: list[tuple[int, int]]
) -> None:
    data = bytearray(wire(frames))
    for at, value in changes:
        data[at % len(data)] = value
    outcome([bytes(data)])


@pytest.mark.parametrize(
    "header",
    [
        (0, 1, 0),
        (FrameType.HELLO, 0, 24),
        (FrameType.OPEN, 1, 1),
        (FrameType.RESET, 1, 0),
        (FrameType.DATA, 0, 1),
        (FrameType.DATA, 1, 0),
        (FrameType.DATA, 1, FRAME_LIMIT_BYTES + 1),
        (FrameType.DATA, 1, 2**32 - 1),
        (FrameType.EOF, 1, 1),
        (FrameType.WINDOW, 1, 5),
        (FrameType.EXIT, 1, 4),
        (FrameType.EXIT, 1, 5000),
        (255, 1, 0),
    ],
)
def test_a_header_the_agent_may_not_send_is_refused_before_its_payload(
    header: tuple[int, int, int],
) -> None:
    with pytest.raises(ProtocolViolation):
        FrameParser().feed(HEADER.pack(*header))


def test_a_wrong_type_is_refused_at_its_first_byte() -> None:
    with pytest.raises(ProtocolViolation):
        FrameParser().feed(b"\0")


@given(st.dictionaries(st.integers(0, 255), st.binary(max_size=50)))
def test_fields_come_back(fields: dict[int, bytes]) -> None:
    assert parse_fields(b"".join(field(tag, value) for tag, value in fields.items())) == fields


@given(st.binary(max_size=60))
def test_any_bytes_are_fields_or_a_violation(data: bytes) -> None:
    try:
        parse_fields(data)
    except ProtocolViolation:
        return
    assert sum(5 + len(value) for value in parse_fields(data).values()) == len(data)


def test_a_field_twice_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        parse_fields(struct.pack(">BIBI", 1, 0, 1, 0))
