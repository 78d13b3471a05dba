"""The look at what a session leaves behind finds it, ends it, and touches nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import leftovers

pytest_plugins = ["pytester"]

# It speaks once it runs: until then /proc shows no command line.
SLEEPER = ("sh", "-c", "echo; read line")


@contextmanager
def _sleeper(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        SLEEPER,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_process_is_found_by_its_environment_and_ended(tmp_path: Path) -> None:
    with _sleeper({"XDG_RUNTIME_DIR": str(tmp_path)}) as process:
        (found,) = leftovers.processes_of(tmp_path)
        assert found.pid == process.pid
        leftovers.end(found, tmp_path)
        assert process.wait(timeout=5) < 0


def test_a_process_is_found_by_its_command_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.touch()
    with _sleeper({}), subprocess.Popen(["tail", "-f", file], stdout=subprocess.PIPE) as process:
        try:
            file.write_text("now it runs\n")
            assert process.stdout is not None
            process.stdout.readline()
            assert [each.pid for each in leftovers.processes_of(tmp_path)] == [process.pid]
        finally:
            process.kill()


def test_a_process_that_does_not_name_the_directory_is_never_ended(tmp_path: Path) -> None:
    with _sleeper({}) as process:
        assert leftovers.processes_of(tmp_path) == []
        leftovers.end(leftovers.Process(process.pid, "a pid used again"), tmp_path)
        assert process.poll() is None


def test_a_session_that_leaves_a_process_fails(pytester: pytest.Pytester) -> None:
    tests = Path(__file__).parent.parent
    for file in tests.glob("*.py"):
        pytester.path.joinpath(file.name).write_text(file.read_text())
    pytester.makepyfile(
        """
        import subprocess

        def test_that_forgets_its_child():
            # It speaks once it runs: until then /proc shows no environment.
            child = subprocess.Popen(["tail", "-f", __file__], stdout=subprocess.PIPE)
            child.stdout.readline()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "default")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left behind: process * tail -f *"])
