"""How the daemon begins: its lock, what it tells the client that started it, and its log."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from banger.base.errors import Cancelled, Conflict, Internal
from banger.base.opid import current_op_id
from banger.base.paths import Paths
from banger.daemon import main as daemon


@pytest.fixture
def paths(short_path: Path) -> Paths:
    made = Paths(*(short_path / name for name in ("c", "d", "s", "r", "cache")))
    made.runtime_dir.mkdir(mode=0o700)
    return made


@pytest.fixture
def other(paths: Paths) -> Iterator[int]:
    """Another daemon's lock; closed, that daemon is gone."""
    descriptor = os.open(paths.daemon_lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield descriptor
    os.close(descriptor)


async def test_the_lock_of_a_daemon_that_is_stopping_is_waited_for(
    paths: Paths, other: int
) -> None:
    waiting = asyncio.create_task(daemon._lock(paths, asyncio.Event()))
    await asyncio.sleep(3 * daemon._LOCK_INTERVAL_S)
    assert not waiting.done()
    fcntl.flock(other, fcntl.LOCK_UN)
    lock = await asyncio.wait_for(waiting, 5)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


@pytest.mark.usefixtures("other")
async def test_a_daemon_that_answers_is_not_waited_for(paths: Paths) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(paths.daemon_socket))
        listener.listen()
        with pytest.raises(Conflict, match="another bangerd of this user is running"):
            await asyncio.wait_for(daemon._lock(paths, asyncio.Event()), 5)


@pytest.mark.usefixtures("other")
async def test_a_lock_that_is_never_given_up_is_said_to_be(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "LOCK_TIMEOUT_S", 0.0)
    with pytest.raises(Conflict, match="another bangerd of this user is running"):
        await asyncio.wait_for(daemon._lock(paths, asyncio.Event()), 5)


@pytest.mark.usefixtures("other")
async def test_who_waits_for_the_lock_can_be_stopped(paths: Paths) -> None:
    stopping = asyncio.Event()
    waiting = asyncio.create_task(daemon._lock(paths, stopping))
    await asyncio.sleep(0)
    stopping.set()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(waiting, 5)


def test_a_starter_that_has_gone_is_no_reason_to_fail() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    daemon._tell_starter(writable, b"ready\n")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writable)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    before = structlog.get_config()
    token = current_op_id.set("")
    handlers = list(logging.getLogger().handlers)
    yield
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = handlers
    current_op_id.reset(token)
    structlog.configure(**before)


@pytest.mark.usefixtures("logging_as_before")
def test_a_crash_is_a_record_with_its_traceback_and_a_sentence_for_the_starter(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object) -> None:
        logging.getLogger("asyncio").warning("it %s", "ails")
        raise ZeroDivisionError("a detail")

    monkeypatch.setattr(daemon, "_run", crash)
    with pytest.raises(Internal, match="bangerd failed: ZeroDivisionError"):
        daemon._run_logged(paths, -1)
    warning, failure = map(json.loads, paths.daemon_log.read_text().splitlines())
    assert (warning["message"], warning["logger"]) == ("it ails", "asyncio")
    assert failure["message"] == "bangerd failed"
    assert failure["exception"][0]["exc_value"] == "a detail"
    assert failure["op_id"] == warning["op_id"] != ""
