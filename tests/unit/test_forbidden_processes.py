"""The guard in `conftest.py` itself: every way to start a process fails the unit test."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

TRUE = "/bin/true"


def _asyncio_exec() -> object:
    return asyncio.run(_subprocess())


async def _subprocess() -> object:
    return await asyncio.create_subprocess_exec(TRUE)


def _fork() -> object:
    # Should the guard fail, the child must not go on as a second test run.
    if (pid := os.fork()) == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


def _forkpty() -> object:
    pid, _ = os.forkpty()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([TRUE]),
        lambda: subprocess.Popen([TRUE]),
        _asyncio_exec,
        _fork,
        _forkpty,
        lambda: os.system(TRUE),
        lambda: os.popen(TRUE),
        lambda: os.posix_spawn(TRUE, [TRUE], {}),
        lambda: os.spawnv(os.P_WAIT, TRUE, [TRUE]),
        lambda: os.execv("/nonexistent", ["nonexistent"]),
        lambda: multiprocessing.get_context("fork").Process(target=print).start(),
    ],
)
def test_no_way_to_start_a_process_works(start: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="tried to start a process"):
        start()


def test_an_event_loop_works_without_processes() -> None:
    async def nothing() -> str:
        await asyncio.to_thread(lambda: None)
        return sys.platform

    assert asyncio.run(nothing()) == "linux"
