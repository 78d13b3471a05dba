"""The command line: what it says, and its exit statuses, against a daemon in a thread."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import click
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger import __version__
from banger.base.errors import BangerError, Conflict, ErrorCode, NotFound, Unavailable, from_wire
from banger.base.model import (
    ErrorInfo,
    Operation,
    OperationState,
    PublishedPort,
    Vm,
    VmState,
    now,
)
from banger.base.terminal import printable
from banger.cli import progress
from banger.cli.app import (
    AfterDashes,
    complete_image,
    complete_operation,
    complete_vm,
    guest_command,
)
from banger.cli.copy import complete_side
from banger.cli.main import cli, run
from banger.cli.progress import ProgressView
from banger.cli.render import print_json, print_table
from banger.rpc.client import Client
from banger.rpc.protocol import Exit, FrameType, encode_json, frame
from cli_daemon import Daemon, read_frame
from records import a_kernel, a_snapshot, a_template, a_vm, an_image

Captured = pytest.CaptureFixture[str]


def ending(exit_: Exit) -> Any:
    """A session that ends at once."""

    def session(connection: socket.socket) -> None:
        connection.sendall(frame(FrameType.EXIT, encode_json(exit_)))
        with suppress(ConnectionError):
            while read_frame(connection) is not None:
                pass

    return session


def raising(error: BangerError) -> Any:
    def answer(params: dict[str, Any]) -> object:
        raise error

    return answer


def running(name: str = "box") -> Vm:
    return a_vm(name, state=VmState.RUNNING, guest_ip="172.16.0.2")


# Exit statuses


@pytest.mark.parametrize("code", list(ErrorCode))
@pytest.mark.parametrize(
    ("arguments", "method", "status"),
    [
        (["vm", "exec", "box", "--", "true"], "vm.exec", 125),
        (["vm", "shell", "box"], "vm.exec", 125),
        (["vm", "run", "--", "true"], "vm.run", 125),
        (["run", "--rm", "--", "true"], "vm.run", 125),
        (["vm", "stop", "box"], "vm.stop", 1),
        (["vm", "show", "exec"], "vm.show", 1),
        (["vm", "cp", "box:/a", "b"], "vm.stat", 1),
        (["ps"], "vm.list", 1),
        (["image", "list"], "image.list", 1),
        (["doctor"], "doctor.run", 1),
    ],
)
def test_our_failures_are_125_beside_a_guests_command_and_1_elsewhere(
    daemon: Daemon,
    capfd: Captured,
    arguments: list[str],
    method: str,
    status: int,
    code: ErrorCode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # cp takes them for the whole process
    daemon.answers[method] = raising(from_wire(code, "what failed", "what to do"))
    assert run(arguments) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "error: what failed (op-0123456789ab)\nhint: what to do\n"


@pytest.mark.parametrize(
    ("exit_", "status"),
    [
        (Exit(exit_code=0), 0),
        (Exit(exit_code=7), 7),
        (Exit(exit_code=127), 127),
        (Exit(signal=15), 143),
        (Exit(error=ErrorInfo(code="unavailable", message="lost", op_id="op-1")), 125),
    ],
)
@pytest.mark.parametrize("arguments", [["vm", "exec", "box"], ["run", "--rm"], ["vm", "run", "-q"]])
def test_the_status_is_the_commands_own(
    daemon: Daemon, capfd: Captured, arguments: list[str], exit_: Exit, status: int
) -> None:
    for method in ("vm.exec", "vm.run"):
        daemon.answers[method] = lambda _: {"vm": running()}
        daemon.sessions[method] = ending(exit_)
    assert run([*arguments, "--", "cmd"]) == status
    assert ("error: lost (op-1)" in capfd.readouterr().err) == (status == 125)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["vm", "nonsense"],
        ["vm", "exec", "box"],
        ["vm", "exec", "box", "--"],
        ["vm", "exec", "box", "true"],
        ["vm", "exec"],
        ["vm", "exec", "-t", "box", "--", "true"],
        ["vm", "run", "--"],
        ["vm", "run", "--rm", "-d", "--", "true"],
        ["vm", "run", "-t", "--", "true"],
        ["vm", "run", "-d", "-i", "--", "true"],
        ["vm", "run", "-d", "-t", "--", "true"],
        ["vm", "run", "-d", "-t"],
        ["vm", "run", "-d", "-e", "A=1", "."],
        ["vm", "run", "-d", "-u", "nobody", "."],
        ["vm", "run", "--memory", "much", "--", "true"],
        ["vm", "run", "--vcpu", "0", "--", "true"],
        ["vm", "run", "--name", "Bad Name", "--", "true"],
        ["vm", "run", "--init", "upstart", "--", "true"],
        ["vm", "run", "-e", "=x", "--", "true"],
        ["vm", "run", "--boot-timeout", "0", "--", "true"],
        ["vm", "cp", "a", "b"],
        ["vm", "stop"],
        ["completion", "tcsh"],
        ["image", "build", "../x"],
    ],
)
def test_a_wrong_call_is_2_says_why_and_calls_nobody(
    daemon: Daemon, capfd: Captured, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # cp takes them for the whole process
    assert run(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Error" in err
    assert daemon.calls == []


def test_interrupted_is_130(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> Client:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "connect", interrupt)
    assert run(["ps"]) == 130


def test_an_error_of_the_system_has_no_traceback(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    def fail(*_: object, **__: object) -> Client:
        raise PermissionError(13, "Permission denied", "/run/x")

    monkeypatch.setattr(Client, "connect", fail)
    assert run(["ps"]) == 1
    assert run(["run", "--", "x"]) == 125
    assert capfd.readouterr().err == "error: /run/x: Permission denied\n" * 2


def test_a_text_that_is_not_utf8_is_refused_without_a_traceback(
    daemon: Daemon, capfd: Captured
) -> None:
    assert run(["vm", "exec", "box", "--", "\udcff"]) == 125
    assert "not valid UTF-8" in capfd.readouterr().err


def test_what_a_guest_says_in_an_error_cannot_command_the_terminal(
    daemon: Daemon, capfd: Captured
) -> None:
    daemon.answers["vm.stop"] = raising(
        Conflict("\x1b]0;title\x07one\ntwo\x9b31m", hint="\x1b[2J", op_id="\x1b")
    )
    assert run(["vm", "stop", "box"]) == 1
    assert capfd.readouterr().err == "error: ?]0;title?one\ntwo?31m (?)\nhint: ?[2J\n"


def test_another_version_of_the_daemon_is_told_of_once(daemon: Daemon, capfd: Captured) -> None:
    daemon.version = "0.0.1"
    daemon.answers["vm.stop"] = lambda params: running(params["vm"])
    assert run(["vm", "stop", "a", "b"]) == 0
    out, err = capfd.readouterr()
    assert out == "a\nb\n"
    assert err.count("bangerd 0.0.1 is running") == 1
    assert "banger daemon restart" in err


def test_a_daemon_of_another_version_that_was_stopped_is_not_told_of(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    lists(daemon)
    daemon.version = "0.0.1"
    daemon.answers["daemon.stop"] = lambda _: {}
    ended, writable = os.pipe()
    os.close(writable)  # readable at once, as the pidfd of a process that has ended
    monkeypatch.setattr(os, "pidfd_open", lambda _: ended)
    assert run(["daemon", "stop"]) == 0
    assert capfd.readouterr() == ("bangerd stopped\n", "")


# The guest's command


def parsed(arguments: list[str]) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    seen: list[tuple[dict[str, Any], tuple[str, ...] | None]] = []

    @click.command(cls=AfterDashes)
    @click.argument("words", nargs=-1)
    @click.option("--flag", is_flag=True)
    def command(**options: Any) -> None:
        seen.append((options, guest_command()))

    command.main(arguments, standalone_mode=False)
    return seen[0]


@given(st.lists(st.text("ab", min_size=1), max_size=3), st.lists(st.text(max_size=4), max_size=5))
def test_what_follows_the_first_dashes_is_the_guests_untouched(
    before: list[str], after: list[str]
) -> None:
    options, command = parsed([*before, "--", *after])
    assert options["words"] == tuple(before)
    assert command == tuple(after)


def test_a_command_without_dashes_is_told_where_it_belongs(capfd: Captured) -> None:
    for words in (["vm", "exec", "box", "ls"], ["run", "ls"]):
        assert run(words) == 2
        told = capfd.readouterr().err
        assert 'unexpected "ls": ' in told
        assert "a command comes after --" in told
    run(["vm", "exec", "--help"])
    assert "NAME -- CMD..." in capfd.readouterr().out


@pytest.mark.parametrize("verb", ["stats", "ports"])
def test_an_empty_name_is_not_all_machines(daemon: Daemon, capfd: Captured, verb: str) -> None:
    assert run(["vm", verb, ""]) == 1
    assert capfd.readouterr().err == "error: vm id or name is required\n"
    assert daemon.calls == []
    daemon.answers[f"vm.{verb}"] = lambda _: []
    assert run(["vm", verb]) == 0
    assert daemon.calls[0][1]["vm"] == ""


def test_options_after_the_dashes_are_not_ours() -> None:
    options, command = parsed(["x", "--", "--flag", "--", "--help"])
    assert not options["flag"]
    assert command == ("--flag", "--", "--help")
    assert parsed(["x", "--flag"])[1] is None


def test_a_command_is_sent_as_it_was_given(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "x=y")
    monkeypatch.delenv("NOT_SET", raising=False)
    daemon.answers["vm.exec"] = lambda _: {"vm": running()}
    daemon.sessions["vm.exec"] = ending(Exit(exit_code=0))
    words = ["sh", "-c", "echo 'a  b' \"$1\"\n", "--", "-e", ""]
    options = ["-e", "A=1=2", "-e", "MINE", "-e", "NOT_SET", "-w", "/tmp", "-u", "nobody"]
    assert run(["vm", "exec", *options, "box", "--", *words]) == 0
    ((_, params),) = daemon.calls
    command = params["command"]
    assert params["vm"] == "box"
    assert command["argv"] == words
    assert command["env"] == ["A=1=2", "MINE=x=y"]
    assert (command["cwd"], command["user"], command["tty"]) == ("/tmp", "nobody", False)


def test_a_run_asks_for_what_was_given_and_nothing_else(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.run"] = lambda _: {"vm": running()}
    daemon.sessions["vm.run"] = ending(Exit(exit_code=0))
    assert run(["run", "--rm", "--memory", "1G", "--disk-size", "512M", "--", "true"]) == 0
    create = daemon.calls[0][1]["create"]
    assert (create["memory_mib"], create["disk_size_mib"], create["ephemeral"]) == (1024, 512, True)
    assert (create["vcpu_count"], create["init"], create["name"]) == (None, None, "")
    assert "boot_timeout_s" not in create
    assert capfd.readouterr() == ("", "")


def test_a_vm_that_is_left_running_is_told_of_on_stderr(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.run"] = lambda _: {"vm": running()}
    daemon.sessions["vm.run"] = ending(Exit(exit_code=3))
    assert run(["run", "--", "false"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "vm box keeps running" in err
    assert "banger vm delete --force box" in err


@pytest.mark.parametrize("method", ["stop", "delete"])
def test_one_machine_that_fails_does_not_keep_the_others_from_their_turn(
    daemon: Daemon, capfd: Captured, method: str
) -> None:
    def answer(params: dict[str, Any]) -> Vm:
        if params["vm"].startswith("no"):
            raise NotFound(f"vm {params['vm']} not found")
        return running(params["vm"])

    daemon.answers[f"vm.{method}"] = answer
    assert run(["vm", method, "no1", "one", "no2", "two"]) == 1
    out, err = capfd.readouterr()
    assert out == "one\ntwo\n"
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        "error: vm no1 not found",
        "error: vm no2 not found",
    ]


def test_a_shell_gets_a_terminal_where_there_is_one_for_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        "banger.cli.run.run_session", lambda _, **how: asked.append(how["terminal"])
    )
    daemon.answers["vm.run"] = lambda _: {"vm": running()}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    run(["run", "-q"])
    run(["run", "-q", "-t"])
    assert asked == [sys.stdout.isatty(), True]


def test_a_detached_run_prints_the_name(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.run"] = lambda _: {"vm": running()}
    assert run(["run", "-d"]) == 0
    assert run(["run", "-d", "-q", "--", "sleep", "9"]) == 0
    first, second = (params["command"] for _, params in daemon.calls)
    assert (first["argv"], first["detach"]) == ([], True)  # the image's own, if it has any
    assert second["detach"] is True
    assert capfd.readouterr().out == "box\nbox\n"


def test_what_is_for_a_command_is_not_lost_unseen(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.run"] = lambda _: {"vm": running(), "started": False}
    assert run(["run", "-d", "-q", "-e", "A=1"]) == 0
    warning = "warning: nothing was started: there is no command, and the image names none\n"
    assert capfd.readouterr() == ("box\n", warning)
    assert run(["run", "-d", "-q"]) == 0
    assert capfd.readouterr() == ("box\n", "")


@pytest.mark.parametrize(
    ("options", "entrypoint"), [([], None), (["--entrypoint", ""], ""), (["--entrypoint=x"], "x")]
)
def test_a_run_says_what_its_words_are_given_to(
    daemon: Daemon, options: list[str], entrypoint: str | None
) -> None:
    daemon.answers["vm.run"] = lambda _: {"vm": running()}
    daemon.sessions["vm.run"] = ending(Exit(exit_code=0))
    assert run(["run", "-q", "-u", "1:2", *options, "--", "true"]) == 0
    ((_, params),) = daemon.calls
    assert params["entrypoint"] == entrypoint
    assert (params["command"]["argv"], params["command"]["user"]) == (["true"], "1:2")


# Listings


def lists(daemon: Daemon) -> None:
    operation = an_operation("boot")
    daemon.answers |= {
        "vm.list": lambda _: [running("box"), a_vm("old")],
        "vm.show": lambda _: running("box"),
        "image.list": lambda _: [an_image("debian", packages=("git 1",))],
        "image.show": lambda _: an_image("debian"),
        "kernel.list": lambda _: [a_kernel()],
        "kernel.show": lambda _: a_kernel(),
        "template.list": lambda _: [a_template()],
        "template.show": lambda _: a_template(),
        "snapshot.list": lambda _: [a_snapshot(), a_snapshot("disks", shape="")],
        "snapshot.show": lambda _: a_snapshot(),
        "operations.list": lambda _: [operation],
        "doctor.run": lambda _: [
            {"name": "qemu", "level": "ok", "detail": "fine", "hint": "unseen"},
            {"name": "kvm", "level": "warn", "detail": "slow", "hint": "enable it"},
        ],
        "daemon.status": lambda _: {
            "version": __version__,
            "pid": 7,
            "uptime_s": 1.5,
            "socket": "/s",
            "log_path": "/l",
            "database": "/d",
            "vms": 2,
            "running_vms": 1,
            "hypervisor": "qemu",
            "storage": "qcow2",
            "network": "user",
        },
    }


def commands(
    group: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command of the tree."""
    context = click.Context(group)
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield (*path, name), command
            yield from commands(command, (*path, name))


def test_every_command_has_a_help_and_says_what_each_option_is_for(capfd: Captured) -> None:
    found = list(commands())
    assert len(found) > 25
    for path, command in found:
        assert command.help, path
        assert command.get_short_help_str(limit=200), path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)
        assert run([*path, "--help"]) == 0
        out, err = capfd.readouterr()
        assert out.startswith(f"Usage: banger {' '.join(path)}")
        assert err == ""


def test_the_one_line_of_a_command_in_the_table_is_there_for_every_command(
    capfd: Captured,
) -> None:
    for path, command in [((), cli), *commands()]:
        if isinstance(command, click.Group):
            run([*path, "--help"])
            text = capfd.readouterr().out
            for name in command.list_commands(click.Context(command)):
                assert f"\n  {name} " in text, (path, name)


_LISTINGS = [
    ["vm", "list"],
    ["ps"],
    ["image", "list"],
    ["kernel", "list"],
    ["kernel", "show", "debian"],
    ["template", "list"],
    ["template", "show", "id"],
    ["snapshot", "list"],
    ["snapshot", "show", "snap"],
    ["operations", "list"],
    ["vm", "show", "box"],
    ["image", "show", "debian"],
    ["daemon", "status"],
    ["config", "show"],
    ["doctor"],
    ["version"],
]


def test_every_command_that_lists_or_shows_is_looked_at_here() -> None:
    named = {path for path, _ in commands() if path[-1] in ("list", "show", "status")}
    asks_systemd = {("system", "status")}  # for tests/host
    assert named - asks_systemd <= {tuple(arguments[:2]) for arguments in _LISTINGS}


@pytest.mark.parametrize("arguments", _LISTINGS, ids=" ".join)
def test_every_listing_has_json_and_a_table_of_the_same(
    daemon: Daemon, capfd: Captured, arguments: list[str]
) -> None:
    lists(daemon)
    assert run([*arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)
    assert err == ""
    assert run(arguments) == 0
    out, err = capfd.readouterr()
    assert out.strip()
    assert "\x1b" not in out
    assert err == ""


def test_json_is_the_whole_record(daemon: Daemon, capfd: Captured) -> None:
    vm = running("box")
    daemon.answers["vm.list"] = lambda _: [vm]
    run(["ps", "--json"])
    assert msgspec.json.decode(capfd.readouterr().out, type=list[Vm]) == [vm]


def test_a_record_is_shown_in_words_and_an_error_with_its_lines(
    daemon: Daemon, capfd: Captured
) -> None:
    vm = a_vm("box", state=VmState.ERROR, last_error="no answer\nits console:\n[1.0] panic\x1b")
    ports = (PublishedPort(host="127.0.0.1", host_port=8080, guest_port=80),)
    spec = msgspec.structs.replace(vm.spec, ephemeral=True, published_ports=ports)
    daemon.answers["vm.show"] = lambda _: msgspec.structs.replace(vm, spec=spec)
    assert run(["vm", "show", "box"]) == 0
    rows = [line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()]
    assert ["ephemeral", "yes"] in rows
    assert ["published_ports", "127.0.0.1:8080:80"] in rows
    assert ["started_at"] not in [row[:1] for row in rows]
    at = rows.index(["last_error", "no answer"])
    assert rows[at + 1 : at + 3] == [["its", "console:"], ["[1.0]", "panic?"]]


def test_a_list_tells_the_size_of_a_disk_as_people_say_it(daemon: Daemon, capfd: Captured) -> None:
    vm = running("box")
    spec = msgspec.structs.replace(vm.spec, disk_size_mib=8192)
    daemon.answers["vm.list"] = lambda _: [msgspec.structs.replace(vm, spec=spec)]
    run(["ps"])
    assert capfd.readouterr().out.split()[-1] == "8.0G"


def test_operations_stay_on_a_line_each_on_a_narrow_terminal(
    daemon: Daemon, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["operations.list"] = lambda _: [an_operation("boot", target="a-long-name" * 2)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    assert run(["operations", "list"]) == 0
    headings, row = click.unstyle(capfd.readouterr().out).splitlines()
    assert headings.split() == ["KIND", "TARGET", "STATE"]
    assert row.split() == ["vm.create", "a-long-name" * 2, "running"]


def test_work_is_stopped_and_what_had_ended_is_told(daemon: Daemon, capfd: Captured) -> None:
    states = iter((OperationState.CANCELLED, OperationState.COMPLETED))

    def cancel(params: dict[str, Any]) -> Operation:
        return an_operation("boot", id=params["id"], state=next(states))

    daemon.answers["operations.cancel"] = cancel
    assert run(["operations", "cancel", "op-1", "op-2"]) == 0
    assert capfd.readouterr() == ("op-1\n", "op-2 (vm.create) had ended: completed\n")
    assert daemon.calls == [("operations.cancel", {"id": each}) for each in ("op-1", "op-2")]
    states = iter((OperationState.CANCELLED,))
    assert run(["operations", "cancel", "--json", "op-1"]) == 0
    (shown,) = json.loads(capfd.readouterr().out)
    assert (shown["id"], shown["state"]) == ("op-1", "cancelled")
    assert run(["operations", "cancel"]) == 2


def test_an_empty_listing_is_a_heading_and_an_empty_list(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.list"] = lambda _: []
    run(["ps"])
    assert capfd.readouterr().out.split() == (
        ["NAME", "STATE", "IMAGE", "ADDRESS", "UP", "CPU", "MEMORY", "VCPU", "DISK"]
    )
    run(["ps", "--json"])
    assert json.loads(capfd.readouterr().out) == []


def test_a_doctor_who_finds_a_failure_ends_with_1(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["doctor.run"] = lambda _: [
        {"name": "qemu", "level": "fail", "detail": "missing", "hint": "install it"}
    ]
    assert run(["doctor"]) == 1
    assert run(["doctor", "--json"]) == 1
    assert "missing; install it" in capfd.readouterr().out


def test_without_a_daemon_status_is_1_and_version_still_tells_ours(
    daemon: Daemon, capfd: Captured
) -> None:
    daemon.running = False
    assert run(["daemon", "status"]) == 1
    assert run(["daemon", "status", "--json"]) == 1
    assert run(["daemon", "stop"]) == 0
    assert run(["version"]) == 0
    assert run(["version", "--json"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith('bangerd is not running\n{\n  "running": false\n}\nbangerd was not')
    assert f"banger {__version__}\n" in out
    assert '"bangerd": null' in out
    assert err == ""


# Completion


def completed(complete: Any, incomplete: str) -> list[str]:
    found: list[str] = complete(
        click.Context(cli), cli.params[0] if cli.params else None, incomplete
    )
    return found


def test_completion_offers_live_names(daemon: Daemon) -> None:
    lists(daemon)
    assert completed(complete_vm, "") == ["box", "old"]
    assert completed(complete_vm, "bo") == ["box"]
    assert completed(complete_image, "x") == []
    daemon.answers["operations.list"] = lambda _: [an_operation("boot")]
    assert completed(complete_operation, "op-0") == ["op-0123456789ab"]


def test_a_side_of_a_copy_is_a_machine_or_a_file_of_the_host(daemon: Daemon) -> None:
    lists(daemon)

    def offered(incomplete: str) -> list[tuple[str, str]]:
        items = complete_side(click.Context(cli), click.Argument(["side"]), incomplete)
        return [(item.type, item.value) for item in items]

    assert offered("bo") == [("plain", "box")]
    assert offered("./d") == [("file", "./d")]
    assert offered("") == [("file", "")]


def test_completion_is_silent_without_a_daemon_or_with_a_broken_one(
    daemon: Daemon, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["vm.list"] = raising(NotFound("x"))
    assert completed(complete_vm, "") == []
    daemon.answers["vm.list"] = lambda _: "nonsense"
    assert completed(complete_vm, "") == []
    daemon.running = False
    assert completed(complete_vm, "") == []

    def fail(*_: object, **__: object) -> Client:
        raise OSError("x")

    monkeypatch.setattr(Client, "connect", fail)
    assert completed(complete_vm, "") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_its_shell(capfd: Captured, shell: str) -> None:
    assert run(["completion", shell]) == 0
    out = capfd.readouterr().out
    assert f"_BANGER_COMPLETE={shell}_complete" in out
    assert "banger" in out


# Drawing


@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_is_a_line_a_row_with_no_control_characters(
    capfd: Captured, rows: list[list[str]]
) -> None:
    print_table(("ONE", "TWO"), rows)
    lines = capfd.readouterr().out.split("\n")
    assert len(lines) == len(rows) + 2
    assert lines[-1] == ""
    assert all(line.isprintable() for line in lines)
    width = max(3, *(len(row[0]) for row in rows)) if rows else 3
    for line, (first, second) in zip(lines[1:], rows, strict=False):
        assert line == f"{printable(first):{width}}  {printable(second)}".rstrip()


@given(st.text())
def test_printable_text_is_kept_and_the_rest_replaced(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
    assert all(a == b or not a.isprintable() for a, b in zip(text, shown, strict=True))


def test_json_is_indented_and_whole(capfd: Captured) -> None:
    print_json({"name": "x", "list": [1, 2], "odd": "\x1b"})
    out = capfd.readouterr().out
    assert json.loads(out) == {"name": "x", "list": [1, 2], "odd": "\x1b"}
    assert "\x1b" not in out
    assert '\n  "name"' in out


# Asking


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [("y\n", 0, "1 machine deleted, 1 MiB of disk\n"), ("n\n", 1, "nothing was deleted\n")],
)
def test_a_prune_deletes_what_it_has_shown_once_the_user_agrees(
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
    typed: str,
    status: int,
    said: str,
) -> None:
    daemon.answers["vm.prune"] = lambda _: [{"vm": a_vm("old"), "size_bytes": 1 << 20}]
    primary, secondary = os.openpty()
    with open(secondary) as terminal, open(primary, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", terminal)
        keyboard.write(typed.encode())
        assert run(["vm", "prune"]) == status
    assert capfd.readouterr().err.endswith(said)
    asked, *done = [params for method, params in daemon.calls if method == "vm.prune"]
    assert asked["dry_run"]
    assert [params["only"] for params in done] == ([[a_vm("old").id]] if status == 0 else [])


# Progress


def an_operation(stage: str, detail: str = "", **fields: Any) -> Operation:
    values: dict[str, Any] = {
        "id": "op-0123456789ab",
        "kind": "vm.create",
        "target": "box",
        "state": OperationState.RUNNING,
        "stage": stage,
        "detail": detail,
        "percent": -1.0,
        "started_at": now(),
    }
    return Operation(**values | fields)


def told(view: ProgressView, *states: Operation) -> None:
    for state in states:
        view.event(msgspec.Raw(msgspec.json.encode(state)))


def test_nothing_is_said_of_work_that_ends_within_a_second(capfd: Captured) -> None:
    with ProgressView("vm") as view:
        told(view, an_operation("disks"), an_operation("boot"))
    assert capfd.readouterr() == ("", "")
    assert view.operation_id == "op-0123456789ab"


def test_longer_work_has_a_line_a_stage_where_there_is_no_terminal(
    capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_QUIET_FOR_S", 0.01)
    loud = threading.Event()
    begin = ProgressView._begin

    def begun(view: ProgressView) -> None:
        begin(view)
        loud.set()

    monkeypatch.setattr(ProgressView, "_begin", begun)
    with ProgressView("vm") as view:
        told(view, an_operation("disks"))
        assert loud.wait(10)
        told(
            view,
            an_operation("boot", "waiting\x1b"),
            an_operation("boot", "still waiting"),
            an_operation("setup"),
        )
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "vm: disks\nvm: boot: waiting?\nvm: setup\n"


def test_a_quiet_one_never_speaks(capfd: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_FOR_S", 0)
    with ProgressView("vm", quiet=True) as view:
        told(view, an_operation("disks"))
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_creation_is_taken_back(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.events["vm.run"] = [an_operation("boot")]
    daemon.answers["vm.run"] = lambda _: {"vm": running()}
    daemon.answers["operations.cancel"] = lambda _: an_operation("boot")
    event = ProgressView.event

    def interrupted(view: ProgressView, raw: msgspec.Raw) -> None:
        event(view, raw)
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressView, "event", interrupted)
    assert run(["run", "--rm", "--", "true"]) == 130
    assert daemon.calls[-1] == ("operations.cancel", {"id": "op-0123456789ab"})


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (OperationState.CANCELLED, "vm box: taking it back\nvm box is stopped\n"),
        (
            OperationState.COMPLETED,
            "vm box: taking it back\nvm box: too late, it is done\nvm box is stopped\n",
        ),
    ],
)
def test_an_interrupted_restart_says_what_it_leaves(
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
    ended: OperationState,
    said: str,
) -> None:
    daemon.events["vm.restart"] = [an_operation("boot")]
    daemon.answers["vm.restart"] = lambda _: running()
    daemon.answers["operations.cancel"] = lambda _: an_operation("boot", state=ended)
    daemon.answers["vm.show"] = lambda _: a_vm("box", state=VmState.STOPPED)
    event = ProgressView.event

    def interrupted(view: ProgressView, raw: msgspec.Raw) -> None:
        event(view, raw)
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressView, "event", interrupted)
    assert run(["vm", "restart", "box", "other"]) == 130
    assert capfd.readouterr().err.lstrip("\n") == said + "\n"


def test_an_image_that_was_built_is_named_and_a_failure_is_1(
    daemon: Daemon, capfd: Captured
) -> None:
    daemon.answers["image.build.begin"] = lambda _: {"operation_id": "op-0123456789ab"}
    daemon.answers["operations.watch"] = lambda _: an_operation(
        "finish", state=OperationState.COMPLETED, image=an_image("debian", size_bytes=1 << 20)
    )
    assert run(["image", "build", "debian"]) == 0
    assert capfd.readouterr().out == "debian (1 MiB)\n"
    daemon.answers["operations.watch"] = lambda _: an_operation(
        "install",
        state=OperationState.FAILED,
        error=ErrorInfo(code="unavailable", message="no network", op_id="op-1"),
    )
    assert run(["image", "build", "debian"]) == 1
    assert capfd.readouterr().err == "error: no network (op-1)\n"


@pytest.mark.parametrize("wanted_by_others", [True, False])
def test_ctrl_c_takes_a_build_back_unless_others_wait_for_it(
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
    wanted_by_others: bool,
) -> None:
    def interrupted(view: ProgressView, raw: msgspec.Raw) -> None:
        raise KeyboardInterrupt

    running = an_operation("install")
    daemon.answers["image.build.begin"] = lambda _: {"operation_id": "op-0123456789ab"}
    daemon.events["operations.watch"] = [running]
    daemon.answers["operations.watch"] = lambda _: running
    daemon.answers["operations.leave"] = lambda _: (
        running if wanted_by_others else an_operation("install", state=OperationState.CANCELLED)
    )
    monkeypatch.setattr(ProgressView, "event", interrupted)
    assert run(["image", "build", "debian"]) == 130
    assert daemon.calls[-1] == ("operations.leave", {"id": "op-0123456789ab"})
    said = capfd.readouterr().err
    assert "image debian: taking it back" in said
    assert ("others wait for it: it goes on" in said) == wanted_by_others


def test_the_daemon_that_cannot_start_gives_its_own_reason(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    def fail(*_: object, **__: object) -> Client:
        raise Unavailable("bangerd did not start", hint="inspect /log")

    monkeypatch.setattr(Client, "connect", fail)
    assert run(["ps"]) == 1
    assert capfd.readouterr().err == "error: bangerd did not start\nhint: inspect /log\n"
