"""One command in several forks of a real machine, and what is kept of each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import repositories as repos
import suite
from homes import Home
from product import Banger, finish, until
from repositories import git

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_FORKS = 3


@pytest.fixture(scope="module")
def with_default(banger: Banger, default_image: str) -> Banger:
    """The command, with the default image, which has git, built."""
    if default_image not in {each["name"] for each in banger.json("image", "list")}:
        assert banger.run("image", "build", default_image, timeout_s=800).returncode == 0
    return banger


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return repos.changed(tmp_path / "host")


@pytest.fixture
def clean(with_default: Banger) -> Iterator[Banger]:
    """Without results, before and after."""
    yield with_default
    for each in with_default.json("vm", "results"):
        with_default.ok("vm", "results", each["name"], "--delete", "-q")


def run_forks(banger: Banger, root: Path, script: str, *options: str) -> tuple[int, dict[str, Any]]:
    """The status, and the results, of `script` in forks."""
    before = {each["name"] for each in banger.json("vm", "results")}
    words = ("vm", "run", "-q", str(root), "--fork", str(_FORKS), *options)
    done = banger.run(*words, "--", "sh", "-c", script)
    (found,) = (each for each in banger.json("vm", "results") if each["name"] not in before)
    return done.returncode, found


def test_each_has_its_status_its_log_and_its_patch(clean: Banger, root: Path) -> None:
    script = 'echo "I am $BANGER_FORK"; echo $BANGER_FORK >mine; cat README; exit $BANGER_FORK'
    status, results = run_forks(clean, root, script, "--rm")
    assert status == 1
    assert [fork["exit_code"] for fork in results["forks"]] == list(range(_FORKS))
    assert all(fork["state"] == "done" for fork in results["forks"])
    assert [fork["files"] for fork in results["forks"]] == [1] * _FORKS
    assert not [vm for vm in clean.json("vm", "list") if vm["name"].startswith(results["name"])]
    name = results["name"]
    for number in range(_FORKS):
        log = clean.ok("vm", "results", name, "--log", str(number))
        assert log == f"I am {number}\nchanged\n"
    assert "+2\n" in clean.ok("vm", "results", name, "--diff", "2")
    before = repos.tree(root)
    clean.ok("vm", "results", name, "--apply", "1", "--delete", "-q")
    assert repos.tree(root) == before | {b"mine": ("f", b"1\n")}
    assert clean.json("vm", "results") == []
    assert not Path(results["directory"]).exists()


def test_forks_are_kept_until_they_are_deleted(clean: Banger, root: Path) -> None:
    status, results = run_forks(clean, root, "hostname >/tmp/here")
    assert status == 0
    names = [fork["vm_name"] for fork in results["forks"]]
    for name in names:
        assert clean.guest(name, "cat /tmp/here") == f"{name}\n"
    assert clean.state(results["name"]) == ""  # what they are forks of
    part = results["name"][:-1]
    assert "the whole name" in clean.fails("vm", "results", part, "--delete", status=1)
    clean.ok("vm", "results", results["name"], "--delete", "-q")
    assert [clean.state(name) for name in names] == [""] * _FORKS


def test_one_that_is_lost_is_no_harm_to_the_others(clean: Banger, root: Path) -> None:
    script = f"echo done >mine; if [ $BANGER_FORK = 1 ]; then {suite.power_off()}; fi; sleep 3"
    status, results = run_forks(clean, root, script, "--rm")
    assert status == 1
    assert [fork["exit_code"] for fork in results["forks"]] == [0, None, 0]
    assert results["forks"][1]["state"] == "failed"
    assert results["forks"][1]["error"]
    assert [fork["files"] for fork in results["forks"]] == [1, None, 1]


def test_broken_off_it_keeps_what_there_is(clean: Banger, root: Path) -> None:
    running = clean.start(
        *("vm", "run", root, "--fork", "2", "--rm", "--name", "broken"),
        *("--", "sh", "-c", "echo begun; echo begun >mine; exec sleep 1000"),
    )

    def begun() -> bool:
        found = [each for each in clean.json("vm", "results") if each["name"] == "broken"]
        logs = [Path(each["directory"]) / f"{n}.log" for each in found for n in range(2)]
        return bool(logs) and all(log.exists() and log.read_text() for log in logs)

    until(begun, "both commands have begun")
    delete = ("vm", "results", "broken", "--delete")
    assert "are under way" in clean.fails(*delete, status=1)
    running.send_signal(signal.SIGINT)
    assert finish(running)[0] == 130
    results = clean.json("vm", "results", "broken")
    assert [fork["error"] for fork in results["forks"]] == ["broken off"] * 2
    assert [fork["files"] for fork in results["forks"]] == [1, 1]
    assert not [vm for vm in clean.json("vm", "list") if vm["name"].startswith("broken")]
    git(root, "apply", "--check", Path(results["directory"]) / "0.patch")


def test_a_repository_that_cannot_go_leaves_nothing(home: Home, tmp_path: Path) -> None:
    root = repos.with_submodules(tmp_path)
    told = home.banger.fails("vm", "run", root, "--fork", "2", "--", "true", status=125)
    assert "does not support git submodules" in told
    assert home.banger.json("vm", "list") == []
    assert home.banger.json("vm", "results") == []


def test_usage(banger: Banger, root: Path) -> None:
    for words in (
        ("vm", "run", root, "--fork", "2"),
        ("vm", "run", root, "--fork", "0", "--", "true"),
        ("vm", "run", root, "--fork", "2", "-d", "--", "true"),
        ("vm", "run", root, "--fork", "2", "--export", "x", "--", "true"),
        ("vm", "results", "--apply", "1"),
        ("vm", "results", "x", "--apply", "1", "--log", "1"),
    ):
        banger.fails(*words, status=2)
    assert "not found" in banger.fails("vm", "results", "nobody", status=1)
