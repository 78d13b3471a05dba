"""`banger vm run --fork`: one command in several copies of a machine; and `banger vm results`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from banger.base.errors import NotFound
from banger.base.model import FileChange, ForkResult, ForkState, Operation, Results
from banger.base.terminal import printable
from banger.base.units import format_age
from banger.cli.app import complete_results, connect, json_option, note
from banger.cli.machine import quiet_option
from banger.cli.progress import ProgressView, watched_call
from banger.cli.render import print_json, print_table, seconds_since
from banger.cli.repository import show_changes, umask
from banger.cli.transfer import guest_output

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("FORK", "STATUS", "TIME", "FILES", "LINES", "MACHINE")


class ForksView(ProgressView):
    """Until the forks run, progress as of anything; then a table of them on a terminal, and
    elsewhere a line for each that ends."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        super().__init__(title, quiet=quiet)
        self._ended: set[int] = set()
        self.results: Results | None = None

    def event(self, raw: msgspec.Raw) -> None:
        state = msgspec.json.decode(raw, type=Operation)
        self.results = state.results
        if state.results is not None and not sys.stderr.isatty() and not self._quiet:
            for fork in state.results.forks:
                if fork.state is not ForkState.RUNNING and fork.number not in self._ended:
                    self._ended.add(fork.number)
                    note(printable(f"fork {fork.number}: {_status(fork)}, {fork.seconds:.1f} s"))
        super().event(raw)

    def below(self) -> Table | None:
        """The table below the live line, once the forks run."""
        if self._state is None or self._state.results is None:
            return None
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in _COLUMNS:
            table.add_column(column)
        for fork in self._state.results.forks:
            table.add_row(*(Text(printable(cell)) for cell in _row(fork)))
        return table


def run_forks(params: dict[str, Any], *, quiet: bool) -> int:
    """Run a command in forks and show what became of it; 0 when all had status 0, else 1."""
    with connect() as client:
        view = ForksView("vm", quiet=quiet)
        try:
            results = watched_call(client, "vm.run_forks", params, Results, title="vm", view=view)
        except KeyboardInterrupt:
            if view.results is not None:
                note(f"what there is of it: banger vm results {view.results.name}")
            raise
    _show(results)
    note(f"compare, apply or delete them: banger vm results {results.name}")
    return 0 if all(fork.exit_code == 0 for fork in results.forks) else 1


@click.command("results")
@click.argument("name", required=False, shell_complete=complete_results)
@click.option("--log", "log", type=click.IntRange(0), metavar="N", help="What fork N printed.")
@click.option("--diff", "diff", type=click.IntRange(0), metavar="N", help="The patch of fork N.")
@click.option(
    "--apply",
    "apply",
    type=click.IntRange(0),
    metavar="N",
    help="Apply the patch of fork N to the repository that it is of.",
)
@click.option(
    "--to",
    metavar="PATH",
    type=click.Path(exists=True, file_okay=False),
    help="With --apply: another clone of it.",
)
@click.option(
    "--delete", is_flag=True, help="Delete them, and their machines, for good (after --apply)."
)
@quiet_option
@json_option
def results(
    *,
    name: str | None,
    log: int | None,
    diff: int | None,
    apply: int | None,
    to: str | None,
    delete: bool,
    quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """What commands in several forks came to: see `banger vm run --fork`."""
    chosen = [each for each in (log, diff, apply) if each is not None]
    if len(chosen) > 1:
        raise click.UsageError("choose one of --log, --diff and --apply")
    if name is None and (chosen or delete):
        raise click.UsageError("name the results: banger vm results lists them")
    if to is not None and apply is None:
        raise click.UsageError("--to is for --apply")
    with connect() as client:
        if name is None:
            _list(client.call("results.list", {}, list[Results]), as_json=as_json)
            return
        found = client.call("results.show", {"results": name}, Results)
        if log is not None:
            _print_file(found, f"{log}.log")
        elif diff is not None:
            _print_file(found, f"{diff}.patch")
        elif apply is not None:
            path = str(Path(to).absolute()) if to else ""
            params = {"results": found.name, "fork": apply, "path": path, "umask": umask()}
            changes = watched_call(
                client, "results.apply", params, list[FileChange], title=found.name, quiet=quiet
            )
            show_changes(changes, as_json=as_json)
        elif as_json:
            print_json(found)
        elif not delete:
            _show(found)
        if delete:
            watched_call(
                client, "results.delete", {"results": name}, Any,
                title=found.name, quiet=quiet, cancels=False,
            )  # fmt: skip


def _list(found: list[Results], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (
            each.name,
            str(len(each.forks)),
            str(sum(fork.exit_code == 0 for fork in each.forks)),
            format_age(seconds_since(each.created_at)),
            printable(" ".join(each.command)),
        )
        for each in found
    ]
    print_table(("NAME", "FORKS", "STATUS 0", "AGE", "COMMAND"), rows)


def _show(found: Results) -> None:
    print_table(_COLUMNS, [_row(fork) for fork in found.forks])


def _row(fork: ForkResult) -> tuple[str, ...]:
    changed = fork.files is not None
    return (
        str(fork.number),
        _status(fork),
        f"{fork.seconds:.1f} s" if fork.state is not ForkState.RUNNING else "",
        str(fork.files) if changed else "",
        f"+{fork.insertions} -{fork.deletions}" if changed else "",
        fork.vm_name,
    )


def _status(fork: ForkResult) -> str:
    if fork.state is ForkState.RUNNING:
        return "running"
    status = "failed" if fork.exit_code is None else str(fork.exit_code)
    return f"{status}: {fork.error}" if fork.error else status


def _print_file(found: Results, name: str) -> None:
    """A file of the results, as it is."""
    path = Path(found.directory) / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f'the results "{found.name}" have no {name}') from None
    guest_output().write(data)
