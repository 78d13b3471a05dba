"""A daemon for tests of the command line: a thread that answers as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from banger import __version__
from banger.base.errors import BangerError, Unavailable
from banger.base.paths import Paths
from banger.rpc.client import Client
from banger.rpc.protocol import FRAME_HEADER, FrameType, encode_json

Answer = Callable[[dict[str, Any]], object]


def read_frame(connection: socket.socket) -> tuple[FrameType, bytes] | None:
    """The next frame a client sent; None when it has gone."""
    header = _exactly(connection, FRAME_HEADER.size)
    if header is None:
        return None
    kind, length = FRAME_HEADER.unpack(header)
    payload = _exactly(connection, length)
    return None if payload is None else (FrameType(kind), payload)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            return None
        data += chunk
    return data


class Daemon:
    """`Client.connect` of a test: see `install` in the fixture `daemon`."""

    def __init__(self) -> None:
        self.running = True
        self.version = __version__
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Answer] = {}
        #: method -> what the daemon's end of the switched connection does.
        self.sessions: dict[str, Callable[[socket.socket], None]] = {}
        self.events: dict[str, list[object]] = {}
        self._threads: list[threading.Thread] = []

    def connect(self, paths: Paths, *, start: bool = True) -> Client:
        if not self.running and not start:
            raise Unavailable("bangerd is not running", hint="any other command starts it")
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._serve, args=(theirs,))
        self._threads.append(thread)
        thread.start()
        return Client(ours)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            while line := self._line(connection):
                request = msgspec.json.decode(line)
                method = request["method"]
                self.calls.append((method, request["params"]))
                for event in self.events.get(method, []):
                    connection.sendall(encode_json({"event": event}) + b"\n")
                connection.sendall(self._reply(method, request["params"]) + b"\n")
                if method in self.sessions:
                    self.sessions[method](connection)
                    return

    def _line(self, connection: socket.socket) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return b""
            line += byte
        return line

    def _reply(self, method: str, params: dict[str, Any]) -> bytes:
        try:
            result = self.answers[method](params)
        except BangerError as error:
            info = {"code": error.code, "message": error.message, "hint": error.hint}
            info["op_id"] = error.op_id or "op-0123456789ab"
            return encode_json({"error": info, "daemon_version": self.version})
        return encode_json({"result": result, "daemon_version": self.version})
