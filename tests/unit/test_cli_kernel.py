"""The commands of `banger kernel`: what they send, and what they print."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from banger.base.model import ErrorInfo, Kernel, Operation, OperationState, now
from banger.cli.main import run
from banger.images.catalog import parse_catalog
from cli_daemon import Daemon
from records import a_kernel

Captured = pytest.CaptureFixture[str]

BEGUN = "op-0123456789ab"


def ended(**fields: Any) -> Operation:
    values: dict[str, Any] = {
        "id": BEGUN,
        "kind": "kernel",
        "target": "mine",
        "state": OperationState.COMPLETED,
        "stage": "finish",
        "detail": "",
        "percent": -1.0,
        "started_at": now(),
    }
    return Operation(**values | fields)


def making(daemon: Daemon, method: str, kernel: Kernel) -> None:
    daemon.answers[method] = lambda _: {"operation_id": BEGUN}
    daemon.answers["operations.watch"] = lambda _: ended(kernel=kernel)


@pytest.mark.parametrize("verb", ["build", "pull"])
def test_a_kernel_that_was_made_is_named(daemon: Daemon, capfd: Captured, verb: str) -> None:
    making(daemon, f"kernel.{verb}.begin", a_kernel("mine", version="6.1", size_bytes=1 << 20))
    assert run(["kernel", verb, "mine"]) == 0
    assert daemon.calls == [
        (f"kernel.{verb}.begin", {"kernel": "mine"}),
        ("operations.watch", {"id": BEGUN}),
    ]
    assert capfd.readouterr() == ("mine (6.1, 1 MiB)\n", "")
    assert run(["kernel", verb, "mine", "--json", "--quiet"]) == 0
    assert '"name": "mine"' in capfd.readouterr().out


def test_an_import_names_its_files_as_the_daemon_finds_them(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    making(daemon, "kernel.import.begin", a_kernel("mine"))
    for name in ("vmlinux", "config"):
        (tmp_path / name).touch()
    (tmp_path / "modules").mkdir()
    assert run(["kernel", "import", "vmlinux", "--name", "mine"]) == 0
    assert daemon.calls[0][1] == {
        "name": "mine", "file": str(tmp_path / "vmlinux"), "modules": "", "config": "",
    }  # fmt: skip
    options = ["--modules", "modules", "--config", str(tmp_path / "config")]
    assert run(["kernel", "import", "vmlinux", "--name", "mine", *options]) == 0
    assert daemon.calls[2][1] == {
        "name": "mine",
        "file": str(tmp_path / "vmlinux"),
        "modules": str(tmp_path / "modules"),
        "config": str(tmp_path / "config"),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "/dev/null"],
        ["import", "/none", "--name", "mine"],
        ["import", "/dev/null", "--name", "../x"],
        ["import", "/dev/null", "--name", "mine", "--modules", __file__],
        ["pull", "A"],
        ["delete", ""],
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    daemon: Daemon, capfd: Captured, arguments: list[str]
) -> None:
    assert run(["kernel", *arguments]) == 2
    assert daemon.calls == []


def test_an_export_prints_what_a_catalog_says_of_it(
    daemon: Daemon, capfd: Captured, tmp_path: Path
) -> None:
    file = tmp_path / 'a "bundle".tar.zst'
    file.write_bytes(b"content")
    making(daemon, "kernel.export.begin", a_kernel("mine"))
    assert run(["kernel", "export", "mine", str(file)]) == 0
    _, params = daemon.calls[0]
    assert (params["kernel"], params["file"]) == ("mine", str(file))
    entry = capfd.readouterr().out
    catalog = parse_catalog(f"version = 1\n{entry}".encode(), "https://example.org/c")
    found = catalog.kernel("mine", "x86_64")
    assert found.sha256 == hashlib.sha256(b"content").hexdigest()
    assert found.size_bytes == 7
    assert found.url == "https://example.org/a%20%22bundle%22.tar.zst"


def test_a_failure_is_said_with_its_operation(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["kernel.pull.begin"] = lambda _: {"operation_id": BEGUN}
    error = ErrorInfo(code="not_found", message="no such", hint="do this", op_id=BEGUN)
    daemon.answers["operations.watch"] = lambda _: ended(state=OperationState.FAILED, error=error)
    assert run(["kernel", "pull", "mine"]) == 1
    assert capfd.readouterr().err == f"error: no such ({BEGUN})\nhint: do this\n"


def test_a_kernel_that_was_deleted_is_named(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["kernel.delete"] = lambda params: a_kernel(params["kernel"])
    assert run(["kernel", "delete", "mine"]) == 0
    assert capfd.readouterr().out == "mine\n"
