"""Making an image or a kernel: begun, watched, and taken back with Ctrl-C."""

from __future__ import annotations

from typing import Any

import msgspec

from banger.base.errors import from_wire
from banger.base.model import Operation
from banger.cli.app import connect, note
from banger.cli.progress import ProgressView


class Begun(msgspec.Struct):
    operation_id: str


def make(method: str, params: dict[str, Any], *, title: str, quiet: bool) -> Operation:
    """Have the daemon make something by a method that only begins it; its last state.

    Ctrl-C leaves the making, which ends it unless others wait for the same.
    """
    with connect() as client, ProgressView(title, quiet=quiet) as view:
        begun = client.call(method, params, Begun)
        reference = {"id": begun.operation_id}
        try:
            done = client.call("operations.watch", reference, Operation, on_event=view.event)
        except KeyboardInterrupt:
            note(f"{title}: taking it back")
            with connect() as second:
                state = second.call("operations.leave", reference, Operation)
            if not state.done:
                note("others wait for it: it goes on")
            raise
    if (error := done.error) is not None:
        raise from_wire(error.code, error.message, error.hint, error.op_id)
    return done
