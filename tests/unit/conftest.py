"""Unit tests cannot start processes: one that tries fails, with the name of what it called.

The interpreter's own audit events are watched, so it does not matter by which module, reference
or thread the call is made. An audit hook cannot be taken away again; outside unit tests it is
switched off.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.cli import app
from banger.rpc.client import Client
from cli_daemon import Daemon

# https://docs.python.org/3/library/audit_events.html
_STARTS_A_PROCESS = frozenset(
    {
        "subprocess.Popen",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "pty.spawn",
    }
)

_forbidden = False


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _forbidden and event in _STARTS_A_PROCESS:
        # Not an Exception: product code that catches those must not swallow it.
        pytest.fail(
            f"a unit test tried to start a process: {event}{arguments[:2]!r}; "
            "fake the tool, or make it an integration test",
        )


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def forbid_processes() -> Iterator[None]:
    global _forbidden
    _forbidden = True
    try:
        yield
    finally:
        _forbidden = False


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As `tmp_path`, but short enough for the sockets of a VM: those are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon for the command line, which reads nothing from stdin."""
    made = Daemon()
    monkeypatch.setattr(Client, "connect", made.connect)
    monkeypatch.setattr(app, "_connections", [])
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield made
        for client in app._connections:
            client.close()
        made.close()
