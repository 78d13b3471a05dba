"""The daemon's end of the helper: privileged operations, for a daemon that is not root."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path

from banger.base.errors import BadRequest, BangerError, PermissionDenied, Unavailable
from banger.base.install import HELPER_SOCKET, INSTALL_FILE, load_installation
from banger.base.opid import current_op_id, new_op_id
from banger.hostops import wire
from banger.hostops.ops import URGENT, Done, Operation

#: The longest that one may take there, and those before it: the helper performs one at a time.
_TIMEOUT_S = 120.0
#: Fewer than the helper takes, together: there may be another daemon, root's.
_CALLS_MAX = 8
_URGENT_MAX = 4
#: systemd starts it again after 0.1 s; on a slow host Python takes seconds to get there.
RESTART_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 0.05
_HINT = "look at it: banger system status"


class HelperHost:
    """Implements `HostOps`. Each operation is a connection of its own, which goes with it."""

    def __init__(self, path: Path = HELPER_SOCKET, install_file: Path = INSTALL_FILE) -> None:
        self._path = path
        self._install_file = install_file
        self._calls = asyncio.Semaphore(_CALLS_MAX)
        #: Of `URGENT` operations, which do not wait for what others wait for.
        self._urgent = asyncio.Semaphore(_URGENT_MAX)

    @property
    def problem(self) -> str:
        """See `HostOps`: whether the socket is there, and ours to connect to."""
        if not self._path.is_socket():
            return f"it needs root, and there is no helper at {self._path}"
        if not os.access(self._path, os.W_OK):
            return f"it needs root, and the helper at {self._path} serves another user"
        return ""

    @property
    def hint(self) -> str:
        """See `HostOps`: how to get one. What does without differs with what it is for."""
        return "install one: sudo banger system install" if self.problem else ""

    @property
    def installed(self) -> bool:
        """See `HostOps`: for us, whether or not its helper runs just now."""
        try:
            return load_installation(self._install_file).owner_uid == os.getuid()
        except BangerError:
            return False

    async def perform(self, operation: Operation) -> Done:
        """See `HostOps.perform`. A cancelled caller does not wait: what comes of it is closed."""
        operation.check()
        problem = self.problem
        if problem and (self._path.is_socket() or not self.installed):
            raise PermissionDenied(f"{type(operation).__name__}: {problem}", hint=self.hint)
        async with self._urgent if isinstance(operation, URGENT) else self._calls:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    return await self._call(operation)
            except TimeoutError:
                raise Unavailable(
                    f"the helper did not answer within {_TIMEOUT_S:g} s", hint=_HINT
                ) from None
            except OSError as error:
                raise Unavailable(
                    f"the helper at {self._path} cannot be reached: {error.strerror}", hint=_HINT
                ) from error

    async def _connect(self, connection: socket.socket) -> None:
        """At once, or refused: it is a Unix socket. An installation's helper that has ended is
        started again, and makes another socket: that is waited for. Raises OSError."""
        until = asyncio.get_running_loop().time() + RESTART_TIMEOUT_S
        while True:
            try:
                connection.connect(os.fspath(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.installed or asyncio.get_running_loop().time() > until:
                    raise
            else:
                return
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _call(self, operation: Operation) -> Done:
        op_id = current_op_id.get() or new_op_id()
        request, passed = wire.encode_request(operation, op_id)
        flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        # Its end closes what is on its way to us.
        with socket.socket(socket.AF_UNIX, flags) as connection:
            await self._connect(connection)
            # One that does not hear us to the end has said why.
            with suppress(BrokenPipeError, ConnectionResetError):
                await wire.send(connection, request, passed)
            try:
                reply, descriptors = await wire.receive(connection, wire.REPLY_MAX_BYTES)
            except BadRequest as error:
                raise Unavailable(
                    f"the helper gave no reply: {error.message}", hint=_HINT
                ) from None
        try:
            return wire.decode_reply(reply, descriptors)
        except BaseException:
            wire.close_all(descriptors)
            raise
