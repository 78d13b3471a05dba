"""What a service tells systemd, when that has started it: sd_notify(3), which is one datagram."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

_VARIABLE = "NOTIFY_SOCKET"


def take_notifier() -> Callable[[str], None]:
    """A function that sends lines like ``READY=1``; without systemd it does nothing.

    The variable goes from the environment: what we start has nothing to tell.
    """
    address = os.environ.pop(_VARIABLE, "")
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]

    def notify(state: str) -> None:
        if not address:
            return
        # Nothing is lost that anybody could do without: systemd waits, and says so.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.connect(address)
            end.send(state.encode())

    return notify
