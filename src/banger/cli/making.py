"""Making an image or a kernel: begun, watched, and taken back with Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from banger.base.errors import from_wire
from banger.base.model import Operation
from banger.base.terminal import printable
from banger.base.units import format_size
from banger.cli.app import connect, note
from banger.cli.progress import ProgressView


class Begun(msgspec.Struct):
    operation_id: str
    #: A file with what is printed meanwhile; empty where nothing is.
    log: str = ""


def tell_image(done: Operation) -> None:
    """What an operation that makes an image had to say, and the image on stdout."""
    for each in done.notes:
        note(each)
    if done.image is not None:
        click.echo(f"{done.image.name} ({format_size(done.image.size_bytes)})")


class OutputView:
    """Feed it the events of an operation: each stage, and what was printed since the last, on
    stderr."""

    def __init__(self, title: str) -> None:
        self.log = ""
        self._title = title
        self._stage = ""
        self._position = 0

    def event(self, raw: msgspec.Raw) -> None:
        state = msgspec.json.decode(raw, type=Operation)
        self.catch_up(to_the_end=state.done)
        if state.stage != self._stage:
            self._stage = state.stage
            note(f"{self._title}: {state.stage}")

    def catch_up(self, *, to_the_end: bool) -> None:
        """Show what is new: whole lines, until nothing more will come."""
        try:
            with Path(self.log).open("rb") as file:
                file.seek(self._position)
                new = file.read()
        except OSError:
            return  # nothing was printed yet
        size = len(new) if to_the_end else new.rfind(b"\n") + 1
        self._position += size
        for line in new[:size].decode(errors="replace").splitlines():
            note(printable(line))


def make(
    method: str, params: dict[str, Any], *, title: str, quiet: bool, verbose: bool = False
) -> Operation:
    """Have the daemon make something by a method that only begins it; its last state.

    Ctrl-C leaves the making, which ends it unless others wait for the same. ``verbose`` shows all
    that is printed meanwhile, in place of how far it is.
    """
    output = OutputView(title)
    with connect() as client, ProgressView(title, quiet=quiet or verbose) as view:
        begun = client.call(method, params, Begun)
        output.log = begun.log
        reference = {"id": begun.operation_id}
        on_event = output.event if verbose else view.event
        try:
            done = client.call("operations.watch", reference, Operation, on_event=on_event)
        except KeyboardInterrupt:
            note(f"{title}: taking it back")
            with connect() as second:
                state = second.call("operations.leave", reference, Operation)
            if not state.done:
                note("others wait for it: it goes on")
            raise
    if verbose:
        output.catch_up(to_the_end=True)
    if (error := done.error) is not None:
        raise from_wire(error.code, error.message, error.hint, error.op_id)
    return done
