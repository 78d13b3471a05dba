"""`vm exec`: bytes, streams, options, and many at once in one guest."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import suite
from product import Banger, finish, read_until

pytestmark = pytest.mark.guest

MIB = 1 << 20


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_100_mb_come_back_identical(banger: Banger, vm: str, tmp_path: Path) -> None:
    source, echo = tmp_path / "source", tmp_path / "echo"
    with source.open("wb") as file:
        for _ in range(100):
            file.write(os.urandom(1_000_000))
    with source.open("rb") as stdin, echo.open("wb") as stdout:
        argv = banger.argv("vm", "exec", vm, "--", "cat")
        subprocess.run(argv, stdin=stdin, stdout=stdout, timeout=200, check=True)
    assert _digest(echo) == _digest(source)


def test_50_at_once_each_get_their_own_answer(banger: Banger, vm: str) -> None:
    script = "cat; echo err$1 >&2; exit $1"
    processes = [
        banger.start("vm", "exec", vm, "--", "sh", "-c", script, "sh", str(number),
                     stdin=subprocess.PIPE)
        for number in range(50)
    ]  # fmt: skip
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(b"%d " % number * 1000)
        process.stdin.flush()
    for number, process in enumerate(processes):
        answer = finish(process, timeout_s=120)
        assert answer == (number, b"%d " % number * 1000, b"err%d\n" % number)


def test_directory_user_and_variables(banger: Banger, vm: str) -> None:
    banger.guest(vm, "useradd --create-home someone")
    answer = banger.ok("vm", "exec", "-w", "/usr/lib", "-u", "someone", "-e", "A=b c", vm, "--",
                       "sh", "-c", "pwd; id -un; id -gn; echo $A; echo $HOME $USER")  # fmt: skip
    assert answer == "/usr/lib\nsomeone\nsomeone\nb c\n/home/someone someone\n"
    assert banger.ok("vm", "exec", "-u", "33", vm, "--", "id", "-u") == "33\n"
    assert banger.guest(vm, "pwd; echo $HOME $USER") == "/root\n/root root\n"


def test_wrong_options_say_what_is_wrong(banger: Banger, vm: str) -> None:
    said = banger.fails("vm", "exec", "-u", "nobody-here", vm, "--", "true", status=125)
    assert "nobody-here" in said
    said = banger.fails("vm", "exec", "-w", "/no/where", vm, "--", "true", status=125)
    assert "/no/where" in said
    assert "Usage:" in banger.fails("vm", "exec", vm, status=2)
    assert "Usage:" in banger.fails("vm", "exec", "-t", vm, "--", "true", status=2)
    said = banger.fails("vm", "exec", "no-such-vm", "--", "true", status=125)
    assert 'vm "no-such-vm" not found' in said


@pytest.mark.parametrize(
    ("script", "status"), [("exit 42", 42), ("kill -TERM $$", 143), ("exit 125", 125)]
)
def test_the_status_is_the_commands(banger: Banger, vm: str, script: str, status: int) -> None:
    assert banger.fails("vm", "exec", vm, "--", "sh", "-c", script, status=status) == ""


def test_arguments_pass_unchanged(banger: Banger, vm: str) -> None:
    words = ["", " ", "a b", "'\"$x`\\", "-n", "--", "new\nline", "é\U0001f600", "x" * 100_000]
    answer = banger.run("vm", "exec", vm, "--", "printf", "%s\\0", *words)
    assert answer.stdout.decode() == "".join(f"{word}\0" for word in words)


def test_a_stopped_vm_is_an_error_of_ours(banger: Banger, make_vm: Callable[..., str]) -> None:
    name = make_vm()
    assert banger.ok("vm", "stop", name) == f"{name}\n"
    said = banger.fails("vm", "exec", name, "--", "true", status=125)
    assert f'vm "{name}" is stopped' in said
    assert banger.ok("vm", "stop", name) == f"{name}\n", "stopping is idempotent"


def test_a_vm_that_powers_itself_off_ends_its_sessions(
    banger: Banger, make_vm: Callable[..., str]
) -> None:
    name = make_vm()
    script = f"{suite.power_off()}; sleep 1000"
    said = banger.fails("vm", "exec", name, "--", "sh", "-c", script, status=125)
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert banger.state(name) == "stopped"
    said = banger.fails("vm", "exec", name, "--", "true", status=125)
    assert f'vm "{name}" is stopped' in said


def test_a_client_that_stops_reading_stalls_nobody_else(banger: Banger, vm: str) -> None:
    with banger.start("vm", "exec", vm, "--", "cat", "/dev/zero") as stuck:
        assert stuck.stdout is not None
        read_until(stuck.stdout, b"\0")
        for number in range(5):
            assert banger.guest(vm, f"echo {number}") == f"{number}\n"
        stuck.kill()
    banger.guest(vm, "while pidof cat; do sleep 0.1; done")


def test_a_reader_that_goes_ends_the_command(banger: Banger, vm: str) -> None:
    process = banger.start("vm", "exec", vm, "--", "yes")
    assert process.stdout is not None
    read_until(process.stdout, b"y\n")
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert (status, err) == (141, b"")
    banger.guest(vm, "while pidof yes; do sleep 0.1; done")


def test_output_that_cannot_be_written_is_an_error_of_ours(banger: Banger, vm: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            banger.argv("vm", "exec", vm, "--", "echo", "x"),
            stdout=full, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 125
    assert done.stderr.startswith(b"error: ")
    assert b"No space left on device" in done.stderr


def test_a_closed_stdin_is_an_empty_one(banger: Banger, vm: str) -> None:
    argv = ["sh", "-c", 'exec "$@" <&-', "sh", *banger.argv("vm", "exec", vm, "--", "wc", "-c")]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\n", b"")


def test_closed_outputs_do_not_keep_a_command_from_its_status(banger: Banger, vm: str) -> None:
    argv = banger.argv("vm", "exec", vm, "--", "sh", "-c", "echo out; echo err >&2; exit 6")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *argv],
        stdin=subprocess.DEVNULL, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 6


def test_what_a_command_does_not_read_is_no_error(banger: Banger, vm: str) -> None:
    done = banger.run("vm", "exec", vm, "--", "head", "-c", "3", stdin=b"abc" + bytes(8 * MIB))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"abc", b"")


def test_stderr_is_apart_and_as_bytes(banger: Banger, vm: str) -> None:
    script = "head -c 3000000 /dev/zero >&2; echo out; printf '\\377' >&2"
    done = banger.run("vm", "exec", vm, "--", "sh", "-c", script)
    assert done.stdout == b"out\n"
    assert done.stderr == bytes(3_000_000) + b"\xff"


def test_a_killed_client_hangs_up_its_whole_command(banger: Banger, vm: str) -> None:
    process = banger.start("vm", "exec", vm, "--", "sh", "-c", "sleep 1000 & echo $!; wait")
    assert process.stdout is not None
    child = int(read_until(process.stdout, b"\n"))
    process.kill()
    finish(process)
    banger.guest(vm, f"while test -e /proc/{child}; do sleep 0.1; done")


def test_a_command_ends_though_a_child_keeps_its_output(banger: Banger, vm: str) -> None:
    """As under ssh without a terminal, a daemon that was started must not hold the client."""
    answer = banger.guest(vm, "sleep 1234 </dev/null >/dev/null 2>&1 & echo done")
    assert answer == "done\n"
