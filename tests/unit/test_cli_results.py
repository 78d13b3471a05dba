"""What the terminal shows of commands in several forks."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest
from rich.console import Console

from banger.base.model import ForkResult, ForkState, Operation, OperationState, Results, now
from banger.cli.main import run
from banger.cli.results import ForksView
from cli_daemon import Daemon

Captured = pytest.CaptureFixture[str]

_FORKS = (
    ForkResult(
        number=0, vm_id="a", vm_name="box-1", state=ForkState.DONE, exit_code=0, seconds=1.5,
        files=2, insertions=10, deletions=3,
    ),
    ForkResult(number=1, vm_id="b", vm_name="box-2"),
    ForkResult(
        number=2, vm_id="c", vm_name="box-3", state=ForkState.FAILED, seconds=0.25,
        error="lost \x1b[31m",
    ),
)  # fmt: skip


def results(directory: str = "/nowhere") -> Results:
    return Results(
        name="box",
        directory=directory,
        repo_root="/repo",
        command=("make", "test"),
        created_at=now(),
        forks=_FORKS,
    )


def event() -> msgspec.Raw:
    state = Operation(
        id="op-0123456789ab", kind="vm.run_forks", target="", state=OperationState.RUNNING,
        stage="run", detail="2 of 3", percent=66, started_at=now(), results=results(),
    )  # fmt: skip
    return msgspec.Raw(msgspec.json.encode(state))


def test_in_a_pipe_each_that_ends_is_a_line(capfd: Captured) -> None:
    with ForksView("vm", quiet=False) as view:
        view.event(event())
        view.event(event())
    assert capfd.readouterr().err.splitlines() == [
        "fork 0: 0, 1.5 s",
        "fork 2: failed: lost ?[31m, 0.2 s",
    ]


def test_on_a_terminal_there_is_a_table(monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    view = ForksView("vm", quiet=False)
    assert view.below() is None
    view.event(event())
    table = view.below()
    assert table is not None
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[1] == ["0", "0", "1.5", "s", "2", "+10", "-3", "box-1"]
    assert rows[2] == ["1", "running", "box-2"]
    assert "\x1b[31m" not in out.getvalue()
    assert capfd.readouterr().err == ""


def test_the_list_and_one_of_them(daemon: Daemon, capfd: Captured, tmp_path: Any) -> None:
    daemon.answers["results.list"] = lambda _: [results()]
    assert run(["vm", "results"]) == 0
    assert capfd.readouterr().out.splitlines()[1].split() == [
        "box", "3", "1", "0s", "make", "test"
    ]  # fmt: skip
    (tmp_path / "1.log").write_bytes(b"printed\xff\n")
    daemon.answers["results.show"] = lambda _: results(str(tmp_path))
    assert run(["vm", "results", "box", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["forks"][0]["insertions"] == 10
    assert run(["vm", "results", "box", "--diff", "1"]) == 1
    assert "have no 1.patch" in capfd.readouterr().err
