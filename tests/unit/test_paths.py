"""Paths: XDG's rules, components that stay components, directories nobody else can enter."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from banger.base.errors import BadRequest, PermissionDenied, PreconditionFailed
from banger.base.paths import (
    SYSTEM_RUNTIME_DIR,
    UNIX_SOCKET_PATH_MAX,
    Paths,
    check_socket_path,
    prepare_private_dir,
    safe_component,
    way_to,
)


def paths(root: Path) -> Paths:
    return Paths(root / "config", root / "data", root / "state", root / "run", root / "cache")


def from_environment(patch: pytest.MonkeyPatch, **environment: str) -> Paths:
    for name in ("CONFIG_HOME", "DATA_HOME", "STATE_HOME", "RUNTIME_DIR", "CACHE_HOME"):
        patch.delenv(f"XDG_{name}", raising=False)
    for name, value in environment.items():
        patch.setenv(name, value)
    return Paths.from_environment()


def test_the_defaults_are_those_of_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    found = from_environment(monkeypatch, HOME="/home/x")
    assert found.config_file == Path("/home/x/.config/banger/config.toml")
    assert found.images_dir == Path("/home/x/.local/share/banger/images")
    assert found.database == Path("/home/x/.local/state/banger/banger.db")
    assert found.downloads_dir == Path("/home/x/.cache/banger/downloads")
    assert found.runtime_dir.parent == Path("/tmp")
    assert found.runtime_dir.name.startswith(f"banger-runtime-{os.getuid()}")


def test_without_a_runtime_directory_the_users_home_has_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = pwd.getpwuid(os.getuid()).pw_dir
    own = from_environment(monkeypatch, HOME=home)
    assert own.runtime_dir == Path(f"/tmp/banger-runtime-{os.getuid()}")
    other = from_environment(monkeypatch, HOME="/home/x")
    assert other.runtime_dir != own.runtime_dir
    assert from_environment(monkeypatch, HOME="/home/x") == other


def test_a_uid_without_a_passwd_entry_has_a_runtime_directory_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    found = from_environment(monkeypatch, HOME="/home/x")
    assert found.runtime_dir.name.startswith("banger-runtime-987654321")


def test_xdg_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    found = from_environment(
        monkeypatch,
        HOME="/home/x",
        XDG_CONFIG_HOME="/c",
        XDG_DATA_HOME="/d",
        XDG_STATE_HOME="/s",
        XDG_RUNTIME_DIR="/run/user/7",
        XDG_CACHE_HOME="/x",
    )
    assert found == Paths(
        Path("/c/banger"),
        Path("/d/banger"),
        Path("/s/banger"),
        Path("/run/user/7/banger"),
        Path("/x/banger"),
    )


def test_the_way_to_a_daemon_leads_to_its_runtime_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = from_environment(monkeypatch, HOME="/home/x", XDG_RUNTIME_DIR="/run/user/7")
    assert way_to(named.runtime_dir) == "to use that one, set XDG_RUNTIME_DIR to /run/user/7"
    without = from_environment(monkeypatch, HOME="/home/x")
    assert way_to(without.runtime_dir) == "to use that one, unset XDG_RUNTIME_DIR"
    assert "systemctl" in way_to(SYSTEM_RUNTIME_DIR)


def test_relative_and_empty_xdg_values_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = from_environment(monkeypatch, HOME="/home/x")
    for value in ("", "relative", "./x", "~/x"):
        found = from_environment(
            monkeypatch,
            XDG_CONFIG_HOME=value,
            XDG_DATA_HOME=value,
            XDG_STATE_HOME=value,
            XDG_RUNTIME_DIR=value,
            XDG_CACHE_HOME=value,
        )
        assert found == defaults


@given(st.text())
@example("..")
@example(".")
@example("a\n")
@example("")
@example("-rf")
@example("a/b")
@example("a\0b")
def test_a_safe_component_stays_one_component(name: str) -> None:
    try:
        component = safe_component(name)
    except BadRequest:
        return
    assert component == name
    path = Path("/base") / component
    assert path.parent == Path("/base")
    assert Path(os.path.normpath(path)) == path
    assert not name.startswith(("-", "."))


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "a\n", "-x", ".hidden", "x" * 129])
def test_paths_of_such_ids_cannot_be_made(tmp_path: Path, name: str) -> None:
    table = paths(tmp_path)
    for make in (table.vm, table.image_dir, table.kernel_dir):
        with pytest.raises(BadRequest):
            make(name)


def test_all_files_of_a_vm_lie_in_its_two_directories(tmp_path: Path) -> None:
    vm = paths(tmp_path).vm("0123456789ab")
    for path in (vm.system_overlay, vm.work_disk, vm.console_log, vm.handles, vm.network_log):
        assert path.parent == vm.directory == tmp_path / "state/vms/0123456789ab"
    for path in (vm.control_socket, vm.agent_socket):
        assert path.parent == vm.runtime == tmp_path / "run/vms/0123456789ab"


def test_a_private_directory_is_made_for_its_owner_alone_and_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    prepare_private_dir(directory)
    prepare_private_dir(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_link_is_refused_even_to_a_private_directory(tmp_path: Path) -> None:
    prepare_private_dir(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to("real")
    with pytest.raises(PermissionDenied, match="symbolic link"):
        prepare_private_dir(link)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(PermissionDenied, match="symbolic link"):
        prepare_private_dir(tmp_path / "dangling")


@pytest.mark.parametrize("mode", [0o755, 0o701, 0o770, 0o710])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(PermissionDenied, match=f"its mode is {mode:04o}, not 0700") as caught:
        prepare_private_dir(directory)
    assert "XDG_RUNTIME_DIR" in caught.value.hint


def test_somebody_elses_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "theirs"
    prepare_private_dir(directory)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(PermissionDenied, match=f"belongs to uid {owner}"):
        prepare_private_dir(directory)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermissionDenied, match="not a directory"):
        prepare_private_dir(tmp_path / "file")
    with pytest.raises(PreconditionFailed, match="cannot make"):
        prepare_private_dir(tmp_path / "file" / "below")


@pytest.mark.parametrize("spare", [0, 1])
def test_the_longest_socket_path_that_passes_is_the_longest_that_binds(spare: int) -> None:
    # Abstract and relative names do not count: the path itself has its NUL in sun_path.
    path = Path("/nonexistent-directory/".ljust(UNIX_SOCKET_PATH_MAX + spare, "x"))
    with socket.socket(socket.AF_UNIX) as bound:
        if spare:
            with pytest.raises(PreconditionFailed, match="longer than 107 bytes"):
                check_socket_path(path)
            with pytest.raises(OSError, match="too long"):
                bound.connect(str(path))
        else:
            check_socket_path(path)
            with pytest.raises(FileNotFoundError):
                bound.connect(str(path))


def test_a_socket_path_is_measured_in_bytes() -> None:
    with pytest.raises(PreconditionFailed):
        check_socket_path(Path("/" + "ü" * 60))
