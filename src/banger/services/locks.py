"""Locks by id, and the one order in which they are taken.

A lock is of an id, so that a rename cannot drop it. It exists while somebody holds or awaits it.
Who needs more than one takes them in the order of `Rank`, and one of each rank at most: a task
that does otherwise, and could thereby wait for ever, gets a `LockOrderError` at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary


class Rank(IntEnum):
    """From the outermost to the innermost."""

    #: What an image's users are, and whether it may go.
    IMAGE = 1
    #: The life of one VM: held by create, start, stop, restart, delete and set to their end.
    VM = 2
    #: Transfers in and out of one VM; never held while its VM lock is asked for.
    WORKSPACE = 3
    #: The one channel to a VM's agent while it is made or dropped.
    CHANNEL = 4
    #: What a kernel's users are, and whether it may go: for as long as it takes to record one.
    KERNEL = 5


class LockOrderError(RuntimeError):
    """A task holds a lock that it may not hold while it takes this one: a bug."""


#: What each task holds, innermost last.
_held: WeakKeyDictionary[asyncio.Task[Any], list[Rank]] = WeakKeyDictionary()


class Locks:
    """The locks of one rank, by key."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: dict[str, int] = {}

    def held(self, key: str) -> bool:
        """Whether somebody has this lock now."""
        lock = self._locks.get(key)
        return lock is not None and lock.locked()

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None  # coroutines run in tasks
        mine = _held.setdefault(task, [])
        if mine and mine[-1] >= self._rank:
            raise LockOrderError(
                f"{self._rank.name} lock of {key} asked for while holding {mine[-1].name}"
            )
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                mine.append(self._rank)
                try:
                    yield
                finally:
                    mine.remove(self._rank)  # not always the innermost: the outer may go first
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]
