"""A client's end of the socket, synchronous: what the CLI needs, and it must start in a blink.

`connect` starts the daemon when none answers: one client wins the lock and starts it, the others
wait for that lock. `call` is one request and its result; `Session` is a switched connection.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from banger.base.errors import (
    BadRequest,
    BangerError,
    Internal,
    PermissionDenied,
    Unavailable,
    from_wire,
)
from banger.base.paths import Paths, check_private_dir, check_socket_path, prepare_private_dir
from banger.rpc.protocol import (
    FRAME_HEADER,
    LINE_MAX_BYTES,
    PROTOCOL_VERSION,
    FrameType,
    decode_reply,
    encode_json,
    frame,
    parse_frame_header,
)

T = TypeVar("T")

#: A daemon waits up to a minute for one that is stopping, then opens its database and looks at
#: what runs before it answers.
START_TIMEOUT_S = 120
_READ_BYTES = 256 << 10

#: How often a socket is looked for that systemd is about to have served, and after how many looks
#: systemd is asked whether it still is.
_SYSTEMS_INTERVAL_S = 0.05
_SYSTEMS_LOOKS = 20
_SYSTEMS_HINT = "it is a unit of the system: sudo systemctl start bangerd"

OnEvent = Callable[[msgspec.Raw], None]


class Client:
    """One connection to the daemon. Close it, or use it as a context manager."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self.daemon_version = ""

    @classmethod
    def connect(cls, paths: Paths, *, start: bool = True) -> Client:
        """Connect, starting the daemon if `start` and none runs.

        Raises Unavailable when there is none, or it does not start (with its own reason).
        """
        connection = _connect(paths)
        if connection is None:
            if not start:
                hint = _SYSTEMS_HINT if paths.of_system else "any other command starts it"
                raise Unavailable("bangerd is not running", hint=hint)
            connection = _await_systems(paths) if paths.of_system else _start(paths)
        return cls(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def call(
        self, method: str, params: object, result: type[T], *, on_event: OnEvent | None = None
    ) -> T:
        """One request; its result, decoded as `result`. Raises the error it was answered with."""
        request = {"version": PROTOCOL_VERSION, "method": method, "params": params}
        try:
            line = encode_json(request) + b"\n"
        except UnicodeEncodeError as wrong:
            raise BadRequest(f"{wrong.object!r} is not valid UTF-8") from None
        try:
            # A daemon that refuses a request before it has read it says why, then closes.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._socket.sendall(line)
            while True:
                reply = decode_reply(self._line())
                self.daemon_version = reply.daemon_version or self.daemon_version
                if bytes(reply.event):
                    if on_event is not None:
                        on_event(reply.event)
                elif reply.error is not None:
                    error = reply.error
                    raise from_wire(error.code, error.message, error.hint, error.op_id)
                elif bytes(reply.result):
                    return msgspec.json.decode(reply.result, type=result)
                else:
                    raise Internal("bangerd answered with neither result nor error")
        except msgspec.DecodeError as error:
            raise Internal(f"bangerd answered with something unexpected: {error}") from error
        except OSError as error:
            raise _lost(error) from error

    def session(self) -> Session:
        """The frames of this connection, after the result of a switching method."""
        return Session(self._socket, self._buffer)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            chunk = self._socket.recv(_READ_BYTES)
            if not chunk:
                raise _lost(None)
            self._buffer += chunk
            if len(self._buffer) > LINE_MAX_BYTES:
                raise Internal(f"bangerd answered with more than {LINE_MAX_BYTES} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


class Session:
    """Frames over a switched connection, for a loop that polls `fileno`."""

    def __init__(self, connection: socket.socket, buffer: bytearray) -> None:
        self._socket = connection
        self._buffer = buffer

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: FrameType, payload: bytes | memoryview = b"") -> None:
        """Send one frame whole. Raises Unavailable when the daemon is gone."""
        try:
            self._socket.sendall(frame(kind, payload))
        except OSError as error:
            raise _lost(error) from error

    def send_some(self, pending: bytearray) -> None:
        """Send what the socket takes without waiting, and take it off `pending`.

        For a daemon that has closed its end this drops it all: what it said last is to be received.
        """
        try:
            sent = self._socket.send(pending, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            sent = len(pending)
        except OSError as error:
            raise _lost(error) from error
        del pending[:sent]

    def receive(self) -> Iterator[tuple[FrameType, memoryview]]:
        """Read once, then give every frame that is complete. Raises Unavailable at the end."""
        try:
            chunk = self._socket.recv(_READ_BYTES)
        except OSError as error:
            raise _lost(error) from error
        if not chunk:
            raise _lost(None)
        self._buffer += chunk
        yield from self.pending()

    def pending(self) -> Iterator[tuple[FrameType, memoryview]]:
        """Frames that are already here, without reading."""
        position = 0
        data = bytes(self._buffer)
        view = memoryview(data)
        while len(data) - position >= FRAME_HEADER.size:
            kind, length = parse_frame_header(data[position : position + FRAME_HEADER.size])
            start = position + FRAME_HEADER.size
            if len(data) < start + length:
                break
            position = start + length
            # Taken out first: the caller may stop after this frame.
            del self._buffer[: FRAME_HEADER.size + length]
            yield kind, view[start:position]


def _lost(error: OSError | None) -> Unavailable:
    reason = f": {error.strerror}" if error is not None and error.strerror else ""
    return Unavailable(
        f"the connection to bangerd was lost{reason}",
        hint="machines run on, and the next command starts it again; see: banger daemon logs",
    )


def _connect(paths: Paths) -> socket.socket | None:
    """A connection to the daemon of this user; None when there is none."""
    check_socket_path(paths.daemon_socket)
    try:
        # Or somebody else's daemon would learn all that we ask ours to do.
        check_private_dir(paths.runtime_dir)
    except FileNotFoundError:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(paths.daemon_socket))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        kind = PermissionDenied if isinstance(error, PermissionError) else Unavailable
        raise kind(f"cannot connect to {paths.daemon_socket}: {error.strerror}") from error
    return connection


def _start(paths: Paths) -> socket.socket:
    prepare_private_dir(paths.runtime_dir)
    with _start_lock(paths.runtime_dir / "start.lock"):
        # Another client may have started it while this one waited for the lock.
        connection = _connect(paths)
        if connection is None:
            start_daemon(paths)
            connection = _connect(paths)
    if connection is None:
        raise Unavailable("bangerd started but does not answer", hint="see: banger daemon logs")
    return connection


def _await_systems(paths: Paths) -> socket.socket:
    """A connection to the daemon that systemd runs, and only root has started. One that it starts
    again is there in a moment: a command need not fail because of an upgrade."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while _is_on_its_way() and time.monotonic() < deadline:
        for _ in range(_SYSTEMS_LOOKS):
            connection = _connect(paths)
            if connection is not None:
                return connection
            time.sleep(_SYSTEMS_INTERVAL_S)  # a socket tells nobody that it has come to be
    raise Unavailable("bangerd is not running", hint=_SYSTEMS_HINT)


def _is_on_its_way() -> bool:
    """Whether systemd runs the daemon, or is about to."""
    from banger.base.proc import popen  # as in `start_daemon`

    # It has a job, and is not active yet, while it waits for the helper that it comes after.
    shown = ("--property=ActiveState", "--property=Job")
    with popen(["systemctl", "show", *shown, "bangerd.service"]) as process:
        said, _ = process.communicate()
    return _announces(said.decode(errors="replace"))


def _announces(said: str) -> bool:
    """Whether what ``systemctl show`` says of the unit (``Job=`` is there while it has one) means
    that it runs, or is about to."""
    shown = dict(line.partition("=")[::2] for line in said.splitlines())
    coming = ("active", "activating", "reloading", "deactivating")
    return shown.get("ActiveState", "") in coming or shown.get("Job", "") not in ("", "0")


@contextmanager
def _start_lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def start_daemon(paths: Paths) -> None:
    """Start the daemon and wait until it is ready. Raises the reason it gave for not starting."""
    # Only here: asyncio, which proc needs, costs more than the rest of a call.
    from banger.base.proc import spawn_detached

    paths.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    readable, writable = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            process = spawn_detached(
                [sys.executable, "-m", "banger.daemon.main", "--ready-fd", str(writable)],
                log=paths.daemon_log,
                pass_fds=[writable],
            )
        finally:
            os.close(writable)
        message = _read_ready(readable)
    finally:
        os.close(readable)
    if message != b"ready\n":
        with suppress(Exception):
            process.wait(timeout=5)
        raise _start_error(message, paths)
    process.returncode = 0  # it lives on as a daemon: nothing to reap, nothing to warn about


def _read_ready(readable: int) -> bytes:
    import select

    message = b""
    while select.select([readable], [], [], START_TIMEOUT_S)[0]:
        chunk = os.read(readable, 65536)
        message += chunk
        if not chunk or message == b"ready\n":
            break
    return message


def _start_error(message: bytes, paths: Paths) -> BangerError:
    try:
        info: dict[str, Any] = msgspec.json.decode(message)
        return from_wire(info["code"], info["message"], info.get("hint", ""))
    except (msgspec.DecodeError, KeyError, TypeError):
        return Unavailable("bangerd did not start", hint=f"inspect {paths.daemon_log}")
