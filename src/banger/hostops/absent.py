"""Nobody here may do what needs root: every operation is refused, with what to do."""

from __future__ import annotations

from banger.base.errors import PermissionDenied
from banger.hostops.ops import Done, Operation


class NoHost:
    """Implements `HostOps`."""

    problem = "it needs root, and the daemon has no helper"
    hint = 'install one: sudo banger system install; or do without: network = "user"'
    installed = False

    async def perform(self, operation: Operation) -> Done:
        """Always raises PermissionDenied."""
        raise PermissionDenied(f"{type(operation).__name__}: {self.problem}", hint=self.hint)
