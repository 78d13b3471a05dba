"""What a VM can have, each as hooks into its life: disks, a network, a name, published ports.

The lifecycle (`vm_start`, `lifecycle`) knows the order of things and no capability by name; a
capability knows its own thing and nothing of the order. The hooks, in the order they are called:

    add_start_prereqs   what the start needs; all that is missing is told at once
    create              once in a VM's life: what lasts as long as it
    prepare_host        make it on the host: files, helper processes
    contribute_machine  devices of the machine
    contribute_guest    what the guest is told of it, before its first command
    post_start          once the guest is up; again when a new daemon finds the VM running
    apply_config_changes  the record has changed: make it so, or refuse
    prepare_disks, release_disks   for the machine of a template, which has no more of the host
    cleanup             the machine has ended (or never came up): take away what `prepare_host`
                        and `post_start` made; idempotent

Clean-up runs in reverse order, all of it, even when some of it fails.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from banger.base.cancellation import to_its_end
from banger.base.errors import BangerError, from_unexpected
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Image, Kernel, Snapshot, Template, Vm
from banger.drivers.base import Check, Disk, NetworkAttachment
from banger.guest.requests import Setup


@dataclass(frozen=True)
class Saved:
    """A machine to go on from instead of a boot."""

    memory: Path
    state: Path
    #: What it takes its work disk's size to be.
    disk_size_mib: int


@dataclass
class Start:
    """One start of one VM, as it comes together."""

    vm: Vm
    image: Image
    kernel: Kernel
    #: Whose disks its own begin as.
    template: Template | None = None
    snapshot: Snapshot | None = None
    #: None: it boots.
    saved: Saved | None = None
    #: A machine that went on from it may have run: its disks are no longer what that one knows.
    ran: bool = False
    #: No guest has written to its disks yet.
    untouched: bool = False
    disks: list[Disk] = field(default_factory=list)
    network: NetworkAttachment | None = None
    setup: Setup = field(default_factory=Setup)

    def abandon(self) -> None:
        """The machine is not launched after all: close its end of the network."""
        if self.network is not None and self.network.fd >= 0:
            os.close(self.network.fd)


class Capability:
    """Hooks that do nothing; a capability overrides those it needs."""

    name: str

    async def add_start_prereqs(self, start: Start) -> list[Check]:  # noqa: ARG002 - a hook
        """What this start needs, each with how it stands. Never raises."""
        return []

    async def create(self, start: Start) -> None:
        """Make what lasts as long as the VM, in its directory, which goes with it."""

    async def prepare_disks(self, start: Start) -> None:
        """Make what the disks of a machine without a record need. Raises BangerError."""

    async def release_disks(self, start: Start) -> None:
        """Take away what `prepare_disks` made. Idempotent."""

    async def prepare_host(self, start: Start) -> None:
        """Make what the machine needs of the host. Raises BangerError."""

    def contribute_machine(self, start: Start) -> None:
        """Add devices to `start`."""

    def contribute_guest(self, start: Start) -> None:
        """Add what the guest's agent is told."""

    async def post_start(self, vm: Vm) -> None:
        """The guest answers, or was found running by a new daemon. Raises BangerError."""

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        """The VM's record was `before` and is `after`: make it true now, or raise BangerError.

        It is called again with the two exchanged when a later capability refuses.
        """

    async def cleanup(self, vm: Vm) -> None:
        """The machine does not run. Idempotent."""


class Capabilities:
    """All of them, in order."""

    def __init__(self, capabilities: Sequence[Capability]) -> None:
        self._all = tuple(capabilities)

    async def prereqs(self, start: Start) -> list[Check]:
        return [check for each in self._all for check in await each.add_start_prereqs(start)]

    async def create(self, start: Start) -> None:
        """All of them at once."""
        made = await asyncio.gather(
            *(each.create(start) for each in self._all),
            return_exceptions=True,  # when one fails, no other must go on behind our back
        )
        for failure in filter(None, made):
            raise failure

    async def prepare_host(self, start: Start) -> None:
        """What fails leaves the rest undone; `cleanup` takes away what was made."""
        for each in self._all:
            await each.prepare_host(start)
        self.contribute_machine(start)
        for each in self._all:
            each.contribute_guest(start)

    @asynccontextmanager
    async def with_disks(self, start: Start) -> AsyncIterator[None]:
        """What the disks of a template's machine need is there, until the block ends."""
        try:
            for each in self._all:
                await each.prepare_disks(start)
            yield
        finally:
            for each in reversed(self._all):
                await to_its_end(each.release_disks(start))

    def contribute_machine(self, start: Start) -> None:
        """The devices of the machine, of a template's, too, which has no network yet."""
        for each in self._all:
            each.contribute_machine(start)

    async def post_start(self, vm: Vm) -> None:
        for each in self._all:
            await each.post_start(vm)

    async def resume(self, vm: Vm) -> None:
        """`post_start` for a VM that a new daemon found running: all of it; failures are logged."""
        for each in self._all:
            try:
                await each.post_start(vm)
            except Exception as error:  # a supervisor's boundary: the others have their turn
                _logged(each, "resume", vm, error)

    async def apply_config_changes(self, before: Vm, after: Vm) -> None:
        """All of them or none: those that were done are taken back when one refuses."""
        done: list[Capability] = []
        try:
            for each in self._all:
                done.append(each)
                await each.apply_config_changes(before, after)
        except BaseException:
            for each in reversed(done):
                try:
                    await each.apply_config_changes(after, before)
                except (BangerError, OSError) as error:
                    _logged(each, "taking back a change", before, error)
            raise

    async def cleanup(self, vm: Vm) -> None:
        """In reverse order, all of it. Raises the first failure when everything was tried."""
        failures = []
        for each in reversed(self._all):
            try:
                await each.cleanup(vm)
            except Exception as error:  # a supervisor's boundary: the others have their turn
                failures.append(_logged(each, "clean-up", vm, error))
        if failures:
            raise failures[0]


def _logged(capability: Capability, what: str, vm: Vm, error: Exception) -> BangerError:
    get_logger().error(
        f"{what} failed",
        capability=capability.name,
        error=str(error),
        exc_info=not isinstance(error, BangerError),
        **vm_attributes(vm),
    )
    return error if isinstance(error, BangerError) else from_unexpected(error)
