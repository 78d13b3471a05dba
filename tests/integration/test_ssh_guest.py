"""OpenSSH's own client on real guests, by way of the agent: with the keys that banger gave it."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from homes import Home
from product import Banger, finish, until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_DEFAULT = "debian-bookworm"
#: In a guest: a server that answers a connection with as many bytes as came, once all have.
_COUNTS = """
import socket
with socket.create_server(("127.0.0.1", 4000)) as server:
    while True:
        peer, _ = server.accept()
        with peer, peer.makefile("rb") as file:
            peer.sendall(b"%d\\n" % len(file.read()))
"""


@pytest.fixture(scope="module")
def box(banger: Banger, default_image: str) -> Iterator[str]:
    """A VM of the default image, without a network."""
    made = banger.run("vm", "run", "-d", "--name", "sshbox", "--network", "none", timeout_s=800)
    assert made.returncode == 0, made.stderr
    yield "sshbox"
    banger.ok("vm", "delete", "--force", "sshbox")


@pytest.fixture
def config(banger: Banger, tmp_path: Path) -> Path:
    """What `banger ssh-config` prints, as a file."""
    file = tmp_path / "config"
    file.write_text(banger.ok("ssh-config"))
    return file


def _ssh(config: Path, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    argv = ["ssh", "-F", str(config), "-o", "BatchMode=yes", *words]
    return subprocess.run(argv, input=stdin, capture_output=True, timeout=100)


def test_a_command_with_its_input_and_its_status(banger: Banger, box: str) -> None:
    done = banger.run("vm", "ssh", box, "read line; echo $line; id -un; exit 7", stdin=b"hello\n")
    assert (done.returncode, done.stdout) == (7, b"hello\nroot\n"), done.stderr
    assert done.stderr == b""


def test_as_openssh_is_used_everywhere(banger: Banger, box: str, config: Path) -> None:
    data = random.Random(5).randbytes(3_000_000)
    done = _ssh(config, f"{box}.vm", "md5sum", stdin=data)
    assert done.stdout.split()[:1] == [hashlib.md5(data).hexdigest().encode()], done.stderr
    source = config.with_name("source")
    source.write_bytes(data)
    copy = ["scp", "-q", "-F", str(config), str(source), f"{box}.vm:/tmp/copy"]
    subprocess.run(copy, check=True, timeout=100)
    assert banger.guest(box, "md5sum </tmp/copy").split()[0] == hashlib.md5(data).hexdigest()


def test_nobody_else_can_pretend_to_be_the_machine(box: str, config: Path) -> None:
    unknown = config.with_name("none")
    done = _ssh(config, "-o", f"UserKnownHostsFile={unknown}", f"{box}.vm", "true")
    assert done.returncode == 255
    assert b"Host key verification failed" in done.stderr
    assert not unknown.exists()


def test_the_key_is_there_once_and_beside_others(banger: Banger, box: str, config: Path) -> None:
    banger.guest(box, "printf 'ssh-ed25519 AAAA other' >/root/.ssh/authorized_keys")
    for _ in range(2):
        assert _ssh(config, f"{box}.vm", "true").returncode == 0
    keys = banger.guest(box, "cat /root/.ssh/authorized_keys").splitlines()
    assert keys[0] == "ssh-ed25519 AAAA other"
    assert len(keys) == 2
    assert banger.guest(box, "stat -c %a /root/.ssh/authorized_keys") == "600\n"


def test_another_user(banger: Banger, box: str, config: Path) -> None:
    banger.guest(box, "useradd --create-home worker")
    assert _ssh(config, f"worker@{box}.vm", "id -un").stdout == b"worker\n"
    assert banger.run("vm", "ssh", box, "-l", "worker", "id -un").stdout == b"worker\n"
    done = _ssh(config, f"nobody-here@{box}.vm", "true")
    assert done.returncode == 255
    assert b"nobody-here" in done.stderr


def test_a_machine_that_takes_the_name_of_another_is_not_mistaken_for_it(
    banger: Banger, box: str, config: Path, make_vm: Callable[..., str]
) -> None:
    other = make_vm("--image", _DEFAULT, "--memory", "512M")
    hosts = [_ssh(config, f"{name}.vm", "hostname").stdout for name in (box, other)]
    assert hosts == [f"{box}\n".encode(), f"{other}\n".encode()]
    banger.ok("vm", "set", box, "--name", "renamed")
    banger.ok("vm", "set", other, "--name", box)
    try:
        done = _ssh(config, f"{box}.vm", "hostname")
        assert (done.returncode, done.stdout) == (0, f"{box}\n".encode()), done.stderr
        known = (Path(os.environ["XDG_STATE_HOME"]) / "banger/ssh/known_hosts").read_text()
        assert {line.split()[0] for line in known.splitlines()} == {f"{box}.vm"}
    finally:
        banger.ok("vm", "set", box, "--name", other)
        banger.ok("vm", "set", "renamed", "--name", box)


def test_a_copy_has_keys_of_its_own_and_is_reached_at_once(
    banger: Banger, box: str, config: Path
) -> None:
    (copy,) = banger.ok("vm", "fork", "-q", box).split()
    try:
        for name in (copy, box):
            done = _ssh(config, f"{name}.vm", "hostname")
            assert (done.returncode, done.stdout) == (0, f"{name}\n".encode()), done.stderr
        keys = [banger.guest(name, "cat /etc/ssh/ssh_host_*.pub") for name in (copy, box)]
        assert keys[0] != keys[1]
    finally:
        banger.ok("vm", "delete", "--force", copy)


def test_a_port_with_both_directions_closed_on_their_own(banger: Banger, box: str) -> None:
    serving = banger.start("vm", "exec", box, "--", "python3", "-c", _COUNTS)
    try:
        until(lambda: "4000" in banger.ok("vm", "ports", box), "it listens")
        for count in (0, 1, 2_000_000):
            done = banger.run("vm", "proxy", box, "4000", stdin=bytes(count))
            assert (done.returncode, done.stdout) == (0, f"{count}\n".encode()), done.stderr
    finally:
        serving.send_signal(2)
        finish(serving)


def test_what_cannot_be_reached_is_told(banger: Banger, box: str, image: str) -> None:
    said = banger.fails("vm", "proxy", box, "4999", status=125)
    assert f'port 4999 of vm "{box}"' in said
    assert f"banger vm ports {box}" in said
    assert 'vm "nothing" not found' in banger.fails("vm", "ssh", "nothing", status=125)
    banger.ok("vm", "run", "-q", "-d", "--image", image, "--name", "bare")
    try:
        said = banger.fails("vm", "ssh", "bare", "true", status=255)
        assert 'vm "bare": there is no sshd in it' in said
        assert "banger vm shell bare" in said
        banger.ok("vm", "stop", "bare")
        said = banger.fails("vm", "ssh", "bare", "true", status=255)
        assert "banger vm start bare" in said
    finally:
        banger.ok("vm", "delete", "--force", "bare")


def test_a_key_where_the_user_wants_it(bare_home: Home) -> None:
    bare_home.configure('ssh_key_path = "~/keys/mine"')
    key = bare_home.directory / "keys/mine"
    told = bare_home.banger.ok("ssh-config")
    assert f'IdentityFile "{key}"' in told
    assert key.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in sorted(key.parent.iterdir())] == ["mine", "mine.pub"]
    secret = key.read_bytes()
    key.with_name("mine.pub").unlink()
    assert bare_home.banger.ok("ssh-config") == told
    assert key.read_bytes() == secret
    argv = ["ssh-keygen", "-q", "-p", "-N", "a passphrase", "-P", "", "-f", str(key)]
    subprocess.run(argv, check=True, capture_output=True)
    said = bare_home.banger.fails("ssh-config", status=1)
    assert f"put it into {key}.pub" in said


def test_it_can_be_used_as_soon_as_a_machine_is_there(banger: Banger) -> None:
    for cold in ((), ("--cold",)):
        banger.ok("vm", "create", "-q", *cold, "--memory", "512M", "--name", "fresh")
        try:
            assert banger.run("vm", "ssh", "fresh", "hostname").stdout == b"fresh\n"
        finally:
            banger.ok("vm", "delete", "--force", "fresh")
