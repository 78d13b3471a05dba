"""Drawing: tables that adapt to the terminal, and JSON.

Rich is imported only to draw on a terminal: a pipe gets plain columns at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click
import msgspec

from banger.base.terminal import printable

#: Colours of states, for terminals.
_STYLES = {"running": "green", "creating": "yellow", "suspended": "cyan",
           "error": "red", "ok": "green", "warn": "yellow", "fail": "red", "failed": "red",
           "completed": "green"}  # fmt: skip


def print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. Cells may come from a guest: control characters do not get through."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(headings, clean)
    else:
        _print_plain(headings, clean)


def _print_plain(headings: Sequence[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    layout = "  ".join(f"{{:{width}}}" for width in widths)
    # In one piece: a thousand rows are written as fast as one.
    click.echo("\n".join(layout.format(*row).rstrip() for row in (headings, *rows)))


def _print_rich(headings: Sequence[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def seconds_since(moment: datetime | None) -> float:
    return 0.0 if moment is None else (datetime.now(UTC) - moment).total_seconds()
