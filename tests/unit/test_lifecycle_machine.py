"""Random lifecycle calls from many clients at once, over few VMs: what must hold, whatever happens.

A round is up to eight calls that run at once, each beginning after some steps of the event loop,
while drivers are slow or fail, guests do not come up or do not go, machines end by themselves,
calls are cancelled, and the daemon is killed and started again. After each round nothing is held,
each record agrees with what runs, and no acknowledged change is lost (`ledger`).

Hypothesis draws the calls; the drivers' moods come from a seed that it draws, too. Nothing runs in
threads here, so that what was found is found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fakes
import world as world_module
from banger.base.errors import BangerError, ErrorCode, from_wire
from banger.base.model import InitMode, NetworkMode, OperationState, Vm, VmState
from banger.base.opid import current_op_id, new_op_id
from banger.services import lifecycle as lifecycle_module
from banger.services.operations import Progress
from banger.services.vm_spec import ChangeRequest, CreateRequest
from banger.services.waiting import Goal, wait_for
from banger.store.store import Store
from ledger import Entry, Ledger, Outcome
from moods import Gate, Guests, Hypervisor, InPlace, Life, Moods, MortalStore
from world import World, made_world

NAMES = ("ash", "birch", "cedar", "elm", "fir", "gum")
#: A round that takes longer hangs: its calls wait for each other.
_ROUND_S = 15.0
#: How long a start waits for its guest: those that come up here take no time.
_BOOT_S = 0.1

_CANCELLABLE = {
    "create": 10,
    "create stopped": 3,
    "start": 9,
    "restart": 6,
    "stop": 7,
    "kill": 4,
    "delete": 2,
    "delete --force": 3,
    "set": 8,
    "rename": 4,
    "prune": 1,
}
_OTHERS = {"touch": 4, "wait": 2, "list": 2, "machine ends": 3}
_VERBS = [verb for verb, weight in (_CANCELLABLE | _OTHERS).items() for _ in range(weight)]

#: With what each call may be refused.
_REFUSALS = {
    ErrorCode.NOT_FOUND,
    ErrorCode.CONFLICT,
    ErrorCode.CANCELLED,
    ErrorCode.UNAVAILABLE,
    ErrorCode.PRECONDITION_FAILED,
    ErrorCode.TIMEOUT,
}


@dataclass(frozen=True)
class Call:
    """What one client asks for, and when: `after` and `cancelled_after` are steps of the loop."""

    verb: str
    vm: int
    after: int
    other: int
    cancelled_after: int | None


@dataclass(frozen=True)
class Round:
    calls: tuple[Call, ...]
    killed_after: int | None
    #: Of the moods of drivers and guests; 0 is a day on which nothing goes wrong.
    seed: int


def _rounds(*, calls: int, rounds: int, fewest: int = 0) -> st.SearchStrategy[list[Round]]:
    """Up to so many rounds of so many calls; with `fewest`, as many calls in each."""
    call = st.builds(
        Call,
        verb=st.sampled_from(_VERBS),
        vm=st.integers(0, len(NAMES) - 1),
        after=st.integers(0, 150),
        other=st.integers(0, len(NAMES) - 1),
        cancelled_after=st.none() | st.none() | st.none() | st.integers(0, 120),
    )
    together = st.lists(call, min_size=calls if fewest else 1, max_size=calls)
    each = st.builds(
        Round,
        calls=together.map(tuple),
        killed_after=st.none() | st.none() | st.integers(0, 200),
        seed=st.integers(0, 1 << 16),
    )
    return st.lists(each, min_size=fewest, max_size=rounds)


class Play:
    """One example: a home, its processes, and one daemon after the other."""

    def __init__(
        self, base: World, guests: Guests, moods: Moods, patch: pytest.MonkeyPatch
    ) -> None:
        self._base = base
        self._guests = guests
        self._moods = moods
        self._patch = patch
        self._ledger = Ledger()
        self._up = asyncio.Event()
        self._sizes = itertools.count(1)
        self.life, self.world = self._daemon()
        self._up.set()

    def _daemon(self) -> tuple[Life, World]:
        life, base = Life(), self._base
        self._patch.setattr(
            world_module,
            "Hypervisor",
            lambda processes, guests: Hypervisor(processes, guests, self._moods, life),
        )
        store = MortalStore(base.store, self._moods, life)
        world = World(base.paths, base.processes, self._guests, cast("Store", store))
        world.network.gate = Gate(self._moods, life)
        for gate in ("gate", "work_gate", "grow_gate"):
            setattr(world.storage, gate, Gate(self._moods, life))
        return life, world

    async def people(self, names: set[str]) -> None:
        """These VMs are there from the beginning, and run."""
        for name in sorted(names):
            await self.world.create(name)
        self._ledger.found(await self._base.store.vms())

    async def round(self, round_: Round) -> None:
        self._moods.begin(round_.seed)
        async with asyncio.timeout(_ROUND_S), asyncio.TaskGroup() as tasks:
            for call in round_.calls:
                tasks.create_task(self._client(call))
            if round_.killed_after is not None:
                tasks.create_task(self._kill_daemon(round_.killed_after))
        await self._settle()
        vms = await self._base.store.vms()
        self._check_processes(vms)
        self._check_files(vms)
        self._check_nothing_held(vms)
        assert await self.world.vms.all() == vms
        self._ledger.check(vms)

    async def finish(self) -> None:
        """All can be deleted, and then nothing is left."""
        self._moods.begin(0)
        for vm in await self._base.store.vms():
            await self.world.delete(vm.id, force=True)
        await self.world.assert_nothing_left()
        await self._end_daemon()

    async def _settle(self) -> None:
        """What happens by itself has happened."""
        for _ in range(20):
            await asyncio.sleep(0)
            await self.world.vms.close()

    # Clients.

    async def _client(self, call: Call) -> None:
        for _ in range(call.after):
            await asyncio.sleep(0)
        await self._up.wait()
        if call.verb == "machine ends":
            self._end_machine(NAMES[call.vm])
        elif call.verb in _CANCELLABLE:
            await self._operate(call)
        else:
            await self._ask(call)

    def _end_machine(self, name: str) -> None:
        machines = [pid for pid, argv in self._base.processes.argv.items() if argv[0] == "machine"]
        if machines:
            self._ledger.mishap()
            self._base.processes.end(machines[NAMES.index(name) % len(machines)])

    async def _operate(self, call: Call) -> None:
        """As a client of the daemon does: begin an operation, await its end, maybe cancel it."""
        world, life = self.world, self.life
        changes = self._changes(call)
        entry = self._ledger.begin(call.verb, **changes)
        answer: list[Vm] = []

        async def work(progress: Progress) -> None:
            answer.extend(await self._work(world, call, changes, progress))

        token = current_op_id.set(new_op_id())
        progress = world.operations.begin(f"vm.{call.verb}", NAMES[call.vm], work)
        current_op_id.reset(token)
        if call.cancelled_after is not None:
            for _ in range(call.cancelled_after):
                await asyncio.sleep(0)
            await world.operations.cancel(progress.record.id)
        async for state in progress.changes():
            last = state
        if last.state is OperationState.COMPLETED:
            self._ledger.end(entry, Outcome.DONE, answer)
        elif life.over or call.cancelled_after is not None:
            self._ledger.end(entry, Outcome.CUT_OFF)
        else:
            assert last.error is not None
            self._refused(entry, from_wire(last.error.code, last.error.message))

    def _refused(self, entry: Entry, error: BangerError) -> None:
        shrinks = "disk_size_mib" in entry.changes and "cannot shrink" in error.message
        assert error.code in _REFUSALS or shrinks, (entry, error.code, error.message)
        self._ledger.end(entry, Outcome.REFUSED)

    def _changes(self, call: Call) -> dict[str, object]:
        """What a call asks for that can be told from what any other asks for."""
        size = next(self._sizes)
        match call.verb:
            case "create" | "create stopped":
                return {"name": NAMES[call.vm], "memory_mib": 512 + size}
            case "rename":
                return {"name": NAMES[call.other]}
            case "set":
                all_: dict[str, object] = {
                    "vcpu_count": 1 + size % 64,
                    "memory_mib": 512 + size,
                    "disk_size_mib": 8192 + size,
                }
                chosen = list(all_)[call.other % 3 :]
                return {name: all_[name] for name in chosen}
            case _:
                return {}

    async def _work(
        self, world: World, call: Call, changes: dict[str, Any], progress: Progress
    ) -> list[Vm]:
        name, lifecycle = NAMES[call.vm], world.lifecycle
        match call.verb:
            case "create" | "create stopped":
                request = CreateRequest(
                    image="base",
                    init=InitMode.SYSTEMD if call.other == 0 else InitMode.MINIMAL,
                    network=NetworkMode.NONE if call.other == 1 else NetworkMode.USER,
                    start=call.verb == "create",
                    **changes,
                )
                return [await world.creator.create(request, progress)]
            case "start":
                return [await lifecycle.start(name, progress, boot_timeout_s=_BOOT_S)]
            case "restart":
                return [await lifecycle.restart(name, progress, boot_timeout_s=_BOOT_S)]
            case "stop":
                return [await lifecycle.stop(name, progress)]
            case "kill":
                return [await lifecycle.kill(name, progress)]
            case "delete" | "delete --force":
                force = call.verb == "delete --force"
                return [await lifecycle.delete(name, progress, force=force)]
            case "set" | "rename":
                change = ChangeRequest(**changes)
                return [await lifecycle.change(name, change.applied, progress, hot=change.hot)]
            case _:
                pruned = await world.prune.run(0, progress, dry_run=False)
                return [each.vm for each in pruned if each.error is None]

    async def _ask(self, call: Call) -> None:
        """A call that is no operation."""
        world, life, name = self.world, self.life, NAMES[call.vm]
        entry = self._ledger.begin(call.verb)
        try:
            if call.verb == "touch":
                vm = await world.vms.resolve(name)
                await world.vms.touch(vm.id)
                self._ledger.end(entry, Outcome.DONE, [await world.vms.show(vm.id)])
            elif call.verb == "wait":
                goal = list(Goal)[call.other % len(Goal)]
                vm = await wait_for(world.vms, world.health, name, goal, timeout_s=0.02)
                self._ledger.end(entry, Outcome.DONE, [vm])
            else:
                listed = await world.stats.listed()
                assert len({vm.name for vm in listed}) == len(listed)
                self._ledger.end(entry, Outcome.DONE)
        except BangerError as error:
            self._refused(entry, error)
        except asyncio.CancelledError:
            if not life.over:
                raise
            self._ledger.end(entry, Outcome.CUT_OFF)

    # The daemon's end.

    async def _kill_daemon(self, after: int) -> None:
        for _ in range(after):
            await asyncio.sleep(0)
        self._up.clear()
        self._ledger.mishap()
        before = self.world
        await self._end_daemon()
        self.life, self.world = self._daemon()
        self.world.hypervisor.pids = before.hypervisor.pids
        await self.world.reconcile()
        for vm in await self._base.store.vms():
            # A guest that was not told its new name any more is told at its next start.
            if guest := self._guests.by_socket.get(Path(vm.runtime.agent_socket)):
                guest.hostname = vm.name
        self._ledger.mishap()
        self._up.set()

    async def _end_daemon(self) -> None:
        """Everything that it was at ends, without any effect."""
        self.life.over = True
        world = self.world
        await world.operations.close()
        for vm_id in list(world.liveness._watches):
            world.liveness.unwatch(vm_id)
        await world.vms.close()
        await world.stats.close()
        await world.automatic_ports.close()
        await world.forwards.close()
        await world.agents.close()
        for _ in range(50):
            await asyncio.sleep(0)

    # What must hold.

    def _check_processes(self, vms: list[Vm]) -> None:
        expected: Counter[tuple[str, ...]] = Counter()
        for vm in vms:
            runs = vm.runtime.state is VmState.RUNNING
            assert self.world.liveness.vm_alive(vm) == runs, vm
            assert (vm.id in self.world.liveness._watches) == runs, vm
            if runs:
                expected["machine", vm.runtime.api_socket] = 1
                if vm.spec.network is NetworkMode.USER:
                    expected["network", vm.id] = 1
                guest = self._guests.by_socket[Path(vm.runtime.agent_socket)]
                assert guest.hostname == vm.name
        assert Counter(self._base.processes.argv.values()) == expected

    def _check_files(self, vms: list[Vm]) -> None:
        paths = self._base.paths
        running = {vm.id for vm in vms if vm.runtime.state is VmState.RUNNING}
        # A deletion that was cut off may have taken the directory, not the record.
        assert running <= _names(paths.vms_dir) <= {vm.id for vm in vms}
        assert _names(paths.vms_runtime_dir) == running
        for vm in vms:
            assert paths.vm(vm.id).handles.exists() == (vm.id in running)
            if vm.id in running:
                size = int(Path(vm.runtime.work_disk).read_text().split()[-1])
                assert size >= vm.spec.disk_size_mib
                assert Path(vm.runtime.system_overlay).exists()
            if vm.runtime.state is VmState.ERROR:
                assert vm.runtime.last_error

    def _check_nothing_held(self, vms: list[Vm]) -> None:
        world = self.world
        running = {vm.id for vm in vms if vm.runtime.state is VmState.RUNNING}
        assert world.vms.locks._locks == world.images.locks._locks == {}
        assert world.agents._connecting._locks == {}
        assert world.agents._attempts == {}
        assert world.agents._channels.keys() <= running
        assert {vm_id for vm_id, each in world.handles._cache.items() if each.pid} == running
        assert world.vms.end_reasons == {}
        assert not world.operations._tasks


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


async def _play(
    names: set[str], rounds: list[Round], root: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(lifecycle_module, "STOP_TIMEOUT_S", 0.02)
    patch.setattr(lifecycle_module, "BUTTON_TIMEOUT_S", 0.02)
    asyncio.get_running_loop().set_default_executor(InPlace())
    moods = Moods()
    guests = Guests(moods)
    async with made_world(root, patch) as base:
        base.store._worker.shutdown()
        base.store._worker = InPlace()
        play = Play(base, guests, moods, patch)
        try:
            await play.people(names)
            for each in rounds:
                await play.round(each)
            await play.finish()
        finally:
            base.processes.close()
            await guests.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is logged: that would take longer than all the calls."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


def run(names: set[str], rounds: list[Round]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as directory,
        pytest.MonkeyPatch.context() as patch,
        _quiet(),
    ):
        before = fakes.descriptors()
        asyncio.run(_play(names, rounds, Path(directory), patch))
        assert fakes.descriptors() == before


_PRESENT = st.sets(st.sampled_from(NAMES))
_REPLAYABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@settings(_REPLAYABLE, max_examples=8, phases=[Phase.generate])
@given(_PRESENT, _rounds(calls=8, rounds=25, fewest=25))
def test_two_hundred_calls_of_eight_clients_over_six_vms(
    names: set[str], rounds: list[Round]
) -> None:
    run(names, rounds)


@settings(_REPLAYABLE, max_examples=100)
@given(_PRESENT, _rounds(calls=8, rounds=3))
def test_some_calls_at_once(names: set[str], rounds: list[Round]) -> None:
    """Fewer, so that what is found is made small."""
    run(names, rounds)
