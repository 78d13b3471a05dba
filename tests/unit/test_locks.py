"""Locks by key: one holder at a time, in one order, nothing kept of keys nobody wants."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.services.locks import LockOrderError, Locks, Rank

#: (key, steps before taking the lock, steps while holding it, whether it is cancelled)
_plans = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3), st.booleans()),
    max_size=12,
)


@given(_plans, st.integers(0, 6))
def test_whatever_the_order_one_holds_a_key_and_all_are_dropped(
    plans: list[tuple[str, int, int, bool]], cancel_after: int
) -> None:
    async def run() -> None:
        locks = Locks(Rank.VM)
        inside: dict[str, int] = {"a": 0, "b": 0}
        finished = 0

        async def user(key: str, before: int, within: int) -> None:
            nonlocal finished
            for _ in range(before):
                await asyncio.sleep(0)
            async with locks.hold(key):
                inside[key] += 1
                try:
                    assert inside[key] == 1
                    for _ in range(within):
                        await asyncio.sleep(0)
                    assert inside[key] == 1
                finally:
                    inside[key] -= 1
            finished += 1

        tasks = [asyncio.create_task(user(*plan[:3])) for plan in plans]
        for _ in range(cancel_after):
            await asyncio.sleep(0)
        for task, plan in zip(tasks, plans, strict=True):
            if plan[3]:
                task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(
            result is None or isinstance(result, asyncio.CancelledError) for result in results
        )
        assert finished >= sum(not plan[3] for plan in plans)
        assert locks._locks == {}
        assert locks._users == {}

    asyncio.run(run())


async def test_other_keys_do_not_wait() -> None:
    locks = Locks(Rank.VM)

    async def other() -> None:
        async with locks.hold("b"):
            pass

    async with locks.hold("a"), asyncio.timeout(5):
        await asyncio.create_task(other())


async def test_who_holds_a_lock_is_known() -> None:
    locks = Locks(Rank.VM)
    assert not locks.held("a")
    async with locks.hold("a"):
        assert locks.held("a")
        assert not locks.held("b")
    assert not locks.held("a")


@given(st.lists(st.sampled_from(Rank), max_size=5))
def test_locks_are_taken_in_the_order_of_their_ranks_or_not_at_all(order: list[Rank]) -> None:
    """One of each rank at most: two of one rank could be taken crosswise by two tasks."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            for rank in order:
                await stack.enter_async_context(Locks(rank).hold("a"))

    if sorted(set(order)) == order:
        asyncio.run(run())
    else:
        with pytest.raises(LockOrderError):
            asyncio.run(run())


async def test_a_lock_given_back_is_held_no_more_and_a_task_holds_for_itself_alone() -> None:
    inner, outer = Locks(Rank.CHANNEL), Locks(Rank.VM)

    async def child() -> None:
        async with outer.hold("a"):
            pass

    async with inner.hold("a"), asyncio.timeout(5):
        await asyncio.create_task(child())
    async with outer.hold("a"), inner.hold("a"):
        pass


async def test_an_outer_lock_may_be_given_back_first() -> None:
    outer, inner, innermost = Locks(Rank.IMAGE), Locks(Rank.VM), Locks(Rank.CHANNEL)
    async with AsyncExitStack() as stack:
        async with outer.hold("a"):
            await stack.enter_async_context(inner.hold("a"))
        async with innermost.hold("a"):
            pass
        with pytest.raises(LockOrderError):
            await stack.enter_async_context(Locks(Rank.VM).hold("b"))


async def test_a_lock_is_given_back_after_a_failure() -> None:
    locks = Locks(Rank.VM)
    try:
        async with locks.hold("a"):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    async with asyncio.timeout(5), locks.hold("a"):
        pass
    assert locks._locks == {}
