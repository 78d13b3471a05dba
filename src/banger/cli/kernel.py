"""The commands of `banger kernel`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from banger.base.model import Kernel, Operation
from banger.base.units import format_age, format_size
from banger.cli.app import ARTIFACT_NAME, complete_kernel, connect, json_option
from banger.cli.making import make
from banger.cli.render import print_json, print_table, seconds_since
from banger.cli.repository import umask

kernel_argument = click.argument(
    "name", metavar="NAME", type=ARTIFACT_NAME, shell_complete=complete_kernel
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


@click.group()
def kernel() -> None:
    """Build, import, pull and manage the kernels that boot images."""


@kernel.command()
@click.argument("name", metavar="NAME", type=ARTIFACT_NAME)
@quiet_option
@json_option
def build(*, name: str, quiet: bool, as_json: bool) -> None:
    """Build `debian`: the kernel of Debian's package for cloud machines.

    Images need it, so it is built with the first of them anyway.
    """
    _print_made(
        make("kernel.build.begin", {"kernel": name}, title=f"kernel {name}", quiet=quiet),
        as_json=as_json,
    )


@kernel.command("import")
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@click.option("--name", required=True, type=ARTIFACT_NAME, help="What to call it.")
@click.option(
    "--modules",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="Its modules: a lib/modules/VERSION directory.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="The configuration it was built with.",
)
@quiet_option
@json_option
def import_kernel(
    *, file: str, name: str, modules: str | None, config: str | None, quiet: bool, as_json: bool
) -> None:
    """Take a kernel of your own: a vmlinux (ELF) or a bzImage.

    It needs virtio (mmio, pci, block, network, console), as modules or built in, and ext4 and PVH
    built in. Without modules, its configuration has to say so, unless it is part of the kernel.
    """
    params = {
        "name": name,
        "file": _absolute(file),
        "modules": _absolute(modules) if modules else "",
        "config": _absolute(config) if config else "",
    }
    _print_made(
        make("kernel.import.begin", params, title=f"kernel {name}", quiet=quiet), as_json=as_json
    )


@kernel.command()
@click.argument("name", metavar="NAME", type=ARTIFACT_NAME)
@quiet_option
@json_option
def pull(*, name: str, quiet: bool, as_json: bool) -> None:
    """Fetch a kernel of the catalog (`catalog_url` in config.toml).

    Interrupted, it goes on from there the next time.
    """
    _print_made(
        make("kernel.pull.begin", {"kernel": name}, title=f"kernel {name}", quiet=quiet),
        as_json=as_json,
    )


@kernel.command()
@kernel_argument
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@quiet_option
def export(*, name: str, file: str, quiet: bool) -> None:
    """Write a kernel to a file for a catalog; print the entry for it."""
    params = {"kernel": name, "file": _absolute(file), "umask": umask()}
    done = make("kernel.export.begin", params, title=f"kernel {name}", quiet=quiet)
    if done.kernel is not None:
        click.echo(catalog_entry("kernels", name, done.kernel.architecture, Path(file)), nl=False)


def catalog_entry(table: str, name: str, architecture: str, file: Path) -> str:
    """What a catalog in TOML says of a bundle that lies beside it."""
    import hashlib
    from urllib.parse import quote

    with file.open("rb") as bundle:
        digest = hashlib.file_digest(bundle, "sha256").hexdigest()
    fields = {
        "name": name,
        "url": quote(os.fsencode(file.name)),
        "sha256": digest,
        "size_bytes": file.stat().st_size,
        "architecture": architecture,
    }
    # A string of JSON is one of TOML.
    lines = [f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in fields.items()]
    return f"[[{table}]]\n{''.join(lines)}"


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
        ("NAME", "VERSION", "ARCHITECTURE", "SIZE", "AGE", "SOURCE"),
        [
            (
                each.name,
                each.version,
                each.architecture,
                format_size(each.size_bytes),
                format_age(seconds_since(each.created_at)),
                each.source,
            )
            for each in kernels
        ],
    )


@kernel.command()
@kernel_argument
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Everything recorded of one kernel."""
    with connect() as client:
        found = client.call("kernel.show", {"kernel": name}, Kernel)
    if as_json:
        print_json(found)
        return
    record = msgspec.to_builtins(found)
    print_table(("FIELD", "VALUE"), [(key, str(value)) for key, value in record.items()])


@kernel.command()
@kernel_argument
def delete(*, name: str) -> None:
    """Delete a kernel that no image, machine or snapshot uses."""
    with connect() as client:
        click.echo(client.call("kernel.delete", {"kernel": name}, Kernel).name)


def _print_made(done: Operation, *, as_json: bool) -> None:
    made = done.kernel
    if made is None:
        return
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made.name} ({made.version}, {format_size(made.size_bytes)})")


def _absolute(path: str) -> str:
    """As the daemon needs it: it has another working directory."""
    return str(Path(path).absolute())
