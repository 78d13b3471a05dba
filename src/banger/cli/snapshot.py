"""`banger snapshot`, and the commands that make them: `banger vm snapshot` and `vm fork`."""

from __future__ import annotations

import click
import msgspec

from banger.base.errors import BangerError
from banger.base.model import Snapshot, Vm
from banger.base.units import format_age, format_size
from banger.cli.app import (
    SNAPSHOT_NAME,
    VM_NAME,
    complete_snapshot,
    connect,
    json_option,
    print_error,
    vm_argument,
)
from banger.cli.machine import quiet_option
from banger.cli.progress import watched_call
from banger.cli.render import print_json, print_table, seconds_since


@click.command("snapshot")
@vm_argument
@click.argument("snapshot_name", metavar="SNAP", type=SNAPSHOT_NAME)
@quiet_option
@json_option
def take(*, vm_ref: str, snapshot_name: str, quiet: bool, as_json: bool) -> None:
    """Keep a machine as it is now: disks, and while it runs its memory. Print the name.

    It goes on as it was. Machines are made of it with `banger vm create --from-snapshot`.
    """
    params = {"vm": vm_ref, "name": snapshot_name}
    with connect() as client:
        made = watched_call(
            client, "vm.snapshot", params, Snapshot, title=f"vm {vm_ref}", quiet=quiet
        )
    if as_json:
        print_json(made)
    else:
        click.echo(made.name)


@click.command()
@vm_argument
@click.option(
    "-n", "--count", type=click.IntRange(1, 100), default=1, show_default=True, help="How many."
)
@click.option(
    "--name",
    type=VM_NAME,
    metavar="PREFIX",
    help="They are PREFIX-1, PREFIX-2 (default: NAME-fork).",
)
@quiet_option
@json_option
def fork(*, vm_ref: str, count: int, name: str | None, quiet: bool, as_json: bool) -> None:
    """Copy a running machine: its processes, memory and disks. Print the names, one a line.

    It goes on after a moment's pause. Copies have names, addresses and keys of their own, and no
    published ports. All are made, or none.
    """
    params = {"vm": vm_ref, "count": count, "name": name or ""}
    with connect() as client:
        made = watched_call(client, "vm.fork", params, list[Vm], title=f"vm {vm_ref}", quiet=quiet)
    if as_json:
        print_json(made)
    else:
        click.echo("\n".join(each.name for each in made))


@click.group()
def snapshot() -> None:
    """See and remove snapshots; `banger vm snapshot` makes one."""


@snapshot.command("list")
@json_option
def list_snapshots(*, as_json: bool) -> None:
    """The snapshots that are there."""
    with connect() as client:
        found = client.call("snapshot.list", {}, list[Snapshot])
    if as_json:
        print_json(found)
        return
    print_table(
        ("NAME", "OF", "IMAGE", "MEMORY", "SIZE", "AGE"),
        [
            (
                each.name,
                each.vm_name,
                each.image_name,
                format_size(each.spec.memory_mib << 20) if each.has_memory else "-",
                format_size(each.size_bytes),
                format_age(seconds_since(each.created_at)),
            )
            for each in found
        ],
    )


@snapshot.command()
@click.argument("snapshot_ref", metavar="SNAP", shell_complete=complete_snapshot)
@json_option
def show(*, snapshot_ref: str, as_json: bool) -> None:
    """Everything recorded of one snapshot."""
    with connect() as client:
        found = client.call("snapshot.show", {"snapshot": snapshot_ref}, Snapshot)
    if as_json:
        print_json(found)
        return
    record = msgspec.to_builtins(found)
    record |= record.pop("spec")
    print_table(("FIELD", "VALUE"), [(key, str(value)) for key, value in record.items()])


@snapshot.command()
@click.argument(
    "snapshot_refs",
    metavar="SNAP...",
    nargs=-1,
    required=True,
    shell_complete=complete_snapshot,
)
@json_option
def delete(*, snapshot_refs: tuple[str, ...], as_json: bool) -> int:
    """Delete snapshots. Machines that were made from them run on."""
    status = 0
    gone = []
    with connect() as client:
        for snapshot_ref in snapshot_refs:
            try:
                params = {"snapshot": snapshot_ref}
                gone.append(client.call("snapshot.delete", params, Snapshot))
            except BangerError as error:
                print_error(error)
                status = 1
    if as_json:
        print_json(gone)
    elif gone:
        click.echo("\n".join(each.name for each in gone))
    return status
