"""Homes that a session's drivers configure, and which tests are about other ones."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import suite
from homes import new_home


@pytest.fixture
def over_firecracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.firecrackers.real", lambda: None)
    session = suite.Session(suite=suite.Suite("firecracker", "reflink"))
    monkeypatch.setattr("suite.session", session)


def settings(directory: Path, text: str) -> dict[str, object]:
    """What is in force in a home that a test has configured by `text`."""
    return tomllib.loads(new_home(directory).configure(text).read_text())


@pytest.mark.usefixtures("over_firecracker")
def test_homes_are_as_the_sessions_drivers_want_them_but_for_what_a_test_says(
    tmp_path: Path,
) -> None:
    text = 'storage = "qcow2"\nstandby_limit = 1\n[vm_defaults]\nnetwork = "x"'
    one, other = settings(tmp_path / "one", text), settings(tmp_path / "other", "")
    assert (one["hypervisor"], one["storage"], one["standby_limit"]) == ("firecracker", "qcow2", 1)
    assert (other["storage"], other["standby_limit"], other["network"]) == ("reflink", 0, "bridge")
    assert one["bridge_name"] != other["bridge_name"]
    assert one["bridge_cidr"] != other["bridge_cidr"]


def test_homes_of_other_sessions_say_nothing_of_drivers(tmp_path: Path) -> None:
    assert settings(tmp_path / "home", "") == {"standby_limit": 0}


@pytest.mark.parametrize(
    ("drivers", "left_out"),
    [
        ("qemu+qcow2", {"own", "guest"}),
        ("qemu+reflink", {"own", "guest", "qcow2"}),
        (
            "firecracker+reflink",
            {"own", "guest", "qcow2", "qemu", "user", "clients", "discard", "process", "outside"},
        ),
    ],
)
def test_what_drivers_have_not_is_known(
    drivers: str, left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.firecrackers.real", lambda: None)
    hypervisor, storage = drivers.split("+")
    assert suite._REASONS.keys() - suite.Suite(hypervisor, storage).words == left_out
