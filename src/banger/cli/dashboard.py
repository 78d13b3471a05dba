"""The screen of `banger vm stats --watch`: a row a machine, with small graphs of its history.

It is imported only to draw: rich takes longer than the rest of a call.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from banger.base.terminal import printable
from banger.base.usage import UsagePoint, VmStats
from banger.cli.figures import GAP, UNKNOWN, fitting
from banger.cli.graph import ASCII_BLOCKS, BLOCKS, columns, sparkline
from banger.cli.stats_columns import COLUMNS, headings_and_rows

_GRAPH_LEAST = 8
_GRAPH_MOST = 40
#: Lines that are not a machine's: the title, the headings, how many more there are.
_OTHER_LINES = 3
_GRAPH_STYLE = "green"


@dataclass(frozen=True)
class _Graph:
    """A graph stands behind the column of its figure and has a rank among the columns."""

    behind: str
    rank: int
    value: Callable[[UsagePoint], float | None]
    top: Callable[[VmStats], float]


_GRAPHS = {
    graph.behind: graph
    for graph in (
        _Graph("CPU", 3, lambda point: point.host_cpu_percent, lambda vm: 100.0 * vm.vcpu_count),
        _Graph("MEMORY", 7, lambda point: point.guest_memory_percent, lambda _: 100.0),
    )
}


class Dashboard:
    """A context manager that has the terminal's other screen; `show` draws.

    The methods are for one thread and its signal handlers: what a signal asks for while a frame is
    drawn is done by that frame or right after it.
    """

    def __init__(self, interval_s: float) -> None:
        self.found: list[VmStats] = []
        self._interval_s = interval_s
        self._live = Live(Text("..."), console=Console(), screen=True, auto_refresh=False)
        self._drawing = False
        self._stop_wanted = False

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, found: list[VmStats]) -> None:
        self.found = found
        self.redraw()

    def redraw(self) -> None:
        if self._drawing:
            return
        self._drawing = True
        try:
            self._live.update(self, refresh=True)
        finally:
            self._drawing = False
        if self._stop_wanted:
            self.suspend()

    def suspend(self) -> None:
        """Give the terminal back and stop, as Ctrl-Z would have us; draw again when continued."""
        self._stop_wanted = self._drawing
        if self._drawing:
            return
        self._live.stop()
        signal.raise_signal(signal.SIGSTOP)
        self._live.start()
        self.redraw()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(options.size.height - _OTHER_LINES, 1)
        shown, more = self.found[:room], len(self.found) - room
        parts: list[Text | Table] = [self._title(), self._table(shown, options)]
        if more > 0:
            parts.append(Text(f"and {more} more", style="dim"))
        yield Group(*parts)

    def _title(self) -> Text:
        count = len(self.found)
        return Text(
            f"{count} {'machine' if count == 1 else 'machines'}, every {self._interval_s:g} s;"
            " Ctrl-C ends",
            style="dim",
            no_wrap=True,
            overflow="crop",
        )

    def _table(self, found: list[VmStats], options: ConsoleOptions) -> Table:
        # Cropped, not with an ellipsis: a terminal may have ASCII only.
        blocks = ASCII_BLOCKS if options.ascii_only else BLOCKS
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        cells: list[list[Text]] = [[] for _ in found]
        headings, rows = headings_and_rows(found)
        kept, graph_width = _layout(headings, rows, options.max_width)
        for at, is_graph in kept:
            heading = headings[at]
            table.add_column("" if is_graph else heading, no_wrap=True, overflow="crop")
            for row, vm, texts in zip(rows, found, cells, strict=True):
                if is_graph:
                    drawn = self._graph(_GRAPHS[heading], vm, graph_width, blocks)
                    texts.append(Text(drawn, style=_GRAPH_STYLE))
                else:
                    cell = printable(row[at])
                    texts.append(Text(cell, style="dim" if cell == UNKNOWN else ""))
        for texts in cells:
            table.add_row(*texts)
        return table

    def _graph(self, graph: _Graph, vm: VmStats, width: int, blocks: str) -> str:
        if not vm.history:
            return " " * width
        points = [(point.at.timestamp(), graph.value(point)) for point in vm.history]
        values = columns(points, end_s=points[-1][0], step_s=self._interval_s, count=width)
        return sparkline(values, top=graph.top(vm), width=width, blocks=blocks)


def _layout(
    headings: list[str], rows: list[list[str]], available: int
) -> tuple[list[tuple[int, bool]], int]:
    """Which columns there is room for, each as (its place, whether it is the graph behind it),
    and how wide graphs are."""
    places: list[tuple[int, bool]] = []
    widths: list[int] = []
    ranks: list[int] = []
    for at, column in enumerate(COLUMNS):
        places.append((at, False))
        widths.append(max(len(headings[at]), *(len(row[at]) for row in rows), 0))
        ranks.append(column.rank)
        if graph := _GRAPHS.get(column.heading):
            places.append((at, True))
            widths.append(_GRAPH_LEAST)
            ranks.append(graph.rank)
    kept = fitting(widths, ranks, available)
    graphs = sum(places[at][1] for at in kept)
    spare = available - sum(widths[at] + GAP for at in kept)
    width = min(_GRAPH_LEAST + max(spare, 0) // graphs, _GRAPH_MOST) if graphs else 0
    return [places[at] for at in kept], width
