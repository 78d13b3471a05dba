"""What the commands share: connecting, talking to the user, types of options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import click

from banger import __version__
from banger.base.errors import BadRequest, BangerError
from banger.base.model import check_artifact_name, check_vm_name
from banger.base.paths import Paths
from banger.base.terminal import printable
from banger.base.units import parse_size_mib
from banger.rpc.client import Client

#: Exit status of `vm run`, `vm exec` and `vm shell` when banger itself failed.
OUR_FAILURE = 125

F = TypeVar("F", bound=Callable[..., Any])


_connections: list[Client] = []


def connect(*, start: bool = True) -> Client:
    """A connection to the daemon, which is started if need be."""
    client = Client.connect(Paths.from_environment(), start=start)
    _connections.append(client)
    return client


def note(text: str) -> None:
    """Tell the user something beside the output: on stderr, if there is somebody to hear it."""
    with suppress(OSError):  # a terminal that was hung up
        click.echo(text, err=True)


def print_error(error: BangerError) -> None:
    """``error: … (op-…)``, and what to do about it. Parts of it may come from a guest."""
    op_id = f" ({error.op_id})" if error.op_id else ""
    title = click.style("error:", fg="red") if colour() else "error:"
    note(f"{title} {_printable_lines(error.message)}{printable(op_id)}")
    if error.hint:
        note(f"hint: {_printable_lines(error.hint)}")


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def warn_of_other_version() -> None:
    """At the end of a command: say so when the daemon it spoke to is not of this version."""
    others = {client.daemon_version for client in _connections} - {"", __version__}
    for version in sorted(others):
        note(
            f"warning: bangerd {version} is running, this is banger {__version__}; to use this"
            " version (VMs run on): banger daemon restart"
        )


def colour() -> bool:
    """Whether stderr takes colour: a terminal, and NO_COLOR is not set."""
    return not os.environ.get("NO_COLOR") and sys.stderr.isatty()


class Checked(click.ParamType[Any]):
    """An option whose text one of our functions checks or converts."""

    def __init__(self, name: str, convert: Callable[[str], Any]) -> None:
        self.name = name
        self._convert = convert

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._convert(value)
        except BangerError as error:
            self.fail(f"{error.message}" + (f" ({error.hint})" if error.hint else ""), param, ctx)


SIZE = Checked("size", parse_size_mib)
VM_NAME = Checked("name", check_vm_name)
SNAPSHOT_NAME = Checked("name", check_vm_name)
ARTIFACT_NAME = Checked("name", check_artifact_name)


def _complete(
    method: str, field: str = "name"
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Names, or another field, from the daemon; nothing, silently, when it does not run."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
        with suppress(BangerError, OSError), connect(start=False) as client:
            found = client.call(method, {}, list[dict[str, Any]])
            names = [str(each[field]) for each in found]
            return [name for name in names if name.startswith(incomplete)]
        return []

    return complete


complete_vm = _complete("vm.list")
complete_image = _complete("image.list")
complete_kernel = _complete("kernel.list")
complete_template = _complete("template.list", "id")
complete_snapshot = _complete("snapshot.list")
complete_results = _complete("results.list")
complete_operation = _complete("operations.list", "id")


vm_argument = click.argument("vm_ref", metavar="NAME", shell_complete=complete_vm)


def _no_empty_reference(ctx: click.Context, param: click.Parameter, value: Any) -> Any:  # noqa: ARG001
    if value == "":  # an unset variable of a script: it did not mean all of them
        raise BadRequest("vm id or name is required")
    return value or ""


#: For commands that are about all machines where none is named: then it is empty.
optional_vm_argument = click.argument(
    "vm_ref",
    metavar="[NAME]",
    required=False,
    callback=_no_empty_reference,
    shell_complete=complete_vm,
)


class AfterDashes(click.Command):
    """A command whose words after ``--`` are a guest's command, kept apart from its own."""

    def __init__(self, *args: Any, needs_command: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._needs_command = needs_command
        self.allow_extra_args = True  # to say more of them than click does

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            cut = args.index("--")
            ctx.meta["guest_command"] = tuple(args[cut + 1 :])
            args = args[:cut]
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            raise click.UsageError(f'unexpected "{rest[0]}": a command comes after --', ctx=ctx)
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        command = "-- CMD..." if self._needs_command else "[-- CMD...]"
        return [*super().collect_usage_pieces(ctx), command]


def guest_command() -> tuple[str, ...] | None:
    """What followed ``--``; None when there was no ``--``."""
    command: tuple[str, ...] | None = click.get_current_context().meta.get("guest_command")
    return command


def json_option(function: F) -> F:
    """``--json`` for a command that lists or shows."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
