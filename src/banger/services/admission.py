"""How many connections published ports may have, and that a VM which has some is in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from banger.base.log import get_logger
from banger.base.opid import current_op_id, new_op_id

#: Of one VM, all its ports together: the rest of the agent's 256 streams are for commands.
VM_CONNECTIONS_MAX = 128
#: Of all VMs: half of the 1024 descriptors that a process usually may have.
CONNECTIONS_MAX = 512
#: Noting a use writes to the database: a VM stays in use for so long after its last connection,
#: and those of a web page are one use.
_LINGER_S = 1.0


class Admission:
    """The connections of one VM. Who comes when there are too many waits for one to end.

    ``of_all`` bounds those of all VMs together. ``in_use`` is entered while there are any.
    """

    def __init__(
        self,
        of_all: asyncio.Semaphore,
        in_use: Callable[[], AbstractAsyncContextManager[None]],
        limit: int = VM_CONNECTIONS_MAX,
    ) -> None:
        self._own = asyncio.Semaphore(limit)
        self._of_all = of_all
        self._in_use = in_use
        self._count = 0
        self._none_left = asyncio.Event()
        self._use: asyncio.Task[None] | None = None

    async def enter(self) -> None:
        """A connection has come; it goes on when there is room for it."""
        await self._own.acquire()
        try:
            await self._of_all.acquire()
        except BaseException:
            self._own.release()
            raise
        self._count += 1
        if self._use is None or self._use.done():
            self._use = asyncio.create_task(self._hold())

    def leave(self) -> None:
        """A connection that had entered has ended."""
        self._of_all.release()
        self._own.release()
        self._count -= 1
        if not self._count:
            self._none_left.set()

    async def close(self) -> None:
        """The use ends now. Idempotent."""
        if self._use is not None:
            self._use.cancel()
            await asyncio.gather(self._use, return_exceptions=True)

    async def _hold(self) -> None:
        current_op_id.set(new_op_id())
        try:
            while self._count:  # there may be one again when the end of a use has been noted
                async with self._in_use():
                    while self._count:
                        self._none_left.clear()
                        await self._none_left.wait()
                        await asyncio.sleep(_LINGER_S)
        except Exception:
            # A supervisor's boundary: connections go on, noted or not.
            get_logger().exception("cannot note the use of a published port")
