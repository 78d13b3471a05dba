"""`banger vm workspace`: a repository into a machine, and what the machine made of it out again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import click
import msgspec

from banger.base.errors import Unavailable, from_wire
from banger.base.model import FileChange, Vm, Workspace
from banger.cli.app import connect, json_option, vm_argument
from banger.cli.lazy import LazyGroup
from banger.cli.machine import quiet_option
from banger.cli.progress import watched_call
from banger.cli.render import print_json
from banger.cli.repository import (
    show_changes,
    show_plan,
    umask,
    workspace_options,
    workspace_request,
)
from banger.cli.transfer import guest_output, receive_stream
from banger.rpc.client import Client

F = TypeVar("F", bound=Callable[..., Any])

_COMMANDS = {
    "prepare": ("banger.cli.workspace:prepare", "Put a git repository into a machine."),
    "export": ("banger.cli.workspace:export", "Bring out what a machine made of it."),
}


@click.command(cls=LazyGroup, table=_COMMANDS)
def workspace() -> None:
    """Give a machine a git repository, and bring its changes back."""


@click.command()
@vm_argument
@click.argument("path", default=".", type=click.Path(exists=True, file_okay=False))
@workspace_options
@click.option("--guest-path", metavar="DIR", help="Where it goes (default: /root/repo).")
@click.option("--read-only", is_flag=True, help="Take write permission away.")
@click.option("--replace", is_flag=True, help="Put it in the place of what is there.")
@quiet_option
@json_option
def prepare(
    *,
    vm_ref: str,
    path: str,
    guest_path: str | None,
    read_only: bool,
    replace: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Put the git repository at PATH into a running machine. Print where it is.

    What goes is HEAD and what was changed since, without history: see --mode.
    """
    request = workspace_request(path, options) | {
        "guest_path": guest_path or "",
        "read_only": read_only,
        "replace": replace,
    }
    with connect() as client:
        if dry_run:
            show_plan(client, request, as_json=as_json)
            return
        params = {"vm": vm_ref, "workspace": request}
        made = watched_call(
            client, "vm.workspace.prepare", params, Workspace, title=f"vm {vm_ref}", quiet=quiet
        )
    if as_json:
        print_json(made)
    else:
        click.echo(made.guest_path)


@click.command()
@vm_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write to a file, whole or not at all; - is stdout (the default).",
)
@click.option("--stat", is_flag=True, help="Only how many lines of which files changed.")
@click.option("--name-only", is_flag=True, help="Only the names of the files that changed.")
@click.option("--apply", "applies", is_flag=True, help="Apply it to the repository it is of.")
@click.option(
    "--to",
    metavar="PATH",
    type=click.Path(exists=True, file_okay=False),
    help="With --apply: another clone of it.",
)
@click.option("--bundle", is_flag=True, help="The machine's commits, as a git bundle.")
@click.option("--since-head", is_flag=True, help="Leave out what was committed in the machine.")
@quiet_option
@json_option
def export(
    *,
    vm_ref: str,
    output: str | None,
    stat: bool,
    name_only: bool,
    applies: bool,
    to: str | None,
    bundle: bool,
    since_head: bool,
    quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Print a patch of what changed in a machine since it was given its repository.

    Committed or not, and new files, but for ignored ones. Nothing changes in the machine.
    """
    chosen = [stat, name_only, applies, bundle]
    if sum(chosen) > 1 or (output is not None and (stat or name_only or applies)):
        raise click.UsageError("choose one of --stat, --name-only, --apply, --bundle and -o")
    if to and not applies:
        raise click.UsageError("--to is for --apply")
    if bundle and since_head:
        raise click.UsageError("a bundle has the machine's commits: no --since-head")
    if as_json and not (stat or name_only or applies):
        raise click.UsageError("--json is for --stat, --name-only and --apply")
    request = {"vm": vm_ref, "since_head": since_head, "bundle": bundle}
    with connect() as client:
        if applies:
            path = os.path.abspath(to) if to else ""  # noqa: PTH100
            params = {"export": request, "path": path, "umask": umask()}
            changes = watched_call(
                client, "vm.workspace.apply", params, list[FileChange],
                title=f"vm {vm_ref}", quiet=quiet,
            )  # fmt: skip
            show_changes(changes, as_json=as_json, names=False)
        elif stat or name_only:
            changes = client.call("vm.workspace.changes", request, list[FileChange])
            show_changes(changes, as_json=as_json, names=name_only)
        else:
            _save(client, request, output or "-")


def _save(client: Client, request: dict[str, Any], output: str) -> None:
    """The patch or the bundle to stdout, or to a file that is there whole or not at all."""
    if output == "-":
        _receive(client, request, guest_output())
        return
    path = Path(output)
    if path.exists() and not path.is_file():
        raise click.UsageError(f"{output} is not a file; - is stdout")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            _receive(client, request, out)
        beside.chmod(0o666 & ~umask())
        beside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


class _Opened(msgspec.Struct):
    vm: Vm


def _receive(client: Client, request: dict[str, Any], out: IO[bytes]) -> None:
    client.call("vm.workspace.export", request, _Opened)
    exit_ = receive_stream(client.session(), out, title=f"from {request['vm']}")
    if exit_.error is not None:
        error = exit_.error
        raise from_wire(error.code, error.message, error.hint, error.op_id)
    if exit_.status != 0:
        raise Unavailable(f"the export failed in the guest (status {exit_.status})")
