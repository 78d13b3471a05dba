"""`banger system`: banger as units of the system, installed by root for one user."""

from __future__ import annotations

import sys

import click

from banger.cli.app import json_option, note
from banger.cli.render import print_json, print_table


@click.group()
def system() -> None:
    """Have systemd run bangerd, and a helper for what needs root."""


@system.command()
@click.option(
    "--owner", metavar="USER", default="", help="Whose machines it runs (default: who calls sudo)."
)
def install(*, owner: str) -> None:
    """Install both units and start them, as root; or upgrade them to this version.

    Machines run on. It can be repeated.
    """
    import asyncio  # not at the top: other commands start without it

    from banger.system import install as steps

    done = asyncio.run(steps.install(owner, sys.executable))
    click.echo(f"banger {done.version} is installed for {done.owner}")


@system.command()
@json_option
def status(*, as_json: bool) -> int:
    """What is installed, and whether it runs. Status 1 unless all of it does."""
    import asyncio

    from banger.system.status import system_status

    found = asyncio.run(system_status())
    if as_json:
        print_json(found)
    elif not found.installed:
        click.echo("banger is not installed on this system: each user's own daemon serves him")
    else:
        click.echo(f"banger {found.version}, for {found.owner} (uid {found.owner_uid})")
        answers = {True: "answers", False: "does not answer", None: "not yours to ask"}
        said = {"banger-helper.service": answers[found.helper_answers]}
        rows = [
            (
                unit.name,
                unit.active,
                unit.enabled,
                str(unit.pid or "-"),
                unit.status or said.get(unit.name, "-"),
            )
            for unit in found.units
        ]
        print_table(("UNIT", "STATE", "AT BOOT", "PID", "SAYS"), rows)
        if found.version != found.banger:
            note(f"this is banger {found.banger}; to install it: sudo banger system install")
    return 0 if found.well else 1


@system.command()
def restart() -> None:
    """Start both anew, as root. Machines run on."""
    import asyncio

    from banger.system import install as steps

    asyncio.run(steps.restart())
    click.echo("bangerd and its helper have been restarted")


@system.command()
@click.option("-f", "--force", is_flag=True, help="Stop machines that run.")
def uninstall(*, force: bool) -> None:
    """Stop both units and remove them, as root. Machines and images are kept."""
    import asyncio

    from banger.system import install as steps

    done = asyncio.run(steps.uninstall(force=force))
    click.echo(f"banger is not installed any more; what {done.owner} has is where it was:")
    for directory in steps.kept(done):
        click.echo(f"  {directory}")
