"""The daemon's socket under callers of every kind: wrong, oversized, foreign, gone."""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from homes import Home, new_home
from product import IMAGE, until
from rpc_socket import RawClient

pytestmark = pytest.mark.guest

_OP_ID = re.compile(r"op-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def served(private_home: object) -> Iterator[Home]:
    """A home whose daemon runs, for the tests that leave it as it was."""
    home = new_home(Path(os.environ["HOME"]) / "rpc")
    home.banger.ok("daemon", "start")
    yield home
    home.close()


@pytest.fixture
def client(served: Home) -> Iterator[RawClient]:
    with RawClient(served.socket) as client:
        yield client


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "bad_request"),
        (b"hello", "bad_request"),
        (b"[]", "bad_request"),
        (b"\xff\xfe", "bad_request"),
        (b"{}", "bad_request"),
        (b'{"version":"1","method":"vm.list"}', "bad_request"),
        (b'{"version":1,"method":"vm.list","op_id":"op-../../etc"}', "bad_request"),
        (b'{"version":2,"method":"vm.list"}', "bad_version"),
        (b'{"version":1,"method":"vm.dance"}', "unknown_method"),
        (b'{"version":1,"method":"vm.show"}', "bad_request"),
        (b'{"version":1,"method":"vm.show","params":{"vm":5}}', "bad_request"),
        (b'{"version":1,"method":"vm.show","params":{"vm":""}}', "bad_request"),
        (b'{"version":1,"method":"vm.show","params":{"vm":"nope"}}', "not_found"),
        (b'{"version":1,"method":"image.show","params":{"image":"../x"}}', "bad_request"),
        (b'{"version":1,"method":"vm.create.status","params":{"id":"op-0"}}', "not_found"),
    ],
)
def test_a_bad_line_gets_its_error_with_an_op_id_and_the_connection_goes_on(
    served: Home, client: RawClient, line: bytes, code: str
) -> None:
    error = client.ask(line)["error"]
    assert error["code"] == code
    assert _OP_ID.fullmatch(error["op_id"])
    assert client.result("vm.list") == []


def test_several_requests_on_one_connection_and_unknown_fields(client: RawClient) -> None:
    request = b'{"version":1,"method":"vm.list","params":{"new":1},"newer":{"x":[]}}\n'
    client.send(request * 3)
    for _ in range(3):
        assert client.receive()["result"] == []


def test_an_op_id_that_is_sent_is_used_and_logged(served: Home, client: RawClient) -> None:
    line = b'{"version":1,"method":"vm.show","params":{"vm":"x"},"op_id":"op-0123456789ab"}'
    assert client.ask(line)["error"]["op_id"] == "op-0123456789ab"
    records = [json.loads(each) for each in served.log.splitlines()]
    mine = [each for each in records if each.get("op_id") == "op-0123456789ab"]
    assert any("error" in each for each in mine), records[-3:]


def test_an_error_of_the_command_line_has_the_op_id_that_the_log_has(served: Home) -> None:
    said = served.banger.fails("vm", "show", "nowhere", status=1)
    found = _OP_ID.search(said)
    assert found
    assert found[0] in served.log


def test_an_oversized_line_is_refused_and_ends_the_connection(served: Home) -> None:
    with RawClient(served.socket) as client:
        # The daemon may hang up before it has read all of it.
        try:
            reply = client.ask(b'{"version":1,"method":"' + b"x" * (1 << 20) + b'"}')
        except BrokenPipeError:
            reply = client.receive()
        assert reply["error"]["code"] == "bad_request"
        assert "longer than 1048576 bytes" in reply["error"]["message"]
        with RawClient(served.socket) as another:
            assert another.result("vm.list") == []


def test_an_endless_line_does_not_fill_the_daemon(served: Home) -> None:
    with RawClient(served.socket) as client:
        sent = 0
        try:
            while sent < 64 << 20:
                client.send(b"x" * 65536)
                sent += 65536
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 16 << 20


def test_a_client_that_leaves_in_the_middle_of_a_line_disturbs_nobody(served: Home) -> None:
    for _ in range(20):
        with RawClient(served.socket) as client:
            client.send(b'{"version":1,"meth')
    with RawClient(served.socket) as client:
        assert client.result("vm.list") == []
    assert "Traceback" not in served.log


def test_the_socket_and_its_directory_are_private(served: Home) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.runtime.stat().st_mode) == 0o700
    for path in (served.state, served.state / "banger.db", served.state / "bangerd.log"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


_CONNECT_AS = """
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[2]))
client = socket.socket(socket.AF_UNIX)
try:
    client.connect(sys.argv[1])
    # Nothing is asked: it is refused as it connects, and what it sent would meet a closed socket.
    print(client.recv(65536).decode())
except PermissionError:
    print("EACCES")
"""


def _connect_as(uid: int, gid: int, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT_AS, path, str(uid), str(gid)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root to act as another user, too")
def test_another_user_is_refused_by_the_modes_and_without_them_by_its_credentials(
    served: Home,
) -> None:
    nobody = pwd.getpwnam("nobody")
    assert _connect_as(nobody.pw_uid, nobody.pw_gid, served.socket) == "EACCES"
    opened = [served.directory.parent, served.directory, served.runtime.parent, served.runtime,
              served.socket]  # fmt: skip
    modes = [path.stat().st_mode for path in opened]
    try:
        for path in opened:
            path.chmod(0o777)
        error = json.loads(_connect_as(nobody.pw_uid, nobody.pw_gid, served.socket))["error"]
    finally:
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(stat.S_IMODE(mode))
    assert error["code"] == "permission_denied"
    assert f"not uid {nobody.pw_uid}" in error["message"]
    assert _OP_ID.fullmatch(error["op_id"])
    assert "peer refused" in served.log


def _follow(client: RawClient, operation: str) -> dict[str, Any]:
    """The last state of an operation, polled."""

    def ended() -> Any:
        state = client.result("vm.create.status", id=operation)
        return state if state["state"] != "running" else None

    found: dict[str, Any] = until(ended, "the operation ends")
    return found


def test_a_creation_is_begun_polled_and_its_id_is_the_op_id_of_the_call(home: Home) -> None:
    home.banger.ok("daemon", "start")
    with RawClient(home.socket) as client:
        line = {"version": 1, "method": "vm.create.begin", "op_id": "op-abcdefabcdef",
                "params": {"name": "begun", "image": IMAGE}}  # fmt: skip
        begun = client.ask(json.dumps(line).encode())["result"]
        assert begun["operation_id"] == "op-abcdefabcdef"
        state = client.result("vm.create.status", id="op-abcdefabcdef")
        assert state["state"] == "running"
        listed = client.result("operations.list")
        assert [each["id"] for each in listed] == ["op-abcdefabcdef"]
        done = _follow(client, "op-abcdefabcdef")
        assert (done["state"], done["error"]) == ("completed", None)
        assert done["vm"]["name"] == "begun"
        assert client.result("vm.show", vm="begun")["runtime"]["state"] == "running"


def test_a_cancelled_creation_leaves_nothing(home: Home) -> None:
    home.banger.ok("daemon", "start")
    with RawClient(home.socket) as client:
        begun = client.result("vm.create.begin", name="cancelled", image=IMAGE)["operation_id"]
        until(home.machines, "the machine has been started")
        ended = client.result("vm.create.cancel", id=begun)
        assert ended["state"] == "cancelled"
        assert ended["error"]["code"] == "cancelled"
        assert client.result("vm.list") == []
        assert home.machines() == []
        assert [each for of in (home.state, home.runtime) for each in of.glob("vms/*")] == []
        again = client.result("vm.create.cancel", id=begun)
        assert again["state"] == "cancelled", "cancelling is idempotent"


def test_a_second_creation_of_the_same_name_fails_and_leaves_the_first(home: Home) -> None:
    home.banger.ok("daemon", "start")
    with RawClient(home.socket) as client:
        ids = [
            client.result("vm.create.begin", name="twin", image=IMAGE)["operation_id"]
            for _ in range(3)
        ]
        states = sorted(_follow(client, each)["state"] for each in ids)
        assert states == ["completed", "failed", "failed"]
        assert [each["name"] for each in client.result("vm.list")] == ["twin"]
        assert len(home.machines()) == 1


def test_frames_that_are_none_end_the_session_and_nothing_else(home: Home) -> None:
    home.banger.ok("vm", "run", "-q", "-d", "--image", IMAGE, "--name", "framed")
    command = {"argv": ["cat"]}
    with RawClient(home.socket) as client:
        client.result("vm.exec", vm="framed", command=command)
        client.send(b"\xff\xff\xff\xff\xff garbage")
        client.receive_until_closed()
    assert home.banger.guest("framed", "while pidof cat; do sleep 0.1; done; echo x") == "x\n"


def test_idle_connections_keep_nobody_out(served: Home) -> None:
    clients = []
    try:
        for _ in range(200):
            connection = socket.socket(socket.AF_UNIX)
            clients.append(connection)
            connection.settimeout(30)
            connection.connect(str(served.socket))
        with RawClient(served.socket) as client:
            assert client.result("vm.list") == []
    finally:
        for connection in clients:
            connection.close()
