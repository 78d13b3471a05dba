"""Bridge against user networking: the same guest, by one and by the other, to a server out there.

The host is a network namespace with an uplink, the server another one, so that the machine's own
network is neither used nor changed. Needs root, for the namespaces and the bridge, and iperf3.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from bench.home import IMAGE, Home
from bench.measure import Figure, compare

_HOST, _WORLD = "bench-host", "bench-world"
_ADDRESS = "198.18.0.1"
_IMAGE = "bench-network"
_BYTES = "32M"
_ECHO_PORT = 7777
_ROUND_TRIPS = 100
_ECHO = (
    "import socket\n"
    f"server = socket.create_server(('{_ADDRESS}', {_ECHO_PORT}))\n"
    "print('listening', flush=True)\n"
    "while True:\n"
    "    peer, _ = server.accept()\n"
    "    while data := peer.recv(100): peer.sendall(data)\n"
)
_ROUNDS = 4
_CLONE_NEWNET = 0x40000000

_PEER = ("peer", "name", "uplink", "netns", _HOST)
_TOWN = (
    ("ip", "-n", _WORLD, "link", "set", "lo", "up"),
    ("ip", "-n", _HOST, "link", "set", "lo", "up"),
    ("ip", "-n", _WORLD, "link", "add", "cable", "type", "veth", *_PEER),
    ("ip", "-n", _WORLD, "addr", "add", f"{_ADDRESS}/24", "dev", "cable"),
    ("ip", "-n", _HOST, "addr", "add", "198.18.0.2/24", "dev", "uplink"),
    ("ip", "-n", _WORLD, "link", "set", "cable", "up"),
    ("ip", "-n", _HOST, "link", "set", "uplink", "up"),
    ("ip", "-n", _HOST, "route", "add", "default", "via", _ADDRESS),
)


def measure(home: Home) -> list[Figure]:
    home.image()
    packages = ("--packages", "iperf3")
    home.banger("image", "build", _IMAGE, "--from", IMAGE, *packages, "--quiet")
    home.banger("daemon", "stop")
    iperf, echo = (
        _server("iperf3", "--server", "--forceflush"),
        _server(sys.executable, "-c", _ECHO),
    )
    with _town(), _inside(_HOST), iperf, echo:
        try:
            for mode in ("bridge", "user"):
                home.banger("run", "-d", "-q", "--image", _IMAGE, "--name", mode, "--network", mode)
            return [
                _compared("32 MB out of a guest, bridge", partial(_send, home, ())),
                _compared("32 MB into a guest, bridge", partial(_send, home, ("--reverse",))),
                _compared("round trip, bridge", partial(_round_trip, home)),
            ]
        finally:
            home.delete_vms()
            home.banger("image", "delete", _IMAGE)
            home.banger("daemon", "stop")


def _compared(name: str, sample: partial[float]) -> Figure:
    return compare(
        name,
        partial(sample, "bridge"),
        floor_name="user networking (passt)",
        floor=partial(sample, "user"),
        rounds=_ROUNDS,
    )


def _send(home: Home, options: tuple[str, ...], vm: str) -> float:
    """Seconds of a transfer, as iperf3 measures them at the end that receives."""
    argv = ("iperf3", "--client", _ADDRESS, "--bytes", _BYTES, "--json", *options)
    report = json.loads(home.banger("vm", "exec", vm, "--", *argv))
    return float(report["end"]["sum_received"]["seconds"])


def _round_trip(home: Home, vm: str) -> float:
    """The mean of some over one connection, in seconds. (passt needs a setting of the host's for a
    ping, net.ipv4.ping_group_range.)"""
    script = (
        "import socket, time\n"
        f"peer = socket.create_connection(('{_ADDRESS}', {_ECHO_PORT}))\n"
        "peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        "began = time.perf_counter()\n"
        f"for _ in range({_ROUND_TRIPS}): peer.sendall(b'x'); peer.recv(1)\n"
        f"print((time.perf_counter() - began) / {_ROUND_TRIPS})"
    )
    return float(home.banger("vm", "exec", vm, "--", "python3", "-c", script))


@contextmanager
def _town() -> Iterator[None]:
    """The two namespaces, joined by a cable; gone afterwards, with all that is in them."""
    with ExitStack() as stack:
        for namespace in (_HOST, _WORLD):
            subprocess.run(["ip", "netns", "add", namespace], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
        for argv in _TOWN:
            subprocess.run(argv, check=True)
        yield


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """This process, and those that it starts meanwhile, are there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as before, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            yield
        finally:
            libc.setns(before.fileno(), _CLONE_NEWNET)


@contextmanager
def _server(*argv: str) -> Iterator[None]:
    """A program out there, which says when it is listening."""
    words = ["ip", "netns", "exec", _WORLD, *argv]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        try:
            yield
        finally:
            server.terminate()
            server.communicate()
