"""The registry of long work: how it begins, tells, ends, is cancelled and forgotten."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from banger.base.errors import Cancelled, Conflict, NotFound
from banger.base.model import Operation, OperationState
from banger.base.opid import current_op_id
from banger.services import operations as module
from banger.services.operations import Operations, Progress, Work, raise_failure
from records import a_vm
from world import ended

OP_ID = "op-0123456789ab"


@pytest.fixture
def operations() -> Operations:
    return Operations()


def begin(operations: Operations, work: Work, op_id: str = OP_ID) -> Progress:
    token = current_op_id.set(op_id)
    try:
        return operations.begin("test.work", "target", work)
    finally:
        current_op_id.reset(token)


async def nothing(progress: Progress) -> None:
    pass


async def for_ever(progress: Progress) -> None:
    progress.stage("waiting")
    await asyncio.Event().wait()


async def test_its_id_is_the_op_id_of_the_call_and_of_all_it_does(operations: Operations) -> None:
    seen: list[str] = []

    async def work(progress: Progress) -> None:
        seen.append(current_op_id.get())

    progress = begin(operations, work)
    assert progress.record.id == OP_ID
    assert progress.record.state is OperationState.RUNNING
    done = await ended(progress)
    assert done.state is OperationState.COMPLETED
    assert done.finished_at is not None
    assert seen == [OP_ID]
    assert operations.all() == [done]


async def test_changes_are_told_and_end_with_the_last(operations: Operations) -> None:
    step = asyncio.Event()
    vm = a_vm("box")

    async def work(progress: Progress) -> None:
        progress.stage("one", "detail", 50)
        await step.wait()
        progress.stage("two")
        progress.result(vm=vm)

    states: list[Operation] = []
    async for state in begin(operations, work).changes():
        states.append(state)
        if state.stage == "one":
            step.set()
    assert ("one", "detail", 50) in [(each.stage, each.detail, each.percent) for each in states]
    assert [each.done for each in states] == [False] * (len(states) - 1) + [True]
    assert states[-1].vm == vm
    assert states[-1].percent == -1


async def test_many_watchers_see_the_end_also_those_who_come_late(operations: Operations) -> None:
    progress = begin(operations, for_ever)
    watching = [asyncio.create_task(ended(progress)) for _ in range(5)]
    await asyncio.sleep(0)
    await operations.cancel(OP_ID)
    last = await asyncio.wait_for(asyncio.gather(*watching), 5)
    assert {state.state for state in last} == {OperationState.CANCELLED}
    assert await ended(progress) == last[0]


async def test_a_failure_keeps_its_code_message_hint_and_op_id(operations: Operations) -> None:
    async def work(progress: Progress) -> None:
        raise Conflict("taken", hint="use another")

    done = await ended(begin(operations, work))
    assert done.state is OperationState.FAILED
    with pytest.raises(Conflict, match="taken") as caught:
        raise_failure(done)
    assert (caught.value.hint, caught.value.op_id) == ("use another", OP_ID)


async def test_a_crash_is_internal_and_its_traceback_is_for_the_log(
    operations: Operations, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(progress: Progress) -> None:
        raise ZeroDivisionError("a detail")

    done = await ended(begin(operations, work))
    assert done.error is not None
    assert done.error.code == "internal"
    assert done.error.message == "internal error: ZeroDivisionError"
    assert "a detail" in capsys.readouterr().out


async def test_cancelled_before_its_first_step_it_never_runs(operations: Operations) -> None:
    ran: list[int] = []

    async def work(progress: Progress) -> None:
        ran.append(1)

    progress = begin(operations, work)
    state = await operations.cancel(OP_ID)
    assert state.state is OperationState.CANCELLED
    assert (await ended(progress)) == state
    assert not ran


async def test_cancelling_waits_for_the_clean_up_and_may_be_done_again(
    operations: Operations,
) -> None:
    order: list[str] = []

    async def work(progress: Progress) -> None:
        try:
            await for_ever(progress)
        finally:
            await asyncio.sleep(0.02)
            order.append("cleaned up")

    progress = begin(operations, work)
    async for state in progress.changes():
        if state.stage:
            break
    first, second = await asyncio.gather(operations.cancel(OP_ID), operations.cancel(OP_ID))
    order.append("cancelled")
    assert order == ["cleaned up", "cancelled"]
    assert first == second == await operations.cancel(OP_ID)
    with pytest.raises(Cancelled):
        raise_failure(first)


async def test_one_who_cancels_and_goes_does_not_interrupt_the_clean_up(
    operations: Operations,
) -> None:
    order: list[str] = []
    cleaning = asyncio.Event()

    async def work(progress: Progress) -> None:
        try:
            await for_ever(progress)
        finally:
            cleaning.set()
            await asyncio.sleep(0.02)
            order.append("cleaned up")

    progress = begin(operations, work)
    async for state in progress.changes():
        if state.stage:
            break
    impatient = asyncio.create_task(operations.cancel(OP_ID))
    await cleaning.wait()
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    await asyncio.wait_for(operations.close(), 5)
    assert order == ["cleaned up"]
    assert progress.record.state is OperationState.CANCELLED


async def test_the_last_one_who_wants_it_and_leaves_cancels_it(operations: Operations) -> None:
    progress = begin(operations, for_ever)
    assert operations.join(OP_ID)
    assert not (await operations.leave(OP_ID)).done
    assert (await operations.leave(OP_ID)).state is OperationState.CANCELLED
    assert (await operations.leave(OP_ID)) == progress.record


async def test_what_is_being_cancelled_or_has_ended_cannot_be_joined(
    operations: Operations,
) -> None:
    begin(operations, for_ever)
    cancelling = asyncio.create_task(operations.cancel(OP_ID))
    await asyncio.sleep(0)
    assert not operations.join(OP_ID)
    await cancelling
    assert not operations.join(OP_ID)


async def test_what_has_ended_cannot_be_cancelled(operations: Operations) -> None:
    done = await ended(begin(operations, nothing))
    assert await operations.cancel(OP_ID) == done
    assert done.state is OperationState.COMPLETED


async def test_closing_cancels_all_and_waits(operations: Operations) -> None:
    every = [begin(operations, for_ever, f"op-00000000000{n}") for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.wait_for(operations.close(), 5)
    assert all(progress.record.state is OperationState.CANCELLED for progress in every)
    assert operations._tasks == {}


async def test_an_op_id_names_one_operation(operations: Operations) -> None:
    progress = begin(operations, for_ever)
    with pytest.raises(Conflict, match="of another operation"):
        begin(operations, nothing)
    assert operations.get(OP_ID) is progress
    await operations.close()


async def test_an_unknown_operation_is_not_found(operations: Operations) -> None:
    with pytest.raises(NotFound, match='operation "op-x" not found'):
        operations.get("op-x")
    with pytest.raises(NotFound):
        await operations.cancel("op-x")


async def test_finished_ones_are_forgotten_after_a_while_and_running_ones_never(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = begin(operations, for_ever, "op-aaaaaaaaaaaa")
    finished = await ended(begin(operations, nothing))
    await asyncio.sleep(0)
    assert operations.all() == [running.record, finished]
    monkeypatch.setattr(module, "KEEP_FINISHED", timedelta(0))
    assert operations.all() == [running.record]
    with pytest.raises(NotFound):
        operations.get(OP_ID)
    await operations.close()
