"""Messages between the daemon and its helper, and the descriptors that go with them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.base.errors import BadRequest, BangerError, Conflict, Unavailable, UnknownMethod
from banger.base.model import ErrorInfo
from banger.hostops import wire
from banger.hostops.ops import (
    DESCRIPTORS_MAX,
    AllowResolved,
    Bridge,
    BridgeDown,
    BridgeUp,
    CheckJail,
    Done,
    EndJail,
    GrowSnapshot,
    Guest,
    InJail,
    LaunchJail,
    LookAtSnapshot,
    MapSnapshot,
    OpenTap,
    Operation,
    RouteNames,
    SetGuests,
    SweepSnapshots,
    UnmapSnapshot,
    UnrouteNames,
)

OP_ID = "op-0123456789ab"
BRIDGE = Bridge(name="banger0", address="172.30.0.1/24")
GUEST = Guest(
    tap="banger0-0a0b0c", mac="02:62:67:01:00:02", address="172.30.0.2", allow=("10.0.0.0/8",)
)
OPERATIONS: list[Operation] = [
    BridgeUp(bridge=BRIDGE, resolver_port=5353),
    BridgeDown(bridge="banger0"),
    OpenTap(bridge="banger0"),
    SetGuests(bridge=BRIDGE, guests=(GUEST,), forget=("172.30.0.3",)),
    AllowResolved(bridge=BRIDGE, guest="172.30.0.2", addresses=("192.0.2.1",)),
    RouteNames(server="127.0.0.1", port=53),
    UnrouteNames(),
    MapSnapshot(vm_id="0123456789ab", instance="89abcdef", base=7, changes=8),
    GrowSnapshot(vm_id="0123456789ab"),
    LookAtSnapshot(vm_id="0123456789ab"),
    UnmapSnapshot(vm_id="0123456789ab"),
    SweepSnapshots(instance="89abcdef", keep=("0123456789ab",)),
    CheckJail(),
    LaunchJail(
        vm_id="0123456789ab",
        vcpu_count=2,
        memory_mib=512,
        files=(
            InJail(name="kernel", read_only=True),
            InJail(name="disks/system", read_only=False),
        ),
        bridge="banger0",
        tap="banger0-0a0b0c",
        out=7,
        console=8,
        log=9,
        inputs=(10, 11),
    ),
    EndJail(vm_id="0123456789ab"),
]


def test_all_operations_are_here() -> None:
    assert {wire.tag_of(type(each)) for each in OPERATIONS} == wire.TAGS


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_arrives_as_it_was_sent(operation: Operation) -> None:
    operation.check()
    data, descriptors = wire.encode_request(operation, OP_ID)
    request = wire.decode_request(data)
    assert request.op_id == OP_ID
    assert wire.method_of(request) == wire.tag_of(type(operation))
    assert wire.decode_operation(request, descriptors) == operation


def test_the_number_of_a_descriptor_is_never_believed() -> None:
    vm_id, instance = "0123456789ab", "89abcdef"
    mapping = MapSnapshot(vm_id=vm_id, instance=instance, base=777, changes=778)
    data, descriptors = wire.encode_request(mapping, OP_ID)
    assert b"77" not in data
    assert descriptors == (777, 778)
    raw = f'{{"op":"map_snapshot","vm_id":"{vm_id}","instance":"{instance}","base":0}}'
    request = wire.Request(version=1, op_id=OP_ID, operation=msgspec.Raw(raw.encode()))
    assert wire.decode_operation(request, (9, 10)) == MapSnapshot(
        vm_id=vm_id, instance=instance, base=9, changes=10
    )
    for descriptors in ((), (9,), (9, 10, 11)):
        with pytest.raises(BadRequest, match="descriptors"):
            wire.decode_operation(request, descriptors)


def test_the_descriptors_of_a_jail_are_those_that_came_whatever_is_said_of_them() -> None:
    raw = (
        b'{"op":"launch_jail","vm_id":"0123456789ab","vcpu_count":1,"memory_mib":1,"out":0,'
        b'"inputs":[0,1,2,3],"files":[{"name":"kernel","read_only":true}]}'
    )
    request = wire.Request(version=1, op_id=OP_ID, operation=msgspec.Raw(raw))
    operation = wire.decode_operation(request, (5, 6, 7, 8))
    assert isinstance(operation, LaunchJail)
    assert operation.descriptors == (5, 6, 7, 8)
    operation.check()
    for descriptors in ((), (5, 6, 7), (5, 6, 7, 8, 9)):
        with pytest.raises(BadRequest, match="descriptors"):
            wire.decode_operation(request, descriptors)


def test_what_is_unknown_is_ignored_around_an_operation_but_not_in_one() -> None:
    later = b'{"version":1,"op_id":"%s","later":1,"operation":%s}'
    fine = wire.decode_request(later % (OP_ID.encode(), b'{"op":"open_tap","bridge":"banger0"}'))
    assert wire.decode_operation(fine, ()) == OpenTap(bridge="banger0")
    more = b'{"op":"open_tap","bridge":"banger0","mtu":9000}'
    request = wire.decode_request(later % (OP_ID.encode(), more))
    with pytest.raises(BadRequest, match="unknown field"):
        wire.decode_operation(request, ())
    other = wire.decode_request(later % (OP_ID.encode(), b'{"op":"format_disk"}'))
    with pytest.raises(UnknownMethod, match="format_disk"):
        wire.method_of(other)


def test_a_reply_may_have_more_than_this_version_knows() -> None:
    data = b'{"name":"banger0-0a0b0c","descriptor":true,"later":{}}'
    assert wire.decode_reply(data, (5,)) == Done(name="banger0-0a0b0c", fd=5)


def test_a_reply_and_its_descriptor_belong_together() -> None:
    assert wire.encode_reply(Done(name="x", fd=5)) == (b'{"name":"x","descriptor":true}', (5,))
    assert wire.encode_reply(Done(pid=7, fd=5)) == (b'{"pid":7,"descriptor":true}', (5,))
    assert wire.decode_reply(b'{"pid":7,"descriptor":true}', (5,)) == Done(pid=7, fd=5)
    for data, descriptors in ((b'{"descriptor":true}', ()), (b"{}", (5,)), (b"[]", ()), (b"", ())):
        with pytest.raises(Unavailable, match="no reply"):
            wire.decode_reply(data, descriptors)


def test_an_error_arrives_as_it_was_raised() -> None:
    info = ErrorInfo(code="conflict", message="it is there", hint="use another", op_id=OP_ID)
    with pytest.raises(Conflict, match="it is there") as raised:
        wire.decode_reply(wire.encode_error(info), ())
    assert (raised.value.hint, raised.value.op_id) == ("use another", OP_ID)


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadRequest):
        wire.decode_request(data)
    with contextlib.suppress(BangerError):
        wire.decode_reply(data, ())


@given(st.text())
def test_what_is_logged_is_short_and_text(text: str) -> None:
    assert len(wire.shortened(text).encode()) < 8000


# --- over a pair of sockets ---


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        yield one, other


def descriptors_open() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


@settings(deadline=None)
@given(data=st.binary(max_size=300_000))
def test_a_message_of_any_length_arrives_whole(data: bytes) -> None:
    async def both() -> bytes:
        with pair() as (one, other):
            _, (received, descriptors) = await asyncio.gather(
                wire.send(one, data), wire.receive(other, 300_000)
            )
            assert descriptors == ()
            return received

    assert asyncio.run(both()) == data


async def test_a_descriptor_arrives_with_its_message_and_is_not_inherited() -> None:
    reader, writer = os.pipe()
    with pair() as (one, other):
        sending = wire.send(one, b"x" * 500_000, (reader,))
        _, (data, descriptors) = await asyncio.gather(sending, wire.receive(other, 500_000))
    os.close(reader)
    assert len(data) == 500_000
    (arrived,) = descriptors
    assert not os.get_inheritable(arrived)
    os.write(writer, b"through")
    assert os.read(arrived, 10) == b"through"
    os.close(arrived)
    os.close(writer)


@pytest.mark.parametrize(
    ("sent", "count", "message"),
    [
        (struct.pack(">I", 11) + b"x" * 11, 1, "too long"),
        (struct.pack(">I", 10) + b"x" * 5, 1, "ended within"),
        (struct.pack(">I", 10) + b"x" * 10, DESCRIPTORS_MAX + 1, "more descriptors"),
        (struct.pack(">I", 10) + b"x" * 10, 100, "more descriptors"),
        (b"\0", 1, "ended within"),
        (b"", 0, "ended within"),
    ],
)
async def test_what_is_refused_leaves_no_descriptor_open(
    sent: bytes, count: int, message: str
) -> None:
    before = descriptors_open()
    with pair() as (one, other):
        socket.send_fds(one, [sent], [one.fileno()] * count) if count else one.send(sent)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(BadRequest, match=message):
            await wire.receive(other, 10)
    assert descriptors_open() == before


async def test_who_is_cancelled_while_he_waits_leaves_no_descriptor_open() -> None:
    before = descriptors_open()
    with pair() as (one, other):
        socket.send_fds(one, [struct.pack(">I", 10) + b"x"], [one.fileno()])
        task = asyncio.create_task(wire.receive(other, 10))
        while len(descriptors_open()) < len(before) + 3:  # both sockets, and what came
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert descriptors_open() == before
