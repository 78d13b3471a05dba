"""The commands about this host: `banger daemon`, `doctor`, `operations`, `version`."""

from __future__ import annotations

import os
import shutil
import sys
import time

import click
import msgspec

from banger import __version__
from banger.base.errors import PreconditionFailed, Unavailable
from banger.base.model import DaemonStatus, Operation, OperationState
from banger.base.paths import Paths
from banger.base.units import format_age
from banger.cli.app import complete_operation, connect, json_option, note
from banger.cli.checks import CheckLine, print_checks
from banger.cli.figures import print_fitting
from banger.cli.render import print_json, print_table, seconds_since

_STOP_TIMEOUT_S = 60.0


@click.group()
def daemon() -> None:
    """Look at and control bangerd. Machines run on without it."""


@daemon.command()
@json_option
def status(*, as_json: bool) -> int:
    """Whether it runs, and what it serves. Status 1 when it does not run."""
    try:
        client = connect(start=False)
    except Unavailable:
        if as_json:
            print_json({"running": False})
        else:
            click.echo("bangerd is not running")
        return 1
    with client:
        found = client.call("daemon.status", {}, DaemonStatus)
    if as_json:
        print_json({"running": True, **msgspec.structs.asdict(found)})
        return 0
    rows = [(key, str(value)) for key, value in msgspec.structs.asdict(found).items()]
    print_table(("FIELD", "VALUE"), rows)
    return 0


@daemon.command()
def start() -> None:
    """Start it, if it does not run."""
    with connect() as client:
        found = client.call("daemon.status", {}, DaemonStatus)
    click.echo(f"bangerd is running (pid {found.pid})")


@daemon.command()
def stop() -> None:
    """Stop it. Machines run on."""
    if Paths.from_environment().of_system:
        raise PreconditionFailed(
            "bangerd is a unit of the system, which would start it again",
            hint="sudo systemctl stop bangerd",
        )
    click.echo("bangerd stopped" if _stop() else "bangerd was not running")


@daemon.command()
def restart() -> None:
    """Stop it and start it again, as this version. Machines run on."""
    _stop()
    with connect() as client:
        found = client.call("daemon.status", {}, DaemonStatus)
    click.echo(f"bangerd is running (pid {found.pid})")


def _stop() -> bool:
    """Stop the daemon and wait until its process has ended; whether there was one."""
    try:
        client = connect(start=False)
    except Unavailable:
        return False
    with client:
        pid = client.call("daemon.status", {}, DaemonStatus).pid
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # somebody else stops it
            return False
        try:
            client.call("daemon.stop", {}, dict[str, str])
            _wait_exit(pidfd)
            client.daemon_version = ""  # no more news: it does not run
        finally:
            os.close(pidfd)
    return True


def _wait_exit(pidfd: int) -> None:
    import select

    if not select.select([pidfd], [], [], _STOP_TIMEOUT_S)[0]:
        raise Unavailable(
            f"bangerd has not ended within {_STOP_TIMEOUT_S:g} s", hint="see: banger daemon logs"
        )


@daemon.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
def logs(*, follow: bool) -> None:
    """Its log: JSON, one record a line."""
    path = Paths.from_environment().daemon_log
    try:
        with path.open("rb") as file:
            out = sys.stdout.buffer
            while True:
                shutil.copyfileobj(file, out)
                out.flush()
                if not follow:
                    return
                time.sleep(0.2)  # a file tells nobody that it has grown
    except FileNotFoundError:
        note(f"{path} is not there: bangerd has not run yet")


@click.command()
@json_option
def doctor(*, as_json: bool) -> int:
    """Check what banger needs on this machine. Status 1 when anything fails."""
    with connect() as client:
        checks = client.call("doctor.run", {}, list[CheckLine])
    if as_json:
        print_json(checks)
    else:
        print_checks(checks)
    return 1 if any(check.level == "fail" for check in checks) else 0


@click.group()
def operations() -> None:
    """See long work in progress, and stop it."""


@operations.command("list")
@json_option
def list_operations(*, as_json: bool) -> None:
    """Work in progress, and what ended in the last minutes."""
    with connect() as client:
        found = client.call("operations.list", {}, list[Operation])
    if as_json:
        print_json(found)
        return
    print_fitting(
        ("ID", "KIND", "TARGET", "STATE", "STAGE", "AGE"),
        [
            (
                each.id,
                each.kind,
                each.target or (each.vm.name if each.vm else "-"),
                each.state.value,
                each.stage or "-",
                format_age(seconds_since(each.started_at)),
            )
            for each in found
        ],
        ranks=(3, 0, 1, 2, 5, 4),
    )


@operations.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_operation)
@json_option
def cancel(*, ids: tuple[str, ...], as_json: bool) -> None:
    """Stop work in progress, and take back what it has done, for all who wait for it."""
    with connect() as client:
        ended = [client.call("operations.cancel", {"id": each}, Operation) for each in ids]
    if as_json:
        print_json(ended)
        return
    for each in ended:
        if each.state is not OperationState.CANCELLED:
            note(f"{each.id} ({each.kind}) had ended: {each.state.value}")
        else:
            click.echo(each.id)


@click.command()
@json_option
def version(*, as_json: bool) -> None:
    """The version of banger, and of bangerd if it runs."""
    running = ""
    try:
        with connect(start=False) as client:
            running = client.call("daemon.status", {}, DaemonStatus).version
    except Unavailable:
        pass
    if as_json:
        print_json({"banger": __version__, "bangerd": running or None})
    else:
        click.echo(f"banger {__version__}")
        if running:
            click.echo(f"bangerd {running}")
