"""One operation for one call: its client is told how it goes, and what came of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from banger.base.model import Vm
from banger.rpc.server import Connection
from banger.services.operations import Operations, Progress, raise_failure

T = TypeVar("T")


async def begun(progress: Progress, connection: Connection) -> None:
    """Answer with the operation that was begun: its client watches it."""
    await connection.result({"operation_id": progress.record.id})


async def operate(
    operations: Operations,
    connection: Connection,
    kind: str,
    target: str,
    work: Callable[[Progress], Awaitable[T]],
) -> None:
    """Do `work` as an operation; tell the client its stages, then its result or its error."""
    results: list[T] = []

    async def run(progress: Progress) -> None:
        result = await work(progress)
        if isinstance(result, Vm):
            progress.result(vm=result)
        results.append(result)

    progress = operations.begin(kind, target, run)
    async for state in progress.changes():
        if not state.done:
            await connection.event(state)
    raise_failure(progress.record)
    (result,) = results
    await connection.result(result)
