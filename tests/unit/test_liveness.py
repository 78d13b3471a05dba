"""Whether a VM runs, by what the kernel says: no other process is ever taken for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger.base import procfs
from banger.base.errors import Internal, Unavailable
from banger.base.model import Handles, ProcessId, Vm, VmState
from banger.base.paths import Paths
from banger.services.handles import HandleCache
from banger.services.liveness import Liveness
from fakes import Agent, Hypervisor, Processes, descriptors, networks
from records import a_vm

SOCKET = "/run/x/control.sock"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(tmp_path, tmp_path, tmp_path, tmp_path / "run", tmp_path)
    made.vm("v").directory.mkdir(parents=True)
    return made


def a_running_vm(state: VmState = VmState.RUNNING) -> Vm:
    return a_vm("box", vm_id="v", state=state, api_socket=SOCKET)


# This very process as the machine: what /proc says of it is real.


class Ourselves(Hypervisor):
    """Takes this process for the machine, unless told not to."""

    def __init__(self) -> None:
        super().__init__(Processes(), Agent())
        self.is_it = True

    def control_socket(self, process: procfs.Process) -> Path | None:
        ours = process.argv == procfs.command_line(os.getpid())
        return Path(SOCKET) if self.is_it and ours else None


@pytest.fixture
def ourselves() -> Ourselves:
    return Ourselves()


@pytest.fixture
def real(paths: Paths, ourselves: Ourselves, monkeypatch: pytest.MonkeyPatch) -> Iterator[Liveness]:
    killed: list[int] = []

    async def no_kill(pidfd: int, timeout_s: float = 5.0) -> bool:
        killed.append(pidfd)
        return True

    monkeypatch.setattr(procfs, "kill", no_kill)
    yield Liveness(ourselves, networks(Processes()), HandleCache(paths))
    assert not killed


def test_a_process_with_our_pid_start_boot_and_command_line_is_alive(real: Liveness) -> None:
    vm = a_running_vm()
    assert not real.vm_alive(vm)
    handles = real.record(vm, pid=os.getpid(), network_pids=())
    assert handles.pid_start_ticks == procfs.start_ticks(os.getpid())
    assert real.vm_alive(vm)
    assert real.pid(vm) == os.getpid()


@pytest.mark.parametrize("state", [VmState.STOPPED, VmState.ERROR])
def test_a_vm_that_is_not_recorded_as_running_is_not_alive(real: Liveness, state: VmState) -> None:
    real.record(a_running_vm(), pid=os.getpid(), network_pids=())
    assert real.vm_alive(a_running_vm(VmState.CREATING))
    assert not real.vm_alive(a_running_vm(state))


@pytest.mark.parametrize(
    "wrong",
    [
        {"pid_start_ticks": 1},
        {"pid_start_ticks": 0},
        {"boot_id": "another boot"},
        {"pid": 0},
        {"pid": 1},
        {"pid": 2**30},
    ],
)
def test_a_pid_that_is_used_again_is_not_alive(
    real: Liveness, paths: Paths, wrong: dict[str, object]
) -> None:
    vm = a_running_vm()
    handles = real.record(vm, pid=os.getpid(), network_pids=())
    real._handles.set("v", msgspec.structs.replace(handles, **wrong))
    assert not real.vm_alive(vm)


async def test_a_process_with_another_command_line_is_neither_alive_nor_signalled(
    real: Liveness, ourselves: Ourselves
) -> None:
    vm = a_running_vm()
    real.record(vm, pid=os.getpid(), network_pids=(os.getpid(),))
    ourselves.is_it = False
    assert not real.vm_alive(vm)
    assert await real.wait_exit(vm, 5)
    await real.end(vm)
    await real.end_network(vm)  # the fixture sees that nothing was killed


def test_looking_leaves_no_descriptor_open(real: Liveness, ourselves: Ourselves) -> None:
    vm = a_running_vm()
    real.record(vm, pid=os.getpid(), network_pids=())
    before = descriptors()
    real.vm_alive(vm)
    ourselves.is_it = False
    real.vm_alive(vm)
    assert descriptors() == before


# Processes in memory: they can end, and be killed.


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    made = Processes()
    made.install(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def hypervisor(processes: Processes) -> Hypervisor:
    return Hypervisor(processes, Agent())


@pytest.fixture
def liveness(paths: Paths, processes: Processes, hypervisor: Hypervisor) -> Liveness:
    return Liveness(hypervisor, networks(processes), HandleCache(paths))


def started(liveness: Liveness, processes: Processes, hypervisor: Hypervisor) -> Vm:
    vm = a_running_vm()
    pid = processes.start("machine", SOCKET)
    hypervisor.pids[Path(SOCKET)] = pid
    liveness.record(vm, pid=pid, network_pids=(processes.start("network", "v"),))
    return vm


async def test_ending_asks_the_hypervisor_and_kills_no_one_who_goes(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    network_pid = liveness._handles.get("v").network[0].pid
    before = descriptors()
    processes.on_end[liveness.pid(vm)] = lambda: processes.end(network_pid)
    await liveness.end(vm)
    assert processes.argv == {}
    assert processes.killed == []
    await liveness.end(vm)
    assert descriptors() == before


async def test_a_hypervisor_that_does_not_quit_is_killed_and_so_is_a_network_that_hangs(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    hypervisor.can_quit = False
    handles = liveness._handles.get("v")
    await asyncio.wait_for(liveness.end(vm), 10)
    await asyncio.wait_for(liveness.end_network(vm), 10)
    assert processes.killed == [handles.pid, handles.network[0].pid]
    assert processes.argv == {}


async def test_a_process_that_cannot_be_killed_is_told_of(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    hypervisor.can_quit = False
    processes.immortal.add(liveness.pid(vm))
    with pytest.raises(Internal, match='the process of vm "box" cannot be killed') as caught:
        await liveness.end(vm)
    assert str(liveness.pid(vm)) in caught.value.hint


async def test_a_network_pid_that_is_used_again_is_left_alone(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    network_pid = liveness._handles.get("v").network[0].pid
    processes.argv[network_pid] = ("network", "of another vm")
    await liveness.end(vm)
    assert processes.alive(network_pid)
    assert processes.killed == []


async def test_the_end_of_a_watched_process_is_told_once(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    before = descriptors()
    told: list[str] = []
    ended = asyncio.Event()

    def tell() -> None:
        told.append("ended")
        ended.set()

    liveness.watch(vm, tell)
    liveness.watch(vm, tell)
    await asyncio.sleep(0)
    assert not told
    processes.end(liveness.pid(vm))
    await asyncio.wait_for(ended.wait(), 5)
    await asyncio.sleep(0.01)
    assert told == ["ended"]
    assert descriptors() == before
    liveness.watch(vm, tell)  # of one that is gone already
    assert told == ["ended", "ended"]


async def test_the_end_of_an_unwatched_process_is_not_told(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    told: list[str] = []
    liveness.watch(vm, lambda: told.append("ended"))
    liveness.unwatch("v")
    liveness.unwatch("v")
    processes.end(liveness.pid(vm))
    await asyncio.sleep(0.01)
    assert not told


async def test_waiting_for_an_exit_is_bounded(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    assert not await liveness.wait_exit(vm, 0.01)
    processes.end(liveness.pid(vm))
    assert await liveness.wait_exit(vm, 5)


@pytest.mark.parametrize("by_itself", [True, False])
async def test_what_only_the_privileged_can_clear_is_cleared_however_a_machine_ended(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor, by_itself: bool
) -> None:
    vm = started(liveness, processes, hypervisor)
    if by_itself:
        processes.end(liveness.pid(vm))
    await liveness.end(vm)
    assert hypervisor.cleared == [Path(SOCKET)]
    assert not liveness.vm_alive(vm)


async def test_a_machine_that_nobody_can_end_is_not_taken_for_ended(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor
) -> None:
    vm = started(liveness, processes, hypervisor)
    hypervisor.unclearable = True
    with pytest.raises(Unavailable, match="nobody can"):
        await liveness.end(vm)


async def test_a_machine_in_a_jail_that_nobody_can_end_is_not_taken_for_ended(
    liveness: Liveness,
    processes: Processes,
    hypervisor: Hypervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refused(pidfd: int) -> bool:
        raise PermissionError

    vm = started(liveness, processes, hypervisor)
    hypervisor.can_quit = False
    monkeypatch.setattr(procfs, "kill", refused)
    with pytest.raises(Internal, match="in a jail"):
        await liveness.end(vm)
    assert liveness.vm_alive(vm)


async def test_a_machine_that_is_hidden_from_now_on_is_not_taken_for_ended(
    liveness: Liveness,
    processes: Processes,
    hypervisor: Hypervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vm = started(liveness, processes, hypervisor)
    monkeypatch.setattr(procfs, "start_ticks", lambda pid: 0)
    monkeypatch.setattr(procfs, "look_at", lambda pid: procfs.UNKNOWN)
    assert not liveness.vm_alive(vm)
    pid = liveness._handles.get(vm.id).pid
    processes.hidden = {"another": {pid}, "v": {pid}}
    assert liveness.vm_alive(vm)
    for hidden in ({"another": {pid}}, {"v": {pid + 1}}):
        processes.hidden = hidden
        assert not liveness.vm_alive(vm)


def test_a_machine_is_found_again_by_its_control_socket(
    liveness: Liveness, processes: Processes, hypervisor: Hypervisor, paths: Paths
) -> None:
    vm = a_running_vm()
    liveness._handles.set(
        "v",
        Handles(
            pid=5, pid_start_ticks=6, boot_id="old", network=(ProcessId(pid=8, start_ticks=9),)
        ),
    )
    other = processes.start("machine", "/another.sock")
    pid = processes.start("machine", SOCKET)
    assert liveness.rediscover(vm, liveness.machines(procfs.own_processes()))
    assert liveness.vm_alive(vm)
    assert liveness.pid(vm) == pid != other
    assert HandleCache(paths).load("v").pid == pid
    assert liveness._handles.get("v").network[0].pid == 8  # what else was recorded is kept


def test_of_a_machine_that_is_gone_the_recorded_handles_are_kept(
    liveness: Liveness, processes: Processes
) -> None:
    vm = a_running_vm()
    recorded = Handles(
        pid=5, pid_start_ticks=6, boot_id="old", network=(ProcessId(pid=8, start_ticks=9),)
    )
    liveness._handles.set("v", recorded)
    assert not liveness.rediscover(vm, liveness.machines(procfs.own_processes()))
    assert liveness._handles.get("v") == recorded
    assert not liveness.vm_alive(vm)
