"""`banger completion`: the script that a shell evaluates."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(banger completion bash)"     in ~/.bashrc
    zsh:   eval "$(banger completion zsh)"      in ~/.zshrc
    fish:  banger completion fish | source      in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # the choice above has only shells that click knows
    root = ctx.find_root().command
    # The base's source(): that of bash starts a bash first, to ask it for its version.
    click.echo(ShellComplete.source(kind(root, {}, "banger", "_BANGER_COMPLETE")))
