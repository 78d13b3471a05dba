"""The daemon's life: started by whoever comes first, and gone at any moment without harm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import leftovers
import suite
from homes import Home
from product import IMAGE, finish, read_until, until
from rpc_socket import RawClient

pytestmark = pytest.mark.guest


def _daemons(home: Home) -> list[leftovers.Process]:
    return [each for each in home.processes() if "banger.daemon.main" in each.command]


def _run(home: Home, name: str) -> None:
    home.banger.ok("vm", "run", "-q", "-d", "--image", IMAGE, "--name", name)


def _assert_clean(home: Home) -> None:
    """No record, no machine, no files of any VM."""
    assert home.banger.json("vm", "list") == []
    assert home.machines() == []
    assert list((home.state / "vms").glob("*")) == []
    assert list((home.runtime / "vms").glob("*")) == []


def test_first_calls_at_once_start_one_daemon(bare_home: Home) -> None:
    calls = [bare_home.banger.start("vm", "list", "--json") for _ in range(8)]
    for call in calls:
        assert finish(call)[:2] == (0, b"[]\n")
    assert len(_daemons(bare_home)) == 1
    assert bare_home.log.count('"bangerd ready"') == 1


def test_a_second_daemon_is_refused(bare_home: Home) -> None:
    bare_home.banger.ok("daemon", "start")
    done = subprocess.run(
        [sys.executable, "-m", "banger.daemon.main"],
        env=os.environ | bare_home.banger.environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert b"another bangerd of this user is running" in done.stderr
    assert len(_daemons(bare_home)) == 1


def test_its_status_and_its_end(bare_home: Home) -> None:
    banger = bare_home.banger
    assert banger.run("daemon", "status", "--json").returncode == 1
    assert banger.ok("daemon", "stop") == "bangerd was not running\n"
    banger.ok("daemon", "start")
    status = banger.json("daemon", "status")
    assert (status["running"], status["vms"], status["socket"]) == (True, 0, str(bare_home.socket))
    why = f"{status['hypervisor']} ({status['hypervisor_reason']})"
    (told,) = (line for line in bare_home.log.splitlines() if '"drivers chosen"' in line)
    assert json.loads(told)["hypervisor"] == why
    assert status["storage_reason"]
    assert status["network_reason"]
    pid = bare_home.daemon_pid()
    banger.ok("daemon", "restart")
    assert bare_home.daemon_pid() != pid
    assert banger.ok("daemon", "stop") == "bangerd stopped\n"
    assert not bare_home.socket.exists()
    assert '"bangerd stopped"' in banger.ok("daemon", "logs")


def test_vms_run_on_without_the_daemon_and_are_found_again(home: Home) -> None:
    banger = home.banger
    _run(home, "steady")
    (machine,) = home.machines()
    banger.guest("steady", "echo kept > /root/file")
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        session = banger.start("vm", "exec", "steady", "--", "sh", "-c", "echo on; sleep 1000")
        assert session.stdout is not None
        read_until(session.stdout, b"on\n")
        if number is None:
            banger.ok("daemon", "stop")
        else:
            home.kill_daemon(number)
        status, _, said = finish(session)
        assert status == 125
        assert said.startswith(b"error: ")
        assert _daemons(home) == []
        assert [each.pid for each in home.machines()] == [machine.pid]
        assert banger.guest("steady", "cat /root/file") == "kept\n"
        # The session that was lost took its process with it.
        banger.guest("steady", "while pidof sleep; do sleep 0.1; done")
        assert banger.state("steady") == "running"
    assert banger.ok("vm", "stop", "steady") == "steady\n"
    assert home.machines() == []
    home.kill_daemon(signal.SIGKILL)
    assert banger.state("steady") == "stopped"
    banger.ok("vm", "delete", "steady")
    _assert_clean(home)


@suite.about_qemu
def test_machines_of_another_qemu_than_the_one_that_is_configured_are_found_again(
    home: Home,
) -> None:
    banger = home.banger
    installed = shutil.which("qemu-system-x86_64")
    assert installed is not None
    other = home.directory / "tools/emulator"
    other.parent.mkdir()
    other.symlink_to(installed)  # a copy would look for its firmware beside itself

    def configure(text: str) -> None:
        home.configure(text)
        banger.ok("daemon", "restart")

    def machine_by(program: str) -> int:
        (machine,) = home.machines()
        assert Path(f"/proc/{machine.pid}/comm").read_text() == f"{program}\n"
        return machine.pid

    configure(f'qemu_bin = "{other}"')
    _run(home, "steady")
    pid = machine_by("emulator")
    configure("")
    assert banger.state("steady") == "running"
    assert banger.guest("steady", "echo known") == "known\n"
    assert machine_by("emulator") == pid
    banger.ok("vm", "stop", "steady")
    banger.ok("vm", "start", "steady")
    pid = machine_by("qemu-system-x86")
    configure(f'qemu_bin = "{other}"')
    assert banger.guest("steady", "echo known") == "known\n"
    assert machine_by("qemu-system-x86") == pid
    banger.ok("vm", "kill", "steady")
    assert home.machines() == []
    banger.ok("vm", "start", "steady")
    machine_by("emulator")
    # Whatever is wrong with the one that is configured, those that run are not concerned.
    other.unlink()
    configure(f'qemu_bin = "{other}"')
    said = banger.fails("vm", "run", "--image", IMAGE, "--", "true", status=125)
    assert f"cannot start a VM here: hypervisor qemu: there is no {other}" in said
    assert "hint: set qemu_bin" in said
    checks = {each["name"]: each for each in json.loads(banger.run("doctor", "--json").stdout)}
    assert checks["hypervisor qemu"]["detail"] == f"there is no {other}"
    assert banger.guest("steady", "echo known") == "known\n"
    banger.ok("vm", "delete", "--force", "steady")
    _assert_clean(home)


@pytest.mark.parametrize("moment", ["recorded", "launched"])
def test_a_daemon_killed_while_it_creates_leaves_nothing(home: Home, moment: str) -> None:
    creating = home.banger.start("vm", "run", "--image", IMAGE, "--name", "half", "--", "true")
    if moment == "recorded":
        until(lambda: home.banger.state("half"), "there is a record")
    else:
        until(home.machines, "the machine runs")
    home.kill_daemon(signal.SIGKILL)
    status, _, said = finish(creating)
    assert status == 125
    assert b"connection to bangerd was lost" in said
    _assert_clean(home)
    assert home.banger.ok("vm", "run", "--rm", "-q", "--image", IMAGE, "--name", "half", "--",
                          "echo", "again") == "again\n"  # fmt: skip


def test_a_daemon_stopped_while_it_creates_takes_it_back(home: Home) -> None:
    creating = home.banger.start("vm", "run", "--image", IMAGE, "--name", "half", "--", "true")
    until(home.machines, "the machine runs")
    home.kill_daemon(signal.SIGTERM)
    assert home.machines() == []
    status, _, said = finish(creating)
    assert status == 125
    assert said.rpartition(b"error: ")[1]
    _assert_clean(home)


def test_the_rm_vm_of_a_session_that_died_with_the_daemon_is_removed(home: Home) -> None:
    session = home.banger.start("vm", "run", "-q", "--rm", "--image", IMAGE, "--", "sh", "-c",
                                "echo on; sleep 1000")  # fmt: skip
    assert session.stdout is not None
    read_until(session.stdout, b"on\n")
    home.kill_daemon(signal.SIGKILL)
    assert finish(session)[0] == 125
    _assert_clean(home)


def test_a_machine_that_is_killed_is_recorded_as_stopped(home: Home) -> None:
    _run(home, "struck")
    (machine,) = home.machines()
    os.kill(machine.pid, signal.SIGKILL)
    until(lambda: home.banger.state("struck") == "stopped", "its end is noticed")
    reason = home.banger.json("vm", "show", "struck")["runtime"]["last_error"]
    assert reason == "the guest powered off or its process ended"
    until(lambda: len(home.processes()) == 1, "its network ends, too; the daemon is left")


def test_a_machine_that_is_killed_while_there_is_no_daemon(home: Home) -> None:
    _run(home, "struck")
    home.kill_daemon(signal.SIGKILL)
    (machine,) = home.machines()
    os.kill(machine.pid, signal.SIGKILL)
    home.await_end_of_processes()
    assert home.banger.state("struck") == "stopped"
    reason = home.banger.json("vm", "show", "struck")["runtime"]["last_error"]
    assert reason == "its process was gone when bangerd started"


@pytest.mark.parametrize("content", [b"{", b'{"pid":1}', b""], ids=["corrupt", "wrong", "empty"])
def test_a_bad_handles_file_does_not_lose_a_vm(home: Home, content: bytes) -> None:
    _run(home, "held")
    home.kill_daemon(signal.SIGKILL)
    (handles,) = home.state.glob("vms/*/handles.json")
    handles.write_bytes(content)
    assert home.banger.guest("held", "echo alive") == "alive\n"
    home.banger.ok("vm", "delete", "--force", "held")
    _assert_clean(home)
    until(lambda: len(home.processes()) == 1, "only the daemon is left")


def test_a_machine_without_a_record_is_reported_and_left_alone(home: Home) -> None:
    """The database may be the wrong one: with the right one the machine is there again."""
    _run(home, "forgotten")
    home.kill_daemon(signal.SIGKILL)
    records = home.state / "banger.db"
    with closing(sqlite3.connect(records)) as database, database:
        rows = database.execute("SELECT * FROM vms").fetchall()
        database.execute("DELETE FROM vms")
    assert home.banger.json("vm", "list") == []
    assert len(home.machines()) == 1
    assert "a machine without a record, left alone" in home.log
    home.kill_daemon(signal.SIGTERM)
    with closing(sqlite3.connect(records)) as database, database:
        (row,) = rows
        database.execute(f"INSERT INTO vms VALUES ({', '.join('?' * len(row))})", row)
    assert home.banger.guest("forgotten", "echo alive") == "alive\n"


def _mmdebstrap_runs(home: Home) -> bool:
    return any("mmdebstrap" in each.command for each in home.processes())


def _assert_no_build_left(home: Home) -> None:
    until(lambda: len(home.processes()) <= 1, "only the daemon is left")
    assert home.banger.json("image", "list") == []
    assert list(home.data.glob("images/*")) == []
    assert list(leftovers.mounts_and_loops_of(home.directory)) == []
    kernels = [each["artifact_dir"] for each in home.banger.json("kernel", "list")]
    assert sorted(map(str, home.data.glob("kernels/*"))) == sorted(kernels)


@suite.needs_outside
def test_a_daemon_killed_while_it_builds_an_image_leaves_nothing(bare_home: Home) -> None:
    building = bare_home.banger.start("image", "build", IMAGE)
    until(lambda: _mmdebstrap_runs(bare_home), "packages are being fetched")
    bare_home.kill_daemon(signal.SIGKILL)
    status, _, said = finish(building)
    assert status == 1
    assert b"connection to bangerd was lost" in said
    _assert_no_build_left(bare_home)


@suite.needs_outside
def test_two_requests_share_a_build_and_the_last_to_leave_takes_it_back(bare_home: Home) -> None:
    building = bare_home.banger.start("image", "build", IMAGE)
    until(lambda: _mmdebstrap_runs(bare_home), "packages are being fetched")
    with RawClient(bare_home.socket) as client:
        (operation,) = (
            each for each in client.result("operations.list") if each["kind"] == "image.build"
        )
        again = client.result("image.build.begin", image=IMAGE)
        assert again["operation_id"] == operation["id"]
        building.send_signal(signal.SIGINT)
        status, _, said = finish(building)
        assert status == 130
        assert b"taking it back" in said
        assert b"others wait for it: it goes on" in said
        assert client.result("operations.leave", id=operation["id"])["state"] == "cancelled"
    _assert_no_build_left(bare_home)


def test_a_stale_socket_and_a_stale_lock_are_no_obstacle(bare_home: Home) -> None:
    bare_home.banger.ok("daemon", "start")
    bare_home.kill_daemon(signal.SIGKILL)
    assert bare_home.socket.is_socket()
    assert (bare_home.runtime / "bangerd.lock").exists()
    assert bare_home.banger.json("vm", "list") == []


def test_logs_can_be_followed(bare_home: Home) -> None:
    bare_home.banger.ok("daemon", "start")
    follower = bare_home.banger.start("daemon", "logs", "--follow")
    assert follower.stdout is not None
    read_until(follower.stdout, b"bangerd ready")
    bare_home.banger.fails("vm", "show", "marker-of-this-test", status=1)
    read_until(follower.stdout, b"marker-of-this-test")
    follower.send_signal(signal.SIGINT)
    assert finish(follower)[0] == 130


def test_the_files_of_a_vm_that_nobody_knows_stay_and_its_sockets_go(bare_home: Home) -> None:
    files, sockets = (
        parent / "vms/0123456789ab" for parent in (bare_home.state, bare_home.runtime)
    )
    for stray in (files, sockets):
        stray.mkdir(parents=True)
        (stray / "file").touch()
    bare_home.runtime.chmod(0o700)
    assert bare_home.banger.json("vm", "list") == []
    assert (files / "file").exists()
    assert str(files) in bare_home.log
    assert not sockets.exists()
    shutil.rmtree(files)
