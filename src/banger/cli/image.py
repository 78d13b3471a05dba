"""The commands of `banger image`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from banger.base.model import Image, ImageConfig
from banger.base.units import format_age, format_size
from banger.base.usage import DiskUse, ShownImage
from banger.cli.app import (
    ARTIFACT_NAME,
    complete_image,
    complete_kernel,
    connect,
    json_option,
)
from banger.cli.image_build import build
from banger.cli.machine import quiet_option
from banger.cli.making import make, tell_image
from banger.cli.render import print_json, print_table, seconds_since
from banger.cli.repository import umask

F = TypeVar("F", bound=Callable[..., Any])

#: References whose second part is a path.
_PATHS = ("oci:", "oci-archive:", "docker-archive:")

image_argument = click.argument(
    "name", metavar="NAME", type=ARTIFACT_NAME, shell_complete=complete_image
)
kernel_option = click.option(
    "--kernel",
    default="",
    metavar="NAME",
    shell_complete=complete_kernel,
    help="The kernel that boots it (default: Debian's).",
)


class Pruned(msgspec.Struct):
    files: int
    size_bytes: int


@click.group()
def image() -> None:
    """Build, pull, import and manage images."""


image.add_command(build)


@image.command()
@click.argument("reference", metavar="REFERENCE")
@click.option("--name", type=ARTIFACT_NAME, help="Its name here (default: from the reference).")
@kernel_option
@click.option(
    "--insecure", is_flag=True, help="Also without TLS, or with a certificate nobody vouches for."
)
@quiet_option
def pull(*, reference: str, name: str | None, kernel: str, insecure: bool, quiet: bool) -> None:
    """Pull an image of containers, and make it one that boots.

    \b
    banger image pull debian:12
    banger image pull registry.example/team/app@sha256:...
    banger image pull oci:DIR[:TAG]               a folder in the OCI layout
    banger image pull oci-archive:FILE[:TAG]      the same in a tar
    banger image pull docker-archive:FILE[:NAME]  what docker save writes
    banger image pull catalog:NAME                a bundle of the catalog (catalog_url); a NAME
                                                  alone is looked for there first

    Credentials are those of skopeo login, or docker login. Layers are kept for further pulls:
    see banger image cache.
    """
    params = {
        "reference": _absolute_reference(reference),
        "name": name or "",
        "kernel": kernel,
        "insecure": insecure,
    }
    tell_image(make("image.pull.begin", params, title=f"image {name or reference}", quiet=quiet))


def _absolute_reference(reference: str) -> str:
    for prefix in _PATHS:
        if reference.startswith(prefix):
            path, colon, rest = reference.removeprefix(prefix).partition(":")
            return f"{prefix}{os.path.abspath(path)}{colon}{rest}"  # noqa: PTH100 - as it is named
    return reference


def _file_options(function: F) -> F:
    for option in (
        quiet_option,
        kernel_option,
        click.option(
            "--name", type=ARTIFACT_NAME, help="The image's name (default: from the file's)."
        ),
        click.argument("file", type=click.Path(exists=True)),
    ):
        function = option(function)
    return function


@image.command("import", short_help="Make an image of a tar archive or an ext4.")
@_file_options
def import_(*, file: str, name: str | None, kernel: str, quiet: bool) -> None:
    """Make an image of FILE: a tar archive, compressed or not, or a raw ext4 file system."""
    _from_file("image.import.begin", file, name, kernel, quiet=quiet)


@image.command(short_help="Use an ext4 as an image where it lies.")
@_file_options
def register(*, file: str, name: str | None, kernel: str, quiet: bool) -> None:
    """Use the raw ext4 file system FILE as an image where it lies.

    It must not be written to as long as it is one. banger image promote copies it.
    """
    _from_file("image.register.begin", file, name, kernel, quiet=quiet)


def _from_file(method: str, file: str, name: str | None, kernel: str, *, quiet: bool) -> None:
    path = os.path.abspath(file)  # noqa: PTH100 - a link stays one
    name = name or _name_of(path)
    params = {"path": path, "name": name, "kernel": kernel}
    tell_image(make(method, params, title=f"image {name}", quiet=quiet))


def _name_of(path: str) -> str:
    """``alpine`` for ``…/alpine.tar.gz``."""
    name = os.path.basename(path).lower()  # noqa: PTH119
    for ending in (".gz", ".xz", ".zst", ".bz2", ".tgz", ".tar", ".ext4", ".img", ".raw"):
        name = name.removesuffix(ending)
    try:
        return str(ARTIFACT_NAME.convert(name, None, None))
    except click.BadParameter:
        raise click.UsageError(
            f'"{name}" cannot be the name of an image: give one with --name'
        ) from None


@image.command()
@image_argument
@quiet_option
def promote(*, name: str, quiet: bool) -> None:
    """Copy the file of a registered image, so that it is banger's own."""
    tell_image(make("image.promote.begin", {"image": name}, title=f"image {name}", quiet=quiet))


@image.command()
@image_argument
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@quiet_option
def export(*, name: str, file: str, quiet: bool) -> None:
    """Write an image to a file for a catalog; print the entry for it."""
    from banger.cli.kernel import catalog_entry

    path = Path(file).absolute()
    params = {"image": name, "file": str(path), "umask": umask()}
    make("image.export.begin", params, title=f"image {name}", quiet=quiet)
    click.echo(catalog_entry("images", name, platform.machine(), path), nl=False)


@image.command("list")
@json_option
def list_images(*, as_json: bool) -> None:
    """The images that are there."""
    with connect() as client:
        images = client.call("image.list", {}, list[Image])
    if as_json:
        print_json(images)
        return
    print_table(
        ("NAME", "ID", "SIZE", "INIT", "SOURCE", "AGE"),
        [
            (
                each.name,
                each.id,
                format_size(each.size_bytes),
                each.init.value,
                each.source,
                format_age(seconds_since(each.created_at)),
            )
            for each in images
        ],
    )


@image.command(short_help="What is known of an image, and what its machines' disks take.")
@image_argument
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Everything recorded of one image, and what the disks of its machines take."""
    with connect() as client:
        found = client.call("image.show", {"image": name}, ShownImage)
    if as_json:
        print_json(found)
        return
    record = msgspec.structs.asdict(found)
    config: ImageConfig = record.pop("config")
    vms: tuple[DiskUse, ...] = record.pop("vms")
    record["packages"] = f"{len(found.packages)} (see --json)" if found.packages else ""
    record["size_bytes"] = f"{found.size_bytes} ({format_size(found.size_bytes)})"
    rows = [(key, str(value)) for key, value in record.items() if value]
    for key, value in msgspec.structs.asdict(config).items():
        values = value if isinstance(value, tuple) else (value,) if value else ()
        rows += [("" if number else key, each) for number, each in enumerate(values)]
    rows += [
        ("" if number else "vms", f"{vm.vm_name} ({format_size(vm.disk_bytes)} of its own)")
        for number, vm in enumerate(vms)
    ]
    print_table(("FIELD", "VALUE"), rows)


@image.command()
@image_argument
def delete(*, name: str) -> None:
    """Delete an image that no machine uses."""
    with connect() as client:
        click.echo(client.call("image.delete", {"image": name}, Image).name)


@image.group()
def cache() -> None:
    """What is kept of pulls, for further ones."""


@cache.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(*, dry_run: bool, as_json: bool) -> None:
    """Remove all layers and downloads that are kept. Images stay."""
    with connect() as client:
        pruned = client.call("image.cache.prune", {"dry_run": dry_run}, Pruned)
    if as_json:
        print_json(pruned)
        return
    would = "would remove" if dry_run else "removed"
    click.echo(f"{would} {pruned.files} files ({format_size(pruned.size_bytes)})")
