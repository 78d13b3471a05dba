"""What running VMs use: looked at from time to time and when asked, kept for a while.

The host's view is read from /proc and the disks; the guest's comes from its agent. Every look at a
VM is shared by all who want one at that time. A guest that does not answer costs nobody else any
time: it is waited for once, for a bounded time, and asked again only when that request has ended.

Takes no lock of a VM. A machine is known by its process, so that a VM that is started again begins
anew, and what is kept of machines that are gone is dropped with the next look at any.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from banger.base import procfs
from banger.base.errors import BangerError
from banger.base.log import get_logger
from banger.base.model import Vm, VmState, now
from banger.base.opid import current_op_id, new_op_id
from banger.base.usage import (
    GuestDisk,
    GuestUsage,
    HostUsage,
    ListedVm,
    Sample,
    ShownVm,
    UsagePoint,
    VmStats,
)
from banger.drivers.base import Hypervisor, Storage, Traffic
from banger.guest import requests
from banger.guest.channel import call
from banger.guest.stats import ANSWER_LIMIT_BYTES, GuestStats
from banger.services.agents import Agents
from banger.services.handles import HandleCache
from banger.services.vm import VmService

T = TypeVar("T")

HISTORY_LENGTH = 120
#: How long a look waits for the guest.
ANSWER_TIMEOUT_S = 2.0
#: How long one waits for the hypervisor, which answers in milliseconds when it is free.
_TRAFFIC_TIMEOUT_S = 1.0
#: How long the request to a guest that is late stays open before it is made again.
_LATE_TIMEOUT_S = 60.0
#: How many guests are waited for at a time; those known to be late are not among them.
_ASKED_AT_ONCE = 16
#: Who asks gets a look that is not older. (CPU time is counted in steps of 10 ms: what is measured
#: over less than this says little.)
_FRESH_S = 0.4
#: Who asks gets figures over this time at most: with none to compare with, two looks are taken.
_COMPARABLE_S = 15.0
_PAIR_S = 0.5
#: What runs when the daemon starts is looked at first after so long.
_SOON_S = 1.0
#: A sample is shown as current for so long at least, where looks are rare.
_CURRENT_S = 60.0
_KIB = 1024


@dataclass(frozen=True)
class _HostReading:
    moment_s: float
    cpu_s: float
    memory_bytes: int
    disk_bytes: int
    traffic: Traffic | None


@dataclass(frozen=True)
class _GuestReading:
    moment_s: float
    stats: GuestStats


@dataclass
class _Track:
    """What is kept of one machine, which its pid and start time name."""

    machine: tuple[int, int]
    host: _HostReading | None = None
    guest: _GuestReading | None = None
    latest: Sample | None = None
    history: deque[UsagePoint] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    #: The look that is being taken.
    looking: asyncio.Task[None] | None = None
    #: The request that the guest has not answered yet.
    asking: asyncio.Task[_GuestReading | None] | None = None
    #: Whether it was in time the last time: only then is it waited for.
    prompt: bool = True


class StatsService:
    def __init__(
        self,
        *,
        vms: VmService,
        agents: Agents,
        handles: HandleCache,
        hypervisor: Hypervisor,
        storage: Storage,
        interval_s: float,
    ) -> None:
        self._vms = vms
        self._agents = agents
        self._handles = handles
        self._hypervisor = hypervisor
        self._storage = storage
        self._interval_s = interval_s
        self._tracks: dict[str, _Track] = {}
        self._slots = asyncio.Semaphore(_ASKED_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Running VMs are looked at every `interval_s` seconds while the block runs; with 0 only
        when somebody asks. Nothing is left open at its end."""
        if self._interval_s:
            self._start(self._poll())
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        """End looks and requests that are open. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def shown(self, vm: Vm) -> ShownVm:
        """A VM with what its disks take now, whether it runs or not."""
        disk_bytes = await asyncio.to_thread(self._disk_bytes, vm)
        return ShownVm(**msgspec.structs.asdict(vm), disk_bytes=disk_bytes)

    async def listed(self) -> list[ListedVm]:
        """Every VM, by name, with its last recent sample. Looks at nothing."""
        return [
            ListedVm(**msgspec.structs.asdict(vm), usage=self.latest(vm))
            for vm in await self._vms.all()
        ]

    async def collect(self, reference: str = "") -> list[VmStats]:
        """What this VM uses now, or (without a reference) every running one, by name.

        A VM that does not run has no sample. Takes up to half a second when there is no recent
        look to compare with, and `ANSWER_TIMEOUT_S` when a guest does not answer. Raises as
        `VmService.resolve` does.
        """
        vms = [await self._vms.show(reference)] if reference else await self._vms.all()
        chosen = vms if reference else _running(vms)
        await self._look_at(_running(chosen), comparable_s=_COMPARABLE_S)
        return [self._stats(vm) for vm in chosen]

    def latest(self, vm: Vm) -> Sample | None:
        """The last sample of a VM that runs, if it is recent; without looking."""
        if vm.runtime.state is not VmState.RUNNING:
            return None
        track = self._tracks.get(vm.id)
        if track is None or track.latest is None or track.machine != self._machine(vm.id):
            return None
        current = timedelta(seconds=max(_CURRENT_S, 3 * self._interval_s))
        return track.latest if now() - track.latest.at <= current else None

    async def _poll(self) -> None:
        pause_s = min(self._interval_s, _SOON_S)
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._interval_s
            current_op_id.set(new_op_id())
            try:
                await self._look_at(_running(await self._vms.all()), comparable_s=float("inf"))
            except Exception:
                # A supervisor's boundary: it must go on whatever one round met with.
                get_logger().exception("stats polling failed")

    async def _look_at(self, vms: list[Vm], *, comparable_s: float) -> None:
        """Take a look at each, all at once; return when all are done."""
        self._drop_the_gone()
        looks = []
        for vm in vms:
            track = self._track(vm)
            if track.looking is None:
                if track.host is not None and time.monotonic() - track.host.moment_s < _FRESH_S:
                    continue
                track.looking = self._start(self._look(vm, track, comparable_s))
            looks.append(track.looking)
        if looks:
            # Not gathered: who goes away must not end the look that others wait for.
            await asyncio.wait(looks)
        for look in looks:
            if not look.cancelled():
                look.result()

    def _track(self, vm: Vm) -> _Track:
        """Call `_drop_the_gone` first."""
        if (track := self._tracks.get(vm.id)) is None:
            track = self._tracks[vm.id] = _Track(self._machine(vm.id))
        return track

    def _machine(self, vm_id: str) -> tuple[int, int]:
        handles = self._handles.get(vm_id)
        return handles.pid, handles.pid_start_ticks

    def _drop_the_gone(self) -> None:
        for vm_id, track in list(self._tracks.items()):
            if track.machine != self._machine(vm_id):
                del self._tracks[vm_id]
                if track.asking is not None:
                    track.asking.cancel()

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _look(self, vm: Vm, track: _Track, comparable_s: float) -> None:
        try:
            if track.host is None or time.monotonic() - track.host.moment_s > comparable_s:
                track.host = track.guest = None
                await self._sample(vm, track)
                await asyncio.sleep(_PAIR_S)
            await self._sample(vm, track)
        finally:
            track.looking = None

    async def _sample(self, vm: Vm, track: _Track) -> None:
        guest, traffic = await asyncio.gather(self._ask_bounded(vm, track), self._traffic(vm))
        host = self._read_host(vm, traffic)
        if host is None:
            return  # it has just ended
        sample = Sample(
            at=now(),
            host=_host_usage(track.host, host),
            guest=None if guest is None else _guest_usage(track.guest, guest),
        )
        track.host = host
        track.guest = guest or track.guest
        track.latest = sample
        track.history.append(_point(sample))

    async def _traffic(self, vm: Vm) -> Traffic | None:
        """None when the hypervisor has something else to do, or hangs."""
        try:
            async with asyncio.timeout(_TRAFFIC_TIMEOUT_S):
                return await self._hypervisor.traffic(Path(vm.runtime.api_socket))
        except (BangerError, TimeoutError) as error:
            get_logger().debug("traffic not known", vm_id=vm.id, error=str(error))
            return None

    def _read_host(self, vm: Vm, traffic: Traffic | None) -> _HostReading | None:
        handles = self._handles.get(vm.id)
        machine = procfs.usage(handles.pid, handles.pid_start_ticks)
        if machine is None:
            return None
        network = (procfs.usage(each.pid, each.start_ticks) for each in handles.network)
        processes = [machine, *filter(None, network)]
        return _HostReading(
            moment_s=time.monotonic(),
            cpu_s=sum(each.cpu_s for each in processes),
            memory_bytes=sum(each.resident_bytes for each in processes),
            disk_bytes=self._disk_bytes(vm),
            traffic=traffic,
        )

    def _disk_bytes(self, vm: Vm) -> int:
        """Of the host's disk; not of the image below, which all its VMs share."""
        disks = (vm.runtime.system_overlay, vm.runtime.work_disk)
        return sum(self._storage.allocated_bytes(Path(disk)) for disk in disks if disk)

    async def _ask_bounded(self, vm: Vm, track: _Track) -> _GuestReading | None:
        """The guest's answer, if it comes in time.

        A guest that was late is asked, but not waited for until it has answered again. A late
        answer is thrown away: it would be taken for what is true now.
        """
        if track.asking is not None:
            return None
        if not track.prompt:
            track.asking = self._start(self._ask(vm, track))
            return None
        async with self._slots:
            track.asking = task = self._start(self._ask(vm, track))
            await asyncio.wait({task}, timeout=ANSWER_TIMEOUT_S)
        track.prompt = task.done()
        return task.result() if task.done() and not task.cancelled() else None

    async def _ask(self, vm: Vm, track: _Track) -> _GuestReading | None:
        try:
            channel = await self._agents.connect(vm, ANSWER_TIMEOUT_S)
            answer = await call(
                channel,
                requests.Stats(),
                timeout_s=_LATE_TIMEOUT_S,
                limit_bytes=ANSWER_LIMIT_BYTES,
            )
            track.prompt = True
            return _GuestReading(time.monotonic(), GuestStats.decode(answer.stdout))
        except BangerError as error:
            get_logger().debug("no answer to stats", vm_id=vm.id, error=error.message)
            return None
        finally:
            track.asking = None

    def _stats(self, vm: Vm) -> VmStats:
        track = self._tracks.get(vm.id) if vm.runtime.state is VmState.RUNNING else None
        return VmStats(
            id=vm.id,
            name=vm.name,
            state=vm.runtime.state,
            vcpu_count=vm.spec.vcpu_count,
            memory_mib=vm.spec.memory_mib,
            latest=track.latest if track is not None else None,
            history=tuple(track.history) if track is not None else (),
        )


def _running(vms: Iterable[Vm]) -> list[Vm]:
    return [vm for vm in vms if vm.runtime.state is VmState.RUNNING]


def _host_usage(before: _HostReading | None, reading: _HostReading) -> HostUsage:
    cpu_percent = None
    seconds = 0.0
    earlier: Traffic | None = None
    if before is not None and reading.moment_s > before.moment_s:
        seconds = reading.moment_s - before.moment_s
        earlier = before.traffic
        # Never below 0: the network's process may have ended since, with its part.
        cpu_s = max(reading.cpu_s - before.cpu_s, 0.0)
        cpu_percent = round(100 * cpu_s / seconds, 2)

    def rate(count: Callable[[Traffic], int | None]) -> float | None:
        if earlier is None or reading.traffic is None:
            return None
        begin, end = count(earlier), count(reading.traffic)
        return None if begin is None or end is None else _rate(end - begin, seconds)

    return HostUsage(
        cpu_percent=cpu_percent,
        memory_bytes=reading.memory_bytes,
        disk_bytes=reading.disk_bytes,
        disk_read_bytes_per_s=rate(lambda each: each.disk_read_bytes),
        disk_written_bytes_per_s=rate(lambda each: each.disk_written_bytes),
        rx_bytes_per_s=rate(lambda each: each.network_in_bytes),
        tx_bytes_per_s=rate(lambda each: each.network_out_bytes),
    )


def _guest_usage(before: _GuestReading | None, reading: _GuestReading) -> GuestUsage:
    """Differences are of a guest's numbers: whatever they are, the results are in their bounds."""
    stats = reading.stats
    cpu_percent = rx_rate = tx_rate = None
    if before is not None and reading.moment_s > before.moment_s:
        earlier, seconds = before.stats, reading.moment_s - before.moment_s
        if (ticks := stats.cpu.total_ticks - earlier.cpu.total_ticks) > 0:
            share = (stats.cpu.busy_ticks - earlier.cpu.busy_ticks) / ticks
            cpu_percent = round(100 * min(max(share, 0.0), 1.0), 2)
        rx_rate = _rate(stats.network.rx_bytes - earlier.network.rx_bytes, seconds)
        tx_rate = _rate(stats.network.tx_bytes - earlier.network.tx_bytes, seconds)
    memory = stats.memory
    return GuestUsage(
        cpu_percent=cpu_percent,
        vcpu_count=stats.cpu.count,
        memory_used_bytes=max(memory.total_kib - memory.available_kib, 0) * _KIB,
        memory_total_bytes=memory.total_kib * _KIB,
        disks=tuple(
            GuestDisk(
                mount=disk.mount,
                used_bytes=max(disk.total_kib - disk.free_kib, 0) * _KIB,
                total_bytes=disk.total_kib * _KIB,
            )
            for disk in stats.disks
        ),
        rx_bytes=stats.network.rx_bytes,
        tx_bytes=stats.network.tx_bytes,
        rx_bytes_per_s=rx_rate,
        tx_bytes_per_s=tx_rate,
        load=stats.load,
        processes=stats.processes,
        uptime_s=stats.uptime_s,
    )


def _rate(count: int, seconds: float) -> float:
    return round(max(count, 0) / seconds, 1)


def _point(sample: Sample) -> UsagePoint:
    guest = sample.guest
    share = None
    if guest is not None and guest.memory_total_bytes:
        share = round(100 * guest.memory_used_bytes / guest.memory_total_bytes, 2)
    return UsagePoint(
        at=sample.at,
        host_cpu_percent=sample.host.cpu_percent,
        host_memory_bytes=sample.host.memory_bytes,
        guest_cpu_percent=guest.cpu_percent if guest is not None else None,
        guest_memory_percent=share,
    )
