"""kill -9 of the daemon while ten machines run and one command streams: nobody else notices."""

from __future__ import annotations

import signal
import subprocess

import pytest

import leftovers
from homes import Home
from product import IMAGE, finish, read_until, until

pytestmark = pytest.mark.guest

NAMES = [f"crowd-{number}" for number in range(10)]

#: Writes without end, and notes by which signal it ends. (Its output may be closed before that
#: signal reaches it.)
_STREAM = """
trap '' PIPE
trap 'echo HUP >/root/ended; exit' HUP
trap 'echo TERM >/root/ended; exit' TERM
count=0
while :; do
    count=$((count + 1))
    echo "line $count"
done
"""
#: Of a client that left long before: nothing of it may be touched.
_DETACHED = "echo $$ >/run/pid; while :; do sleep 0.2; done"
_LIFE = "cat /proc/sys/kernel/random/boot_id /run/pid; kill -0 $(cat /run/pid)"


def _start_ten(home: Home) -> None:
    starts = [
        home.banger.start("vm", "run", "-q", "-d", "--image", IMAGE, "--memory", "256M",
                          "--vcpu", "1", "--name", name, "--", "sh", "-c", _DETACHED)
        for name in NAMES
    ]  # fmt: skip
    answers = [finish(start, timeout_s=240) for start in starts]
    assert [status for status, _, _ in answers] == [0] * len(NAMES), answers


def _lives(home: Home) -> dict[str, list[bytes]]:
    """The boot of each guest, and the pid of its detached command, which runs."""
    calls = {name: home.banger.start("vm", "exec", name, "--", "sh", "-c", _LIFE) for name in NAMES}
    answers = {name: finish(call, timeout_s=120) for name, call in calls.items()}
    assert all(status == 0 for status, _, _ in answers.values()), answers
    return {name: out.split() for name, (_, out, _) in answers.items()}


def _streaming(home: Home) -> subprocess.Popen[bytes]:
    stream = home.banger.start("vm", "exec", NAMES[3], "--", "sh", "-c", _STREAM)
    assert stream.stdout is not None
    read_until(stream.stdout, b"line 100\n")
    return stream


def test_ten_machines_outlive_a_daemon_that_is_killed_while_one_streams(home: Home) -> None:
    banger = home.banger
    _start_ten(home)
    machines = {each.pid for each in home.machines()}
    before = _lives(home)
    stream = _streaming(home)
    home.kill_daemon(signal.SIGKILL)

    status, _, said = finish(stream)
    assert status == 125
    assert said.startswith(b"error: the connection to bangerd was lost")
    assert b"hint: machines run on, and the next command starts it again" in said
    assert {each.pid for each in home.machines()} == machines

    vms = banger.json("vm", "list")
    assert {vm["name"]: vm["runtime"]["state"] for vm in vms} == dict.fromkeys(NAMES, "running")
    assert _lives(home) == before
    assert {each.pid for each in home.machines()} == machines
    banger.guest(NAMES[3], "until [ -s /root/ended ]; do sleep 0.1; done")
    assert banger.guest(NAMES[3], "cat /root/ended") == "HUP\n"

    assert sorted(banger.ok("vm", "delete", "--force", *NAMES).split()) == NAMES
    _assert_nothing_left(home, [vm["id"] for vm in vms])


def _assert_nothing_left(home: Home, vm_ids: list[str]) -> None:
    assert home.banger.json("vm", "list") == []
    daemon = home.daemon_pid()
    until(lambda: [each.pid for each in home.processes()] == [daemon], "only the daemon is left")
    # The filter of a network names nothing but its VM.
    assert [each for vm_id in vm_ids for each in leftovers.processes_naming(vm_id)] == []
    assert list(home.state.glob("vms/*")) == []
    assert list(home.runtime.glob("vms/*")) == []
