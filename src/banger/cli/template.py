"""The commands of `banger template`: the saved machines that new ones start from."""

from __future__ import annotations

import click
import msgspec

from banger.base.errors import BangerError
from banger.base.model import Template
from banger.base.units import format_age, format_size
from banger.cli.app import complete_template, connect, json_option, note, print_error
from banger.cli.render import print_json, print_table, seconds_since


@click.group()
def template() -> None:
    """See and remove the templates that machines start from.

    They make themselves, on the first start of each kind of machine.
    """


@template.command("list")
@json_option
def list_templates(*, as_json: bool) -> None:
    """The templates that are there, the one that was used last first."""
    with connect() as client:
        templates = client.call("template.list", {}, list[Template])
    if as_json:
        print_json(templates)
    else:
        _print(templates)


@template.command()
@click.argument("template_ref", metavar="ID", shell_complete=complete_template)
@json_option
def show(*, template_ref: str, as_json: bool) -> None:
    """Everything recorded of one template."""
    with connect() as client:
        found = client.call("template.show", {"template": template_ref}, Template)
    if as_json:
        print_json(found)
        return
    record = msgspec.to_builtins(found)
    print_table(("FIELD", "VALUE"), [(key, str(value)) for key, value in record.items()])


@template.command()
@click.argument(
    "template_refs",
    metavar="ID...",
    nargs=-1,
    required=True,
    shell_complete=complete_template,
)
def delete(*, template_refs: tuple[str, ...]) -> int:
    """Delete templates. Machines that were started from them run on."""
    status = 0
    with connect() as client:
        for template_ref in template_refs:
            try:
                params = {"template": template_ref}
                click.echo(client.call("template.delete", params, Template).id)
            except BangerError as error:
                print_error(error)
                status = 1
    return status


@template.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that would be used.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be deleted.")
@json_option
def prune(*, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Delete templates that no start would use: their image, kernel, agent or QEMU has changed."""
    params = {"everything": everything, "dry_run": dry_run}
    with connect() as client:
        gone = client.call("template.prune", params, list[Template])
    if as_json:
        print_json(gone)
    elif gone:
        _print(gone)
    templates = f"{len(gone)} template{'' if len(gone) == 1 else 's'}"
    total = format_size(sum(each.size_bytes for each in gone))
    note(f"{templates} {'would go' if dry_run else 'deleted'}, {total} of disk")


def _print(templates: list[Template]) -> None:
    print_table(
        ("ID", "IMAGE", "VCPU", "MEMORY", "INIT", "NETWORK", "SIZE", "USED"),
        [
            (
                each.id,
                each.image_name,
                str(each.vcpu_count),
                format_size(each.memory_mib << 20),
                each.init.value,
                each.network.value,
                format_size(each.size_bytes),
                f"{format_age(seconds_since(each.used_at))} ago",
            )
            for each in templates
        ],
    )
