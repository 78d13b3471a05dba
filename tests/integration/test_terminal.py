"""With a real terminal: shells, resizing, Ctrl-C, hang-up, and the terminal left as it was."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from product import Banger, finish, read_until, until

pytestmark = pytest.mark.guest


@dataclass
class Terminal:
    """A pseudo-terminal; what runs on it has it as its controlling terminal."""

    master: int
    slave: int

    def resize(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def start(self, banger: Banger, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["setsid", "--ctty", *banger.argv(*words)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, text: str) -> str:
        return read_until(self.master, text.encode()).decode()

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def close(self) -> None:
        """Close the terminal's window."""
        os.close(self.slave)
        os.close(self.master)
        self.master = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(*os.openpty())
    terminal.resize(31, 117)
    yield terminal
    if terminal.master >= 0:
        terminal.close()


def test_a_shell_prompts_answers_and_leaves_the_terminal_as_it_was(
    banger: Banger, vm: str, terminal: Terminal
) -> None:
    before = terminal.settings()
    shell = terminal.start(banger, "vm", "shell", vm)
    terminal.read_until("# ")
    assert terminal.settings() != before, "the guest's terminal does the editing"
    terminal.write("echo $((40+2)) $TERM; tty; stty size\n")
    said = terminal.read_until("31 117\r\n")
    assert "42 xterm\r\n" in said
    assert "/dev/pts/" in said
    terminal.write("exit 5\n")
    assert shell.wait(timeout=60) == 5
    assert terminal.settings() == before


def test_a_resize_reaches_the_command(banger: Banger, vm: str, terminal: Terminal) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done"
    command = terminal.start(banger, "vm", "exec", "-t", vm, "--", "sh", "-c", script)
    terminal.read_until("ready")
    for rows, columns in ((50, 200), (10, 40)):
        terminal.resize(rows, columns)
        terminal.read_until(f"{rows} {columns}\r\n")
    terminal.write("\x03")
    assert command.wait(timeout=60) == 130


def test_ctrl_c_ends_the_foreground_process_only(
    banger: Banger, vm: str, terminal: Terminal
) -> None:
    shell = terminal.start(banger, "vm", "shell", vm)
    terminal.read_until("# ")
    terminal.write("sleep 2345 & sleep 5432\n")
    banger.guest(vm, "until grep -qs 5432 /proc/[0-9]*/cmdline; do sleep 0.1; done")
    terminal.write("\x03")
    terminal.read_until("# ")
    terminal.write("echo $?; kill %1 && echo ba''ckground\n")
    assert "130\r\n" in terminal.read_until("background\r\n")
    terminal.write("exit\n")
    assert shell.wait(timeout=60) == 0


def test_a_closed_terminal_hangs_up_what_runs_in_the_guest(
    banger: Banger, vm: str, terminal: Terminal
) -> None:
    script = """
    exec 2>/dev/null
    trap 'touch /root/hup; exit' HUP
    echo ready
    while :; do sleep 0.1; done
    """
    command = terminal.start(banger, "vm", "exec", "-t", vm, "--", "sh", "-c", script)
    terminal.read_until("ready")
    terminal.close()
    command.wait(timeout=60)
    banger.guest(vm, "until test -e /root/hup; do sleep 0.1; done")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
def test_a_shell_that_is_ended_leaves_the_terminal_as_it_was(
    banger: Banger, vm: str, terminal: Terminal, number: signal.Signals
) -> None:
    before = terminal.settings()
    shell = terminal.start(banger, "vm", "shell", vm)
    terminal.read_until("# ")
    shell.send_signal(number)
    assert shell.wait(timeout=60) == 128 + number
    assert terminal.settings() == before


def test_a_closed_terminal_ends_a_fresh_machine_with_rm(
    banger: Banger, image: str, terminal: Terminal
) -> None:
    shell = terminal.start(banger, "vm", "run", "--rm", "--image", image, "--name", "window")
    terminal.read_until("# ")
    terminal.close()
    shell.wait(timeout=60)
    until(lambda: banger.state("window") == "", "the VM of a terminal that is gone is deleted")


def test_a_bare_run_is_a_shell_in_a_fresh_machine(
    banger: Banger, image: str, terminal: Terminal
) -> None:
    before = terminal.settings()
    shell = terminal.start(banger, "vm", "run", "--rm", "--image", image, "--name", "fresh")
    terminal.read_until("# ")
    terminal.write("hostname; exit 3\n")
    terminal.read_until("fresh\r\n")
    assert shell.wait(timeout=60) == 3
    assert terminal.settings() == before
    assert banger.state("fresh") == ""


def test_ctrl_c_while_the_machine_is_made_takes_it_back(
    banger: Banger, image: str, terminal: Terminal
) -> None:
    before = terminal.settings()
    shell = terminal.start(banger, "vm", "run", "--image", image, "--name", "regret")
    until(lambda: banger.state("regret") == "creating", "regret is being created")
    terminal.write("\x03")
    assert shell.wait(timeout=60) == 130
    assert banger.state("regret") == ""
    assert terminal.settings() == before


def test_run_with_a_terminal(banger: Banger, image: str, terminal: Terminal) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && stty size; exit 4"
    command = terminal.start(
        banger, "vm", "run", "-t", "-q", "--rm", "--image", image, "--", "sh", "-c", script
    )
    assert terminal.read_until("\n") == "31 117\r\n"
    assert command.wait(timeout=60) == 4


def test_without_t_a_command_has_no_terminal(banger: Banger, vm: str, terminal: Terminal) -> None:
    command = terminal.start(banger, "vm", "exec", vm, "--", "sh", "-c", "tty; cat; echo end")
    assert "not a tty" in terminal.read_until("end")
    assert command.wait(timeout=60) == 0


def test_a_terminal_needs_a_terminal(banger: Banger, vm: str) -> None:
    for words in (("exec", "-t", vm), ("run", "-t")):
        said = banger.fails("vm", *words, "--", "true", status=2)
        assert "-t needs a terminal on stdin" in said


def test_a_shell_without_a_terminal_reads_commands_from_a_pipe(banger: Banger, vm: str) -> None:
    done = banger.run("vm", "shell", vm, stdin=b"cd /tmp\npwd\necho err >&2\nexit 4\n")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"/tmp\n", b"err\n")


def test_the_hidden_input_of_a_password_stays_hidden(
    banger: Banger, vm: str, terminal: Terminal
) -> None:
    script = "stty -echo; echo ask; read -r secret; stty echo; echo got ${#secret}"
    command = terminal.start(banger, "vm", "exec", "-t", vm, "--", "sh", "-c", script)
    terminal.read_until("ask\r\n")
    terminal.write("geheim\n")
    said = terminal.read_until("got 6")
    assert "geheim" not in said
    assert finish(command)[0] == 0
