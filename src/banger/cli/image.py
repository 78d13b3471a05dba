"""The commands of `banger image`."""

from __future__ import annotations

import click
import msgspec

from banger.base.model import Image
from banger.base.units import format_age, format_size
from banger.cli.app import ARTIFACT_NAME, complete_image, connect, json_option
from banger.cli.making import make
from banger.cli.render import print_json, print_table, seconds_since

image_argument = click.argument(
    "name", metavar="NAME", type=ARTIFACT_NAME, shell_complete=complete_image
)


@click.group()
def image() -> None:
    """Build and manage images."""


@image.command()
@click.argument("name", metavar="NAME", type=ARTIFACT_NAME)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def build(*, name: str, quiet: bool) -> None:
    """Build debian-bookworm or debian-bookworm-minimal from Debian's packages.

    Interrupted, the build is taken back, unless others wait for it; nothing half-made is left.
    """
    done = make("image.build.begin", {"image": name}, title=f"image {name}", quiet=quiet)
    if done.image is not None:
        click.echo(f"{done.image.name} ({format_size(done.image.size_bytes)})")


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
        ("NAME", "ID", "SIZE", "INIT", "AGE"),
        [
            (
                each.name,
                each.id,
                format_size(each.size_bytes),
                each.init.value,
                format_age(seconds_since(each.created_at)),
            )
            for each in images
        ],
    )


@image.command()
@image_argument
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Everything recorded of one image."""
    with connect() as client:
        found = client.call("image.show", {"image": name}, Image)
    if as_json:
        print_json(found)
        return
    record = msgspec.to_builtins(found) | {"packages": f"{len(found.packages)} (see --json)"}
    print_table(("FIELD", "VALUE"), [(key, str(value)) for key, value in record.items()])


@image.command()
@image_argument
def delete(*, name: str) -> None:
    """Delete an image that no machine uses."""
    with connect() as client:
        click.echo(client.call("image.delete", {"image": name}, Image).name)
