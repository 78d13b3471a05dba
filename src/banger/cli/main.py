"""banger: the command line's entry, and the table of its commands.

Commands live in modules that are imported when one of theirs is called: see `lazy`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from banger.base.errors import BangerError, Unavailable
from banger.cli.app import OUR_FAILURE, print_error, warn_of_other_version
from banger.cli.lazy import LazyGroup

#: name -> (module:attribute, one line of help)
_COMMANDS = {
    "vm": ("banger.cli.vm:vm", "Create, use and end virtual machines."),
    "run": ("banger.cli.run:run", "Short for `banger vm run`."),
    "ps": ("banger.cli.vm:list_vms", "Short for `banger vm list`."),
    "image": ("banger.cli.image:image", "Build and manage images."),
    "kernel": ("banger.cli.kernel:kernel", "Build and manage the kernels that boot images."),
    "snapshot": ("banger.cli.snapshot:snapshot", "See and remove snapshots of machines."),
    "template": ("banger.cli.template:template", "See and remove what machines start from."),
    "operations": ("banger.cli.host:operations", "See long work in progress, and stop it."),
    "daemon": ("banger.cli.host:daemon", "Look at and control bangerd."),
    "doctor": ("banger.cli.host:doctor", "Check what banger needs on this machine."),
    "system": ("banger.cli.system:system", "Have systemd run banger: install, status, ..."),
    "config": ("banger.cli.config:config", "See the settings."),
    "version": ("banger.cli.host:version", "Print the version."),
    "ssh-config": ("banger.cli.ssh:ssh_config", "Let `ssh NAME.vm` lead into machines."),
    "completion": ("banger.cli.complete:completion", "Print the completion script of a shell."),
}


class ReaderGone(Exception):
    """Whoever read our stdout has gone."""


class Top(LazyGroup):
    """The whole command line. click gives a broken pipe status 1, like any failure: we do not."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGone from None


@click.command(cls=Top, table=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """One-command development sandboxes on microVMs.

    \b
    banger run -- CMD          run one command in a fresh machine
    banger run                 a shell in a fresh machine
    banger ps                  the machines that are there
    """


def run(arguments: list[str]) -> int:
    """Run the command line; its exit status."""
    status = _run(arguments)
    warn_of_other_version()
    return status if isinstance(status, int) else 0


def _run(arguments: list[str]) -> Any:
    try:
        return cli.main(arguments, prog_name="banger", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:  # usage: 2
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BangerError as error:
        print_error(error)
    except ReaderGone:
        # End quietly, as if killed by SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        subject = f"{error.filename}: " if error.filename else ""
        print_error(Unavailable(f"{subject}{error.strerror or error}"))
    return OUR_FAILURE if _runs_guest_command(arguments) else 1


def _runs_guest_command(arguments: list[str]) -> bool:
    """Whether the status of this call is a guest command's, so that ours must be told apart."""
    words = [word for word in arguments if not word.startswith("-")][:2]
    if words[:1] == ["vm"]:
        return words[1:] in (["run"], ["exec"], ["shell"], ["ssh"])
    return words[:1] == ["run"]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
