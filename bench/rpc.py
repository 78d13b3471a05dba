"""One request and its answer on an open connection, beside a line echoed over the same kind of
socket by a process that does nothing else."""

from __future__ import annotations

import socket
import subprocess
import sys

from banger.rpc.client import Client
from bench.home import Home
from bench.measure import Figure, compare, timed

_ROUNDS = 500

_ECHO = """
import socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
while line := connection.recv(65536):
    connection.sendall(line)
"""
_LINE = b'{"version":1,"method":"operations.list","params":{}}\n'


def measure(home: Home) -> list[Figure]:
    home.banger("vm", "list")  # starts the daemon
    ours, theirs = socket.socketpair()
    with ours, Client.connect(home.paths, start=False) as client:
        with theirs:
            echo = subprocess.Popen(
                [sys.executable, "-c", _ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        try:
            return [
                compare(
                    "RPC round trip",
                    lambda: timed(lambda: client.call("operations.list", {}, list[object])),
                    floor_name="a line echoed by a process",
                    floor=lambda: timed(lambda: _echoed(ours)),
                    rounds=_ROUNDS,
                )
            ]
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            echo.wait()


def _echoed(connection: socket.socket) -> bytes:
    connection.sendall(_LINE)
    return connection.recv(65536)
