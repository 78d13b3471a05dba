"""A client that is interrupted, ended or killed: what becomes of its VM and its command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from homes import Home
from product import Banger, finish, read_until, until

pytestmark = pytest.mark.guest

#: Answers the first of these signals; says when it is ready. (The shell's notice of the child that
#: the same signal ends is not of interest; and where nobody reads it any more, it would end it.)
_TRAPS = """
exec 2>/dev/null
trap 'echo got INT; exit 9' INT
trap 'echo got TERM; exit 10' TERM
trap 'echo got QUIT; exit 11' QUIT
echo ready
while :; do sleep 0.1; done
"""


def _creating(banger: Banger, image: str, name: str, *options: str) -> subprocess.Popen[bytes]:
    """`vm run` of a VM whose record is there and which is still being made."""
    words = ("vm", "run", "--image", image, "--name", name, *options)
    process = banger.start(*words, "--", "sleep", "1000")
    until(lambda: banger.state(name) == "creating", f"{name} is being created")
    return process


def _machines() -> list[leftovers.Process]:
    return Home(Path(os.environ["HOME"])).machines()


@pytest.mark.parametrize("options", [(), ("--rm",)], ids=["kept", "rm"])
def test_ctrl_c_during_creation_takes_everything_back(
    banger: Banger, image: str, options: tuple[str, ...]
) -> None:
    machines = _machines()
    process = _creating(banger, image, "brief", *options)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert (status, out) == (130, b"")
    assert b"Traceback" not in err
    assert banger.state("brief") == ""
    assert _machines() == machines


def test_a_client_killed_during_creation_takes_its_rm_vm_with_it(
    banger: Banger, image: str
) -> None:
    process = _creating(banger, image, "orphan", "--rm")
    process.kill()
    finish(process)
    until(lambda: banger.state("orphan") == "", "the VM of a client that is gone is deleted")


def test_a_client_killed_during_creation_leaves_a_vm_that_it_meant_to_keep(
    banger: Banger, image: str
) -> None:
    process = _creating(banger, image, "kept")
    process.kill()
    finish(process)
    until(lambda: banger.state("kept") == "running", "its creation is finished")
    banger.ok("vm", "delete", "--force", "kept")


@pytest.mark.parametrize("options", [(), ("--rm",)], ids=["kept", "rm"])
def test_a_client_killed_during_its_command(
    banger: Banger, image: str, options: tuple[str, ...]
) -> None:
    script = """
    exec 2>/dev/null
    trap 'touch /root/hup; exit' HUP
    echo ready
    while :; do sleep 0.1; done
    """
    process = banger.start("vm", "run", "-q", *options, "--image", image, "--name", "victim",
                           "--", "sh", "-c", script)  # fmt: skip
    assert process.stdout is not None
    read_until(process.stdout, b"ready\n")
    process.kill()
    finish(process)
    if options:
        until(lambda: banger.state("victim") == "", "the VM of a client that is gone is deleted")
        return
    await_hangup = "until test -e /root/hup; do sleep 0.1; done; echo hangup"
    assert banger.guest("victim", await_hangup) == "hangup\n"
    assert banger.state("victim") == "running"
    banger.ok("vm", "delete", "--force", "victim")


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 9), (signal.SIGTERM, 10), (signal.SIGQUIT, 11)],
    ids=["INT", "TERM", "QUIT"],
)
def test_a_signal_reaches_the_command_once_and_its_status_is_its_own(
    banger: Banger, vm: str, number: signal.Signals, status: int
) -> None:
    process = banger.start("vm", "exec", vm, "--", "sh", "-c", _TRAPS)
    assert process.stdout is not None
    read_until(process.stdout, b"ready\n")
    process.send_signal(number)
    word = number.name.removeprefix("SIG")
    assert finish(process) == (status, f"got {word}\n".encode(), b"")


def test_a_command_without_a_handler_dies_of_ctrl_c(banger: Banger, image: str) -> None:
    process = banger.start("vm", "run", "-q", "--rm", "--image", image, "--name", "plain", "--",
                           "sh", "-c", "echo ready; exec sleep 1000")  # fmt: skip
    assert process.stdout is not None
    read_until(process.stdout, b"ready\n")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert banger.state("plain") == ""


def test_a_second_ctrl_c_abandons_a_command_that_ignores_the_first(banger: Banger, vm: str) -> None:
    script = """
    exec 2>/dev/null
    trap 'echo ignored' INT
    trap 'echo hangup > /root/second; exit' HUP
    echo ready
    while :; do sleep 0.1; done
    """
    process = banger.start("vm", "exec", vm, "--", "sh", "-c", script)
    assert process.stdout is not None
    read_until(process.stdout, b"ready\n")
    process.send_signal(signal.SIGINT)
    read_until(process.stdout, b"ignored\n")
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130
    assert b"abandoned" in err
    seen = banger.guest(vm, "until test -s /root/second; do sleep 0.1; done; cat /root/second")
    assert seen == "hangup\n"


@pytest.fixture
def endless() -> Iterator[int]:
    """A pipe that always has more to read."""
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as yes:
        assert yes.stdout is not None
        yield yes.stdout.fileno()
        yes.kill()


def _ignoring_input(banger: Banger, vm: str, endless: int, script: str) -> subprocess.Popen[bytes]:
    """A command that reads nothing, once as much of its input was sent as can be."""
    process = banger.start("vm", "exec", vm, "--", "sh", "-c", script, stdin=endless)
    assert process.stdout is not None
    read_until(process.stdout, b"ready\n")
    read = Path(f"/proc/{process.pid}/io")

    def is_stuck() -> bool:
        before = read.read_text().split()[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
        return read.read_text().split()[1] == before

    until(is_stuck, "no more input goes in")
    return process


def test_ctrl_c_reaches_a_command_that_does_not_read_its_input(
    banger: Banger, vm: str, endless: int
) -> None:
    process = _ignoring_input(banger, vm, endless, "echo ready; exec sleep 1000")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_a_killed_client_takes_a_command_along_that_does_not_read_its_input(
    banger: Banger, vm: str, endless: int
) -> None:
    script = """
    exec 2>/dev/null
    trap 'echo hangup > /root/third; exit' HUP
    echo ready
    while :; do sleep 0.1; done
    """
    process = _ignoring_input(banger, vm, endless, script)
    process.kill()
    finish(process)
    seen = banger.guest(vm, "until test -s /root/third; do sleep 0.1; done; cat /root/third")
    assert seen == "hangup\n"
