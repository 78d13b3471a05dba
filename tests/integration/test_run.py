"""The main job: a command in a fresh machine, with its status, its bytes, and nothing of ours."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from homes import Home
from product import IMAGE, Banger, finish, read_until
from tiny_guest import speaking_guest

pytestmark = pytest.mark.guest


def test_a_command_runs_on_a_machine_of_its_own_and_nothing_stays(
    banger: Banger, image: str
) -> None:
    answer = banger.ok("vm", "run", "--rm", "--image", image, "--name", "mine", "--", "uname", "-n")
    assert answer == "mine\n"
    assert banger.json("vm", "list") == []


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -9 $$"), 137),
        (("/nowhere",), 127),
        (("/etc/passwd",), 126),
    ],
    ids=["exited", "killed", "not-found", "not-executable"],
)
def test_the_status_is_the_commands_and_rm_deletes_whatever_it_is(
    banger: Banger, image: str, command: tuple[str, ...], status: int
) -> None:
    banger.fails("vm", "run", "--rm", "--image", image, "--name", "st", "--", *command,
                 status=status)  # fmt: skip
    assert banger.state("st") == ""


def test_bytes_pass_unchanged_and_stdout_has_nothing_of_ours(banger: Banger, image: str) -> None:
    data = os.urandom(300_000)
    done = banger.run("vm", "run", "--rm", "--image", image, "--", "sh", "-c",
                      "cat; printf 'a\\0\\377' >&2", stdin=data)  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == data
    assert done.stderr.endswith(b"a\0\xff")
    assert re.fullmatch(rb"(vm( \S+)?: .*\n)*a\0\xff", done.stderr)


def test_quiet_says_nothing_at_all(banger: Banger, image: str) -> None:
    done = banger.run("vm", "run", "-q", "--rm", "--image", image, "--", "echo", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n", b"")


def test_variables_are_given_or_passed_on(image: str, banger: Banger) -> None:
    caller = Banger({"PASSED": "a b\n$x", "NOT_PASSED": "secret"})
    answer = caller.ok("run", "--rm", "--image", image, "--env", "GIVEN=1=2", "-e", "PASSED",
                       "-e", "UNSET", "--", "env")  # fmt: skip
    assert "GIVEN=1=2\n" in answer
    assert "PASSED=a b\n$x\n" in answer
    assert "UNSET" not in answer
    assert "secret" not in answer


def test_without_rm_it_stays_and_says_how_to_end_it(banger: Banger, image: str) -> None:
    done = banger.run("vm", "run", "--image", image, "--", "sh", "-c", "echo x > /root/f; exit 3")
    assert done.returncode == 3
    hint = re.search(rb"vm (\S+) keeps running; .* (delete --force \S+)\n", done.stderr)
    assert hint, done.stderr
    name = hint[1].decode()
    assert banger.state(name) == "running"
    assert banger.guest(name, "cat /root/f") == "x\n"
    banger.ok("vm", *hint[2].decode().split())
    assert banger.state(name) == ""


def test_detached_it_prints_the_name_and_the_console_has_the_output(
    banger: Banger, image: str
) -> None:
    script = "echo detached-output; exec sleep 1000"
    name = banger.ok("vm", "run", "-q", "-d", "--image", image, "--", "sh", "-c", script)
    name = name.removesuffix("\n")
    try:
        assert banger.state(name) == "running"
        assert banger.guest(name, "pidof sleep").strip().isdigit()
        follower = banger.start("vm", "logs", "-f", name)
        assert follower.stdout is not None
        assert b"detached-output" in read_until(follower.stdout, b"detached-output")
        follower.terminate()
        finish(follower)
        assert "detached-output" in banger.ok("vm", "logs", name)
    finally:
        banger.ok("vm", "delete", "--force", name)


@pytest.mark.parametrize(
    "words",
    [
        ("--rm", "--detach", "--", "true"),
        ("--",),
        ("--memory", "lots", "--", "true"),
        ("--name", "Not Valid", "--", "true"),
        ("--vcpu", "0", "--", "true"),
        ("--boot-timeout", "0", "--", "true"),
        ("--env", "=x", "--", "true"),
        ("--no-such-option",),
    ],
    ids=" ".join,
)
def test_wrong_use_is_status_2_and_makes_nothing(banger: Banger, words: tuple[str, ...]) -> None:
    said = banger.fails("vm", "run", *words, status=2)
    assert "Usage: banger vm run" in said
    assert "Error: " in said


def test_an_unknown_image_is_status_125_and_says_what_to_do(banger: Banger) -> None:
    said = banger.fails("vm", "run", "--image", "no-such", "--", "true", status=125)
    assert re.search(r'error: image "no-such" not found \(op-[0-9a-f]{12}\)', said)
    assert "hint: see: banger image list" in said


def test_a_name_that_is_taken_is_refused_and_its_owner_untouched(
    banger: Banger, vm: str, image: str
) -> None:
    before = banger.json("vm", "show", vm)
    said = banger.fails("vm", "run", "--rm", "--image", image, "--name", vm, "--", "true",
                        status=125)  # fmt: skip
    assert f'"{vm}"' in said
    assert "already" in said
    # Its guest may write meanwhile.
    assert banger.json("vm", "show", vm) | {"disk_bytes": 0} == before | {"disk_bytes": 0}
    assert banger.guest(vm, "echo alive") == "alive\n"


@pytest.mark.parametrize("remove", [(), ("--rm",)], ids=["kept", "rm"])
def test_a_guest_that_never_answers_is_kept_with_its_last_words(
    home: Home, remove: tuple[str, ...]
) -> None:
    (kernel,) = home.data.glob("kernels/*/vmlinux")
    kernel.write_bytes(speaking_guest(b"last words\x1b[31m\n"))
    banger = home.banger
    said = banger.fails("vm", "run", *remove, "--image", IMAGE, "--name", "mute",
                        "--boot-timeout", "2", "--", "true", status=125)  # fmt: skip
    assert 'the guest of vm "mute" did not come up: no answer within 2 s' in said
    assert "the end of its console:\nlast words?[31m\n" in said
    assert "hint: the VM is kept: banger vm logs mute, then banger vm start or delete it" in said
    assert banger.state("mute") == "error"
    assert home.machines() == []
    assert "last words" in banger.ok("vm", "logs", "mute")
    assert "no answer within 2 s" in banger.ok("vm", "show", "mute")
    assert "did not come up" in banger.fails("vm", "exec", "mute", "--", "true", status=125)
    # A daemon that starts anew leaves it, too, for whoever looks.
    banger.ok("daemon", "restart")
    assert banger.state("mute") == "error"
    banger.ok("vm", "delete", "mute")
    assert banger.json("vm", "list") == []


def test_a_machine_that_ends_while_it_boots_is_noticed_at_once(home: Home) -> None:
    """Its root file system is one of zeros behind a superblock that looks right."""
    rootfs = Path(home.banger.json("image", "show", IMAGE)["rootfs_path"])
    size = rootfs.stat().st_size
    with rootfs.open("r+b") as file:
        file.truncate(4096)
        file.truncate(size)
    said = home.banger.fails("vm", "run", "--image", IMAGE, "--name", "zeros", "--", "true",
                             status=125)  # fmt: skip
    assert "the machine ended while it booted" in said
    assert "banger: fatal: " in said
    assert home.banger.state("zeros") == "error"
