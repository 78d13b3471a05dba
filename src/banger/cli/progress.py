"""Progress of long work on stderr: a live line on a terminal, a line a stage elsewhere.

Nothing is shown of work that ends within a second.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from banger.base.model import Operation, OperationState
from banger.base.terminal import printable
from banger.cli.app import connect, note
from banger.rpc.client import Client

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

_QUIET_FOR_S = 1.0

T = TypeVar("T")


class ProgressView:
    """Feed it the events of an operation; a context manager that clears the line at its end."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title = title
        self._shown_stage = ""
        self._live: Progress | None = None
        self._state: Operation | None = None
        self._quiet = quiet
        self._noted = 0
        self._loud = False
        # The timer's thread and the caller's both draw.
        self._lock = threading.Lock()
        self._timer = None if quiet else threading.Timer(_QUIET_FOR_S, self._begin)

    @property
    def operation_id(self) -> str:
        """The operation that is shown; empty before its first event."""
        return self._state.id if self._state is not None else ""

    @property
    def title(self) -> str:
        """What it is about; of a machine whose name was made up that name, once it is known."""
        return self._title

    def __enter__(self) -> Self:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._loud = False
            if self._live is not None:
                self._live.stop()

    def event(self, raw: msgspec.Raw) -> None:
        """One state of the operation, as it comes over the wire."""
        with self._lock:
            self._state = msgspec.json.decode(raw, type=Operation)
            if self._state.vm is not None:
                self._title = f"vm {self._state.vm.name}"
            self._tell_notes(self._state.notes)
            self._show()

    def _tell_notes(self, notes: tuple[str, ...]) -> None:
        """Each once, however soon the work ends."""
        for text in notes[self._noted :]:
            if not self._quiet:
                note(f"{self._title}: {printable(text)}")
        self._noted = len(notes)

    def _begin(self) -> None:
        with self._lock:
            self._loud = True
            self._show()

    def _show(self) -> None:
        if not self._loud or self._state is None:
            return
        stage, detail = self._state.stage.replace("_", " "), printable(self._state.detail)
        if sys.stderr.isatty():
            self._draw(stage, detail, self._state.percent)
        elif stage != self._shown_stage:
            note(f"{self._title}: {stage}" + (f": {detail}" if detail else ""))
        self._shown_stage = stage

    def _draw(self, stage: str, detail: str, percent: float) -> None:
        text = f"{self._title}: {stage}" + (f" ({detail})" if detail else "")
        if self._live is None:
            self._live = _make_live(self.below)
            self._live.add_task(text, total=None)
            self._live.start()
        task = self._live.task_ids[0]
        total = None if percent < 0 else 100
        self._live.update(task, description=text, total=total, completed=max(percent, 0))

    def below(self) -> RenderableType | None:
        """What is drawn below the line."""
        return None


def watched_call(
    client: Client,
    method: str,
    params: dict[str, Any],
    result: type[T],
    *,
    title: str,
    quiet: bool = False,
    cancels: bool = True,
    view: ProgressView | None = None,
) -> T:
    """Call a method that tells of its operation, and show that. Ctrl-C takes it back (`cancels`),
    or leaves it to the daemon, and says so."""
    with view or ProgressView(title, quiet=quiet) as view:
        try:
            return client.call(method, params, result, on_event=view.event)
        except KeyboardInterrupt:
            if view.operation_id:
                _interrupt(view, cancels=cancels)
            raise


def _interrupt(view: ProgressView, *, cancels: bool) -> None:
    """What Ctrl-C does to the operation: cancel it and wait for its clean-up, or leave it alone."""
    if not cancels:
        note(f"{view.title}: bangerd goes on with it; see: banger operations list")
        return
    note(f"{view.title}: taking it back")
    with connect() as second:
        ended = second.call("operations.cancel", {"id": view.operation_id}, Operation)
    if ended.state is OperationState.COMPLETED:
        note(f"{view.title}: too late, it is done")


def _make_live(below: Callable[[], RenderableType | None]) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    class Live(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if (more := below()) is not None:
                yield more

    return Live(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
