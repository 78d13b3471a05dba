"""`banger vm stats`: what machines use, once or for as long as somebody watches.

On a terminal `--watch` has a screen of its own, with small graphs; elsewhere it writes lines.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

import click
import msgspec

from banger.base.errors import BadRequest
from banger.base.terminal import printable
from banger.base.units import parse_duration_s
from banger.base.usage import VmStats
from banger.cli.app import Checked, connect, json_option, optional_vm_argument
from banger.cli.figures import print_fitting
from banger.cli.render import print_json
from banger.cli.stats_columns import COLUMNS, headings_and_rows

if TYPE_CHECKING:
    from banger.cli.dashboard import Dashboard

_LEAST_S, _MOST_S = 0.5, 3600

Show = Callable[[list[VmStats]], None]


class _Ended(Exception):
    """This signal ends the watching."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class _Unwritable(Exception):
    """What came cannot be shown, for this reason."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason)
        self.reason = reason


def _interval(text: str) -> float:
    seconds = parse_duration_s(text)
    if not _LEAST_S <= seconds <= _MOST_S:
        raise BadRequest(f'"{text}" is not from 500ms to 1h')
    return seconds


@click.command()
@optional_vm_argument
@click.option("-w", "--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.option(
    "--interval",
    type=Checked("duration", _interval),
    default="2s",
    show_default=True,
    help="How often to look with --watch.",
)
@json_option
def stats(*, vm_ref: str, watch: bool, interval: float, as_json: bool) -> int:
    """What running machines use: CPU, memory, disks, network.

    CPU is the host's view, of one core: two busy vCPUs are 200%. HOST MEM and HOST DISK are what
    the machine takes of the host; GUEST CPU (of all its vCPUs), MEMORY, DISK, NET, LOAD and PROCS
    are what the guest says.
    """
    if not watch:
        _once(vm_ref, as_json=as_json)
        return 0
    try:
        if as_json:
            return _watch(vm_ref, interval, _print_json_lines)
        if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
            return _watch(vm_ref, interval, _Lines().show)
        return _watch_screen(vm_ref, interval)
    except KeyboardInterrupt:
        return 0


def _once(vm_ref: str, *, as_json: bool) -> None:
    with connect() as client:
        found = client.call("vm.stats", {"vm": vm_ref}, list[VmStats])
    if as_json:
        print_json(found)
    else:
        _print_fitting(found)


def _print_fitting(found: list[VmStats]) -> None:
    print_fitting(*headings_and_rows(found), [column.rank for column in COLUMNS])


def _watch(vm_ref: str, interval_s: float, show: Show) -> int:
    """Show what comes until the daemon ends it, with an error; the user does by a signal."""
    params = {"vm": vm_ref, "watch": True, "interval_s": interval_s}

    def tell(raw: msgspec.Raw) -> None:
        try:
            show(msgspec.json.decode(raw, type=list[VmStats]))
        except OSError as error:
            # As itself the client would take it for the end of its own connection.
            raise _Unwritable(error) from error

    try:
        with connect() as client:
            client.call("vm.stats", params, list[VmStats], on_event=tell)
    except _Unwritable as unwritable:
        raise unwritable.reason from None
    return 0


def _print_json_lines(found: list[VmStats]) -> None:
    """A line a machine. Who reads them has the history already."""
    for each in found:
        click.echo(msgspec.json.encode(msgspec.structs.replace(each, history=())))


class _Lines:
    """Lines one after another: the time, then a table's columns, in widths that do not change."""

    def __init__(self) -> None:
        self._widths: list[int] = []

    def show(self, found: list[VmStats]) -> None:
        headings, rows = headings_and_rows(found)
        headings.insert(0, "TIME")
        for each, row in zip(found, rows, strict=True):
            at = each.latest.at if each.latest is not None else datetime.now(UTC)
            row.insert(0, at.astimezone().strftime("%H:%M:%S"))
        if not self._widths and rows:
            self._widths = [8, *(column.width for column in COLUMNS)]
            self._print(headings)
        for row in rows:
            self._print([printable(cell) for cell in row])

    def _print(self, cells: list[str]) -> None:
        pairs = zip(cells, self._widths, strict=True)
        click.echo("  ".join(cell.ljust(width) for cell, width in pairs).rstrip())


def _watch_screen(vm_ref: str, interval_s: float) -> int:
    from banger.cli.dashboard import Dashboard

    dashboard = Dashboard(interval_s)
    try:
        with dashboard, _signals(dashboard):
            return _watch(vm_ref, interval_s, dashboard.show)
    except _Ended as ended:
        return ended.status
    finally:
        # The screen is as it was before: what was seen last stays to be read.
        if dashboard.found:
            _print_fitting(dashboard.found)


@contextmanager
def _signals(dashboard: Dashboard) -> Iterator[None]:
    """Redraw after a change of the window or a stop (Ctrl-Z); end in good order."""

    def end(number: int, _: FrameType | None) -> None:
        raise _Ended(number)

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
        signal.SIGWINCH: lambda *_: dashboard.redraw(),
        signal.SIGTSTP: lambda *_: dashboard.suspend(),
        signal.SIGTERM: end,
        signal.SIGHUP: end,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
