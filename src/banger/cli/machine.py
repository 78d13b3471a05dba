"""The options that say what a new machine is like: those of `banger vm run` and `vm create`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from banger.base.model import InitMode, NetworkMode
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
        help="How it reaches the network (default: user).",
    ),
    publish_option,
    boot_timeout_option,
    cold_option,
    quiet_option,
)


def machine_options(function: F) -> F:
    """All of them; `machine_request` makes a request of their values."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


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
        "published_ports": options["ports"],
        "cold": options["cold"],
    }
    if options["boot_timeout"] is not None:
        request["boot_timeout_s"] = options["boot_timeout"]
    return request
