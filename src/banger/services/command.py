"""What an image says of its programs, put under what was asked for: pure functions of both.

As container engines have it: https://github.com/opencontainers/image-spec/blob/main/config.md
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace

from banger.base.model import ImageConfig
from banger.guest.requests import Exec


def program(
    config: ImageConfig, words: Sequence[str], entrypoint: str | None = None
) -> tuple[str, ...]:
    """What `vm run` runs for these words (none: for none); empty for a login shell.

    ``entrypoint`` is in place of the image's; empty it drops it. Words that were meant for the
    image's are not given to another.
    """
    if entrypoint is None:
        return (*config.entrypoint, *(words or config.cmd))
    return (entrypoint, *words) if entrypoint else tuple(words)


def in_image(config: ImageConfig, request: Exec) -> Exec:
    """The request with the image's environment, user and working directory where it has none.

    The image's user is one that runs programs, and may have no shell: who wants one gets /bin/sh.
    """
    directory, make = request.directory, request.make_directory
    if directory is None and config.working_dir:
        directory, make = posixpath.join("/", config.working_dir), True
    return replace(
        request,
        environment={**environment(config), **(request.environment or {})},
        user=request.user or config.user or None,
        directory=directory,
        make_directory=make,
        any_login=request.login and not request.user and bool(config.user),
    )


def environment(config: ImageConfig) -> dict[str, str]:
    """The image's, without entries that are no ``K=V`` or have a NUL: whoever made it may have put
    anything there."""
    pairs = (entry.partition("=") for entry in config.env if "\0" not in entry)
    return {name: value for name, equals, value in pairs if name and equals}
