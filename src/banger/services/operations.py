"""The registry of long work: what runs, at which stage, how it ended, and how to stop it.

An operation's id is the op_id of the call that began it. Its task belongs to the registry, not to
the client that asked: the client may come and go. Finished ones are kept for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Protocol

import msgspec

from banger.base.errors import (
    BangerError,
    Cancelled,
    Conflict,
    NotFound,
    from_unexpected,
    from_wire,
)
from banger.base.log import OperationLog, get_logger
from banger.base.model import (
    ErrorInfo,
    Image,
    Kernel,
    Operation,
    OperationState,
    Results,
    Snapshot,
    Template,
    Vm,
    now,
)
from banger.base.opid import current_op_id

#: How long a finished operation can still be asked about.
KEEP_FINISHED = timedelta(minutes=10)


class Stages(Protocol):
    """Where work says how far it is: the progress of an operation, or just a log."""

    def stage(self, stage: str, detail: str = "") -> None:
        """The work enters `stage`, or says more of the one it is in."""
        ...

    def describe(self, **attributes: object) -> None:
        """Attributes for the log's records, known only now."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should hear of, in a line: it goes another way than usual."""
        ...


class Progress:
    """What the work of an operation reports to; the registry and the log read it."""

    def __init__(self, log: OperationLog, record: Operation) -> None:
        self._log = log
        self.record = record
        #: How many want what it makes: who began it, and who joined and has not left.
        self.wanted_by = 1
        self._changed = asyncio.Event()

    def stage(self, stage: str, detail: str = "", percent: float = -1) -> None:
        """Enter `stage`, or say more about the one it is in. Percent is -1 if unknown."""
        entered = stage != self.record.stage
        self._update(stage=stage, detail=detail, percent=percent)
        if entered:
            self._log.stage(stage)

    def describe(self, **attributes: object) -> None:
        """Attributes for the log's records, known only now."""
        self._log.describe(**attributes)

    def note(self, text: str) -> None:
        """Something that the user should hear of, in a line."""
        self._log.note(text)
        self._update(notes=(*self.record.notes, text))

    def result(
        self,
        *,
        vm: Vm | None = None,
        image: Image | None = None,
        kernel: Kernel | None = None,
        template: Template | None = None,
        snapshot: Snapshot | None = None,
        results: Results | None = None,
    ) -> None:
        self._update(
            vm=vm or self.record.vm,
            image=image or self.record.image,
            kernel=kernel or self.record.kernel,
            template=template or self.record.template,
            snapshot=snapshot or self.record.snapshot,
            results=results or self.record.results,
        )

    def finish(self, state: OperationState, error: BangerError | None = None) -> None:
        info = None
        if error is not None:
            info = ErrorInfo(
                code=error.code, message=error.message, hint=error.hint, op_id=self.record.id
            )
        self._update(state=state, error=info, finished_at=now())

    async def changes(self) -> AsyncIterator[Operation]:
        """The record now and after each change (some may be skipped), ending with the last."""
        while True:
            changed, record = self._changed, self.record
            yield record
            if record.done:
                return
            await changed.wait()

    def _update(self, **fields: object) -> None:
        self.record = msgspec.structs.replace(self.record, **fields)
        self._changed.set()
        self._changed = asyncio.Event()


Work = Callable[[Progress], Awaitable[None]]


class Operations:
    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, kind: str, target: str, work: Work) -> Progress:
        """Start `work` in a task of the registry. Its id is the current op_id.

        Raises Conflict for an op_id (a client may choose it) that is an operation's already.
        """
        self._prune()
        op_id = current_op_id.get()
        if op_id in self._progress:
            raise Conflict(f"{op_id} is the op_id of another operation")
        record = Operation(
            id=op_id,
            kind=kind,
            target=target,
            state=OperationState.RUNNING,
            stage="",
            detail="",
            percent=-1,
            started_at=now(),
        )
        log = OperationLog(kind, target=target)
        progress = Progress(log, record)
        self._progress[op_id] = progress
        task = asyncio.create_task(self._run(progress, log, work), name=f"{kind} {op_id}")
        self._tasks[op_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(op_id, None))
        return progress

    async def _run(self, progress: Progress, log: OperationLog, work: Work) -> None:
        try:
            with log:
                await work(progress)
        except asyncio.CancelledError:
            progress.finish(OperationState.CANCELLED, Cancelled(f"{log.operation} was cancelled"))
        except BangerError as error:
            progress.finish(OperationState.FAILED, error)
        except Exception as error:
            # A supervisor's boundary: the traceback goes to the log, the client gets a sentence.
            get_logger().exception("operation crashed", operation=log.operation)
            progress.finish(OperationState.FAILED, from_unexpected(error))
        else:
            progress.finish(OperationState.COMPLETED)

    def get(self, op_id: str) -> Progress:
        try:
            return self._progress[op_id]
        except KeyError:
            raise NotFound(f'operation "{op_id}" not found') from None

    def all(self) -> list[Operation]:
        """Every operation that is known, oldest first."""
        self._prune()
        return [progress.record for progress in self._progress.values()]

    def join(self, op_id: str) -> bool:
        """Want it, too. False when it has ended or is being cancelled."""
        progress, task = self.get(op_id), self._tasks.get(op_id)
        if progress.record.done or task is None or task.cancelling():
            return False
        progress.wanted_by += 1
        return True

    async def leave(self, op_id: str) -> Operation:
        """Want it no more. It goes on for others; the last one to leave cancels it (`cancel`)."""
        progress = self.get(op_id)
        progress.wanted_by -= 1
        return progress.record if progress.wanted_by > 0 else await self.cancel(op_id)

    async def cancel(self, op_id: str) -> Operation:
        """Stop it, wait until it has cleaned up, and return how it ended. Idempotent."""
        progress = self.get(op_id)
        if task := self._tasks.get(op_id):
            # Once: a second one would interrupt the clean-up of the first.
            if not task.cancelling():
                task.cancel()
            await asyncio.wait({task})  # not gather: it would pass on our own cancellation
            if not progress.record.done:  # cancelled before its first step
                progress.finish(OperationState.CANCELLED, Cancelled("cancelled before it began"))
        return progress.record

    async def close(self) -> None:
        """Cancel all and wait for their clean-up: the daemon is stopping."""
        await asyncio.gather(*(self.cancel(op_id) for op_id in list(self._tasks)))

    def _prune(self) -> None:
        horizon = now() - KEEP_FINISHED
        for op_id, progress in list(self._progress.items()):
            finished = progress.record.finished_at
            if finished is not None and finished < horizon:
                del self._progress[op_id]


def raise_failure(operation: Operation) -> None:
    """Raise the error of an operation that ended without success."""
    if (info := operation.error) is not None:
        raise from_wire(info.code, info.message, info.hint, info.op_id)
