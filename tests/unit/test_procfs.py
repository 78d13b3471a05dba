"""What /proc says of a process, and that only a proven one gets a signal."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from banger.base import jail, procfs
from banger.base.jail import parent_group
from banger.base.procfs import UNKNOWN, Process
from fakes import JailedProcess


def fake_process(root: Path, pid: int, comm: bytes, ticks: int = 4242) -> None:
    """A /proc/PID/stat as in proc(5): pid, (comm), state, then numbers that are their fields'
    places, but for 22, starttime."""
    directory = root / str(pid)
    directory.mkdir()
    rest = b"S " + b" ".join(str(number).encode() for number in range(4, 22))
    line = b"%d (%s) %s %d 23 24 25\n" % (pid, comm, rest, ticks)
    (directory / "stat").write_bytes(line)


@pytest.mark.parametrize(
    "comm", [b"qemu", b"a b", b"a) R 1 1", b"((", b"))", b") S 1 (", b"\xff\xfe", b"a\nb", b""]
)
def test_no_name_of_a_process_hides_when_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comm: bytes
) -> None:
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    fake_process(tmp_path, 7, comm)
    assert procfs.start_ticks(7) == 4242


def test_our_own_start_is_the_same_every_time_and_before_now() -> None:
    ticks = procfs.start_ticks(os.getpid())
    assert ticks == procfs.start_ticks(os.getpid())
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < ticks <= uptime_s * os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("comm", [b"qemu", b"a) S 1 (", b""])
def test_what_a_process_uses_is_read_from_its_own_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comm: bytes
) -> None:
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    fake_process(tmp_path, 7, comm)
    ticks_per_s, page_bytes = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    assert procfs.usage(7, 4242) == procfs.ProcessUsage((14 + 15) / ticks_per_s, 24 * page_bytes)


def test_the_use_of_a_later_process_with_the_same_pid_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    fake_process(tmp_path, 7, b"qemu")
    assert procfs.usage(7, 4241) is None
    assert procfs.usage(8, 4242) is None
    assert procfs.usage(0, 0) is None


def test_our_own_use_is_what_the_interpreter_says() -> None:
    before = os.times()
    used = procfs.usage(os.getpid(), procfs.start_ticks(os.getpid()))
    after = os.times()
    assert used is not None
    # Each of the two times is counted in whole ticks.
    assert before.user + before.system - 0.03 <= used.cpu_s <= after.user + after.system + 0.03
    status = Path("/proc/self/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    assert used.resident_bytes == pytest.approx(resident_kib * 1024, rel=0.2)


def test_a_process_that_is_gone_has_no_start_and_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    assert procfs.start_ticks(7) == 0
    assert procfs.command_line(7) == ()


@pytest.mark.parametrize(
    ("raw", "argv"),
    [
        (b"", ()),
        (b"a\0", ("a",)),
        (b"a\0-b c\0", ("a", "-b c")),
        (b"a\0\0b\0", ("a", "", "b")),
        (b"\xff\0", ("\udcff",)),
    ],
)
def test_arguments_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, argv: tuple[str, ...]
) -> None:
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes(raw)
    assert procfs.command_line(7) == argv


def test_this_process_is_among_our_own() -> None:
    ours = Process(procfs.command_line(os.getpid()))
    assert (os.getpid(), ours) in list(procfs.own_processes())


JAILED = "0123456789ab"


@pytest.fixture
def jailed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JailedProcess:
    return JailedProcess(tmp_path, JAILED, monkeypatch)


@pytest.mark.parametrize(
    "name", ["firecracker", "a\vNSpid:\t7 2", "a\rNSpid:\t7 2", "a\u2028State:\tZ"]
)
def test_a_jailed_machine_is_recognised_by_its_jail_and_by_nothing_that_it_says(
    jailed: JailedProcess, name: str
) -> None:
    jailed.says("qemu-system-x86_64", "--id", "ffffff000000", name=name)
    assert procfs.look_at(7) == Process(jail=JAILED)
    assert list(procfs.own_processes()) == [(7, Process(jail=JAILED))]


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": f"banger-{os.getuid() + 1}/{JAILED}"},
        {"group": f"banger-{os.getuid()}/ffffff000000"},  # whose uid is another
        {"group": "user.slice"},
        {"namespaces": "7\t2"},  # a child of the machine's
        {"namespaces": "7\t5\t1"},
        {"namespaces": "7"},
        {"state": "Z (zombie)"},
        {"state": "X (dead)"},
    ],
)
def test_who_has_a_jails_uid_and_is_not_its_machine_is_nobody(
    jailed: JailedProcess, wrong: dict[str, str]
) -> None:
    jailed.says("/firecracker", "--id", JAILED, **wrong)
    assert procfs.look_at(7) == UNKNOWN
    assert list(procfs.own_processes()) == []


def test_a_jailed_process_that_ends_while_it_is_looked_at_is_nobody(jailed: JailedProcess) -> None:
    jailed.says("/firecracker", "--id", JAILED)
    jailed.ends()
    assert procfs.look_at(7) == UNKNOWN


def test_processes_of_others_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert os.getpid() not in {pid for pid, _ in procfs.own_processes()}


def test_where_the_first_process_is_not_shown_others_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    assert procfs.hides_others()
    fake_process(tmp_path, 1, b"init")
    assert not procfs.hides_others()


def test_machines_are_hidden_whose_jails_have_somebody_who_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"0123456789ab": "7\n8\n", "111111111111": "7\n", "222222222222": "", "other": "9\n"}
    for name, pids in groups.items():
        directory = tmp_path / parent_group(os.getuid()) / name
        directory.mkdir(parents=True)
        (directory / "cgroup.procs").write_text(pids)
    (tmp_path / parent_group(os.getuid()) / "333333333333").mkdir()  # it is going
    monkeypatch.setattr(jail, "groups_root", lambda: tmp_path)
    monkeypatch.setattr(procfs, "_PROC", tmp_path)
    fake_process(tmp_path, 7, b"firecracker")
    assert procfs.hidden_machines() == {"0123456789ab": {8}}
    fake_process(tmp_path, 8, b"another")
    assert procfs.hidden_machines() == {}
    monkeypatch.setattr(jail, "groups_root", lambda: None)
    assert procfs.hidden_machines() == {}


def test_who_ends_while_it_is_looked_was_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([{"0123456789ab": {2**22 + 1}}, {"0123456789ab": set()}])
    monkeypatch.setattr(procfs, "pids_in_jails", lambda _: next(looks))
    assert procfs.hidden_machines() == {}


def test_a_pidfd_is_given_for_the_expected_process_only() -> None:
    seen: list[Process] = []
    before = len(list(Path("/proc/self/fd").iterdir()))

    def refuse(process: Process) -> bool:
        seen.append(process)
        return False

    assert procfs.open_pidfd(os.getpid(), refuse) == -1
    assert seen == [Process(procfs.command_line(os.getpid()))]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    pidfd = procfs.open_pidfd(os.getpid(), lambda process: process == seen[0])
    assert pidfd >= 0
    os.close(pidfd)


@pytest.mark.parametrize("pid", [-1, 2**22 + 1])
def test_no_process_no_pidfd(pid: int) -> None:
    assert procfs.open_pidfd(pid, lambda _: True) == -1


def test_a_process_is_looked_at_after_the_pidfd_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_open, real_look = os.pidfd_open, procfs.look_at

    def note_open(pid: int) -> int:
        order.append("open")
        return real_open(pid)

    def note_look(pid: int) -> Process:
        order.append("look")
        return real_look(pid)

    monkeypatch.setattr(os, "pidfd_open", note_open)
    monkeypatch.setattr(procfs, "look_at", note_look)
    os.close(procfs.open_pidfd(os.getpid(), lambda _: True))
    assert order == ["open", "look"]


async def test_waiting_for_a_process_that_runs_on_ends_in_time() -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert not await procfs.wait_exit(pidfd, 0.02)
    finally:
        os.close(pidfd)


async def test_an_exit_ends_the_wait() -> None:
    # A pidfd becomes readable when its process ends; a pipe stands in for one here.
    readable, writable = os.pipe()
    waiting = asyncio.create_task(procfs.wait_exit(readable, 10))
    await asyncio.sleep(0)
    os.close(writable)
    try:
        assert await waiting
    finally:
        os.close(readable)


def test_the_boot_has_an_id() -> None:
    assert len(procfs.boot_id()) == 36


def test_the_hosts_memory_is_what_the_kernel_says() -> None:
    assert 0 < procfs.available_memory_bytes() <= procfs.total_memory_bytes()
    assert procfs.total_memory_bytes() % 1024 == 0
