"""The options that say what a new machine is like: those of `banger vm run` and `vm create`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from banger.base.model import Egress, InitMode, NetworkMode
from banger.cli.app import ARTIFACT_NAME, SIZE, VM_NAME, complete_image, complete_snapshot
from banger.cli.ports import publish_option

F = TypeVar("F", bound=Callable[..., Any])

vcpu_option = click.option("--vcpu", type=click.IntRange(1, 64), help="Number of vCPUs.")
memory_option = click.option("--memory", type=SIZE, help="Memory, like 2G.")
disk_size_option = click.option(
    "--disk-size", type=SIZE, help="Size of its work disk /root, like 8G."
)
boot_timeout_option = click.option(
    "--boot-timeout",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="How long the guest may take to come up.",
)
cold_option = click.option(
    "--cold", is_flag=True, help="Boot it: use no template, and no memory that was saved."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")

#: What it may reach.
_REACH_OPTIONS = (
    click.option(
        "--egress",
        type=click.Choice([each.value for each in Egress]),
        help="What of the outside it reaches (default: all).",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="CIDR|NAME",
        help="A network or name on its allowlist, like 10.0.0.0/8 or *.example.org.",
    ),
    click.option(
        "--isolated/--no-isolated",
        default=None,
        help="Whether it is kept from other machines, too (default: it is).",
    ),
)

_OPTIONS = (
    click.option("--name", type=VM_NAME, help="Its name (default: one is made up)."),
    click.option(
        "--image",
        type=ARTIFACT_NAME,
        shell_complete=complete_image,
        help="The image it starts from.",
    ),
    click.option(
        "--from-snapshot",
        metavar="SNAP",
        shell_complete=complete_snapshot,
        help="A snapshot it begins as, with its memory unless --cold.",
    ),
    vcpu_option,
    memory_option,
    disk_size_option,
    click.option(
        "--init",
        type=click.Choice([mode.value for mode in InitMode]),
        help="Who is PID 1: banger's own init, or the image's systemd.",
    ),
    click.option(
        "--network",
        type=click.Choice([mode.value for mode in NetworkMode]),
        help="How it reaches the network (default: as configured).",
    ),
    *_REACH_OPTIONS,
    publish_option,
    boot_timeout_option,
    cold_option,
    quiet_option,
)


def machine_options(function: F) -> F:
    """All of them; `machine_request` makes a request of their values."""
    return _with(_OPTIONS, function)


def reach_options(function: F) -> F:
    """Those of what it may reach; `reach_request` makes a request of their values."""
    return _with(_REACH_OPTIONS, function)


def _with(options: Sequence[Callable[[F], F]], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def reach_request(options: dict[str, Any]) -> dict[str, Any]:
    """What was said of it; nothing for what was not."""
    said = {
        "egress": options["egress"],
        "allow": options["allow"] or None,
        "isolated": options["isolated"],
    }
    return {name: value for name, value in said.items() if value is not None}


def machine_request(options: dict[str, Any]) -> dict[str, Any]:
    """A request for `vm.run` and `vm.create.begin`, of the values of `machine_options`."""
    request = {
        "name": options["name"] or "",
        "image": options["image"] or "",
        "from_snapshot": options["from_snapshot"] or "",
        "vcpu_count": options["vcpu"],
        "memory_mib": options["memory"],
        "disk_size_mib": options["disk_size"],
        "init": options["init"],
        "network": options["network"],
        "reach": reach_request(options),
        "published_ports": options["ports"],
        "cold": options["cold"],
    }
    if options["boot_timeout"] is not None:
        request["boot_timeout_s"] = options["boot_timeout"]
    return request
