"""`banger vm ssh` and `ssh-config`: what OpenSSH is told, and what becomes of its file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from banger.base import proc
from banger.base.config import load_config
from banger.base.errors import BadRequest, NotFound
from banger.base.paths import Paths
from banger.base.ssh import SshAccess, SshFiles
from banger.cli.main import run
from banger.rpc.protocol import Exit, FrameType, encode_json, frame
from banger.services.ssh import _host_keys
from cli_daemon import Daemon
from records import a_vm

Captured = pytest.CaptureFixture[str]

FILES = SshFiles(key="/home/a b/100%/id", known_hosts="/state/ssh/known_hosts")
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJc7Qx0t3zGZ2b8kU1qVZ3m3Yb0lq0o0b1c2d3e4f5g6"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CONFIG", "DATA", "STATE", "RUNTIME", "CACHE"):
        monkeypatch.delenv(f"XDG_{name}_{'DIR' if name == 'RUNTIME' else 'HOME'}", raising=False)
    return tmp_path


@pytest.fixture
def asked(daemon: Daemon) -> Daemon:
    daemon.answers["ssh.files"] = lambda _: FILES
    daemon.answers["vm.ssh"] = lambda _: SshAccess(vm_name="box", files=FILES)
    return daemon


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have taken our place."""
    seen: list[list[str]] = []
    monkeypatch.setattr(
        proc, "replace", lambda argv: seen.append([os.fspath(word) for word in argv])
    )
    return seen


@pytest.mark.usefixtures("home")
def test_what_openssh_is_told(asked: Daemon, capfd: Captured) -> None:
    assert run(["ssh-config"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = [line.strip() for line in out.splitlines()]
    assert "Host *.vm" in lines
    assert 'IdentityFile "/home/a b/100%%/id"' in lines
    assert 'UserKnownHostsFile "/state/ssh/known_hosts"' in lines
    assert {"StrictHostKeyChecking yes", "Port 22", "ForwardAgent no"} < set(lines)
    (command,) = (line for line in lines if line.startswith("ProxyCommand "))
    assert command.endswith(" vm proxy --ssh %r %h %p")
    assert asked.calls == [("ssh.files", {})]


@pytest.mark.parametrize("words", [["-v"], ["--", "ls", "-l"], ["-L", "1:localhost:2", "true"]])
def test_ssh_gets_all_that_follows_the_name(
    asked: Daemon, home: Path, replaced: list[list[str]], words: Sequence[str]
) -> None:
    asked.answers["vm.show"] = lambda _: a_vm("box")
    assert run(["vm", "ssh", "bo", *words]) == 0
    assert asked.calls == [("vm.show", {"vm": "bo"}), ("ssh.files", {})]
    config = home / ".local/state/banger/ssh/config"
    assert replaced == [["ssh", "-F", str(config), "box.vm", *words]]
    text = config.read_text()
    assert text.startswith("# Written by: banger ssh-config\nHost *.vm\n")
    assert text.endswith("Match all\n    Include ~/.ssh/config\n    Include /etc/ssh/ssh_config\n")
    assert config.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("home")
def test_a_failure_of_ours_has_a_status_of_its_own(
    daemon: Daemon, replaced: list[list[str]], capfd: Captured
) -> None:
    def refuse(_: dict[str, Any]) -> object:
        raise NotFound('vm "box" not found')

    daemon.answers["vm.show"] = refuse
    assert run(["vm", "ssh", "box.vm", "true"]) == 125
    assert 'vm "box" not found' in capfd.readouterr().err
    assert daemon.calls == [("vm.show", {"vm": "box"})]
    assert replaced == []


@pytest.mark.parametrize("words", [[], ["--ssh", "ann"]])
def test_a_proxy_has_the_machine_prepared_when_it_is_for_ssh(
    asked: Daemon, words: Sequence[str]
) -> None:
    asked.answers["vm.connect"] = lambda _: {}
    asked.sessions["vm.connect"] = lambda connection: connection.sendall(
        frame(FrameType.EXIT, encode_json(Exit(exit_code=0)))
    )
    assert run(["vm", "proxy", *words, "box.vm", "22"]) == 0
    connecting: dict[str, object] = {"vm": "box", "port": 22}
    expected: list[tuple[str, dict[str, object]]] = [("vm.connect", connecting)]
    if words:
        connecting["greeting_timeout_s"] = 30
        expected.insert(0, ("vm.ssh", {"vm": "box", "user": "ann"}))
    assert asked.calls == expected


def test_a_part_of_a_name_is_not_enough_for_ssh(asked: Daemon, capfd: Captured) -> None:
    """It would look for the keys of another."""
    assert run(["vm", "proxy", "--ssh", "root", "bo.vm", "22"]) == 1
    assert "ssh wants a whole name: box.vm" in capfd.readouterr().err
    assert [method for method, _ in asked.calls] == ["vm.ssh"]


def included(home: Path) -> Path:
    return home / ".config/banger/ssh_config"


@pytest.mark.parametrize(
    "before",
    [
        None,
        "",
        "Host x\n    User y",
        "# no end \udcff \x0c# >>> banger >>>",
        "\n\n",
        "Host x\r\n#\ré",
    ],
)
@pytest.mark.usefixtures("asked")
def test_what_is_installed_goes_without_a_trace(
    home: Path, capfd: Captured, before: str | None
) -> None:
    users = home / ".ssh/config"
    if before is not None:
        users.parent.mkdir(mode=0o700)
        users.write_bytes(os.fsencode(before))
        users.chmod(0o644)
    for _ in range(2):  # once more changes nothing
        assert run(["ssh-config", "--install"]) == 0
        block, _, rest = users.read_bytes().partition(b"# <<< banger <<<\n\n")
        assert block.startswith(b"# >>> banger >>>")
        assert f'\nInclude "{included(home)}"\n'.encode() in block
        assert rest == os.fsencode(before or "")
        assert "Host *.vm" in included(home).read_text()
    said = capfd.readouterr().err
    assert "leads into machines" in said
    assert f"ssh -F {users}" in said  # which reads the home of the password file
    assert users.parent.stat().st_mode & 0o777 == 0o700
    assert users.stat().st_mode & 0o777 == (0o600 if before is None else 0o644)
    for _ in range(2):
        assert run(["ssh-config", "--uninstall"]) == 0
        assert not included(home).exists()
        if before:
            assert users.read_bytes() == os.fsencode(before)
        else:
            assert not users.exists() or users.read_bytes() == b""
    assert [each.name for each in users.parent.iterdir()] in ([], ["config"])


@pytest.mark.usefixtures("asked")
def test_a_file_behind_a_link_stays_behind_it(home: Path) -> None:
    kept = home / "dotfiles"
    kept.write_text("Host x\n")
    users = home / ".ssh/config"
    users.parent.mkdir()
    users.symlink_to(kept)
    assert run(["ssh-config", "--install"]) == 0
    assert users.is_symlink()
    assert kept.read_text().endswith("\n\nHost x\n")
    assert run(["ssh-config", "--uninstall"]) == 0
    assert (users.is_symlink(), kept.read_text()) == (True, "Host x\n")


@pytest.mark.parametrize("verb", ["--install", "--uninstall"])
@pytest.mark.parametrize(
    "text",
    [
        "# >>> banger >>>\nInclude x\nHost y\n",
        "# >>> banger >>>\nInclude x\nHost mine\n# <<< banger <<<\n",
        "# >>> banger >>>\nHost mine\n# >>> banger >>>\nInclude x\n# <<< banger <<<\n",
    ],
)
@pytest.mark.usefixtures("asked")
def test_lines_that_were_changed_by_hand_are_left_alone(
    home: Path, capfd: Captured, verb: str, text: str
) -> None:
    users = home / ".ssh/config"
    users.parent.mkdir()
    users.write_text(text)
    assert run(["ssh-config", verb]) == 1
    assert "not as banger wrote them" in capfd.readouterr().err
    assert users.read_text() == text


@pytest.mark.usefixtures("asked")
def test_the_file_of_another_user_is_not_taken_over(
    home: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = home / ".ssh/config"
    users.parent.mkdir()
    users.write_text("Host x\n")
    monkeypatch.setattr("banger.cli.ssh.os.geteuid", lambda: os.getuid() + 1)
    assert run(["ssh-config", "--install"]) == 1
    assert "belongs to another user" in capfd.readouterr().err
    assert users.read_text() == "Host x\n"


def test_install_and_uninstall_exclude_each_other(daemon: Daemon) -> None:
    assert run(["ssh-config", "--install", "--uninstall"]) == 2
    assert daemon.calls == []


def test_the_key_may_be_anywhere_that_is_said_in_full(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    for good in ("", "~/.ssh/id_vm", "/keys/id"):
        file.write_text(f'ssh_key_path = "{good}"\n')
        assert load_config(file).ssh_key_path == good
    file.write_text('ssh_key_path = "keys/id"\n')
    with pytest.raises(BadRequest, match="neither absolute nor below"):
        load_config(file)


def test_of_what_a_guest_says_only_keys_are_known() -> None:
    said = "\n".join([
        f"{ED25519} root@box",
        f"@cert-authority * {ED25519}",
        f"* {ED25519}",
        "ssh-ed25519 short",
        "ssh-dss " + "A" * 100,
        f"{ED25519}\\nother.vm {ED25519}",
        "ssh-rsa " + "A" * 5000,
    ])  # fmt: skip
    assert _host_keys(said) == [ED25519]
    assert len(_host_keys(f"{ED25519}\n" * 100)) == 8


def test_files_lie_where_the_table_of_paths_has_them(home: Path) -> None:
    paths = Paths.from_environment()
    assert paths.ssh_key == home / ".local/share/banger/ssh/id_ed25519"
    assert paths.ssh_known_hosts == home / ".local/state/banger/ssh/known_hosts"
