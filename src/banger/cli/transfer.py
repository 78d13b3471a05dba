"""Bulk bytes over a switched connection, with a count of them on stderr while it takes long."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
import time
from typing import IO, Any, cast

import click

from banger.base.terminal import printable
from banger.base.units import format_size
from banger.cli.app import note
from banger.rpc.client import Session
from banger.rpc.protocol import CREDIT_BYTES, NUMBER, Exit, FrameType, decode_exit, frame

_READ_BYTES = 128 << 10
#: A longer line of a guest's is cut.
_LINE_BYTES = 8 << 10
_SHOW_EVERY_S = 0.5
_QUIET_FOR_S = 1.0


class _Counter:
    """A line that tells how far a transfer is: on terminals, of what takes over a second."""

    def __init__(self, title: str) -> None:
        self._title = printable(title)
        self._count = 0
        self._began = time.monotonic()
        self._next = self._began + _QUIET_FOR_S
        self._shown = False

    def add(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if now >= self._next and sys.stderr.isatty():
            rate = self._count / (now - self._began)
            text = f"{self._title}: {format_size(self._count)}, {format_size(int(rate))}/s"
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
            self._next, self._shown = now + _SHOW_EVERY_S, True

    def clear(self) -> None:
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


class _Said:
    """What the guest says on its stderr, passed on to ours line by line, without what could
    command a terminal: unlike a command's, it is not asked for."""

    def __init__(self) -> None:
        self._begun = b""

    def add(self, data: bytes | memoryview) -> None:
        *lines, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) > _LINE_BYTES:
            lines, self._begun = [*lines, self._begun], b""
        for line in lines:
            note(printable(line.decode(errors="replace")))

    def end(self) -> None:
        if self._begun:
            self.add(b"\n")


class _Shown(io.RawIOBase):
    """A terminal, which what a guest wrote is not to command."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: Any) -> int:
        text = self._decoder.decode(bytes(data))
        lines = ("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
        click.echo("\n".join(lines), nl=False)
        return len(data)


def guest_output() -> IO[bytes]:
    """Where bytes of a guest's go that were asked for: stdout, of which a terminal gets text."""
    return cast("IO[bytes]", _Shown()) if sys.stdout.isatty() else sys.stdout.buffer


def send_stream(session: Session, data: IO[bytes], *, title: str) -> Exit:
    """Send all of `data` as DATA and then EOF; how the other side ended.

    What the guest says on its stderr goes to ours.
    """
    counter = _Counter(title)
    said = _Said()
    out = bytearray()
    credit = CREDIT_BYTES
    open_ = True
    frames = session.pending()
    try:
        while True:
            for kind, payload in frames:
                if kind is FrameType.STDERR:
                    said.add(payload)
                elif kind is FrameType.WINDOW:
                    credit += NUMBER.unpack(payload)[0]
                elif kind is FrameType.EXIT:
                    return decode_exit(payload)
            poll = select.poll()
            poll.register(session.fileno(), select.POLLIN | (select.POLLOUT if out else 0))
            if open_ and credit and not out:
                poll.register(data.fileno(), select.POLLIN)
            ready = dict(poll.poll())
            if ready.get(session.fileno(), 0) & select.POLLOUT:
                session.send_some(out)
            readable = ready.get(session.fileno(), 0) & ~select.POLLOUT
            frames = session.receive() if readable else iter(())
            if data.fileno() in ready:
                chunk = os.read(data.fileno(), min(_READ_BYTES, credit))
                credit -= len(chunk)
                counter.add(len(chunk))
                open_ = bool(chunk)
                out += frame(FrameType.DATA, chunk) if chunk else frame(FrameType.EOF)
                session.send_some(out)
    finally:
        counter.clear()
        said.end()


def receive_stream(session: Session, out: IO[bytes], *, title: str) -> Exit:
    """Write the DATA that comes to `out`; how the other side ended."""
    counter = _Counter(title)
    said = _Said()
    frames = session.pending()
    try:
        while True:
            for kind, payload in frames:
                if kind is FrameType.DATA:
                    out.write(payload)
                    out.flush()
                    counter.add(len(payload))
                elif kind is FrameType.STDERR:
                    said.add(payload)
                elif kind is FrameType.EXIT:
                    return decode_exit(payload)
            frames = session.receive()
    finally:
        counter.clear()
        said.end()
