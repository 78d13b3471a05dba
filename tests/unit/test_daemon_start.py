"""How the daemon begins: its lock, what it tells the client that started it, and its log."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from banger.base.errors import Cancelled, Conflict, Internal
from banger.base.opid import current_op_id
from banger.base.paths import Paths
from banger.daemon import lock
from banger.daemon import main as daemon


@pytest.fixture
def paths(short_path: Path) -> Paths:
    made = Paths(*(short_path / name for name in ("c", "d", "s", "r/banger", "cache")))
    for directory in (made.runtime_dir, made.state_dir):
        directory.mkdir(mode=0o700, parents=True)
    return made


@pytest.fixture
def elsewhere(paths: Paths, short_path: Path) -> Paths:
    """Of the same home, with another runtime directory."""
    made = replace(paths, runtime_dir=short_path / "other/banger")
    made.runtime_dir.mkdir(mode=0o700, parents=True)
    return made


class Other:
    """Another daemon's lock, and its socket."""

    def __init__(self, lock: Path, note: str = "") -> None:
        self.descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        os.pwrite(self.descriptor, note.encode(), 0)
        self._listener = socket.socket(socket.AF_UNIX)

    def listen(self, path: Path) -> None:
        self._listener.bind(os.fspath(path))
        self._listener.listen()

    def end(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        self._listener.close()
        os.close(self.descriptor)


@pytest.fixture(params=["beside", "at home"])
def other(request: pytest.FixtureRequest, paths: Paths, elsewhere: Paths) -> Iterator[Other]:
    """One with the same runtime directory, or with another, on its way up or down."""
    if request.param == "beside":
        made = Other(paths.daemon_lock)
    else:
        made = Other(paths.home_lock, f"7 {elsewhere.runtime_dir}")
    with closing(made):
        yield made


async def have_locks(paths: Paths, stopping: asyncio.Event | None = None) -> None:
    async with asyncio.timeout(5), lock.only_daemon(paths, stopping or asyncio.Event()):
        pass


async def test_the_lock_of_a_daemon_that_is_stopping_is_waited_for(
    paths: Paths, other: Other
) -> None:
    waiting = asyncio.create_task(have_locks(paths))
    await asyncio.sleep(3 * lock._LOCK_INTERVAL_S)
    assert not waiting.done()
    other.end()
    await waiting


async def test_while_a_daemon_runs_it_has_both_locks(paths: Paths) -> None:
    async with lock.only_daemon(paths, asyncio.Event()):
        for path in (paths.daemon_lock, paths.home_lock):
            with path.open("rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    for path in (paths.daemon_lock, paths.home_lock):
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_daemon_that_answers_is_not_waited_for(paths: Paths) -> None:
    with closing(Other(paths.daemon_lock)) as other:
        other.listen(paths.daemon_socket)
        with pytest.raises(Conflict, match="another bangerd of this user is running"):
            await have_locks(paths)


async def test_a_home_has_one_daemon_whatever_the_runtime_directory(
    paths: Paths, elsewhere: Paths
) -> None:
    """A second one would take the first one's machines for what was left behind, and end them."""
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        async with lock.only_daemon(elsewhere, asyncio.Event()):
            listener.bind(os.fspath(elsewhere.daemon_socket))
            listener.listen()
            with pytest.raises(Conflict) as refused:
                await have_locks(paths)
    assert refused.value.message == (
        f"another bangerd serves {paths.state_dir}, with its sockets in {elsewhere.runtime_dir}"
        f" (pid {os.getpid()})"
    )
    assert refused.value.hint == (
        f"to use that one, set XDG_RUNTIME_DIR to {elsewhere.runtime_dir.parent}"
    )
    await have_locks(paths)
    assert paths.home_lock.read_text() == f"{os.getpid()} {paths.runtime_dir}"


async def test_a_daemon_whose_sockets_were_removed_is_said_to_be_in_the_way(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_S", 0.0)
    with (
        closing(Other(paths.home_lock, f"7 {paths.runtime_dir}")),
        pytest.raises(Conflict, match=r"\(pid 7\)") as refused,
    ):
        await have_locks(paths)
    assert refused.value.hint == "it is not to be reached: kill 7; machines run on"


@pytest.mark.parametrize("note", ["", "7", "7 ", "7 relative", "\0 /x", "x /x", f"7 /{'x' * 300}"])
async def test_whatever_is_in_a_lock_it_is_one(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_S", 0.0)
    with (
        closing(Other(paths.home_lock, note)),
        pytest.raises(Conflict, match="another bangerd serves"),
    ):
        await have_locks(paths)


@pytest.mark.usefixtures("other")
async def test_a_lock_that_is_never_given_up_is_said_to_be(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_S", 0.0)
    with pytest.raises(Conflict, match="another bangerd "):
        await have_locks(paths)


@pytest.mark.usefixtures("other")
async def test_who_waits_for_the_lock_can_be_stopped(paths: Paths) -> None:
    stopping = asyncio.Event()
    waiting = asyncio.create_task(have_locks(paths, stopping))
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
