"""The CLI is quick because of what it does not import: looked at in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import banger.cli

MODULES = sorted(
    f"banger.cli.{path.stem}"
    for path in Path(banger.cli.__file__).parent.glob("*.py")
    if path.stem != "__init__"
)

#: Slow to import (asyncio 86 ms, rich.console 76, structlog 201, sqlite3 22), or the daemon's side.
NOT_IN_THE_CLI = {
    "asyncio",
    "httpx",
    "qemu",
    "rich",
    "sqlite3",
    "structlog",
    "subprocess",
    "banger.base.log",
    "banger.base.proc",
    "banger.daemon",
    "banger.drivers",
    "banger.guest",
    "banger.hostops",
    "banger.images",
    "banger.rpc.server",
    "banger.services",
    "banger.store",
    "banger.system",
}

#: Both are imported when they are called: `vm cp` runs tar, `vm stats --watch` draws.
ALLOWED = {
    "banger.cli.copy": {"asyncio", "subprocess", "banger.base.proc"},
    "banger.cli.dashboard": {"rich"},
}


def imported_by(module: str) -> set[str]:
    """The modules in a new interpreter after it imported this one."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_importing_the_cli_imports_nothing_slow(module: str) -> None:
    assert imported_by(module) & NOT_IN_THE_CLI <= ALLOWED.get(module, set())


def test_a_daemon_does_not_import_at_its_start_what_only_pulls_need() -> None:
    assert "httpx" not in imported_by("banger.daemon.main")


def test_the_look_sees_what_is_imported() -> None:
    assert {"asyncio", "banger.base.log"} <= imported_by("banger.base.proc, banger.base.log")
