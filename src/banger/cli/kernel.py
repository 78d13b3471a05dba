"""The commands of `banger kernel`."""

from __future__ import annotations

import click

from banger.base.model import Kernel
from banger.base.units import format_age, format_size
from banger.cli.app import connect, json_option
from banger.cli.render import print_json, print_table, seconds_since


@click.group()
def kernel() -> None:
    """See the kernels that boot images."""


@kernel.command("list")
@json_option
def list_kernels(*, as_json: bool) -> None:
    """The kernels that are there."""
    with connect() as client:
        kernels = client.call("kernel.list", {}, list[Kernel])
    if as_json:
        print_json(kernels)
        return
    print_table(
        ("NAME", "VERSION", "ARCHITECTURE", "SIZE", "AGE"),
        [
            (
                each.name,
                each.version,
                each.architecture,
                format_size(each.size_bytes),
                format_age(seconds_since(each.created_at)),
            )
            for each in kernels
        ],
    )
