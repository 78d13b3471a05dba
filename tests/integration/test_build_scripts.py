"""The scripts that a build runs in its guest, on this machine: who is asked for what.

(With a real guest, and apt: test_image_from_guest.py.)
"""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path

import pytest

_PACKAGES = (resources.files("banger.services") / "guest" / "packages.sh").read_text()


def _install(tools: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    """Run the script where there is nothing but `tools`."""
    argv = ["/bin/sh", "-c", _PACKAGES, "packages", *packages]
    return subprocess.run(
        argv, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60, check=False
    )


def _fake(tools: Path, name: str, status: int = 0) -> None:
    tool = tools / name
    tool.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {status}\n')
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("manager", "calls"),
    [
        ("apk", ["apk add --no-cache -- a b"]),
        ("dnf", ["dnf install -y --setopt=install_weak_deps=False a b", "dnf clean all"]),
        (
            "zypper",
            ["zypper --non-interactive install --no-recommends -- a b", "zypper clean --all"],
        ),
        ("pacman", ["pacman -Syu --noconfirm --needed -- a b", "pacman -Scc --noconfirm"]),
    ],
)
def test_the_manager_that_there_is_installs_and_cleans_up(
    tmp_path: Path, manager: str, calls: list[str]
) -> None:
    _fake(tmp_path, manager)
    done = _install(tmp_path, "a", "b")
    assert (done.returncode, done.stdout.splitlines()) == (0, calls)
    _fake(tmp_path, manager, status=3)
    done = _install(tmp_path, "a", "b")
    assert (done.returncode, done.stdout.splitlines()) == (3, calls[:1])


def test_without_a_manager_the_status_says_so(tmp_path: Path) -> None:
    done = _install(tmp_path, "a")
    assert (done.returncode, done.stdout, done.stderr) == (90, "", "")
