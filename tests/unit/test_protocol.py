"""Lines and frames of the daemon's socket as data."""

from __future__ import annotations

import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import BadRequest, Unavailable
from banger.base.model import ErrorInfo
from banger.rpc.client import Session
from banger.rpc.protocol import (
    FRAME_HEADER,
    FRAME_MAX_BYTES,
    Exit,
    FrameType,
    Reply,
    decode_exit,
    decode_reply,
    decode_request,
    encode_json,
    frame,
    parse_frame_header,
)

Frames = list[tuple[FrameType, bytes]]

_frames = st.lists(st.tuples(st.sampled_from(FrameType), st.binary(max_size=300)), max_size=12)


@given(_frames, st.data())
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: Frames, data: st.DataObject
) -> None:
    raw = b"".join(frame(kind, payload) for kind, payload in frames)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        session = Session(ours, bytearray())
        received: Frames = []
        at = 0
        while at < len(raw):
            size = data.draw(st.integers(1, len(raw) - at))
            theirs.sendall(raw[at : at + size])
            at += size
            received += [(kind, bytes(payload)) for kind, payload in session.receive()]
        theirs.close()
        with pytest.raises(Unavailable, match="lost"):
            next(iter(session.receive()))
    assert received == frames


@given(_frames)
def test_frames_that_came_with_the_result_line_are_given_first(frames: Frames) -> None:
    raw = b"".join(frame(kind, payload) for kind, payload in frames)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        session = Session(ours, bytearray(raw))
        received = []
        for kind, payload in frames:  # one at a time: a consumer may stop after any frame
            got, content = next(iter(session.pending()))
            received.append((got, bytes(content)))
            assert received[-1] == (kind, payload)
        assert list(session.pending()) == []


@given(st.binary(min_size=5, max_size=5))
def test_any_header_is_a_frame_of_ours_or_a_bad_request(header: bytes) -> None:
    try:
        kind, length = parse_frame_header(header)
    except BadRequest:
        number, length = FRAME_HEADER.unpack(header)
        assert length > FRAME_MAX_BYTES or number not in list(FrameType)
        return
    assert FRAME_HEADER.pack(kind, length) == header
    assert length <= FRAME_MAX_BYTES


def test_the_largest_frame_passes_and_one_byte_more_does_not() -> None:
    assert parse_frame_header(FRAME_HEADER.pack(1, FRAME_MAX_BYTES)) == (1, FRAME_MAX_BYTES)
    with pytest.raises(BadRequest, match="bad frame"):
        parse_frame_header(FRAME_HEADER.pack(1, FRAME_MAX_BYTES + 1))


def test_a_session_drops_what_a_closed_daemon_will_not_read_and_gets_its_last_word() -> None:
    """`yes | banger vm exec NAME -- true`: the exit is there, however much is still to be sent."""
    ours, theirs = socket.socketpair()
    with ours:
        session = Session(ours, bytearray())
        pending = bytearray(8 << 20)
        while len(pending) > 0:
            before = len(pending)
            session.send_some(pending)
            if len(pending) == before:
                break
        assert pending
        theirs.sendall(frame(FrameType.EXIT, encode_json(Exit(exit_code=7))))
        theirs.close()  # with unread bytes: the kernel makes that a reset
        session.send_some(pending)
        assert not pending
        ((kind, payload),) = session.receive()
        assert kind is FrameType.EXIT
        assert decode_exit(payload).status == 7


@pytest.mark.parametrize(
    ("exit_", "status"),
    [
        (Exit(exit_code=0), 0),
        (Exit(exit_code=7), 7),
        (Exit(signal=9), 137),
        (Exit(signal=15), 143),
        (Exit(error=ErrorInfo(code="internal", message="x")), 125),
        (Exit(exit_code=3, error=ErrorInfo(code="internal", message="x")), 125),
    ],
)
def test_exits_have_a_shells_status(exit_: Exit, status: int) -> None:
    assert exit_.status == status
    assert decode_exit(encode_json(exit_)) == exit_


def test_unknown_fields_are_ignored_in_both_directions() -> None:
    request = decode_request(b'{"version":1,"method":"m","of_tomorrow":[1]}')
    assert (request.method, bytes(request.params), request.op_id) == ("m", b"{}", "")
    reply = decode_reply(b'{"result":{"a":1},"of_tomorrow":{}}')
    assert bytes(reply.result) == b'{"a":1}'
    assert decode_exit(b'{"exit_code":1,"x":2}') == Exit(exit_code=1)


def test_an_error_reply_holds_its_four_fields_alone() -> None:
    info = ErrorInfo(code="conflict", message="m", hint="h", op_id="op-0123456789ab")
    line = msgspec.json.encode(Reply(error=info))
    assert msgspec.json.decode(line) == {
        "error": {"code": "conflict", "message": "m", "hint": "h", "op_id": "op-0123456789ab"}
    }
