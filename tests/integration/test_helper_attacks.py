"""The helper under attack, by its owner's taken-over daemon and by others.

Whatever is sent, nothing that is not banger's changes: rules, interfaces, routes, mounts and loop
devices of the world around it are compared before and after, and each refusal is in the log.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.base.errors import BangerError
from banger.base.reach import ALLOWED_MAX
from banger.hostops import wire
from banger.hostops.client import HelperHost
from banger.hostops.helper import CONNECTIONS_MAX, TRANSFER_TIMEOUT_S
from banger.hostops.ops import (
    ALLOWED_TOTAL_MAX,
    GUESTS_MAX,
    AnyOperation,
    Bridge,
    BridgeDown,
    BridgeUp,
    Guest,
    InJail,
    MapSnapshot,
    OpenTap,
    SetGuests,
    UnmapSnapshot,
)
from helper_world import JUNK, OWNER_UID, World, helper_world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for the helper")

OP_ID = "op-0123456789ab"
_MAP = {"vm_id": "0123456789ab", "instance": "89abcdef"}
_LENGTH = struct.Struct(">I")
_MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with helper_world() as made:
        yield made


@contextmanager
def untouched(world: World, *, refusals: int | None = None) -> Iterator[None]:
    """All of the world is as it was, the helper serves on, and has logged so many refusals."""
    before, loops, open_before = world.network(), loops_of(world), world.descriptors()
    logged = len(world.records())
    yield
    assert answer(world, {"op": "open_tap", "bridge": "banger77"})["error"]["code"] == (
        "precondition_failed"
    )
    assert world.network() == before
    assert loops_of(world) == loops
    assert world.descriptors() == open_before
    refused = [
        each for each in world.records()[logged:-1] if each["message"] != "helper rpc completed"
    ]
    assert refusals is None or len(refused) == refusals
    assert all(each["op_id"] and each["error"] for each in refused)


def loops_of(world: World) -> list[str]:
    """Those of the attacks: others on this machine come and go."""
    listing = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if str(world.directory) in line]


@contextmanager
def connected(world: World) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TRANSFER_TIMEOUT_S * 3)
        connection.connect(str(world.socket))
        yield connection


def received(connection: socket.socket) -> Any:
    """The reply; None where the helper said nothing."""
    header = connection.recv(_LENGTH.size, socket.MSG_WAITALL)
    if not header:
        return None
    (length,) = _LENGTH.unpack(header)
    return json.loads(connection.recv(length, socket.MSG_WAITALL))


def request(operation: Any, **other: Any) -> bytes:
    return json.dumps({"version": 1, "op_id": OP_ID, "operation": operation, **other}).encode()


def answer(world: World, operation: Any, **other: Any) -> Any:
    with connected(world) as connection:
        data = request(operation, **other)
        connection.sendall(_LENGTH.pack(len(data)) + data)
        return received(connection)


# --- what is no request ---


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0",
        _LENGTH.pack(100) + b"{",
        _LENGTH.pack(0),
        _LENGTH.pack(2) + b"{}",
        _LENGTH.pack(4) + b"\xff\xfe\0\0",
        _LENGTH.pack(50_000) + b"[" * 50_000,
        _LENGTH.pack(wire.REQUEST_MAX_BYTES + 1),
        _LENGTH.pack(0xFFFFFFFF) + b"x" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_garbage_and_half_sent_requests_are_refused(world: World, sent: bytes) -> None:
    with untouched(world, refusals=1), connected(world) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert received(connection)["error"]["code"] == "bad_request"


@_MANY
@given(sent=st.binary(max_size=2000), framed=st.booleans())
def test_any_bytes_are_refused(world: World, sent: bytes, framed: bool) -> None:
    with connected(world) as connection:
        connection.sendall((_LENGTH.pack(len(sent)) if framed else b"") + sent)
        connection.shutdown(socket.SHUT_WR)
        assert received(connection)["error"]["code"] == "bad_request"


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ({"op_id": "op-1\n"}, "bad_request"),
        ({"op_id": '", "forged": "'}, "bad_request"),
        ({"op_id": ""}, "bad_request"),
        ({"op_id": None}, "bad_request"),
        ({"version": 2}, "bad_version"),
        ({"operation": None}, "bad_request"),
        ({"operation": []}, "bad_request"),
        ({"operation": {"op": 1}}, "bad_request"),
        ({"operation": {"op": "run", "argv": ["id"]}}, "unknown_method"),
        ({"operation": {"op": "../bridge_down"}}, "unknown_method"),
        ({"operation": {"op": "x" * 100_000}}, "unknown_method"),
        ({"operation": {"op": "bridge_down", "bridge": "banger1", "force": True}}, "bad_request"),
        ({"operation": {"op": "bridge_down", "bridge": "banger1\n"}}, "bad_request"),
        ({"operation": {"op": "bridge_down", "bridge": ["banger1"]}}, "bad_request"),
        ({"operation": {"op": "bridge_down", "bridge": "y" * 1_000_000}}, "bad_request"),
        ({"operation": {"op": "map_snapshot", **_MAP, "base": 0, "changes": 1}}, "bad_request"),
        ({"operation": {"op": "map_snapshot", **_MAP, "path": "/etc/shadow"}}, "bad_request"),
        ({"operation": {"op": "map_snapshot", **_MAP, "instance": ""}}, "bad_request"),
        ({"operation": {"op": "sweep_snapshots", "instance": "*"}}, "bad_request"),
        ({"operation": {"op": "sweep_snapshots", "keep": ["x"]}}, "bad_request"),
        ({"operation": {"op": "sweep_snapshots", "keep": ["0" * 12] * 4097}}, "bad_request"),
        ({"operation": {"op": "unmap_snapshot", "vm_id": "0123456789ab\n"}}, "bad_request"),
        ({"operation": {"op": "end_jail", "vm_id": "../../system.slice"}}, "bad_request"),
        ({"operation": {"op": "end_jail", "vm_id": "0123456789ab", "pid": 1}}, "bad_request"),
        (
            {
                "operation": {
                    "op": "launch_jail",
                    "vm_id": "0123456789ab",
                    "vcpu_count": 1,
                    "memory_mib": 1,
                    "files": [],
                    "firecracker": "/bin/sh",
                }
            },
            "bad_request",
        ),
    ],
)
def test_what_is_not_of_the_protocol_is_refused(
    world: World, other: dict[str, Any], code: str
) -> None:
    with untouched(world, refusals=1):
        error = answer(world, other.pop("operation", {"op": "open_tap", "bridge": "b"}), **other)
        assert error["error"]["code"] == code
        assert len(json.dumps(error)) < 4000
        assert len(json.dumps(world.records()[-1])) < 4000


def test_one_operation_cannot_be_logged_as_another(world: World) -> None:
    operation = b'{"op":"bridge_down","op":"open_tap","bridge":"banger1"}'
    data = b'{"version":1,"op_id":"%s","operation":%s}' % (OP_ID.encode(), operation)
    with connected(world) as connection:
        connection.sendall(_LENGTH.pack(len(data)) + data)
        reply = received(connection)
    # There is no bridge: one of the two is refused.
    assert world.records()[-1]["method"] == ("open_tap" if "error" in reply else "bridge_down")


# --- arguments ---

_VALID: dict[str, dict[str, Any]] = {
    "bridge_up": {
        "bridge": {"name": "banger1", "address": "172.30.0.1/24"},
        "resolver_port": 5353,
    },
    "bridge_down": {"bridge": "banger1"},
    "open_tap": {"bridge": "banger1"},
    "set_guests": {
        "bridge": {"name": "banger1", "address": "172.30.0.1/24"},
        "guests": [
            {
                "tap": "banger1-0a0b0c",
                "mac": "02:62:67:01:00:02",
                "address": "172.30.0.2",
                "allow": ["192.0.2.0/24"],
                "everywhere": False,
                "sociable": True,
            }
        ],
        "forget": ["172.30.0.3"],
    },
    "allow_resolved": {
        "bridge": {"name": "banger1", "address": "172.30.0.1/24"},
        "guest": "172.30.0.2",
        "addresses": ["203.0.113.5"],
    },
    "route_names": {"server": "127.0.0.1", "port": 5353},
    "unroute_names": {},
    "map_snapshot": {**_MAP, "base": -1, "changes": -1},
    "grow_snapshot": {"vm_id": "0123456789ab"},
    "look_at_snapshot": {"vm_id": "0123456789ab"},
    "unmap_snapshot": {"vm_id": "0123456789ab"},
    "sweep_snapshots": {"instance": "89abcdef", "keep": ["0123456789ab"]},
    "check_jail": {},
    "launch_jail": {
        "vm_id": "0123456789ab",
        "vcpu_count": 1,
        "memory_mib": 256,
        "files": [{"name": "kernel", "read_only": True}],
        "bridge": "banger1",
        "tap": "banger1-0a0b0c",
    },
    "end_jail": {"vm_id": "0123456789ab"},
}


def test_every_operation_is_attacked() -> None:
    assert set(_VALID) == wire.TAGS


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each text and number in it."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from places(each, (*path, index))
    else:
        yield path


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    head, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[head] = replaced(copy[head], tuple(rest), new)
    return copy


_ARGUMENTS = [(op, path) for op, fields in _VALID.items() for path in places(fields)]
_WRONG = st.one_of(
    JUNK,
    st.integers(),
    st.none(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(JUNK, max_size=3),
    st.dictionaries(JUNK, JUNK, max_size=2),
)


@settings(_MANY, max_examples=600)
@given(where=st.sampled_from(_ARGUMENTS), wrong=_WRONG)
def test_no_argument_reaches_what_is_not_bangers(
    world: World, where: tuple[str, tuple[Any, ...]], wrong: Any
) -> None:
    op, path = where
    operation = replaced({"op": op, **_VALID[op]}, path, wrong)
    reply = answer(world, operation)
    if "error" in reply:
        assert reply["error"]["code"] != "internal"
    elif op == "bridge_up":  # it was right by chance, and is taken back
        answer(world, {"op": "bridge_down", "bridge": operation["bridge"]["name"]})


def test_the_world_is_as_it_was_after_all_of_them(world: World) -> None:
    with untouched(world):
        test_no_argument_reaches_what_is_not_bangers(world=world)


@pytest.mark.parametrize(
    ("guests", "message"),
    [
        ([{"allow": ["10.0.0.0/8", "10.1.0.0/16"]}], "overlap"),
        ([{"allow": ["0.0.0.0/0", "192.0.2.0/24"]}], "overlap"),
        ([{"allow": ["192.0.2.1/24"]}], "network"),
        ([{"allow": [f"10.{n // 256}.{n % 256}.0/24" for n in range(ALLOWED_MAX + 1)]}], "many"),
        ([{"tap": "banger11-0a0b0c"}], "tap"),
        ([{"tap": "banger1-0A0B0C"}], "tap"),
        ([{"mac": "02:62:67:00:00:01"}], "MAC"),
        ([{"mac": "ff:ff:ff:ff:ff:ff"}], "MAC"),
        ([{"address": "172.30.0.1"}], "guest"),
        ([{"address": "172.30.0.255"}], "guest"),
        ([{"address": "172.30.1.2"}], "guest"),
        ([{}, {}], "two guests"),
        ([{}] * (GUESTS_MAX + 1), "many"),
    ],
)
def test_guests_that_cannot_be(world: World, guests: list[dict[str, Any]], message: str) -> None:
    (usual,) = _VALID["set_guests"]["guests"]
    with untouched(world, refusals=1):
        operation = {"op": "set_guests", **_VALID["set_guests"]}
        operation["guests"] = [usual | each for each in guests]
        error = answer(world, operation)["error"]
        assert error["code"] == "bad_request"
        assert message in error["message"]


def many_guests() -> SetGuests:
    """As many as there may be, with as much as they may have together."""
    bridge = Bridge(name="banger1", address="10.99.0.1/16")
    each = ALLOWED_TOTAL_MAX // GUESTS_MAX
    guests = tuple(
        Guest(
            tap=f"banger1-{n:06x}",
            mac=f"02:62:67:01:{n // 256:02x}:{n % 256:02x}",
            address=f"10.99.{n // 250 + 1}.{n % 250 + 2}",
            allow=tuple(f"203.{n % 256}.{100 + k}.{200 + k}/32" for k in range(each)),
            everywhere=False,
            sociable=True,
        )
        for n in range(GUESTS_MAX)
    )
    return SetGuests(bridge=bridge, guests=guests, forget=tuple(guest.address for guest in guests))


async def test_the_largest_operation_fits(world: World) -> None:
    operation = many_guests()
    request_bytes, _ = wire.encode_request(operation, OP_ID)
    assert len(request_bytes) < wire.REQUEST_MAX_BYTES
    host = HelperHost(world.socket)
    with untouched(world):
        await host.perform(BridgeUp(bridge=operation.bridge, resolver_port=5353))
        try:
            await host.perform(operation)
            rules = world.inside("nft", "list", "set", "inet", "banger1", "sociable")
            assert rules.count("10.99.") == GUESTS_MAX
        finally:
            await host.perform(BridgeDown(bridge="banger1"))


# --- who asks ---


def as_uid(uid: int, code: str, *arguments: str) -> str:
    argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable]
    result = subprocess.run(
        [*argv, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return result.stdout + result.stderr


_CONNECT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(30)
connection.connect(sys.argv[1])
try:
    connection.sendall(bytes.fromhex(sys.argv[2]))
except OSError:
    pass
print(connection.recv(65536)[4:].decode())
"""


def test_another_user_cannot_connect_and_is_refused_where_he_can(world: World) -> None:
    data = request({"op": "bridge_down", "bridge": "banger1"})
    sent = (_LENGTH.pack(len(data)) + data).hex()
    assert "PermissionError" in as_uid(OWNER_UID + 1, _CONNECT, str(world.socket), sent)
    world.socket.chmod(0o666)
    try:
        with untouched(world, refusals=1):
            reply = json.loads(as_uid(OWNER_UID + 1, _CONNECT, str(world.socket), sent))
            assert reply["error"]["code"] == "permission_denied"
    finally:
        world.socket.chmod(0o600)
    refused = world.records("helper rpc refused")[-1]
    assert refused["peer_uid"] == OWNER_UID + 1
    assert refused["op_id"] == reply["error"]["op_id"]


# --- descriptors ---


def send_with(connection: socket.socket, data: bytes, descriptors: list[int]) -> None:
    socket.send_fds(connection, [_LENGTH.pack(len(data)) + data], descriptors)


@pytest.mark.parametrize(
    ("operation", "count"),
    [
        ({"op": "bridge_down", "bridge": "banger1"}, 1),
        *(({"op": "map_snapshot", **_MAP}, count) for count in (0, 1, 3, 200)),
        *(({"op": "launch_jail", **_VALID["launch_jail"]}, count) for count in (0, 3, 5, 16, 17)),
    ],
)
def test_descriptors_that_do_not_belong_are_refused_and_closed(
    world: World, operation: dict[str, Any], count: int
) -> None:
    with untouched(world, refusals=1), open("/dev/null") as null, connected(world) as connection:
        send_with(connection, request(operation), [null.fileno()] * count)
        assert received(connection)["error"]["code"] == "bad_request"


def test_a_jail_is_made_of_nothing_but_the_owners_own(world: World, tmp_path: Path) -> None:
    """Root's files, which a helper could open: whether or not there is a Firecracker to jail."""
    secret = tmp_path / "secret"
    secret.write_text("root's")
    with untouched(world, refusals=None), secret.open("r+") as file, connected(world) as connection:
        send_with(connection, request({"op": "launch_jail", **_VALID["launch_jail"]}),
            [file.fileno()] * 4)  # fmt: skip
        assert received(connection)["error"]["code"] in ("bad_request", "precondition_failed")


def test_a_descriptor_with_every_byte_is_refused_and_closed(world: World) -> None:
    data = request({"op": "map_snapshot", **_MAP})
    with untouched(world, refusals=1), open("/dev/null") as null, connected(world) as connection:
        with suppress(BrokenPipeError):  # it has heard enough
            for byte in _LENGTH.pack(len(data)) + data:
                socket.send_fds(connection, [bytes([byte])], [null.fileno()])
        assert received(connection)["error"]["code"] == "bad_request"


def test_a_descriptor_of_a_request_that_ends_early_is_closed(world: World) -> None:
    with untouched(world, refusals=1), open("/dev/null") as null, connected(world) as connection:
        socket.send_fds(connection, [_LENGTH.pack(1000) + b"{"], [null.fileno()])
        connection.shutdown(socket.SHUT_WR)
        assert received(connection)["error"]["code"] == "bad_request"


async def test_a_file_swapped_after_it_was_opened_is_still_the_one_that_was(
    world: World, tmp_path: Path
) -> None:
    """The path may lead anywhere by then: the helper has none."""
    secret = world.directory / "secret"
    secret.write_bytes(b"s" * 4096)
    mine, base = world.directory / "mine", world.directory / "base"
    for file in (mine, base):
        file.write_bytes(bytes(4096))
        os.chown(file, OWNER_UID, OWNER_UID)
    with mine.open("r+b") as opened, base.open("rb") as under:
        mine.unlink()
        mine.symlink_to(secret)
        # It is not refused, and looked at no more where it was.
        assert (await mapped(world, under.fileno(), opened.fileno())) != "permission_denied"
        # As root the path could be opened; root's file is still not the owner's.
        with mine.open("r+b") as roots:
            for pair in ((under, roots), (roots, opened)):
                refused = await mapped(world, pair[0].fileno(), pair[1].fileno())
                assert refused == "permission_denied"
    assert secret.read_bytes() == b"s" * 4096
    assert loops_of(world) == []


async def mapped(world: World, base: int, changes: int) -> str:
    """What mapping them is refused with; it is taken back."""
    host = HelperHost(world.socket)
    try:
        await host.perform(MapSnapshot(**_MAP, base=base, changes=changes))
    except BangerError as error:
        return error.code
    finally:
        await host.perform(UnmapSnapshot(vm_id=_MAP["vm_id"]))
    return ""


# --- how many, how slow ---


def test_those_who_say_nothing_are_given_up_and_cost_nobody_else(world: World) -> None:
    with untouched(world):
        idle = [socket.socket(socket.AF_UNIX) for _ in range(CONNECTIONS_MAX // 2)]
        try:
            for connection in idle:
                connection.settimeout(TRANSFER_TIMEOUT_S * 3)
                connection.connect(str(world.socket))
            idle[0].sendall(_LENGTH.pack(4000) + b"{")
            assert "error" not in answer(world, {"op": "bridge_down", "bridge": "banger1"})
            assert received(idle[0])["error"]["code"] == "timeout"
            assert {received(each)["error"]["code"] for each in idle[1:]} == {"timeout"}
        finally:
            for connection in idle:
                connection.close()
    assert world.records("refused")[-1]["code"] == "timeout"


def test_more_connections_than_it_takes_are_turned_away(world: World) -> None:
    logged = len(world.records("refused"))
    held = [socket.socket(socket.AF_UNIX) for _ in range(CONNECTIONS_MAX * 3)]
    try:
        for connection in held:
            connection.connect(str(world.socket))  # waits while the helper's queue is full
            connection.settimeout(30)
        # The helper takes them in turn: the last one's answer comes after all were seen.
        assert received(held[-1])["error"]["code"] == "unavailable"
    finally:
        for connection in held:
            connection.close()
    busy = [each for each in world.records("refused")[logged:] if each["code"] == "unavailable"]
    assert len(busy) == CONNECTIONS_MAX * 2


async def test_a_caller_who_goes_before_the_reply_gets_nothing(world: World) -> None:
    host = HelperHost(world.socket)
    bridge = Bridge(name="banger1", address="172.30.0.1/24")
    with untouched(world):
        await host.perform(BridgeUp(bridge=bridge, resolver_port=5353))
        with connected(world) as connection:
            data = request({"op": "open_tap", "bridge": "banger1"})
            connection.sendall(_LENGTH.pack(len(data)) + data)
        # After it, for the helper performs one at a time.
        tap = await host.perform(OpenTap(bridge="banger1"))
        links = json.loads(world.inside("ip", "-j", "link", "show", "master", "banger1"))
        assert [each["ifname"] for each in links] == [tap.name]
        os.close(tap.fd)
        await host.perform(BridgeDown(bridge="banger1"))


def test_the_set_is_closed() -> None:
    """No operation takes a path, a command or an environment: names, numbers and addresses."""
    allowed = {str, int, bool, tuple[str, ...], Bridge, tuple[Guest, ...], tuple[InJail, ...]}
    allowed |= {tuple[int, ...]}  # descriptors
    for kind in get_args(AnyOperation):
        for field in msgspec.structs.fields(kind):
            assert field.type in allowed, (kind, field.name)
            assert not {"path", "argv", "command", "env"} & set(field.name.split("_"))
