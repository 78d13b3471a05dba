"""banger: the command line's entry, and the table of its commands.

Each group of commands is a module that is imported when one of them is called: what a call does
not need, it does not pay for.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from banger.base.errors import BangerError, Unavailable
from banger.cli.app import OUR_FAILURE, print_error, warn_of_other_version

#: name -> (module:attribute, one line of help)
_COMMANDS = {
    "vm": ("banger.cli.vm:vm", "Create, use and end virtual machines."),
    "run": ("banger.cli.vm:run", "Short for `banger vm run`."),
    "ps": ("banger.cli.vm:list_vms", "Short for `banger vm list`."),
    "image": ("banger.cli.image:image", "Build and manage images."),
    "kernel": ("banger.cli.image:kernel", "See the kernels that boot images."),
    "operations": ("banger.cli.host:operations", "See long work in progress."),
    "daemon": ("banger.cli.host:daemon", "Look at and control bangerd."),
    "doctor": ("banger.cli.host:doctor", "Check what banger needs on this machine."),
    "version": ("banger.cli.host:version", "Print the version."),
    "completion": ("banger.cli.complete:completion", "Print the completion script of a shell."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The help of the table: listing commands imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """One-command development sandboxes on microVMs.

    \b
    banger run -- CMD          run one command in a fresh machine
    banger run                 a shell in a fresh machine
    banger ps                  the machines that are there
    """


def main() -> None:
    """Run the command line; the exit status says how it went."""
    status = _main(sys.argv[1:])
    warn_of_other_version()
    sys.exit(status)


def _main(arguments: list[str]) -> Any:
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
    except BrokenPipeError:
        # The reader of our stdout has gone: end quietly, as if killed by SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        subject = f"{error.filename}: " if error.filename else ""
        print_error(Unavailable(f"{subject}{error.strerror or error}"))
    return OUR_FAILURE if _runs_guest_command(arguments) else 1


def _runs_guest_command(arguments: list[str]) -> bool:
    """Whether the status of this call is a guest command's, so that ours must be told apart."""
    words = [word for word in arguments if not word.startswith("-")][:2]
    return words[:1] == ["run"] or words in (["vm", "run"], ["vm", "exec"], ["vm", "shell"])


if __name__ == "__main__":
    main()
