"""The guest's half of a build: packages and scripts into it, and its files out of it.

What is printed goes to the build's log. What comes is not believed: `images.unpack` is for archives
that nobody vouches for.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path

import msgspec

from banger.base.errors import BangerError, PreconditionFailed
from banger.base.model import Vm
from banger.guest.channel import AgentStream, Data, ExitKind, Stderr
from banger.guest.channel import Exit as GuestExit
from banger.guest.requests import Exec, Pack, PackFlag, Request, Write
from banger.images.unpack import Layer, Limits, Unpacked, unpack
from banger.services.build_log import BuildLog
from banger.services.vm import VmService
from banger.services.workspace_guest import answer, check

#: Below /run, which is memory: nothing of it becomes part of the image.
_SCRIPTS = "/run/banger/build"
_SETTLE_TIMEOUT_S = 120.0
#: See `guest/packages.sh`.
_NO_MANAGER = 90


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """A program for the guest; ``name`` is for messages."""

    name: str
    content: bytes


class BuildGuest:
    """The VM of one build, while it runs."""

    def __init__(self, vms: VmService, vm: Vm, log: BuildLog) -> None:
        self._vms = vms
        self._vm = vm
        self._log = log

    async def install(self, packages: Sequence[str]) -> None:
        """Install packages. Raises PreconditionFailed when that fails."""
        self._log.heading(f"packages: {' '.join(packages)}")
        status = _NO_MANAGER
        if await self._has_shell():
            status = await self._run(_script("packages", *packages))
        if status == _NO_MANAGER:
            raise PreconditionFailed(
                f'image "{self._vm.image_name}" has no package manager that banger knows'
                " (apt-get, apk, dnf, zypper, pacman)",
                hint="install what is needed by a script: --run SCRIPT",
            )
        if status != 0:
            raise self._failure(f"the packages were not installed (status {status})")

    async def run_script(self, number: int, script: Script, environment: Mapping[str, str]) -> None:
        """Run a script to its end, as root in its home. Raises PreconditionFailed when it fails."""
        path = f"{_SCRIPTS}/{number}"
        async with await self._vms.open_stream(self._vm, Write(path, mode=0o755)) as stream:
            await stream.send(script.content)
            await stream.send_eof()
            check(*await answer(stream), path)
        self._log.heading(f"script: {script.name}")
        status = await self._run(Exec((path,), environment, directory="/root"))
        if status != 0:
            raise self._failure(f'script "{script.name}" failed (status {status})')

    async def settle(self) -> None:
        """End what runs in the guest, and remove what is temporary.

        Without a shell there is nobody who could have left anything running.
        """
        if not await self._has_shell():
            return
        self._log.heading("settle")
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                await self._run(_script("settle"))
        except TimeoutError:
            raise self._failure("the processes of the guest do not end") from None

    async def take_files(self, tree: Path, limits: Limits, came: Callable[[int], None]) -> Unpacked:
        """Put the guest's files into the empty directory `tree`: those of its root file system,
        and those of its work disk as ``/root``. `came` hears of each piece how large it is.

        Raises BadArchive for what cannot be an image.
        """
        self._log.heading("pack")
        flags = PackFlag.XATTRS | PackFlag.ONE_FILE_SYSTEM
        requests = (Pack("/", name=".", flags=flags), Pack("/root", name="root", flags=flags))
        with ExitStack() as held:
            ends = [_pair(held) for _ in requests]
            layers = [
                Layer(f'the files of vm "{self._vm.name}"', theirs.fileno()) for _, theirs in ends
            ]
            sockets = [ours for ours, _ in ends]
            unpacking, sending = (
                asyncio.create_task(unpack(layers, tree, limits=limits)),
                asyncio.create_task(self._pour_all(requests, sockets, came)),
            )
            try:
                await asyncio.wait({unpacking, sending}, return_when=asyncio.FIRST_EXCEPTION)
                if sending.done():
                    sending.result()  # a guest that fails is why an archive is cut off
                return await unpacking
            finally:
                for task in (unpacking, sending):
                    task.cancel()
                await asyncio.gather(unpacking, sending, return_exceptions=True)

    async def _pour_all(
        self,
        requests: Sequence[Request],
        sockets: Sequence[socket.socket],
        came: Callable[[int], None],
    ) -> None:
        for request, end in zip(requests, sockets, strict=True):
            _, writer = await asyncio.open_connection(sock=end)
            try:
                # Why nobody reads any more, he says himself.
                with suppress(ConnectionError):
                    await self._pour(request, writer, came)
            except BaseException:
                writer.transport.abort()
                raise
            writer.close()

    async def _pour(
        self, request: Request, writer: asyncio.StreamWriter, came: Callable[[int], None]
    ) -> None:
        async with await self._vms.open_stream(self._vm, request) as stream:
            await stream.send_eof()
            while True:
                match await stream.receive():
                    case GuestExit() as exit_:
                        check(exit_, b"", f'the files of vm "{self._vm.name}"')
                        writer.write_eof()
                        return
                    case Data(data):
                        writer.write(data)
                        await writer.drain()
                        came(len(data))
                    case Stderr(data):
                        self._log.write(data)

    async def _has_shell(self) -> bool:
        return await self._vms.stat(self._vm, "/bin/sh") is not None

    async def _run(self, request: Exec) -> int:
        """Run a program to its end; its status, as a shell gives it."""
        async with await self._vms.open_stream(self._vm, request) as stream:
            await stream.send_eof()
            exit_ = await self._logged(stream)
        if exit_.kind is ExitKind.FAILED:
            raise exit_.error()
        return exit_.status

    async def _logged(self, stream: AgentStream) -> GuestExit:
        while True:
            match await stream.receive():
                case GuestExit() as exit_:
                    return exit_
                case Data(data) | Stderr(data):
                    self._log.write(data)

    def _failure(self, what: str) -> BangerError:
        tail = self._log.tail()
        if tail:
            what += f"\nthe end of what was printed:\n{tail}\n"
        return PreconditionFailed(f"{what}; inspect {self._log.path}")


def _pair(held: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, closed with `held`."""
    ours, theirs = socket.socketpair()
    return held.enter_context(ours), held.enter_context(theirs)


def _script(name: str, *arguments: str) -> Exec:
    """One of our scripts, as a request."""
    text = (resources.files("banger.services") / "guest" / f"{name}.sh").read_text()
    return Exec(("sh", "-c", text, name, *arguments))
