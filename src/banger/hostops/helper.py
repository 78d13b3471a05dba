"""banger-helper: root's end of the privileged operations, for the owner of the installation alone.

It starts once for a system and is asked over a Unix socket, one operation on each connection. It
believes nothing of who asks but his uid, which the kernel says: what he sends is bounded in size,
time and number, decoded strictly and checked; no path, command or environment of his is used. Each
request is one line of the log, refused ones too.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import pwd
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

from banger import __version__
from banger.base import log
from banger.base.errors import (
    BadRequest,
    BadVersion,
    BangerError,
    Conflict,
    OperationTimeout,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
    UnknownMethod,
    from_unexpected,
)
from banger.base.install import (
    HELPER_SOCKET,
    INSTALL_FILE,
    Installation,
    check_of_root,
    load_installation,
)
from banger.base.model import ErrorInfo
from banger.base.notify import take_notifier
from banger.base.opid import current_op_id, new_op_id
from banger.hostops import wire
from banger.hostops.local import LocalHost
from banger.hostops.ops import BridgeDown, HostOps, SweepSnapshots, UnrouteNames

#: For a whole request, and for whoever asked to take the reply.
TRANSFER_TIMEOUT_S = 10.0
#: Each may hold a request of `wire.REQUEST_MAX_BYTES`; a daemon opens a few (`client`).
CONNECTIONS_MAX = 32
_BACKLOG = 64
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred of SO_PEERCRED
#: The first of the descriptors that systemd passes: sd_listen_fds(3).
_LISTEN_FD = 3
#: All that tools get to see; ours may have been anybody's, by hand.
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
#: These were turned away before anything was done.
_REFUSALS = (BadRequest, BadVersion, UnknownMethod, PermissionDenied, OperationTimeout)


class Helper:
    """Serves connections until it is stopped. What has begun by then is done, and answered."""

    def __init__(self, host: HostOps, owner_uid: int) -> None:
        self._host = host
        self._allowed = (owner_uid, 0)
        self._connections: set[asyncio.Task[None]] = set()
        #: Those that have not asked for anything yet.
        self._reading: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket, stopping: asyncio.Event) -> None:
        """Accept connections of a listening, non-blocking socket until `stopping` is set."""
        accepting = asyncio.create_task(self._accept(listener))
        stop = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait({accepting, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (accepting, stop, *self._reading):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            results = await asyncio.gather(accepting, stop, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            uid = _peer_uid(connection)
            if uid not in self._allowed:
                denied = PermissionDenied(
                    f"the helper of this system serves uid {self._allowed[0]}, not uid {uid}",
                    hint='do without it: network = "user"',
                )
                _turn_away(connection, uid, denied)
            elif len(self._connections) >= CONNECTIONS_MAX:
                _turn_away(connection, uid, Unavailable("the helper is busy", hint="try again"))
            else:
                task = asyncio.create_task(self._serve(connection, uid))
                self._connections.add(task)
                self._reading.add(task)
                task.add_done_callback(self._connections.discard)
                task.add_done_callback(self._reading.discard)

    async def _serve(self, connection: socket.socket, uid: int) -> None:
        """One connection, which is a context of its own: that of its request's op_id."""
        call = _Call(uid)
        with connection:
            try:
                async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                    data, descriptors = await wire.receive(connection, wire.REQUEST_MAX_BYTES)
            except TimeoutError:
                await call.fail(connection, OperationTimeout("the request did not come in time"))
            except (BangerError, OSError) as error:
                await call.fail(connection, error)
            else:
                self._reading.discard(_current_task())
                try:
                    await self._perform(connection, call, data, descriptors)
                finally:
                    wire.close_all(descriptors)

    async def _perform(
        self, connection: socket.socket, call: _Call, data: bytes, descriptors: tuple[int, ...]
    ) -> None:
        try:
            request = wire.decode_request(data)
            current_op_id.set(request.op_id)
            call.method = wire.method_of(request)
            operation = wire.decode_operation(request, descriptors)
            # JSON may say twice which it is: what is logged is what is done.
            call.method = wire.tag_of(type(operation))
            done = await self._host.perform(operation)
        except Exception as error:  # a supervisor's boundary: the helper serves on
            await call.fail(connection, error)
            return
        try:
            await call.complete(connection, *wire.encode_reply(done))
        finally:
            if done.fd >= 0:
                os.close(done.fd)


class _Call:
    """One request, as it is logged and answered."""

    def __init__(self, uid: int) -> None:
        self.method = ""
        self._uid = uid
        self._began = time.monotonic()

    async def complete(
        self, connection: socket.socket, reply: bytes, descriptors: tuple[int, ...]
    ) -> None:
        if await _answer(connection, reply, descriptors):
            self._log("info", "helper rpc completed")
        else:
            self._log("warning", "helper rpc completed", error="nobody waited for the reply")

    async def fail(self, connection: socket.socket, error: Exception) -> None:
        if not isinstance(error, BangerError | OSError):
            log.get_logger().exception("a bug of the helper's", method=self.method)
        told = error if isinstance(error, BangerError) else from_unexpected(error)
        # Where the op_id could not be read there is one for this line and the reply.
        current_op_id.set(current_op_id.get() or new_op_id())
        event = "helper rpc refused" if isinstance(told, _REFUSALS) else "helper rpc failed"
        self._log("warning", event, error=wire.shortened(told.message), code=told.code.value)
        await _answer(connection, wire.encode_error(_error_info(told)))

    def _log(self, level: str, event: str, **more: str) -> None:
        duration_ms = round((time.monotonic() - self._began) * 1000, 1)
        record = getattr(log.get_logger(), level)
        record(event, method=self.method, peer_uid=self._uid, duration_ms=duration_ms, **more)


async def _answer(
    connection: socket.socket, reply: bytes, descriptors: tuple[int, ...] = ()
) -> bool:
    """Whether it could be sent."""
    try:
        async with asyncio.timeout(TRANSFER_TIMEOUT_S):
            await wire.send(connection, reply, descriptors)
    except (OSError, TimeoutError):
        return False
    return True


def _turn_away(connection: socket.socket, uid: int, error: BangerError) -> None:
    """Refuse a connection before anything of it is read, without waiting for it."""
    op_id = new_op_id()
    log.get_logger().warning(
        "helper rpc refused",
        method="",
        peer_uid=uid,
        duration_ms=0.0,
        error=error.message,
        code=error.code.value,
        op_id=op_id,
    )
    error.op_id = op_id
    with connection, suppress(OSError):
        connection.send(wire.framed(wire.encode_error(_error_info(error))))


def _error_info(error: BangerError) -> ErrorInfo:
    return ErrorInfo(
        code=error.code,
        message=wire.shortened(error.message),
        hint=wire.shortened(error.hint),
        op_id=error.op_id or current_op_id.get(),
    )


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(raw)[1]
    return uid


def _current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="banger-helper",
        description="Does what needs root for the banger of one user; systemd starts it.",
    )
    parser.add_argument("--version", action="version", version=f"banger-helper {__version__}")
    # Only who is root already gives these; where they lead is checked as the defaults are.
    parser.add_argument("--socket", type=Path, default=HELPER_SOCKET, metavar="PATH")
    parser.add_argument("--install-file", type=Path, default=INSTALL_FILE, metavar="PATH")
    parser.add_argument(
        "--take-down", action="store_true", help="give back what the owner's banger has of the host"
    )
    arguments = parser.parse_args()
    log.configure(sys.stderr, "info")
    try:
        if arguments.take_down:
            asyncio.run(_take_down(_installation(arguments.install_file)))
        else:
            _run(arguments.socket, arguments.install_file)
    except BangerError as error:
        log.get_logger().error("helper failed", error=error.message, hint=error.hint)
        sys.exit(1)
    except OSError as error:
        log.get_logger().error("helper failed", error=str(error), hint="")
        sys.exit(1)


def _run(path: Path, install_file: Path) -> None:
    installation = _installation(install_file)
    _check_owner(installation)
    inherited = _inherited_listener()
    notify = take_notifier()
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    os.umask(0o077)
    listener = inherited or _bind(path, installation.owner_uid)
    notify("READY=1")  # it can be connected to
    try:
        asyncio.run(_serve(listener, installation))
    finally:
        listener.close()
        if inherited is None:  # systemd's stays, and so does whoever waits at it
            path.unlink(missing_ok=True)


def _installation(install_file: Path) -> Installation:
    """Whom it is for."""
    if os.geteuid() != 0:
        raise PermissionDenied("banger-helper does what needs root, and is not root")
    return load_installation(install_file)


async def _take_down(installation: Installation) -> None:
    """For the end of an installation: a daemon that was killed took back nothing."""
    from banger.hostops import jails, links  # see `local`

    host = LocalHost(installation.owner_uid)
    await jails.end_all(installation.owner_uid)  # before the bridges that they are on
    # In a thread, as `local` does it: pyroute2 runs an event loop of its own.
    for name in await asyncio.to_thread(links.bridges, installation.owner_uid):
        await host.perform(BridgeDown(bridge=name))
    for operation in (UnrouteNames(), SweepSnapshots()):
        try:
            await host.perform(operation)
        except Conflict as error:  # a link of somebody else's, a disk that somebody looks at
            log.get_logger().warning("left as it is", error=error.message)


async def _serve(listener: socket.socket, installation: Installation) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    owner_uid = installation.owner_uid
    log.get_logger().info("helper ready", version=__version__, owner_uid=owner_uid)
    await Helper(LocalHost(owner_uid), owner_uid).serve(listener, stopping)
    log.get_logger().info("helper stopped")


def _check_owner(installation: Installation) -> None:
    """Raise PreconditionFailed where the owner's account is gone, or has become another's."""
    try:
        uid = pwd.getpwnam(installation.owner).pw_uid
    except KeyError:
        uid = -1
    if uid != installation.owner_uid:
        raise PreconditionFailed(
            f"banger was installed for {installation.owner}, uid {installation.owner_uid}, "
            "and there is no such account",
            hint="install it for another: banger system install",
        )


def _inherited_listener() -> socket.socket | None:
    """The listening socket that systemd opened for us, if it did (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise PreconditionFailed("the helper listens at one socket, and was passed others")
    listener = socket.socket(fileno=_LISTEN_FD)
    listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_STREAM) or not listening:
        raise PreconditionFailed("what the helper was passed is no listening Unix socket")
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def _bind(path: Path, owner_uid: int) -> socket.socket:
    """A listening socket at `path` that the owner, and nobody else, can connect to."""
    with suppress(FileExistsError):
        path.parent.mkdir()
        path.parent.chmod(0o755)  # whatever the umask says
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(path.parent, flags)
    try:
        # Nobody but root can put anything else there between these steps.
        check_of_root(directory, path.parent)
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            os.chown(path, owner_uid, -1, follow_symlinks=False)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    finally:
        os.close(directory)
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a helper that is no more. Raises Conflict for what is another thing."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Conflict(f"{path} is there and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
                raise Conflict(f"another helper listens at {path}")
        path.unlink()


if __name__ == "__main__":
    main()
