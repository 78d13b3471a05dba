"""The guest's half of a workspace: trees sent into it, and the scripts that are run there.

A guest is told nothing but constant scripts (`git/guest`), with what differs as their arguments.
What it says is not believed: it is bounded, and shown as what the guest said.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from importlib import resources
from typing import Any

from banger.base import proc
from banger.base.cancellation import past_recall, to_its_end
from banger.base.errors import (
    BangerError,
    Conflict,
    NotFound,
    OperationTimeout,
    PreconditionFailed,
    Unavailable,
)
from banger.base.log import get_logger, vm_attributes
from banger.base.model import Vm
from banger.base.units import format_size
from banger.git.shipment import Shipment, Tree
from banger.git.throwaway import joined
from banger.git.tooling import Step
from banger.guest.channel import AgentStream, ExitKind, Stderr, StreamEnded
from banger.guest.channel import Exit as GuestExit
from banger.guest.requests import Exec, Unpack
from banger.services.operations import Progress
from banger.services.vm import VmService

_SAID_BYTES = 4000
_CLEAN_UP_TIMEOUT_S = 20.0
#: Two renames; with `read_only` a mode for each file.
_PLACE_TIMEOUT_S = 120.0
_TAR = ("tar", "--create", "--file=-", "--format=gnu", "--owner=root:0", "--group=root:0",
        "--hard-dereference")  # fmt: skip
_NAMES_FROM_STDIN = ("--no-recursion", "--null", "--verbatim-files-from", "--files-from=-")

#: All but what is in repositories within: see `git/guest/export.sh`.
LEFT_OUT = 85

#: What the commands of a repository's own print, in the guest.
BOOTSTRAP_LOG = "/var/log/banger-bootstrap.log"

#: What the statuses of the scripts mean: see there.
_MEANINGS: dict[int, tuple[type[BangerError], str, str]] = {
    80: (Conflict, "something is there already", "--replace puts the repository in its place"),
    81: (
        PreconditionFailed,
        "the guest has no git",
        "install it there, or use an image that has it",
    ),
    82: (
        NotFound,
        "the guest's repository does not have the commit to compare with any more",
        "see in the guest: git log; git reflog",
    ),
    83: (NotFound, "there is no git repository any more", "bring files out with: banger vm cp"),
    84: (NotFound, "no commits were made in the guest", "changes: banger vm workspace export"),
}
#: A shell's, of a program that is not there; also of the shell itself.
_NOT_FOUND = 127


def script(name: str, *arguments: str) -> Exec:
    """One of our scripts, as a request."""
    text = (resources.files("banger.git") / "guest" / f"{name}.sh").read_text()
    return Exec(("sh", "-c", text, name, *arguments))


class Sent:
    """How much of a shipment has gone."""

    def __init__(self, progress: Progress, shipment: Shipment) -> None:
        self._progress = progress
        self._total = shipment.size_bytes
        self._of = f"of {format_size(shipment.size_bytes)}, {shipment.file_count} files"
        self._count = 0

    def add(self, count: int) -> None:
        self._count += count
        percent = min(100.0, 100 * self._count / max(self._total, 1))
        self._progress.stage("send", f"{format_size(self._count)} {self._of}", percent)


class GuestSide:
    """Of one VM, while the lock of its workspace is held."""

    def __init__(self, vms: VmService, vm: Vm, guest_path: str) -> None:
        self._vms = vms
        self._vm = vm
        self._target = guest_path
        parent, name = posixpath.split(guest_path)
        self._staging = posixpath.join(parent, f".{name}.banger")

    async def deliver(
        self,
        shipment: Shipment,
        progress: Progress,
        record: Callable[[], Coroutine[Any, Any, None]],
        *,
        replace: bool,
        read_only: bool,
    ) -> None:
        """Put all trees of a shipment at the guest's path, at once, and `record` that.

        Raises Conflict when something is there and is not to be replaced. Cancelled or failed
        nothing has changed.
        """
        inner = [
            os.fsdecode(tree.prefix + path) for tree in shipment.trees for path in tree.directories
        ]
        await self._run("begin", self._target, self._staging, "yes" if replace else "", *inner)
        try:
            sent = Sent(progress, shipment)
            for tree in shipment.trees:
                await self._send_tree(tree, sent)
            checked_out = [self._place(tree) for tree in shipment.trees if tree.checks_out]
            if checked_out:
                progress.stage("checkout", "in the guest")
                await self._run("checkout", *checked_out)
            progress.stage("place")
            await past_recall(self._placed(record, read_only=read_only))
        except BaseException:
            await to_its_end(self._clean_up())
            raise

    async def _placed(
        self, record: Callable[[], Coroutine[Any, Any, None]], *, read_only: bool
    ) -> None:
        try:
            async with asyncio.timeout(_PLACE_TIMEOUT_S):
                await self._run("place", self._target, self._staging, "yes" if read_only else "")
        except TimeoutError:
            raise OperationTimeout(
                f'vm "{self._vm.name}" did not put the repository in its place within'
                f" {_PLACE_TIMEOUT_S:g} s"
            ) from None
        await record()

    async def bootstrap(self, step: Step) -> None:
        """Run a command in the repository, with a log in the guest. Raises PreconditionFailed, with
        the end of the log, when it fails."""
        request = script("bootstrap", self._target, BOOTSTRAP_LOG, step.title, *step.argv)
        async with await self._vms.open_stream(self._vm, request) as stream:
            await stream.send_eof()
            exit_, said = await answer(stream)
        if exit_.kind is ExitKind.FAILED:
            raise exit_.error()
        if exit_.status != 0:
            text = said.decode(errors="backslashreplace").strip()
            raise PreconditionFailed(
                f"the bootstrap of {step.file} failed: {step.title} (status {exit_.status})"
                + (f"\n{text}" if text else ""),
                hint=f"its log is in the guest, while there is one: {BOOTSTRAP_LOG}",
            )

    def _place(self, tree: Tree) -> str:
        return posixpath.normpath(posixpath.join(self._staging, os.fsdecode(tree.prefix)))

    async def _send_tree(self, tree: Tree, sent: Sent) -> None:
        git, place = tree.git_dir, self._place(tree)
        repository = (*_TAR, f"--directory={git.parent}", "--", git.name)
        await self._send(Unpack(place, name=".git"), repository, b"", sent)
        if tree.files:
            files = (*_TAR, f"--directory={tree.source.root}", *_NAMES_FROM_STDIN)
            await self._send(Unpack(place), files, joined(tree.files), sent)

    async def _send(self, request: Unpack, argv: proc.Argv, names: bytes, sent: Sent) -> None:
        """Stream what tar packs to the guest, which unpacks it."""
        stream = await self._vms.open_stream(self._vm, request)
        async with stream, aclosing(proc.stream(argv, stdin=names)) as pieces:
            answering = asyncio.create_task(answer(stream))
            try:
                with suppress(StreamEnded):  # why is in its answer
                    async for piece in pieces:
                        await stream.send(piece)
                        sent.add(len(piece))
                    await stream.send_eof()
                exit_, said = await answering
            finally:
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
        check(exit_, said, f'{self._target} in vm "{self._vm.name}"')

    async def _run(self, name: str, *arguments: str) -> None:
        """Run one of our scripts to its end. Raises what its status means."""
        async with await self._vms.open_stream(self._vm, script(name, *arguments)) as stream:
            await stream.send_eof()
            exit_, said = await answer(stream)
        check(exit_, said, f'{self._target} in vm "{self._vm.name}"')

    async def _clean_up(self) -> None:
        """Remove what was sent. What stays in a guest that is gone, the next transfer removes."""
        try:
            async with asyncio.timeout(_CLEAN_UP_TIMEOUT_S):
                await self._run("clean", self._staging)
        except (BangerError, TimeoutError) as error:
            get_logger().warning("staging stays", error=str(error), **vm_attributes(self._vm))


async def answer(stream: AgentStream) -> tuple[GuestExit, bytes]:
    """How a stream ended, and the beginning of what it said on stderr."""
    said = bytearray()
    while True:
        match await stream.receive():
            case GuestExit() as exit_:
                return exit_, bytes(said)
            case Stderr(data):
                said += data[: _SAID_BYTES - len(said)]


def check(exit_: GuestExit, said: bytes, what: str) -> None:
    """Raise what a request or a script of ours ended with, unless that is success."""
    if exit_.kind is ExitKind.FAILED:
        error = exit_.error()
        error.message = f"{what}: {error.message}"
        raise error
    if exit_.status != 0:
        raise failure(exit_.status, said, what)


def failure(status: int, said: bytes, what: str) -> BangerError:
    """What it means that one of our scripts ended with this status, other than 0."""
    if status in _MEANINGS:
        kind, message, hint = _MEANINGS[status]
        return kind(f"{what}: {message}", hint=hint)
    text = said.decode(errors="backslashreplace").strip()
    if status == _NOT_FOUND:
        return PreconditionFailed(
            f"{what}: the guest lacks a program that repositories need there"
            + (f": {text}" if text else ""),
            hint="use an image with a shell, the usual commands beside it, and git",
        )
    why = f"status {status}" + (f": {text}" if text else "")
    return Unavailable(f"{what}: the guest failed ({why})")
