"""`banger image build`: the images banger knows how to make, and those of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from banger.base.units import format_size
from banger.cli.app import ARTIFACT_NAME, complete_image
from banger.cli.machine import disk_size_option, memory_option, quiet_option, vcpu_option
from banger.cli.making import make, tell_image

#: What the daemon takes of all scripts together.
_SCRIPTS_MAX_BYTES = 512 << 10


def _package_names(
    ctx: click.Context,  # noqa: ARG001
    param: click.Parameter,  # noqa: ARG001
    values: tuple[str, ...],
) -> tuple[str, ...]:
    return tuple(word for value in values for word in value.replace(",", " ").split())


def _read_scripts(
    ctx: click.Context,
    param: click.Parameter,
    values: tuple[str, ...],
) -> list[dict[str, Any]]:
    """What the daemon is sent of scripts: it need not be able to read them."""
    scripts = []
    left = _SCRIPTS_MAX_BYTES
    for value in values:
        try:
            with Path(value).open("rb") as file:
                content = file.read(left + 1)
        except OSError as error:
            raise click.BadParameter(f"{value}: {error.strerror}", ctx=ctx, param=param) from error
        left -= len(content)
        if left < 0:
            problem = f"{value} is too large: scripts may have {format_size(_SCRIPTS_MAX_BYTES)}"
            raise click.BadParameter(f"{problem} together", ctx=ctx, param=param)
        scripts.append({"name": Path(value).name, "content": content})
    return scripts


@click.command(short_help="Build an image: one of Debian's, or one's own from another.")
@click.argument("name", metavar="NAME", type=ARTIFACT_NAME)
@click.option(
    "--from",
    "source",
    metavar="IMAGE",
    type=ARTIFACT_NAME,
    shell_complete=complete_image,
    help="Make an image of one's own, which begins as this one.",
)
@click.option(
    "--packages",
    multiple=True,
    metavar="LIST",
    callback=_package_names,
    help="Packages to install in it, like git,jq. More than once is possible.",
)
@click.option(
    "--run",
    "scripts",
    multiple=True,
    type=click.Path(dir_okay=False),
    metavar="SCRIPT",
    callback=_read_scripts,
    help="A script to run in it as root, after the packages. More than once: in this order.",
)
@vcpu_option
@memory_option
@disk_size_option
@click.option("-v", "--verbose", is_flag=True, help="Show what packages and scripts print.")
@quiet_option
def build(
    *,
    name: str,
    source: str | None,
    packages: tuple[str, ...],
    scripts: list[dict[str, Any]],
    vcpu: int | None,
    memory: int | None,
    disk_size: int | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Build debian-bookworm or debian-bookworm-minimal from Debian's packages; with --from any
    image, by what --packages and --run do in a machine that is started for it.

    Interrupted, the build is taken back, unless others wait for it; nothing half-made is left.
    """
    title = f"image {name}"
    if source is None:
        given = {
            "--packages": packages,
            "--run": scripts,
            "--vcpu": vcpu,
            "--memory": memory,
            "--disk-size": disk_size,
            "--verbose": verbose,
        }
        for option, value in given.items():
            if value:
                raise click.UsageError(f"{option} needs an image to begin with: --from IMAGE")
        done = make("image.build.begin", {"image": name}, title=title, quiet=quiet)
    else:
        params = {
            "name": name,
            "source": source,
            "packages": packages,
            "scripts": scripts,
            "vcpu_count": vcpu,
            "memory_mib": memory,
            "disk_size_mib": disk_size,
        }
        done = make("image.make.begin", params, title=title, quiet=quiet, verbose=verbose)
    tell_image(done)
