"""`banger config`: the settings in force."""

from __future__ import annotations

import click

from banger.base.config import effective
from banger.base.paths import Paths
from banger.cli.app import json_option
from banger.cli.render import print_json, print_table


@click.group()
def config() -> None:
    """See the settings. They are in config.toml; see the README."""


@config.command()
@json_option
def show(*, as_json: bool) -> None:
    """Every setting: its value, where that comes from, and what it is for.

    A running bangerd keeps the settings it started with: banger daemon restart.
    """
    settings = effective(Paths.from_environment().config_file)
    if as_json:
        print_json(
            [
                {"key": each.setting.key, "value": each.value, "origin": each.origin}
                for each in settings
            ]
        )
        return
    print_table(
        ("SETTING", "VALUE", "FROM", "WHAT IT IS"),
        [(each.setting.key, each.value, each.origin, each.setting.help) for each in settings],
    )
