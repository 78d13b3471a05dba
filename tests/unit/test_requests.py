"""The payloads of OPEN are as docs/agent-protocol.md says, and bad values stop here."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import BadRequest
from banger.base.opid import current_op_id
from banger.guest.requests import (
    OP_ID_TAG,
    Connect,
    Exec,
    FileStat,
    Pack,
    PackFlag,
    Ping,
    Read,
    Request,
    Setup,
    Shutdown,
    Sockets,
    Stat,
    Stats,
    Unpack,
    Write,
)

_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def fields_of(payload: bytes) -> list[tuple[int, bytes]]:
    """All but the op_id."""
    *fields, (tag, _) = all_fields_of(payload)
    assert tag == OP_ID_TAG
    return fields


def all_fields_of(payload: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 1
    while at < len(payload):
        tag, length = struct.unpack_from(">BI", payload, at)
        found.append((tag, payload[at + 5 : at + 5 + length]))
        assert len(found[-1][1]) == length
        at += 5 + length
    return found


@pytest.mark.parametrize(
    ("request_", "kind", "fields"),
    [
        (Read("/a"), 2, [(1, b"/a")]),
        (
            Write("/a", mode=0o600, uid=1, gid=2),
            3,
            [(2, b"\0\0\x01\x80"), (3, b"\0\0\0\x01"), (4, b"\0\0\0\x02"), (1, b"/a")],
        ),
        (Write("/a"), 3, [(1, b"/a")]),
        (Pack("/a", name="b"), 4, [(2, b"b"), (1, b"/a")]),
        (Pack("/a", flags=PackFlag(3)), 4, [(3, b"\0\0\0\3"), (1, b"/a")]),
        (Unpack("/a"), 5, [(1, b"/a")]),
        (Stat("/a"), 6, [(1, b"/a")]),
        (Connect(8080), 7, [(1, b"\x1f\x90")]),
        (Stats(), 8, []),
        (Sockets(), 9, []),
        (Shutdown(reboot=True), 11, [(1, b"\0\0\0\x01")]),
        (Ping(), 12, []),
    ],
)
def test_a_request_is_its_kind_and_its_fields(
    request_: Request, kind: int, fields: list[tuple[int, bytes]]
) -> None:
    payload = request_.encode()
    assert payload[0] == kind
    assert fields_of(payload) == fields


def test_setup_has_each_value_under_its_tag() -> None:
    setup = Setup("h", "0" * 32, "10.0.0.2/24", "10.0.0.1", "10.0.0.3", "52:54:00:0:0:1", b"e", 7)
    assert dict(fields_of(setup.encode())) == {
        1: b"h",
        2: b"0" * 32,
        3: b"10.0.0.2/24",
        4: b"10.0.0.1",
        5: b"10.0.0.3",
        6: b"52:54:00:0:0:1",
        7: b"e",
        8: struct.pack(">Q", 7),
    }
    assert dict(fields_of(Setup(copied=True).encode())) == {11: struct.pack(">I", 1)}


@given(st.lists(_TEXT), st.dictionaries(_TEXT, _TEXT), st.booleans())
def test_exec_keeps_arguments_and_environment_in_order(
    arguments: list[str], environment: dict[str, str], pty: bool
) -> None:
    fields = fields_of(Exec(arguments, environment, pty=pty, rows=3, columns=4).encode())
    assert [value for tag, value in fields if tag == 1] == [os.fsencode(a) for a in arguments]
    assert [value for tag, value in fields if tag == 2] == [
        os.fsencode(f"{key}={value}") for key, value in environment.items()
    ]
    assert dict(fields).get(6) == (b"\0\x03\0\x04" if pty else None)


def test_exec_flags_are_one_number() -> None:
    assert (5, b"\0\0\0\x03") in fields_of(Exec(login=True, pty=True).encode())
    assert (5, b"\0\0\0\x04") in fields_of(Exec(["a"], detached=True).encode())
    assert (5, b"\0\0\0\x12") in fields_of(Exec(login=True, any_login=True).encode())
    made = Exec(["a"], directory="/b", user="c:d", make_directory=True)
    assert fields_of(made.encode()) == [(5, b"\0\0\0\x08"), (3, b"/b"), (4, b"c:d"), (1, b"a")]


def test_names_that_are_not_utf8_pass_unchanged() -> None:
    assert fields_of(Read(os.fsdecode(b"/\xff\n")).encode()) == [(1, b"/\xff\n")]


@pytest.mark.parametrize(
    "request_",
    [
        Read("/a\0b"),
        Exec(["a\0"]),
        Exec(["a"], {"K": "\0"}),
        Connect(0),
        Connect(65536),
        Setup(entropy=bytes(513)),
        Exec(["a", "x" * 262144]),
    ],
)
def test_what_the_agent_would_refuse_is_refused_here(request_: Request) -> None:
    with pytest.raises(BadRequest):
        request_.encode()


def test_a_stat_answer_is_read_strictly() -> None:
    answer = b"d" + struct.pack(">IQ", 0o755, 4096)
    assert FileStat.decode(answer) == FileStat("d", 0o755, 4096)
    for bad in (b"", answer[:-1], answer + b"x", b"z" + answer[1:]):
        with pytest.raises(BadRequest):
            FileStat.decode(bad)


def test_the_operations_id_goes_with_every_request() -> None:
    token = current_op_id.set("op-0123456789ab")
    try:
        assert all_fields_of(Ping().encode()) == [(OP_ID_TAG, b"op-0123456789ab")]
    finally:
        current_op_id.reset(token)


@pytest.mark.parametrize(
    "request_", [Connect(0x1234), Shutdown(reboot=True), Setup(entropy=b"e"), Ping(), Exec(["a"])]
)
def test_a_text_comes_last_so_that_a_cut_off_request_shows(request_: Request) -> None:
    """Zeros complete it: a port would be another port, and a reboot a power-off."""
    tag, text = all_fields_of(request_.encode())[-1]
    assert (tag, bool(text)) == (OP_ID_TAG, True)
