"""The options that say which git repository a machine is given: of `banger vm run PATH` and
`vm workspace prepare`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from banger.base.model import FileChange, Plan, WorkspaceMode
from banger.base.terminal import printable
from banger.base.units import format_size
from banger.cli.app import note
from banger.cli.render import print_json
from banger.rpc.client import Client

#: The widest bar of a summary.
_BAR_MAX = 40

F = TypeVar("F", bound=Callable[..., Any])


_WORKSPACE_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice([mode.value for mode in WorkspaceMode]),
        default=WorkspaceMode.SHALLOW_OVERLAY.value,
        show_default=True,
        help="HEAD and the working tree; all of the repository; or its history at HEAD.",
    ),
    click.option("--branch", metavar="NAME", help="Make a branch in the machine's copy."),
    click.option("--from", "from_ref", metavar="REF", help="Where it begins (default: HEAD)."),
    click.option("--include-untracked", is_flag=True, help="Ship files that git does not track."),
    click.option(
        "--bootstrap",
        is_flag=True,
        help="Install what the repository asks for: .mise.toml, .tool-versions, devcontainer.json.",
    ),
    click.option("--dry-run", is_flag=True, help="List what would be shipped, and do nothing."),
)


def workspace_options(function: F) -> F:
    """What can be said of a repository; `workspace_request` makes a request of the values."""
    for option in reversed(_WORKSPACE_OPTIONS):
        function = option(function)
    return function


def workspace_request(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """A request for `vm.workspace.prepare` and `vm.run`, of the values of `workspace_options`."""
    if options["from_ref"] and not options["branch"]:
        raise click.UsageError("--from names where a branch begins: give it a name with --branch")
    full = os.path.abspath(path)  # noqa: PTH100 - not resolved: a link is named as it is
    try:
        full.encode()
    except UnicodeEncodeError:
        # JSON has no such names. A directory that is open has one that it has.
        full = f"/proc/{os.getpid()}/fd/{os.open(full, os.O_PATH | os.O_DIRECTORY)}"
    return {
        "path": full,
        "mode": options["mode"],
        "branch": options["branch"] or "",
        "from_ref": options["from_ref"] or "",
        "include_untracked": options["include_untracked"],
        "bootstrap": options["bootstrap"],
    }


def umask() -> int:
    """Ours, for what the daemon writes in our name."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def show_plan(client: Client, request: dict[str, Any], *, as_json: bool = False) -> None:
    """Print what would be shipped: the files on stdout, the sums on stderr."""
    plan = client.call("vm.workspace.plan", {"workspace": request}, Plan)
    if as_json:
        print_json(plan)
        return
    for file in plan.files:
        click.echo(printable(file.path))
    note(
        f"{len(plan.files)} files and the repository {printable(plan.repo_root)},"
        f" {format_size(plan.size_bytes)}, would go to {plan.guest_path}"
    )


def show_changes(changes: list[FileChange], *, as_json: bool, names: bool = False) -> None:
    """How many lines of which files changed, as `git diff --stat` has it; or just their names."""
    if as_json:
        print_json(changes)
        return
    if names:
        for change in changes:
            click.echo(printable(change.path))
        return
    if not changes:
        note("nothing changed")
        return
    width = max(len(printable(change.path)) for change in changes)
    most = max((change.insertions or 0) + (change.deletions or 0) for change in changes)
    for change in changes:
        click.echo(f" {printable(change.path):<{width}} | {_bar(change, most)}")
    insertions = sum(change.insertions or 0 for change in changes)
    deletions = sum(change.deletions or 0 for change in changes)
    files = f"{len(changes)} file{'s' if len(changes) != 1 else ''}"
    click.echo(f" {files} changed, {insertions} lines added, {deletions} removed")


def _bar(change: FileChange, most: int) -> str:
    """As `git diff --stat` draws it."""
    if change.insertions is None or change.deletions is None:
        return "Bin"
    lines = change.insertions + change.deletions
    scale = min(1.0, _BAR_MAX / max(most, 1))
    plus = -(-int(change.insertions * scale * 1000) // 1000)
    minus = -(-int(change.deletions * scale * 1000) // 1000)
    return f"{lines} {'+' * plus}{'-' * minus}".rstrip()
