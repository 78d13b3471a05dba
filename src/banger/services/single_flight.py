"""Work that several callers want is done once: an operation of its own, which each joins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from banger.base.model import Operation
from banger.base.opid import current_op_id, new_op_id
from banger.services.operations import Operations, Progress, Work, raise_failure


class SingleFlight:
    """Operations of one kind, by what they make."""

    def __init__(self, operations: Operations, kind: str) -> None:
        self._operations = operations
        self._kind = kind
        self._flights: dict[str, Progress] = {}

    async def join(
        self, key: str, target: str, work: Work, is_there: Callable[[], Awaitable[bool]]
    ) -> Progress | None:
        """The operation that makes `key` now, joined, or a new one; None when it is there.

        A new one has the current op_id. Between seeing that the thing is missing and looking for
        its operation lies no await, so none can have ended meanwhile.
        """
        while not await is_there():
            running = self._flights.get(key)
            if running is None or running.record.done:
                running = self._operations.begin(self._kind, target, work)
                self._flights = {
                    other: flight
                    for other, flight in self._flights.items()
                    if not flight.record.done
                } | {key: running}
                return running
            if self._operations.join(running.record.id):
                return running
            # It is being taken back; when that is done another can begin.
            await self._operations.cancel(running.record.id)
        return None

    async def begin(self, key: str, target: str, work: Work) -> Progress:
        """The operation that does just this now, joined, or a new one."""
        begun = await self.join(key, target, work, _never)
        assert begun is not None  # it is never there
        return begun

    async def ensure(
        self,
        key: str,
        target: str,
        work: Work,
        is_there: Callable[[], Awaitable[bool]],
        tell: Callable[[Operation], None],
    ) -> None:
        """Wait until it is there; `tell` hears how that goes. Raises its failure.

        When the caller is cancelled the work goes on only if others want it.
        """
        # An operation of its own beside the caller's.
        token = current_op_id.set(new_op_id())
        try:
            flight = await self.join(key, target, work, is_there)
        finally:
            current_op_id.reset(token)
        if flight is None:
            return
        try:
            async for state in flight.changes():
                tell(state)
            raise_failure(flight.record)
        except asyncio.CancelledError:
            await asyncio.shield(self._operations.leave(flight.record.id))
            raise


async def _never() -> bool:
    return False
