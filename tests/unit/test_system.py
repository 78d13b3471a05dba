"""What `banger system` writes and reads, and whom it believes; tests/host has the rest."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base import paths, trust
from banger.base.errors import NotFound, PreconditionFailed
from banger.base.install import Installation
from banger.base.notify import take_notifier
from banger.base.paths import SYSTEM_RUNTIME_DIR, Paths
from banger.hostops.mappings import mapping_uuid
from banger.rpc.client import _announces
from banger.system import install, systemd, udev
from banger.system.install import install_text
from banger.system.units import DAEMON, HELPER, Owner, quoted, unit_texts

_ANN = Owner("ann", 1000, 1001)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def settings(text: str, name: str) -> list[str]:
    """The values of a unit's setting, in their order."""
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def test_the_helper_is_root_with_few_capabilities_and_little_to_write_to() -> None:
    text = unit_texts(_ANN, "/opt/banger/bin/python3")[HELPER]
    assert settings(text, "ExecStart") == ['"/opt/banger/bin/python3" -I -m banger.hostops.helper']
    assert settings(text, "User") == []
    assert settings(text, "NoNewPrivileges") == ["yes"]
    assert settings(text, "ProtectSystem") == ["strict"]
    assert settings(text, "ReadWritePaths") == ["/proc/sys/net"]
    (bounds,) = settings(text.replace("\\\n", ""), "CapabilityBoundingSet")
    assert len(bounds.split()) == 8
    # CAP_DAC_OVERRIDE is there, for Firecracker's jailer makes files in a directory of another's.
    more = {"CAP_SYS_MODULE", "CAP_SYS_PTRACE", "CAP_KILL", "CAP_SYS_RAWIO", "CAP_SETPCAP"}
    assert not more & set(bounds.split())


def test_a_machine_in_a_jail_outlives_the_helper() -> None:
    """Its control group is none of the unit's, which systemd ends with the unit."""
    text = unit_texts(_ANN, "/opt/banger/bin/python3")[HELPER]
    assert settings(text, "ProtectControlGroups") == ["no"]


def test_the_daemon_is_the_owner_and_its_end_is_not_that_of_machines() -> None:
    text = unit_texts(_ANN, "/opt/banger/bin/python3")[DAEMON]
    assert settings(text, "User") == ["1000"]
    assert settings(text, "Group") == ["1001"]
    assert settings(text, "KillMode") == ["process"]
    assert settings(text, "OOMPolicy") == ["continue"]
    assert settings(text, "RuntimeDirectory") == [SYSTEM_RUNTIME_DIR.name]
    assert settings(text, "RuntimeDirectoryPreserve") == ["yes"]


def test_the_daemon_can_build_images() -> None:
    """newuidmap is setuid: systemd.exec(5) says what brings NoNewPrivileges with it."""
    text = unit_texts(_ANN, "/opt/banger/bin/python3")[DAEMON]
    for name in (
        *("NoNewPrivileges", "SystemCallFilter", "SystemCallArchitectures", "PrivateDevices"),
        *("RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"),
        *("MemoryDenyWriteExecute", "LockPersonality", "ProtectKernelTunables", "ProtectHostname"),
        *("ProtectKernelModules", "ProtectKernelLogs", "ProtectClock"),
    ):
        assert settings(text, name) == []


@given(_TEXT)
def test_a_quoted_word_ends_where_it_ends(text: str) -> None:
    inside = quoted(text)[1:-1]
    assert not re.search(r'(?<!\\)(\\\\)*"', inside)
    assert "%" not in inside.replace("%%", "")
    assert "$" not in inside.replace("$$", "")


@given(_TEXT, _TEXT, st.lists(_TEXT, max_size=4))
def test_what_is_written_of_an_installation_is_what_is_read(
    owner: str, python: str, created: list[str]
) -> None:
    found = Installation(
        owner=owner, owner_uid=7, version="1.2", python=python, created=tuple(created)
    )
    assert msgspec.toml.decode(install_text(found), type=Installation) == found


@pytest.fixture
def of_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Below which it is installed: there is an udev."""
    for directory in ("units", "rules"):
        (tmp_path / directory).mkdir()
    monkeypatch.setattr(install, "INSTALL_FILE", tmp_path / "banger/install.toml")
    monkeypatch.setattr(install, "UNIT_DIR", tmp_path / "units")
    monkeypatch.setattr(install, "RULES_FILE", tmp_path / "rules/12-banger.rules")
    return tmp_path


def files(directory: Path) -> list[str]:
    return sorted(str(each.relative_to(directory)) for each in directory.rglob("*"))


def read_installation(directory: Path) -> Installation:
    return msgspec.toml.decode((directory / "banger/install.toml").read_text(), type=Installation)


def test_what_was_made_goes_and_nothing_else(of_system: Path) -> None:
    before = files(of_system)
    install._write_files(_ANN, "/opt/python", None)
    there = ["rules/12-banger.rules", *(f"units/{name}" for name in sorted((HELPER, DAEMON)))]
    assert set(files(of_system)) - set(before) == {"banger", "banger/install.toml", *there}
    install._remove_files(read_installation(of_system))
    assert files(of_system) == before


def test_an_upgrade_takes_away_later_what_it_has_added(of_system: Path) -> None:
    before = files(of_system)
    install._write_files(_ANN, "/opt/python", None)
    found = read_installation(of_system)
    earlier = msgspec.structs.replace(
        found, created=tuple(each for each in found.created if "rules" not in each)
    )
    (of_system / "rules/12-banger.rules").unlink()
    install._write_files(_ANN, "/opt/python", earlier)
    install._remove_files(read_installation(of_system))
    assert files(of_system) == before


def test_a_host_without_udev_gets_no_rules_for_it(of_system: Path) -> None:
    (of_system / "rules").rmdir()
    install._write_files(_ANN, "/opt/python", None)
    assert not (of_system / "rules").exists()
    install._remove_files(read_installation(of_system))


def test_the_rules_come_before_those_that_read_devices() -> None:
    assert udev.RULES_FILE.name < "13-dm-disk.rules" < "60-persistent-storage-dm.rules"
    assert udev.RULES_FILE.name > "10-dm.rules"
    lines = udev.RULES.replace("\\\n", "").splitlines()
    (mapping,) = (line for line in lines if "dm/uuid" in line)
    assert mapping_uuid("0123456789ab", "89abcdef", 7).startswith("BANGER-")
    assert 'ATTR{dm/uuid}=="BANGER-*"' in mapping
    for line in lines:
        if line.startswith("KERNEL"):
            assert line.endswith('OPTIONS:="nowatch"')


def test_the_state_of_a_unit_is_read_and_one_that_is_not_there_is_inactive() -> None:
    shown = "ActiveState=active\nMainPID=12\nNRestarts=3\nStatusText=a=b\nUnitFileState=enabled\n"
    state = systemd.parse_state("x.service", shown)
    assert (state.active, state.pid, state.restarts, state.status) == ("active", 12, 3, "a=b")
    assert state.runs
    gone = systemd.parse_state("y.service", "ActiveState=inactive\nUnitFileState=\nMainPID=0\n")
    assert (gone.runs, gone.starts, gone.restarts, gone.enabled) == (False, False, 0, "")


def test_the_way_to_a_file_has_what_its_links_lead_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link").symlink_to("../real")
    (tmp_path / "first").symlink_to(tmp_path / "other/link")
    way = list(trust._way_to(tmp_path / "first/file"))
    names = [str(path.relative_to(tmp_path)) for path in way if path.is_relative_to(tmp_path)]
    assert [name for name in dict.fromkeys(names) if name != "."] == [
        *("first", "other", "other/link", "real", "real/file"),
    ]
    (tmp_path / "loop").symlink_to("loop")
    assert len(list(trust._way_to(tmp_path / "loop"))) < 100


def test_what_others_can_write_is_found_and_what_is_roots_is_not(tmp_path: Path) -> None:
    assert trust.first_doubtful(Path("/usr/bin/env")) is None
    assert trust.first_doubtful(Path("/usr/share/doc/coreutils")) is None
    assert trust.first_doubtful(tmp_path) is not None  # in /tmp, whoever owns it


@pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root, to make what is root's")
def test_one_file_of_somebody_elses_is_found_below_what_is_roots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trust, "_way_to", lambda path: iter((path,)))  # /tmp is everybody's
    tmp_path.chmod(0o755)
    (tmp_path / "a/b").mkdir(parents=True)
    file = tmp_path / "a/b/module.py"
    file.touch()
    assert trust.first_doubtful(tmp_path) is None
    for uid, mode in ((12345, 0o644), (0, 0o664), (0, 0o646)):
        os.chown(file, uid, 0)
        file.chmod(mode)
        assert trust.first_doubtful(tmp_path) == file
    file.chmod(0o644)
    (tmp_path / "a/link").symlink_to("b")
    assert trust.first_doubtful(tmp_path) is None


def _as_owner(patch: pytest.MonkeyPatch, uid: int) -> Paths:
    found = Installation(owner="ann", owner_uid=uid, version="1")
    patch.setattr(paths, "load_installation", lambda path: found)
    return Paths.from_environment()


def test_the_owner_of_an_installation_has_its_daemon_wherever_xdg_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paths, "_is_usual", lambda state_dir: True)
    assert _as_owner(monkeypatch, os.getuid()).runtime_dir == SYSTEM_RUNTIME_DIR
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert _as_owner(monkeypatch, os.getuid()).of_system


def test_others_and_other_homes_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _as_owner(monkeypatch, os.getuid()).of_system  # HOME is the tests' own
    monkeypatch.setattr(paths, "_is_usual", lambda state_dir: True)
    assert not _as_owner(monkeypatch, os.getuid() + 1).of_system


def test_an_installation_that_is_not_believed_is_an_error_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path) -> Installation:
        raise PreconditionFailed("anybody could have written it")

    monkeypatch.setattr(paths, "_is_usual", lambda state_dir: True)
    monkeypatch.setattr(paths, "load_installation", refuse)
    with pytest.raises(PreconditionFailed):
        Paths.from_environment()

    def miss(path: Path) -> Installation:
        raise NotFound("none")

    monkeypatch.setattr(paths, "load_installation", miss)
    assert not Paths.from_environment().of_system


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_once_and_children_are_not_asked_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool
) -> None:
    name = f"banger-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0{name}" if abstract else str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else str(tmp_path / "notify"))
        notify = take_notifier()
        assert "NOTIFY_SOCKET" not in os.environ
        notify("READY=1")
        server.settimeout(5)
        assert server.recv(100) == b"READY=1"
    notify("STOPPING=1")  # nobody is there any more
    take_notifier()("READY=1")  # nor was


def test_a_daemon_that_waits_for_its_helper_is_waited_for() -> None:
    """Killed with it, it is inactive until that is ready, and has a job."""
    assert _announces("ActiveState=inactive\nJob=1234\n")
    assert _announces("ActiveState=activating\n")
    for gone in ("ActiveState=inactive\n", "ActiveState=failed\nJob=0\n", ""):
        assert not _announces(gone)
