"""Homes that a session's drivers configure, and which tests are about other ones."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import firecrackers
import suite
from banger.drivers.hypervisor.kvm import KvmProbe
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


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has all that the tests with Firecracker need; its directory of parameters."""
    for name in ("real", "jailer"):
        monkeypatch.setattr(firecrackers, name, lambda: tmp_path)
    monkeypatch.setattr(firecrackers, "_probed", lambda: KvmProbe(True, "a vCPU ran"))
    monkeypatch.setattr("banger.drivers.hypervisor.kvm._obstacle", lambda _: None)
    monkeypatch.setattr(firecrackers, "DESCRIPTION", tmp_path)
    nested = tmp_path / "nested"
    nested.write_text("Y\n")
    monkeypatch.setattr(firecrackers, "_NESTED", [tmp_path / "other", nested])
    return tmp_path


@pytest.mark.usefixtures("equipped")
def test_where_firecracker_can_run_nothing_is_said_to_be_missing() -> None:
    assert firecrackers.lacks() == []


@pytest.mark.usefixtures("equipped")
def test_a_kvm_that_is_not_fit_for_it_here_keeps_no_test_from_a_guest_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(firecrackers, "_probed", lambda: KvmProbe(False, "a vCPU hangs"))
    monkeypatch.setattr(firecrackers, "_NESTED", [])
    assert firecrackers.lacks() == [
        "here, not with the real Firecracker: KVM runs no guest here: a vCPU hangs"
    ]


@pytest.mark.usefixtures("equipped")
def test_programs_that_are_not_there_are_missed_where_they_would_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("real", "jailer"):
        monkeypatch.setattr(firecrackers, name, lambda: None)
    places = [(line.partition(",")[0], line.split(": ")[1]) for line in firecrackers.lacks()]
    assert places == [
        ("here", "firecracker is not on PATH"),
        ("on a guest as the host", "firecracker is not on PATH"),
        ("on a guest as the host", "jailer, of the same release, is not on PATH"),
    ]


def test_what_else_is_not_there_is_told_beforehand(
    equipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (equipped / "nested").write_text("N\n")
    monkeypatch.setattr(firecrackers, "DESCRIPTION", equipped / "nowhere")
    obstacle = KvmProbe(False, "there is no KVM")
    monkeypatch.setattr("banger.drivers.hypervisor.kvm._obstacle", lambda _: obstacle)
    jailed = "on a guest as the host, not with the real Firecracker in jails"
    assert firecrackers.lacks() == [
        f"here, not the driver's integration tests: {firecrackers.NO_DESCRIPTION}",
        "here, not a daemon with the stand-in: there is no KVM",
        f"{jailed}: {firecrackers.NO_NESTING}",
    ]
