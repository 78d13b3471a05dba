"""The commands that hold a session with a guest: `banger vm run`, `exec`, `shell`, `logs`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from banger.base.model import Vm
from banger.base.terminal import printable
from banger.cli.app import AfterDashes, connect, guest_command, note, vm_argument
from banger.cli.machine import machine_options, machine_request
from banger.cli.ports import note_ports
from banger.cli.progress import watched_call
from banger.cli.repository import show_plan, umask, workspace_options, workspace_request
from banger.cli.session import run_session, window_size
from banger.cli.transfer import receive_stream


class VmResult(msgspec.Struct):
    """The result line of the methods that open a session."""

    vm: Vm
    #: Of a detached command that could not be started: as a shell gives it, and why.
    exit_code: int = 0
    message: str = ""
    #: False when there was no command to be started, detached.
    started: bool = True


def check_assignment(ctx: click.Context, param: click.Parameter, values: Any) -> Any:  # noqa: ARG001
    """``K=V``, or ``K`` for this environment's own value."""
    pairs = []
    for value in values:
        name, equals, _ = value.partition("=")
        if not name:
            raise click.BadParameter(f'"{value}" is not K=V')
        if equals:
            pairs.append(value)
        elif name in os.environ:
            pairs.append(f"{name}={os.environ[name]}")
    return tuple(pairs)


env_option = click.option(
    "-e", "--env", multiple=True, callback=check_assignment, metavar="K=V",
    help="Set a variable for the command; K alone passes yours on.",
)  # fmt: skip
user_option = click.option(
    "-u", "--user", default="", metavar="USER[:GROUP]",
    help="User to run as, by names or numbers (default: the image's, or root).",
)  # fmt: skip
stdin_option = click.option(
    "-i", "--interactive", is_flag=True, help="Pass stdin on even when it is a terminal."
)
tty_option = click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")


def _check_repository_path(
    ctx: click.Context,
    param: click.Parameter,  # noqa: ARG001
    value: str | None,
) -> str | None:
    """A directory: a word that is none was meant as a command, it may be."""
    if value is not None and not Path(value).is_dir():
        raise click.UsageError(
            f'unexpected "{value}": it is no directory, and a command comes after --', ctx=ctx
        )
    return value


@click.command(cls=AfterDashes)
@click.argument(
    "path", required=False, type=click.Path(file_okay=False), callback=_check_repository_path
)
@workspace_options
@click.option(
    "--export",
    "patch",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write a patch of what changed in the repository, however the command ends.",
)
@click.option(
    "--fork",
    "forks",
    type=click.IntRange(1, 100),
    metavar="N",
    help="Run the command in N copies of the machine, and keep what came of each.",
)
@machine_options
@click.option("--rm", "remove", is_flag=True, help="Delete it when the command or shell ends.")
@click.option("-d", "--detach", is_flag=True, help="Leave the command running; print the name.")
@click.option(
    "--entrypoint",
    metavar="WORD",
    help="Give the command's words to this program, not to the image's entrypoint; empty: to none.",
)
@user_option
@env_option
@stdin_option
@tty_option
def run(
    *,
    path: str | None,
    patch: str | None,
    forks: int | None,
    mode: str,
    branch: str | None,
    from_ref: str | None,
    include_untracked: bool,
    bootstrap: bool,
    dry_run: bool,
    remove: bool,
    detach: bool,
    quiet: bool,
    entrypoint: str | None,
    user: str,
    env: tuple[str, ...],
    interactive: bool,
    tty: bool,
    **machine: Any,
) -> int:
    """Run a command, or a shell, in a fresh machine; with PATH in a copy of its git repository.

    Without a command and PATH it is the image's own program, if the image names one. The exit
    status is the command's own; 125 when banger itself failed. Without --rm the machine keeps
    running afterwards.
    """
    words = guest_command()
    if words == ():
        raise click.UsageError("there is no command after --")
    if remove and detach:
        raise click.UsageError("--rm and --detach exclude each other")
    if detach and (interactive or tty):
        raise click.UsageError("a detached command has neither stdin nor terminal: no -i, no -t")
    if detach and words is None and entrypoint is None and path is not None and (env or user):
        raise click.UsageError("-e and -u are for a command: give one after --")
    _check_tty(tty)
    repository = _repository(
        path,
        {"mode": mode, "branch": branch, "from_ref": from_ref,
         "include_untracked": include_untracked, "bootstrap": bootstrap},
        dry_run=dry_run, patch=patch, detach=detach,
    )  # fmt: skip
    if dry_run:
        assert repository is not None  # or --dry-run was refused
        with connect() as client:
            show_plan(client, repository)
        return 0
    create = machine_request(machine) | {"ephemeral": remove}
    if forks is not None:
        if words is None:
            raise click.UsageError("--fork runs a command: give it after --")
        return _run_forks(
            forks,
            create,
            {"command": _command(words, env, tty=False, user=user), "entrypoint": entrypoint},
            repository,
            refused=(detach, interactive, tty, patch),
            quiet=quiet,
        )
    if words is None and not detach:
        tty = tty or (sys.stdin.isatty() and sys.stdout.isatty())
    params = {
        "create": create,
        "command": _command(words or (), env, tty=tty, detach=detach, user=user),
        "entrypoint": entrypoint,
        "workspace": repository,
        # Not resolved: a link to a file is replaced itself.
        "export": "" if patch is None else os.path.abspath(patch),  # noqa: PTH100
        "umask": umask(),
    }
    stdin = words is None or interactive or tty or not sys.stdin.isatty()
    return _run_machine(params, stdin=stdin, quiet=quiet)


def _run_machine(params: dict[str, Any], *, stdin: bool, quiet: bool) -> int:
    """`run` of one machine: made, and its command attached to, or left running."""
    command = params["command"]
    with connect() as client:
        result = watched_call(client, "vm.run", params, VmResult, title="vm", quiet=quiet)
        made = result.vm
        if not quiet:
            note_ports(made)
        if command["detach"]:
            click.echo(made.name)
            status = result.exit_code
            if result.message:
                note(f"error: {printable(result.message)}")
            if not result.started and (command["env"] or command["user"]):
                note("warning: nothing was started: there is no command, and the image names none")
        else:
            status = run_session(client.session(), terminal=command["tty"], stdin=stdin)
    if not params["create"]["ephemeral"] and not quiet:
        note(
            f"vm {made.name} keeps running; a shell in it: banger vm shell {made.name};"
            f" stop it: banger vm stop {made.name};"
            f" end it for good: banger vm delete --force {made.name}"
        )
    return status


def _run_forks(
    count: int,
    create: dict[str, Any],
    program: dict[str, Any],
    repository: dict[str, Any] | None,
    *,
    refused: tuple[object, ...],
    quiet: bool,
) -> int:
    """`run --fork`: all at once, and waited for."""
    if any(refused):
        raise click.UsageError(
            "forks have no terminal and no stdin, and are waited for: no -d, -i, -t, and no"
            " --export, for each has its patch in the results"
        )
    from banger.cli.results import run_forks  # draws, and is for this alone

    params = {
        **program,
        "create": {**create, "ephemeral": False},
        "count": count,
        "workspace": repository,
        "remove": create["ephemeral"],
    }
    return run_forks(params, quiet=quiet)


def _repository(
    path: str | None,
    options: dict[str, Any],
    *,
    dry_run: bool,
    patch: str | None,
    detach: bool,
) -> dict[str, Any] | None:
    """The request for the repository, if there is one; UsageError for what needs one, without."""
    if path is not None:
        if patch is not None and detach:
            raise click.UsageError(
                "the changes of a detached command come later: banger vm workspace export"
            )
        return workspace_request(path, options)
    given = {
        "--branch": options["branch"],
        "--from": options["from_ref"],
        "--include-untracked": options["include_untracked"],
        "--bootstrap": options["bootstrap"],
        "--dry-run": dry_run,
        "--export": patch,
    }
    for name, value in given.items():
        if value:
            raise click.UsageError(f"{name} is of a repository: give its PATH")
    return None


def _command(
    argv: tuple[str, ...], env: tuple[str, ...], *, tty: bool, detach: bool = False,
    cwd: str = "", user: str = "",
) -> dict[str, Any]:  # fmt: skip
    rows, columns = window_size()
    if tty and "TERM" in os.environ and not any(each.startswith("TERM=") for each in env):
        env = (*env, f"TERM={os.environ['TERM']}")
    return {
        "argv": argv,
        "env": env,
        "cwd": cwd,
        "user": user,
        "tty": tty,
        "rows": rows,
        "columns": columns,
        "detach": detach,
    }


def _check_tty(tty: bool) -> None:
    if tty and not sys.stdin.isatty():
        raise click.UsageError("-t needs a terminal on stdin")


@click.command("exec", cls=AfterDashes, needs_command=True)
@vm_argument
@click.option(
    "-w",
    "--workdir",
    default="",
    metavar="DIR",
    help="Directory to run in (default: the image's, or the user's home).",
)
@user_option
@env_option
@stdin_option
@tty_option
def exec_(
    *, vm_ref: str, workdir: str, user: str, env: tuple[str, ...], interactive: bool, tty: bool
) -> int:
    """Run a command in a running machine, with its exit status."""
    words = guest_command()
    if not words:
        raise click.UsageError("give the command after --")
    _check_tty(tty)
    command = _command(words, env, tty=tty, cwd=workdir, user=user)
    with connect() as client:
        client.call("vm.exec", {"vm": vm_ref, "command": command}, VmResult)
        stdin = interactive or tty or not sys.stdin.isatty()
        return run_session(client.session(), terminal=tty, stdin=stdin)


@click.command()
@vm_argument
@user_option
@env_option
def shell(*, vm_ref: str, user: str, env: tuple[str, ...]) -> int:
    """A login shell in a running machine: needs no network and no sshd."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    with connect() as client:
        command = _command((), env, tty=tty, user=user)
        client.call("vm.exec", {"vm": vm_ref, "command": command}, VmResult)
        return run_session(client.session(), terminal=tty, stdin=True)


@click.command()
@vm_argument
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
def logs(*, vm_ref: str, follow: bool) -> int:
    """The machine's serial console."""
    with connect() as client:
        client.call("vm.console", {"vm": vm_ref, "follow": follow}, dict[str, str])
        exit_ = receive_stream(client.session(), sys.stdout.buffer, title=f"console of {vm_ref}")
    return exit_.status
