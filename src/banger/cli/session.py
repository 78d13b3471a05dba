"""The terminal's half of a command in a guest: bytes, signals, window size, exit status.

One poll loop, never blocked on one direction: what cannot be sent yet waits while the other
direction moves on, or two full pipes would wait for each other for ever.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from banger.base.errors import from_wire
from banger.cli.app import OUR_FAILURE, note, print_error
from banger.rpc.client import Session
from banger.rpc.protocol import (
    CREDIT_BYTES,
    NUMBER,
    WINDOW_SIZE,
    Exit,
    FrameType,
    decode_exit,
    frame,
)

_READ_BYTES = 128 << 10
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
#: On a terminal these are ours, and end the session once the terminal is as it was.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class _Abandoned(Exception):
    """The command is left to itself because of this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


def window_size() -> tuple[int, int]:
    """(rows, columns) of the terminal on stdout; 24 by 80 where there is none."""
    with suppress(OSError):
        size = os.get_terminal_size(sys.stdout.fileno())
        return size.lines, size.columns
    return 24, 80


def join_session(session: Session) -> int:
    """Carry a connection to a guest, on stdin and stdout, until both sides have finished. Signals
    do what they always do."""
    exit_ = _Loop(session, terminal=False, stdin=True).run(-1)
    return _status(exit_)


def run_session(session: Session, *, terminal: bool, stdin: bool) -> int:
    """Carry a guest's command until it ends; its exit status.

    `terminal`: stdin is put into raw mode, so Ctrl-C is a byte like others; SIGTERM and SIGHUP
    abandon the command (status 128+n). Without it the first Ctrl-C is sent to the command as a
    signal and the second one abandons it (status 130).
    `stdin`: whether the command gets our standard input.
    """
    loop = _Loop(session, terminal=terminal, stdin=stdin)
    try:
        with _signals(terminal) as wakeup, _raw(terminal):
            exit_ = loop.run(wakeup)
    except _Abandoned as abandoned:
        note("abandoned: the command in the guest gets SIGHUP")
        return abandoned.status
    return _status(exit_)


def _status(exit_: Exit) -> int:
    if exit_.error is not None:
        error = exit_.error
        print_error(from_wire(error.code, error.message, error.hint, error.op_id))
        return OUR_FAILURE
    return exit_.status


class _Loop:
    def __init__(self, session: Session, *, terminal: bool, stdin: bool) -> None:
        self._session = session
        self._terminal = terminal
        self._out = bytearray()
        self._credit = CREDIT_BYTES
        self._signalled = False
        self._stdin = sys.stdin.fileno() if stdin else -1
        if not stdin:
            self._send(FrameType.EOF)

    def run(self, wakeup: int) -> Exit:
        """The exit of the command. Raises _Abandoned."""
        if (exit_ := self._frames(self._session.pending())) is not None:
            return exit_
        while True:
            ready = self._poll(wakeup)
            if wakeup in ready:
                self._take_signals(wakeup)
            if ready.get(self._session.fileno(), 0) & select.POLLOUT:
                self._session.send_some(self._out)
            if ready.get(self._session.fileno(), 0) & ~select.POLLOUT:
                exit_ = self._frames(self._session.receive())
                if exit_ is not None:
                    return exit_
            if self._stdin in ready:
                self._read_stdin()

    def _poll(self, wakeup: int) -> dict[int, int]:
        poll = select.poll()  # not epoll: it refuses regular files, which stdin may be
        if wakeup >= 0:
            poll.register(wakeup, select.POLLIN)
        waiting = select.POLLOUT if self._out else 0
        poll.register(self._session.fileno(), select.POLLIN | waiting)
        if self._stdin >= 0 and self._credit and not self._out:
            poll.register(self._stdin, select.POLLIN)
        return dict(poll.poll())

    def _frames(self, frames: Iterator[tuple[FrameType, memoryview]]) -> Exit | None:
        for kind, payload in frames:
            if kind is FrameType.DATA:
                _write_all(sys.stdout.fileno(), payload)
            elif kind is FrameType.STDERR:
                _write_all(sys.stderr.fileno(), payload)
            elif kind is FrameType.EOF:
                _close_stdout()
            elif kind is FrameType.WINDOW:
                self._credit += NUMBER.unpack(payload)[0]
            elif kind is FrameType.EXIT:
                return decode_exit(payload)
        return None

    def _read_stdin(self) -> None:
        try:
            data = os.read(self._stdin, min(_READ_BYTES, self._credit))
        except OSError as error:
            if self._terminal and error.errno == errno.EIO:
                raise _Abandoned(signal.SIGHUP) from None  # it was hung up
            raise
        if data:
            self._credit -= len(data)
            self._send(FrameType.DATA, data)
        else:
            self._stdin = -1
            self._send(FrameType.EOF)

    def _take_signals(self, wakeup: int) -> None:
        """Act on the signals that came. Raises _Abandoned."""
        for number in os.read(wakeup, 64):
            if number == signal.SIGWINCH:
                if self._terminal:
                    self._send(FrameType.RESIZE, WINDOW_SIZE.pack(*window_size()))
            elif self._terminal:
                raise _Abandoned(number)
            elif self._signalled:
                raise _Abandoned(signal.SIGINT)
            else:
                self._signalled = True
                self._send(FrameType.SIGNAL, NUMBER.pack(number))

    def _send(self, kind: FrameType, payload: bytes = b"") -> None:
        self._out += frame(kind, payload)
        self._session.send_some(self._out)


def _close_stdout() -> None:
    """Whoever reads it learns that nothing more comes, while what he writes still goes."""
    descriptor = sys.stdout.fileno()
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):  # which may be our stdin, too
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as out:
            out.shutdown(socket.SHUT_WR)
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, descriptor)
    os.close(null)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _signals(terminal: bool) -> Iterator[int]:
    """A descriptor from which the numbers of the signals that come can be read."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    numbers = [signal.SIGWINCH, *(_ENDING if terminal else _FORWARDED)]
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    previous = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(readable)
        os.close(writable)


@contextmanager
def _raw(terminal: bool) -> Iterator[None]:
    if not terminal:
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        with suppress(termios.error):  # of a terminal that has gone
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
