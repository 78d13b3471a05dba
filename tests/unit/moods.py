"""Drivers, guests and a database that have moods: slow, or failing, as a seed has it.

What one daemon works through is bound to its `Life`: once that is over, nothing that is left of the
daemon reaches anything, as if it had been killed. Used by `test_lifecycle_machine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ParamSpec, TypeVar

import fakes
from banger.drivers.base import Machine, NetworkAttachment
from banger.guest import requests
from banger.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")


class Moods:
    """How drivers and guests feel in this round: all of it comes from the round's seed."""

    def __init__(self) -> None:
        self._random = Random(0)
        self._calm = True

    def begin(self, seed: int) -> None:
        self._random, self._calm = Random(seed), not seed

    async def take_time(self, most_steps: int) -> None:
        if not self._calm:
            for _ in range(self._random.randrange(most_steps + 1)):
                await asyncio.sleep(0)

    def whim(self, one_in: int) -> bool:
        return not self._calm and not self._random.randrange(one_in)


class Life:
    """A daemon's. Once it is over, nothing that the daemon still does reaches anything."""

    def __init__(self) -> None:
        self.over = False

    def check(self) -> None:
        if self.over:
            raise asyncio.CancelledError


class Gate(fakes.Gate):
    """Takes its time, and sometimes fails."""

    def __init__(self, moods: Moods, life: Life) -> None:
        super().__init__()
        self._moods = moods
        self._life = life

    async def passed(self) -> None:
        await self._moods.take_time(25)
        self._life.check()
        if self._moods.whim(25):
            raise fakes.failing("out of sorts")


class MortalStore:
    """The database as one daemon has it."""

    def __init__(self, store: Store, moods: Moods, life: Life) -> None:
        self._store = store
        self._moods = moods
        self._life = life

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._store, name)

        async def call(*arguments: object) -> Any:
            self._life.check()
            await self._moods.take_time(2)
            self._life.check()
            return await method(*arguments)

        return call


@dataclass
class Guest:
    """The guest of one machine."""

    #: It powers off when it is asked to.
    obeys: bool = True
    answers: bool = True
    exits: dict[int, bytes | None] = field(default_factory=dict)
    hostname: str = ""


class Guests(fakes.Agent):
    """The agents of all machines, each with a mood of its own."""

    def __init__(self, moods: Moods) -> None:
        super().__init__()
        self._moods = moods
        self.by_socket: dict[Path, Guest] = {}

    async def listen(self, path: Path) -> None:
        # Only the starts of VMs that were there before wait no longer than we want to here.
        silent = path in self.by_socket and self._moods.whim(25)
        refuses = {requests.Setup.KIND: b"\x02\0\0\0\x10busy"} if self._moods.whim(25) else {}
        self.by_socket[path] = Guest(
            obeys=not self._moods.whim(8), answers=not silent, exits={**refuses}
        )
        listening = asyncio.ensure_future(super().listen(path))
        try:
            await asyncio.shield(listening)
        except asyncio.CancelledError:
            await listening
            self.hang_up(path)
            raise

    async def _serve(
        self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._moods.take_time(15)
        await super()._serve(path, reader, writer)

    def _answer(self, writer: asyncio.StreamWriter, kind: int, stream: int, payload: bytes) -> None:
        task = asyncio.current_task()
        assert task is not None
        guest = self.by_socket[self._tasks[task]]
        self.silent, self.exits = not guest.answers, guest.exits
        before = len(self.setups)
        super()._answer(writer, kind, stream, payload)
        for setup in self.setups[before:]:
            if not guest.exits and 1 in setup:
                guest.hostname = setup[1].decode()

    def _shut_down(self, path: Path) -> None:
        if self.by_socket[path].obeys:
            super()._shut_down(path)


class Hypervisor(fakes.Hypervisor):
    def __init__(self, processes: fakes.Processes, guests: Guests, moods: Moods, life: Life):
        super().__init__(processes, guests)
        self._moods = moods
        self._life = life
        self.gate = Gate(moods, life)

    async def launch(self, machine: Machine, network: NetworkAttachment | None) -> int:
        try:
            pid = await super().launch(machine, network)
        except BaseException:
            if network is not None:
                for helper in network.pids:
                    self.processes.end(helper)
            raise
        if self._moods.whim(30):
            self.processes.end(pid)
        return pid

    async def quit(self, control_socket: Path) -> None:
        await self._moods.take_time(10)
        self._life.check()
        self.can_quit = not self._moods.whim(6)
        await super().quit(control_socket)


class InPlace(ThreadPoolExecutor):
    """Works at once, in the event loop's own thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
