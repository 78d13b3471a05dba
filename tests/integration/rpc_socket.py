"""The daemon's socket as any program could use it, without the client of ours."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Self


class RawClient:
    """One connection: lines out, JSON lines in."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._replies = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._replies.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Any:
        """The next line; None at the end."""
        line = self._replies.readline()
        return json.loads(line) if line else None

    def ask(self, line: bytes) -> Any:
        """The reply to a line of any shape."""
        self.send(line + b"\n")
        return self.receive()

    def call(self, method: str, **params: Any) -> Any:
        """The reply to a request as it should be."""
        request = {"version": 1, "method": method, "params": params}
        return self.ask(json.dumps(request).encode())

    def result(self, method: str, **params: Any) -> Any:
        """The result of a call that must succeed."""
        reply = self.call(method, **params)
        assert "result" in reply, reply
        return reply["result"]

    def receive_until_closed(self) -> bytes:
        """Whatever still comes until the daemon closes the connection."""
        return self._replies.read()
