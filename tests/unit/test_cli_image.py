"""`banger image build --from`: what is asked of the daemon, what is shown of its output."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from banger.base.errors import BadRequest
from banger.base.model import ErrorInfo, Operation, OperationState, now
from banger.cli import image_build
from banger.cli.main import run
from cli_daemon import Daemon
from records import an_image

Captured = pytest.CaptureFixture[str]

_OP_ID = "op-0123456789ab"


def state(stage: str, **fields: Any) -> Operation:
    values: dict[str, Any] = {"state": OperationState.RUNNING, "detail": "", "percent": -1}
    return Operation(
        id=_OP_ID, kind="image.build", target="mine", stage=stage, started_at=now(),
        **(values | fields),
    )  # fmt: skip


@pytest.fixture
def begun(daemon: Daemon, tmp_path: Path) -> Daemon:
    log = {"operation_id": _OP_ID, "log": str(tmp_path / "log")}
    daemon.answers["image.make.begin"] = lambda _: log
    daemon.answers["operations.watch"] = lambda _: state(
        "finish", state=OperationState.COMPLETED, image=an_image("mine", size_bytes=1 << 20)
    )
    return daemon


def test_a_build_is_asked_for_with_the_content_of_its_scripts(
    begun: Daemon, tmp_path: Path, capfd: Captured
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(f"#!/bin/{name}\0\xff".encode("latin-1"))
    arguments = ["--packages", "git,jq", "--packages", "tree less", "--vcpu", "2"]
    for name in ("b", "a"):
        arguments += ["--run", str(tmp_path / name)]
    assert run(["image", "build", "mine", "--from", "base", *arguments]) == 0
    assert capfd.readouterr().out == "mine (1 MiB)\n"
    method, params = begun.calls[0]
    contents = {name: (tmp_path / name).read_bytes() for name in ("b", "a")}
    scripts = [
        {"name": name, "content": base64.b64encode(content).decode()}
        for name, content in contents.items()
    ]
    assert (method, params) == (
        "image.make.begin",
        {
            "name": "mine",
            "source": "base",
            "packages": ["git", "jq", "tree", "less"],
            "scripts": scripts,
            "vcpu_count": 2,
            "memory_mib": None,
            "disk_size_mib": None,
        },
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "SCRIPT"], "--from IMAGE"),
        (["--packages", "git"], "--from IMAGE"),
        (["--memory", "1G"], "--from IMAGE"),
        (["--verbose"], "--from IMAGE"),
        (["--from", "../x"], "not a valid"),
        (["--from", "base", "--run", "no-such"], "No such file"),
        (["--from", "base", "--run", "."], "directory"),
        (["--from", "base", "--run", "LARGE"], "too large"),
        (["--from", "base", "--run", "SCRIPT", "--run", "SCRIPT", "--run", "SCRIPT"], "together"),
    ],
)
def test_a_wrong_build_is_2_and_calls_nobody(
    daemon: Daemon,
    capfd: Captured,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_build, "_SCRIPTS_MAX_BYTES", 10)
    Path("SCRIPT").write_text("true")
    Path("LARGE").write_text("x" * 11)
    assert run(["image", "build", "mine", *arguments]) == 2
    assert said in capfd.readouterr().err
    assert daemon.calls == []


def test_what_the_daemon_refuses_is_told(daemon: Daemon, capfd: Captured) -> None:
    def refuse(_: dict[str, Any]) -> object:
        raise BadRequest('"mine" would be as "base" is', hint="say what to change")

    daemon.answers["image.make.begin"] = refuse
    assert run(["image", "build", "mine", "--from", "base"]) == 1
    assert 'error: "mine" would be as "base" is' in capfd.readouterr().err


def test_all_that_is_printed_is_shown_when_that_is_wanted(
    begun: Daemon, tmp_path: Path, capfd: Captured
) -> None:
    (tmp_path / "log").write_bytes(b"== packages: git\nget\x1b[2J\n== script\n\xff last")
    begun.events["operations.watch"] = [state("vm"), state("packages"), state("script")]
    assert run(["image", "build", "mine", "--from", "base", "--packages", "git", "-v"]) == 0
    out, err = capfd.readouterr()
    assert out == "mine (1 MiB)\n"
    lines = err.splitlines()
    assert lines[-1] == "\ufffd last"
    assert lines.count("get?[2J") == 1
    assert [line for line in lines if line.startswith("image mine: ")] == [
        "image mine: vm", "image mine: packages", "image mine: script",
    ]  # fmt: skip
    assert run(["image", "build", "mine", "--from", "base", "--packages", "git"]) == 0
    assert "get" not in capfd.readouterr().err


def test_a_build_that_failed_says_why_after_its_output(
    begun: Daemon, tmp_path: Path, capfd: Captured
) -> None:
    (tmp_path / "log").write_text("no newline at the end")
    error = ErrorInfo(code="precondition_failed", message="it failed; inspect LOG", op_id=_OP_ID)
    begun.answers["operations.watch"] = lambda _: state(
        "script", state=OperationState.FAILED, error=error
    )
    assert run(["image", "build", "mine", "--from", "base", "--run", __file__, "-v"]) == 1
    assert capfd.readouterr().err == (
        f"no newline at the end\nerror: it failed; inspect LOG ({_OP_ID})\n"
    )
