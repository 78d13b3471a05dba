"""The daemon's end of the socket: who may connect, requests in, replies out.

It knows lines, frames and peer credentials; what a method does is the dispatcher's. One task
serves each connection; a connection serves one request after another.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from banger import __version__
from banger.base.errors import (
    BadRequest,
    BadVersion,
    BangerError,
    Cancelled,
    PermissionDenied,
    from_unexpected,
)
from banger.base.log import get_logger
from banger.base.malformed import MALFORMED
from banger.base.model import ErrorInfo
from banger.base.opid import current_op_id, is_op_id, new_op_id
from banger.base.paths import check_socket_path
from banger.rpc.protocol import (
    FRAME_HEADER,
    PROTOCOL_VERSION,
    REQUEST_MAX_BYTES,
    Exit,
    FrameType,
    Request,
    decode_request,
    encode_json,
    frame,
    parse_frame_header,
)

#: How long what a client has not read yet may keep its connection open.
_FLUSH_TIMEOUT_S = 1.0

_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred of SO_PEERCRED


class Oversized(BadRequest):
    """A request line longer than REQUEST_MAX_BYTES."""


class Connection:
    """One client. Before the switch: lines; after it: frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._early = b""
        self.switched = False

    def peer_uid(self) -> int:
        """The uid of the process that connected, from the kernel."""
        connection: socket.socket = self._writer.get_extra_info("socket")
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        uid: int = _UCRED.unpack(raw)[1]
        return uid

    async def read_line(self) -> bytes | None:
        """The next request line; None at the end. Raises Oversized."""
        early, self._early = self._early, b""
        if early == b"\n":
            return early
        try:
            return early + await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return early + error.partial or None
        except asyncio.LimitOverrunError:
            raise Oversized(f"request is longer than {REQUEST_MAX_BYTES} bytes") from None

    async def event(self, event: object) -> None:
        await self._line({"event": event})

    async def result(self, result: object) -> None:
        await self._line({"result": result, "daemon_version": __version__})

    async def error(self, error: BangerError) -> None:
        await self._line({"error": error_info(error), "daemon_version": __version__})

    async def switch(self, result: object) -> None:
        """Answer with `result`; from here on the connection carries frames."""
        await self.result(result)
        self.switched = True

    async def wait_disconnect(self) -> None:
        """Return when the client has gone; one that speaks early stays connected."""
        if not self._early:
            self._early = await self._reader.read(1)
            if not self._early:
                return
        await asyncio.Event().wait()

    async def read_frame(self) -> tuple[FrameType, bytes] | None:
        """The next frame; None when the client has gone. Raises BadRequest for a bad one."""
        try:
            early, self._early = self._early, b""
            header = early + await self._reader.readexactly(FRAME_HEADER.size - len(early))
            kind, length = parse_frame_header(header)
            return kind, await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def send_frame(self, kind: FrameType, payload: bytes | memoryview = b"") -> None:
        """Raises ConnectionError when the client has gone; waits while it reads slowly."""
        self._writer.write(frame(kind, payload))
        await self._writer.drain()

    async def send_exit(self, exit_: Exit) -> None:
        await self.send_frame(FrameType.EXIT, encode_json(exit_))

    async def flush(self) -> None:
        """Wait until the client has taken everything, however slowly; or has gone."""
        # Down to nothing, where drain alone is content with the low-water mark.
        self._writer.transport.set_write_buffer_limits(0)
        with suppress(ConnectionError):
            await self._writer.drain()

    async def close(self) -> None:
        """Send what is still to be sent, for a client that reads, and close."""
        self._writer.close()
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except ConnectionError:
            pass

    async def _line(self, message: object) -> None:
        self._writer.write(encode_json(message) + b"\n")
        await self._writer.drain()


def error_info(error: BangerError) -> ErrorInfo:
    """The error as it goes over the wire, with the op_id of the work that failed."""
    return ErrorInfo(
        code=error.code,
        message=_as_text(error.message),
        hint=_as_text(error.hint),
        op_id=error.op_id or current_op_id.get(),
    )


def _as_text(message: str) -> str:
    """Names of files may be in it, with bytes that are no UTF-8: those as ``\\xff``."""
    return message.encode(errors="surrogateescape").decode(errors="backslashreplace")


#: Does what a request asks and sends the reply, or raises BangerError for the server to send.
Dispatcher = Callable[[Request, Connection], Awaitable[None]]


class Server:
    """Listens on the daemon's socket and gives each request to the dispatcher."""

    def __init__(self, path: Path, dispatch: Dispatcher) -> None:
        self._path = path
        self._dispatch = dispatch
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind and listen, mode 0600. The caller holds the daemon's lock, so a socket file that
        is there already is stale."""
        check_socket_path(self._path)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise BadRequest(f"{self._path} is there and is not a socket")
            self._path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Only the umask makes the mode right from the first moment.
        umask = os.umask(0o177)
        try:
            listener.bind(os.fspath(self._path))
        finally:
            os.umask(umask)
        self._server = await asyncio.start_unix_server(
            self._accept, sock=listener, limit=REQUEST_MAX_BYTES, backlog=256
        )

    async def stop(self) -> None:
        """Stop listening, cancel what is being served, wait for it, remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(Connection(reader, writer)))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: Connection) -> None:
        try:
            uid = connection.peer_uid()
            if uid != os.getuid():
                get_logger().warning("peer refused", peer_uid=uid)
                current_op_id.set(new_op_id())
                await connection.error(
                    PermissionDenied(
                        f"this bangerd serves uid {os.getuid()}, not uid {uid}",
                        hint="run banger as the user that owns the daemon",
                    )
                )
                return
            while not connection.switched and await self._serve_one(connection):
                pass
            # The end of a command's output may wait for whoever reads it: a pager, a slow pipe.
            await connection.flush()
        except ConnectionError:
            pass  # the client went away; what it had started decides for itself
        except asyncio.CancelledError:
            pass  # the daemon is stopping
        except Exception:
            # A supervisor's boundary: one connection's bug must not end the daemon.
            get_logger().exception("connection failed")
        finally:
            await connection.close()

    async def _serve_one(self, connection: Connection) -> bool:
        """Serve one request; whether there may be another."""
        current_op_id.set("")
        try:
            line = await connection.read_line()
            if line is None:
                return False
            if not line.strip():
                return True
            request = _parse(line)
            await self._dispatch(request, connection)
        except BangerError as error:
            current_op_id.set(current_op_id.get() or new_op_id())
            await _report(connection, error)
            # Past an oversized line nothing tells where the next one begins.
            return not isinstance(error, Oversized)
        except asyncio.CancelledError:
            current_op_id.set(current_op_id.get() or new_op_id())
            # A client that does not read must not keep the daemon from stopping.
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                    await _report(connection, Cancelled("bangerd is stopping"))
            raise
        except ConnectionError:
            raise
        except Exception as error:
            get_logger().exception("request failed")
            await _report(connection, from_unexpected(error))
        return True


async def _report(connection: Connection, error: BangerError) -> None:
    if connection.switched:
        await connection.send_exit(Exit(error=error_info(error)))
    else:
        await connection.error(error)


def _parse(line: bytes) -> Request:
    """The request on this line, its op_id set as the current one (minted if it has none)."""
    try:
        request = decode_request(line)
    except MALFORMED as error:
        raise BadRequest(f"malformed request: {error}") from None
    if request.op_id and not is_op_id(request.op_id):
        raise BadRequest("malformed request: op_id is not op- and 12 hex digits")
    request.op_id = request.op_id or new_op_id()
    current_op_id.set(request.op_id)
    if request.version != PROTOCOL_VERSION:
        raise BadVersion(
            f"protocol version {request.version} is not supported (this is {PROTOCOL_VERSION})",
            hint="use a banger and a bangerd of the same version",
        )
    return request
