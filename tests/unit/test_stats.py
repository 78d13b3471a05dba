"""What VMs use: the two views, what a guest may say, and that a bad guest costs nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base import procfs
from banger.base.errors import BadRequest, NotFound, Unavailable, UnknownMethod
from banger.base.model import Handles, ProcessId, Vm, VmState
from banger.base.paths import Paths
from banger.base.procfs import ProcessUsage
from banger.base.usage import GuestDisk, GuestUsage, HostUsage, ListedVm, Sample, VmStats
from banger.daemon.observation import Observation, StatsQuery
from banger.drivers.base import Traffic
from banger.guest import requests
from banger.guest.stats import GuestStats
from banger.rpc.client import Client
from banger.rpc.protocol import Request
from banger.rpc.server import Connection, Server
from banger.services import stats as stats_module
from banger.services.agents import Agents
from banger.services.handles import HandleCache
from banger.services.stats import HISTORY_LENGTH, StatsService
from banger.services.vm import VmService
from fakes import Agent, Hypervisor, Processes, Storage
from records import a_vm

_TIMEOUT_S = 10.0
_KIND = requests.Stats.KIND


def answer(**fields: Any) -> dict[str, Any]:
    """What a well-behaved guest says."""
    return {
        "uptime_s": 12.5,
        "cpu": {"busy_ticks": 100, "total_ticks": 1000, "count": 2},
        "memory": {"total_kib": 1000, "available_kib": 600},
        "disks": [{"mount": "/", "total_kib": 2048, "free_kib": 1024}],
        "network": {"rx_bytes": 1000, "tx_bytes": 500},
        "processes": 3,
        "load": [0.1, 0.2, 0.3],
    } | fields


class Clock:
    """Seconds pass when a test, or a reading, says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Fleet:
    """VMs with an agent each, and the two methods of a `VmService` that are asked for them.

    Each has one process, which is busy for `busy` of every second; a reading takes a second.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self.clock = clock
        self.paths = Paths(root / "c", root / "d", root / "s", root / "r", root / "cache")
        self.root = root
        self.vms: dict[str, Vm] = {}
        self.guests: dict[str, Agent] = {}
        self.busy: dict[int, float] = {}
        self.handles = HandleCache(self.paths)
        self.agents = Agents()
        self.hypervisor = Hypervisor(Processes(), Agent())
        self.service = self.made_service()

    def made_service(self, interval_s: float = 0) -> StatsService:
        return StatsService(
            vms=cast("VmService", self),
            agents=self.agents,
            handles=self.handles,
            hypervisor=self.hypervisor,
            storage=Storage(),
            interval_s=interval_s,
        )

    async def add(self, name: str, said: object = None) -> Agent:
        socket = self.root / f"{name}.sock"
        disks = {kind: str(self.root / f"{name}-{kind}") for kind in ("system", "work")}
        Path(disks["system"]).write_bytes(bytes(300))
        Path(disks["work"]).write_bytes(bytes(11))
        self.vms[name] = a_vm(
            name,
            state=VmState.RUNNING,
            agent_socket=str(socket),
            system_overlay=disks["system"],
            work_disk=disks["work"],
        )
        guest = self.guests[name] = Agent()
        guest.stdout[_KIND] = msgspec.json.encode(answer() if said is None else said)
        await guest.listen(socket)
        self.start(name)
        return guest

    def start(self, name: str, busy: float = 0.25) -> int:
        """A process for this VM; another one if it has one already."""
        pid = (1 << 30) + len(self.busy)
        self.busy[pid] = busy
        self.paths.vm(self.vms[name].id).directory.mkdir(parents=True, exist_ok=True)
        self.handles.set(self.vms[name].id, Handles(pid=pid, pid_start_ticks=pid * 2))
        return pid

    def stop(self, name: str) -> None:
        vm = self.vms[name]
        runtime = msgspec.structs.replace(vm.runtime, state=VmState.STOPPED)
        self.vms[name] = msgspec.structs.replace(vm, runtime=runtime)
        self.handles.clear(vm.id)

    def says(self, name: str, **fields: Any) -> None:
        self.guests[name].stdout[_KIND] = msgspec.json.encode(answer(**fields))

    def usage(self, pid: int, expected_start_ticks: int) -> ProcessUsage | None:
        if pid not in self.busy or expected_start_ticks != pid * 2:
            return None
        self.clock.now += 1
        return ProcessUsage(self.clock.now * self.busy[pid], 5 << 20)

    async def all(self) -> list[Vm]:
        return [self.vms[name] for name in sorted(self.vms)]

    async def show(self, reference: str) -> Vm:
        for vm in self.vms.values():
            if reference in (vm.name, vm.id):
                return vm
        raise NotFound(f'vm "{reference}" not found')

    async def one(self, name: str = "box") -> VmStats:
        (found,) = await asyncio.wait_for(self.service.collect(name), _TIMEOUT_S)
        return found

    async def sample(self, name: str = "box") -> Sample:
        latest = (await self.one(name)).latest
        assert latest is not None
        return latest


@pytest.fixture
async def fleet(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    clock = Clock()
    made = Fleet(short_path, clock)
    monkeypatch.setattr(stats_module, "time", clock)
    monkeypatch.setattr(stats_module, "_PAIR_S", 0)
    monkeypatch.setattr(stats_module, "_SOON_S", 0)
    monkeypatch.setattr(procfs, "usage", made.usage)
    async with made.service.polling():
        yield made
    await made.agents.close()
    for guest in made.guests.values():
        await guest.close()


# The two views


async def test_the_host_tells_of_a_core_and_what_processes_and_disks_take(fleet: Fleet) -> None:
    await fleet.add("box")
    assert (await fleet.sample()).host == HostUsage(
        cpu_percent=25.0,
        memory_bytes=5 << 20,
        disk_bytes=311,
        disk_read_bytes_per_s=0,
        disk_written_bytes_per_s=0,
    )


async def test_what_its_devices_move_is_a_rate(fleet: Fleet) -> None:
    await fleet.add("box")
    socket = Path(fleet.vms["box"].runtime.api_socket)
    fleet.hypervisor.traffics[socket] = Traffic(1000, 500, 70, None)
    await fleet.sample()
    fleet.clock.now += 8  # and a reading takes two
    fleet.hypervisor.traffics[socket] = Traffic(3000, 400, 170, None)
    host = (await fleet.sample()).host
    seconds = pytest.approx(10, abs=2)
    assert host.disk_read_bytes_per_s
    assert host.rx_bytes_per_s
    assert 2000 / host.disk_read_bytes_per_s == seconds
    assert 100 / host.rx_bytes_per_s == seconds
    assert host.disk_written_bytes_per_s == 0, "it was begun anew: less is not negative"
    assert host.tx_bytes_per_s is None, "nobody counts it"


async def test_a_hypervisor_that_does_not_answer_delays_nobody(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.add("box")
    for problem in (Unavailable("busy"), None):

        async def traffic(_: Path, problem: Exception | None = problem) -> Traffic:
            if problem is not None:
                raise problem
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(fleet.hypervisor, "traffic", traffic)
        monkeypatch.setattr(stats_module, "_TRAFFIC_TIMEOUT_S", 0.01)
        fleet.clock.now += 5
        sample = await fleet.sample()
        assert sample.guest is not None
        assert sample.host.disk_read_bytes_per_s is None


async def test_the_process_of_the_network_counts(fleet: Fleet) -> None:
    await fleet.add("box")
    fleet.busy[77] = 1.5
    handles = fleet.handles.get("id-box")
    handles = msgspec.structs.replace(handles, network=(ProcessId(pid=77, start_ticks=154),))
    fleet.handles.set("id-box", handles)
    host = (await fleet.sample()).host
    assert host.memory_bytes == 10 << 20
    assert host.cpu_percent == pytest.approx(175, rel=0.01)
    del fleet.busy[77]
    fleet.clock.now += 5
    assert (await fleet.sample()).host.cpu_percent == 0, "less than before is not negative"


async def test_the_guest_tells_what_is_within(fleet: Fleet) -> None:
    await fleet.add("box")
    await fleet.one()
    fleet.clock.now += 4 - 1
    fleet.says(
        "box",
        cpu={"busy_ticks": 250, "total_ticks": 1200, "count": 2},
        network={"rx_bytes": 9000, "tx_bytes": 500},
    )
    assert (await fleet.sample()).guest == GuestUsage(
        cpu_percent=75.0,
        vcpu_count=2,
        memory_used_bytes=400 << 10,
        memory_total_bytes=1000 << 10,
        disks=(GuestDisk(mount="/", used_bytes=1 << 20, total_bytes=2 << 20),),
        rx_bytes=9000,
        tx_bytes=500,
        rx_bytes_per_s=2000.0,
        tx_bytes_per_s=0.0,
        load=(0.1, 0.2, 0.3),
        processes=3,
        uptime_s=12.5,
    )


async def test_a_first_look_is_two_readings_and_the_next_compares_with_it(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    first = await fleet.one()
    assert [point.host_cpu_percent for point in first.history] == [None, 25.0]
    fleet.clock.now += 5
    second = await fleet.one()
    assert len(second.history) == 3
    assert second.history[:2] == first.history
    fleet.clock.now += 3600
    third = await fleet.one()
    assert [point.host_cpu_percent for point in third.history[3:]] == [None, 25.0]
    assert guest.opened == [_KIND] * 5


async def test_who_asks_at_the_same_time_shares_a_look(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    found = await asyncio.gather(*(fleet.one() for _ in range(5)))
    assert all(each == found[0] for each in found)
    assert await fleet.one() == found[0], "it is fresh enough for the next one, too"
    assert len(guest.opened) == 2


async def test_a_client_that_goes_away_does_not_end_the_look_of_others(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "ANSWER_TIMEOUT_S", 0.1)
    guest = await fleet.add("box")
    guest.exits[_KIND] = None
    going = asyncio.create_task(fleet.one())
    staying = asyncio.create_task(fleet.one())
    while not guest.opened:
        await asyncio.sleep(0.001)
    going.cancel()
    assert (await staying).latest is not None


async def test_all_that_run_are_told_by_name_and_others_only_when_named(fleet: Fleet) -> None:
    for name in ("b", "a", "c"):
        await fleet.add(name)
    fleet.stop("c")
    assert [each.name for each in await fleet.service.collect()] == ["a", "b"]
    stopped = await fleet.one("c")
    assert (stopped.state, stopped.latest, stopped.history) == (VmState.STOPPED, None, ())
    with pytest.raises(NotFound):
        await fleet.service.collect("d")


# History


async def test_the_history_is_bounded(fleet: Fleet) -> None:
    await fleet.add("box")
    for _ in range(HISTORY_LENGTH + 5):
        fleet.clock.now += 1
        found = await fleet.one()
    assert len(found.history) == HISTORY_LENGTH
    assert found.latest is not None
    assert found.history[-1].at == found.latest.at


async def test_a_machine_that_is_started_again_begins_anew(fleet: Fleet) -> None:
    await fleet.add("box")
    await fleet.one()
    fleet.clock.now += 5
    fleet.start("box", busy=0.5)
    assert fleet.service.latest(fleet.vms["box"]) is None
    found = await fleet.one()
    assert [point.host_cpu_percent for point in found.history] == [None, 50.0]


async def test_nothing_is_kept_of_a_vm_that_is_gone(fleet: Fleet) -> None:
    await fleet.add("box")
    await fleet.add("other")
    await fleet.service.collect()
    fleet.stop("box")
    await fleet.one("other")
    assert set(fleet.service._tracks) == {"id-other"}


async def test_the_latest_is_told_without_a_look_while_it_is_recent(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await fleet.add("box")
    assert fleet.service.latest(fleet.vms["box"]) is None
    sample = await fleet.sample()
    asked = len(guest.opened)
    assert fleet.service.latest(fleet.vms["box"]) == sample
    assert len(guest.opened) == asked
    monkeypatch.setattr(stats_module, "_CURRENT_S", -1)
    assert fleet.service.latest(fleet.vms["box"]) is None
    monkeypatch.undo()
    fleet.stop("box")
    assert fleet.service.latest(fleet.vms["box"]) is None


async def test_the_list_has_every_vm_and_looks_at_none(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    await fleet.add("off")
    fleet.stop("off")
    assert [each.usage for each in await fleet.service.listed()] == [None, None]
    assert guest.opened == []
    sample = await fleet.sample()
    box, off = await fleet.service.listed()
    assert (box.name, box.usage) == ("box", sample)
    assert (off.name, off.usage, off.runtime) == ("off", None, fleet.vms["off"].runtime)


async def test_a_process_that_has_just_ended_has_no_sample(fleet: Fleet) -> None:
    await fleet.add("box")
    fleet.busy.clear()
    assert (await fleet.one()).latest is None


# Guests that do not answer, or answer nonsense


async def test_a_silent_guest_has_a_host_view_and_delays_nobody(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "ANSWER_TIMEOUT_S", 0.1)
    silent = await fleet.add("silent")
    silent.exits[_KIND] = None
    await fleet.add("box")
    looking = asyncio.create_task(fleet.one("silent"))
    while not silent.opened:
        await asyncio.sleep(0.001)
    assert (await fleet.sample("box")).guest is not None
    assert not looking.done()
    found = await looking
    assert found.latest is not None
    assert found.latest.host.cpu_percent is not None
    assert found.latest.guest is None


async def test_a_guest_that_was_late_is_not_waited_for_until_it_answers_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "ANSWER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(stats_module, "_LATE_TIMEOUT_S", 1)
    guest = await fleet.add("box")
    guest.exits[_KIND] = None
    await fleet.one()
    monkeypatch.setattr(stats_module, "ANSWER_TIMEOUT_S", _TIMEOUT_S)
    started = time.perf_counter()
    for _ in range(20):
        fleet.clock.now += 5
        assert (await fleet.sample()).guest is None
    assert time.perf_counter() - started < 0.9
    assert len(guest.opened) == 1, "one request at a time"
    del guest.exits[_KIND]
    async with asyncio.timeout(_TIMEOUT_S):
        while (await fleet.sample()).guest is None:
            fleet.clock.now += 5
            await asyncio.sleep(0.02)


async def test_a_guest_without_an_agent_has_a_host_view(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "ANSWER_TIMEOUT_S", 0.05)
    guest = await fleet.add("box")
    guest.silent = True
    sample = await fleet.sample()
    assert sample.guest is None
    assert sample.host.memory_bytes == 5 << 20


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 10_000,
        b'{"a":"' + bytes(20_000) + b'"}',
        msgspec.json.encode(answer())[:-1],
        msgspec.json.encode(answer(uptime_s=-1)),
        msgspec.json.encode(answer(uptime_s="1")),
        msgspec.json.encode(answer()).replace(b"12.5", b"NaN"),
        msgspec.json.encode(answer()).replace(b"12.5", b"1e999"),
        msgspec.json.encode(answer(processes=-1)),
        msgspec.json.encode(answer(processes=1 << 40)),
        msgspec.json.encode(answer(load=[1, 2])),
        msgspec.json.encode(answer(load=[1, 2, -3])),
        msgspec.json.encode(answer(network={"rx_bytes": 1 << 63, "tx_bytes": 0})),
        msgspec.json.encode(answer(cpu={"busy_ticks": 1, "total_ticks": 1, "count": 0})),
        msgspec.json.encode(answer(disks=[answer()["disks"][0]] * 17)),
        msgspec.json.encode(answer(disks=[answer()["disks"][0] | {"mount": "/" * 65}])),
    ],
)
async def test_nonsense_is_no_view_of_the_guest_and_no_harm(fleet: Fleet, nonsense: bytes) -> None:
    guest = await fleet.add("box")
    guest.stdout[_KIND] = nonsense
    sample = await fleet.sample()
    assert sample.guest is None
    assert sample.host.cpu_percent == 25.0
    fleet.says("box")
    fleet.clock.now += 5
    assert (await fleet.sample()).guest is not None


async def test_a_guest_that_cannot_say_has_a_host_view(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    guest.exits[_KIND] = b"\2\0\0\0\x0cno memory"
    assert (await fleet.sample()).guest is None


COUNTERS = st.integers(0, (1 << 63) - 1)
KIB = st.integers(0, (1 << 53) - 1)


@st.composite
def answers(draw: st.DrawFn) -> GuestStats:
    """Anything a guest can say that is decoded."""
    said = answer(
        uptime_s=draw(st.floats(0, 1e12)),
        cpu={"busy_ticks": draw(COUNTERS), "total_ticks": draw(COUNTERS), "count": 1},
        memory={"total_kib": draw(KIB), "available_kib": draw(KIB)},
        disks=[{"mount": "/", "total_kib": draw(KIB), "free_kib": draw(KIB)}],
        network={"rx_bytes": draw(COUNTERS), "tx_bytes": draw(COUNTERS)},
    )
    return GuestStats.decode(msgspec.json.encode(said))


@given(answers(), answers(), st.floats(1e-3, 1e6))
def test_whatever_a_guest_counts_what_comes_of_it_is_in_bounds(
    before: GuestStats, after: GuestStats, seconds: float
) -> None:
    reading = stats_module._GuestReading
    usage = stats_module._guest_usage(reading(1, before), reading(1 + seconds, after))
    assert usage.cpu_percent is None or 0 <= usage.cpu_percent <= 100
    assert usage.memory_used_bytes >= 0
    assert usage.disks[0].used_bytes >= 0
    assert usage.rx_bytes_per_s is not None
    assert 0 <= usage.rx_bytes_per_s < float("inf")
    assert msgspec.json.decode(msgspec.json.encode(usage), type=GuestUsage) == usage


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_a_bad_request(said: bytes) -> None:
    with pytest.raises(BadRequest):
        GuestStats.decode(said)


def test_what_a_guest_says_beyond_what_is_known_is_ignored() -> None:
    assert GuestStats.decode(msgspec.json.encode(answer(more=[1]))).processes == 3


# Polling


async def test_running_vms_are_looked_at_without_being_asked_for(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    service = fleet.made_service(interval_s=0.02)
    async with service.polling():
        async with asyncio.timeout(_TIMEOUT_S):
            while len(guest.opened) < 4:
                fleet.clock.now += 1
                await asyncio.sleep(0.01)
        assert service.latest(fleet.vms["box"]) is not None
        asked = guest.opened
    asked = list(guest.opened)
    await asyncio.sleep(0.05)
    assert guest.opened == asked
    assert service._tasks == set()


async def test_with_an_interval_of_0_nobody_looks_unasked(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    await asyncio.sleep(0.05)
    assert guest.opened == []


async def test_polling_goes_on_after_a_round_that_failed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await fleet.add("box")
    failed = asyncio.Event()
    everything = fleet.all

    async def fail() -> list[Vm]:
        if not failed.is_set():
            failed.set()
            raise OSError("disk full")
        return await everything()

    monkeypatch.setattr(fleet, "all", fail)
    async with fleet.made_service(interval_s=0.01).polling():
        async with asyncio.timeout(_TIMEOUT_S):
            while not guest.opened:
                await asyncio.sleep(0.005)
    assert failed.is_set()


async def test_a_request_that_is_open_at_the_end_is_ended(fleet: Fleet) -> None:
    guest = await fleet.add("box")
    guest.exits[_KIND] = None
    service = fleet.made_service()
    async with service.polling():
        waiting = asyncio.create_task(service.collect())
        while not guest.opened:
            await asyncio.sleep(0.001)
    await asyncio.wait_for(waiting, _TIMEOUT_S)
    assert service._tasks == set()


# Over the wire


@pytest.fixture
async def served(fleet: Fleet) -> AsyncIterator[Fleet]:
    methods = Observation(fleet.service).methods()

    async def dispatch(request: Request, connection: Connection) -> None:
        if request.method not in methods:
            raise UnknownMethod(request.method)
        params, call = methods[request.method]
        try:
            decoded = msgspec.json.decode(request.params, type=params)
        except msgspec.ValidationError as error:
            raise BadRequest(str(error)) from None
        await call(decoded, connection)

    fleet.paths.runtime_dir.mkdir(mode=0o700, parents=True)
    server = Server(fleet.paths.daemon_socket, dispatch)
    await server.start()
    yield fleet
    await server.stop()


def call(fleet: Fleet, params: object) -> Any:
    def work() -> list[VmStats]:
        with Client.connect(fleet.paths, start=False) as client:
            return client.call("vm.stats", params, list[VmStats])

    return asyncio.wait_for(asyncio.to_thread(work), _TIMEOUT_S)


async def test_a_client_gets_what_all_or_one_use(served: Fleet) -> None:
    await served.add("a")
    await served.add("b")
    assert [each.name for each in await call(served, {})] == ["a", "b"]
    (found,) = await call(served, {"vm": "b"})
    assert found == (await served.service.collect("b"))[0]
    with pytest.raises(NotFound):
        await call(served, {"vm": "c"})


async def test_a_client_that_lists_gets_the_records_with_what_was_seen_last(served: Fleet) -> None:
    await served.add("box")
    sample = await served.sample()

    def work() -> tuple[list[ListedVm], list[Vm]]:
        with Client.connect(served.paths, start=False) as client:
            listed = client.call("vm.list", {}, list[ListedVm])
            return listed, client.call("vm.list", {}, list[Vm])

    listed, plain = await asyncio.wait_for(asyncio.to_thread(work), _TIMEOUT_S)
    assert [each.usage for each in listed] == [sample]
    assert plain == [served.vms["box"]], "a client that knows nothing of usage reads the record"


@pytest.mark.parametrize("interval_s", [0, 0.4, 3601, -1, "2s"])
async def test_an_interval_that_cannot_be_is_refused(served: Fleet, interval_s: object) -> None:
    with pytest.raises(BadRequest):
        await call(served, {"watch": True, "interval_s": interval_s})


async def watching(fleet: Fleet, **params: Any) -> tuple[asyncio.StreamReader, Any]:
    reader, writer = await asyncio.open_unix_connection(fleet.paths.daemon_socket, limit=1 << 20)
    request = {"version": 1, "method": "vm.stats", "params": {"watch": True, **params}}
    writer.write(msgspec.json.encode(request) + b"\n")
    return reader, writer


async def event(reader: asyncio.StreamReader) -> list[VmStats]:
    line = await asyncio.wait_for(reader.readline(), _TIMEOUT_S)
    return msgspec.json.decode(line, type=dict[str, list[VmStats]])["event"]


async def test_who_watches_gets_an_event_an_interval_until_it_goes(
    served: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await served.add("box")
    reader, writer = await watching(served, interval_s=0.5)
    first = await event(reader)
    served.clock.now += 0.5
    second = await event(reader)
    assert len(first[0].history) == 2
    assert len(second[0].history) == 3
    await served.add("later")
    assert [each.name for each in await event(reader)] == ["box", "later"]
    writer.close()
    await writer.wait_closed()
    asked = len(guest.opened)
    await asyncio.sleep(0.7)
    assert len(guest.opened) == asked


async def test_a_vm_that_is_watched_stays_the_one(served: Fleet) -> None:
    await served.add("box")
    reader, writer = await watching(served, vm="box", interval_s=0.5)
    assert (await event(reader))[0].state is VmState.RUNNING
    renamed = msgspec.structs.replace(served.vms.pop("box"), name="other")
    served.vms["other"] = renamed
    assert (await event(reader))[0].name == "other"
    served.stop("other")
    assert (await event(reader))[0].state is VmState.STOPPED
    served.vms.clear()
    line = await asyncio.wait_for(reader.readline(), _TIMEOUT_S)
    assert msgspec.json.decode(line)["error"]["code"] == "not_found"
    writer.close()
    await writer.wait_closed()


def test_the_bounds_of_an_interval_are_those_of_the_command() -> None:
    from banger.cli.stats import _LEAST_S, _MOST_S

    for seconds in (_LEAST_S, _MOST_S):
        query = msgspec.convert({"interval_s": seconds}, StatsQuery)
        assert query.interval_s == seconds
