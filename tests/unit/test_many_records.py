"""A thousand records: what a daemon's start looks at does not grow with their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from banger.base import procfs
from banger.base.model import Handles, Vm, VmState
from records import a_vm
from world import World, made_world

_STOPPED, _GONE, _RUNNING = 790, 200, 10
#: Processes that are no machines.
_OTHERS = 100
#: How often a machine that was found is looked at again, to watch it.
_AGAIN = 3


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def insert(world: World, number: int, state: VmState) -> Vm:
    vm_id = f"{number:012x}"
    socket = str(world.paths.vm(vm_id).control_socket)
    vm = a_vm(f"vm-{number}", vm_id=vm_id, state=state, api_socket=socket)
    await world.store.insert_vm(vm)
    directory = world.paths.vm(vm_id).directory
    directory.mkdir(parents=True)
    if state is VmState.RUNNING:
        (directory / "handles.json").write_bytes(msgspec.json.encode(Handles(pid=1 << 30)))
    return vm


def count(looks: Counter[str], of: object, name: str, patch: pytest.MonkeyPatch) -> None:
    """Count the calls of this method of `of`."""
    real = getattr(of, name)

    def call(*arguments: object) -> object:
        looks[name] += 1
        return real(*arguments)

    patch.setattr(of, name, call)


async def test_a_thousand_records_take_one_look_at_the_processes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(_STOPPED):
        await insert(world, number, VmState.STOPPED)
    running = [
        await insert(world, number, VmState.RUNNING)
        for number in range(_STOPPED, _STOPPED + _GONE + _RUNNING)
    ][:_RUNNING]
    for vm in running:
        world.processes.start("machine", vm.runtime.api_socket)
    for number in range(_OTHERS):
        world.processes.start("another", str(number))
    looks: Counter[str] = Counter()
    count(looks, procfs, "own_processes", monkeypatch)
    count(looks, world.hypervisor, "control_socket", monkeypatch)
    count(looks, world.handles, "load", monkeypatch)
    await world.reconcile()
    states = Counter(vm.runtime.state for vm in await world.store.vms())
    assert states == {VmState.STOPPED: _STOPPED + _GONE, VmState.RUNNING: _RUNNING}
    assert all(world.liveness.vm_alive(vm) for vm in running)
    assert looks["own_processes"] == 1
    # Each command line once, and not once for each record.
    assert looks["control_socket"] <= _OTHERS + _RUNNING * (1 + _AGAIN)
    # What is recorded as stopped has no handles to read.
    assert looks["load"] == _GONE + _RUNNING
