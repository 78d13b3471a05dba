"""The program that is QEMU: what the setting ``qemu_bin`` leads to, and what is wrong with it.

Whatever it is called, machines are called `qemu_argv.QEMU`: a daemon with another setting knows
them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.drivers.hypervisor.qemu_argv import QEMU


@dataclass(frozen=True)
class QemuProgram:
    """`setting` is a name to be found on PATH, or an absolute path."""

    setting: str = QEMU

    def path(self) -> str:
        """Where it is. Raises PreconditionFailed for one that is not there, or may not be run."""
        path = proc.which(self.setting)
        if path is not None:
            return path
        if self.setting == QEMU:
            raise proc.missing_tool(QEMU)
        if "/" not in self.setting:
            raise _unfit(f"{self.setting} is not on PATH")
        # False, too, for what may not be looked at.
        if os.path.exists(self.setting):  # noqa: PTH110
            raise _unfit(f"{self.setting} is not a program that may be run")
        raise _unfit(f"there is no {self.setting}")

    @contextmanager
    def starting(self) -> Iterator[str]:
        """Its path, for a block that starts it. Raises as `path` does, there too: for one that the
        kernel refuses."""
        path = self.path()
        try:
            yield path
        except OSError as error:
            if error.filename != path:
                raise
            raise _unfit(f"{path} cannot be run: {error.strerror}") from error

    def is_not_the_machine(self) -> PreconditionFailed:
        """For one that runs QEMU as another process, or by another name: a script around it."""
        return _unfit(f"{self.setting} is not QEMU itself: its machines would not be known again")

    @property
    def doubt(self) -> str:
        """What to look at where it ends before it has answered; empty for Debian's own."""
        return "" if self.setting == QEMU else f"see that qemu_bin, {self.setting}, is QEMU itself"


def _unfit(problem: str) -> PreconditionFailed:
    return PreconditionFailed(
        problem, hint=f"set qemu_bin to QEMU itself: its path, or a name on PATH, like {QEMU}"
    )
