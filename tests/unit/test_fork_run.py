"""One command in several forks, on drivers in memory: at whatever moment it is cut off, no machine
is left that nobody knows of. (With real guests: tests/integration/test_fork_run_guest.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from banger.base.errors import Conflict, Unavailable
from banger.base.model import ForkState, ImageConfig, OperationState, Results
from banger.base.opid import current_op_id, new_op_id
from banger.guest.requests import Exec
from banger.services.fork_run import Trial
from banger.services.operations import Progress, raise_failure
from banger.services.results import log_of
from banger.services.vm_spec import CreateRequest
from test_requests import fields_of
from world import World, ended, made_world


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


def begin(world: World, *, remove: bool = True) -> Progress:
    create = CreateRequest(name="box", image="base")
    trial = Trial(create, None, Exec(("true",)), 3, remove)

    async def work(progress: Progress) -> None:
        await world.fork_runs.run(trial, progress)

    token = current_op_id.set(new_op_id())
    try:
        return world.operations.begin("vm.run_forks", "box", work)
    finally:
        current_op_id.reset(token)


async def run(world: World, *, remove: bool = True) -> Results:
    raise_failure(await ended(begin(world, remove=remove)))
    (results,) = await world.results.all()
    return results


async def names(world: World) -> list[str]:
    return [vm.name for vm in await world.store.vms()]


async def test_what_became_of_each_is_kept(world: World) -> None:
    world.agent.stdout[Exec.KIND] = b"printed"
    results = await run(world, remove=False)
    assert [fork.exit_code for fork in results.forks] == [0, 0, 0]
    assert [fork.vm_name for fork in results.forks] == await names(world)
    assert not any(vm.spec.ephemeral for vm in await world.store.vms())
    assert [log_of(results, number).read_bytes() for number in range(3)] == [b"printed"] * 3
    await world.fork_runs.delete(results)
    assert await names(world) == []
    assert await world.results.all() == []


async def test_each_command_has_what_the_image_says_of_its_programs(world: World) -> None:
    config = ImageConfig(env=("A=1",), user="app", working_dir="/srv", entrypoint=("env",))
    await world.configure_image(config)
    assert (await run(world)).command == ("true",)
    forks = sorted(map(fields_of, world.agent.programs))
    assert forks == [
        [
            (5, b"\0\0\0\x08"), (2, b"A=1"), (2, b"BANGER_FORK=%d" % number),
            (3, b"/srv"), (4, b"app"), (1, b"env"), (1, b"true"),
        ]
        for number in range(3)
    ]  # fmt: skip


async def test_a_second_run_of_that_name_has_its_own_folder(world: World) -> None:
    await run(world)
    raise_failure(await ended(begin(world)))
    assert [each.name for each in await world.results.all()] == ["box", "box-2"]
    assert (await world.results.resolve("box")).name == "box"


async def test_cut_off_at_any_moment_it_leaves_no_machine(world: World) -> None:
    steps, finished = 0, 0
    while finished < 2:
        progress = begin(world)
        for _ in range(steps):
            await asyncio.sleep(0)
        done = await world.operations.cancel(progress.record.id)
        finished += done.state is OperationState.COMPLETED
        assert await names(world) == [], steps
        for results in await world.results.all():
            assert all(fork.state is not ForkState.RUNNING for fork in results.forks), steps
            await world.fork_runs.delete(results)
        steps = max(steps + 1, steps * 9 // 8)


@pytest.mark.parametrize("step", ["begin", "save"])
async def test_without_room_for_the_results_nothing_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def full(*_: object) -> Results:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(world.results, step, full)
    with pytest.raises(Unavailable, match="disk is full"):
        await run(world, remove=False)
    assert await names(world) == []
    assert await world.results.all() == []


async def test_results_of_a_run_under_way_are_not_deleted(world: World) -> None:
    world.agent.exits[Exec.KIND] = None  # it goes on
    progress = begin(world)
    while not await world.results.all() or not world.fork_runs._active:
        await asyncio.sleep(0.01)
    (results,) = await world.results.all()
    with pytest.raises(Conflict, match="under way"):
        await world.fork_runs.delete(results)
    await world.operations.cancel(progress.record.id)
    (results,) = await world.results.all()
    assert [fork.error for fork in results.forks] == ["broken off"] * 3
    await world.fork_runs.delete(results)


async def test_the_next_daemon_ends_what_was_under_way(world: World) -> None:
    results = await run(world)
    fork = msgspec.structs.replace(results.forks[1], state=ForkState.RUNNING, exit_code=None)
    forks = (results.forks[0], fork, results.forks[2])
    await world.results.save(msgspec.structs.replace(results, forks=forks))
    following = await world.restarted()
    await following.reconcile()
    (settled,) = await following.results.all()
    await following.close()
    assert [each.state.value for each in settled.forks] == ["done", "failed", "done"]
    assert settled.forks[1].error == "bangerd ended meanwhile"
