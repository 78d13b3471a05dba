"""What an installation on a system is: whose it is, and where its privileged part is met.

`/etc/banger/install.toml` is written once by root and believed by the helper, which is root: so it
is believed only where nobody but root can have written it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from banger.base.errors import NotFound, PreconditionFailed
from banger.base.malformed import MALFORMED

INSTALL_FILE = Path("/etc/banger/install.toml")
HELPER_SOCKET = Path("/run/banger/helper.sock")

_MAX_BYTES = 64 << 10
_HINT = "make it anew, as root: banger system install"


class Installation(msgspec.Struct, frozen=True, kw_only=True):
    """What `INSTALL_FILE` says. Fields that this version does not know are for a later one."""

    #: The user whom the helper serves, by both: an account that has been made anew is another's.
    owner: str
    owner_uid: int
    #: Of the banger that was installed.
    version: str
    #: The interpreter that runs both daemons.
    python: str = ""
    #: Files and directories that the installation made, which go with it.
    created: tuple[str, ...] = ()


def load_installation(path: Path) -> Installation:
    """Read it. Raises NotFound without one, PreconditionFailed for one that is not to be believed:
    it, or its directory, is a link, not root's, or may be written by others."""
    try:
        data = _read_of_root(path)
    except FileNotFoundError:
        raise NotFound(
            f"{path} is not there: banger is not installed on this system",
            hint="install it, as root: banger system install",
        ) from None
    except OSError as error:
        raise PreconditionFailed(f"{path}: {error.strerror}", hint=_HINT) from error
    try:
        found = msgspec.toml.decode(data, type=Installation)
    except MALFORMED as error:
        raise PreconditionFailed(
            f"{path} is not as it was installed: {error}", hint=_HINT
        ) from None
    if found.owner_uid < 0:
        raise PreconditionFailed(f"{path} names no user: uid {found.owner_uid}", hint=_HINT)
    return found


def _read_of_root(path: Path) -> bytes:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        check_of_root(directory, path.parent)
        # Without O_NONBLOCK a FIFO would hold us before we see that it is one.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, dir_fd=directory)
    finally:
        os.close(directory)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise PreconditionFailed(f"{path} is not a regular file", hint=_HINT)
        check_of_root(descriptor, path)
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise PreconditionFailed(f"{path} is longer than any that was installed", hint=_HINT)
    return data


def check_of_root(descriptor: int, path: Path) -> None:
    """Raise PreconditionFailed unless what is open belongs to root, and root alone may write it."""
    status = os.fstat(descriptor)
    if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PreconditionFailed(
            f"{path} could have been written by others than root",
            hint=f"as root: chown root:root {path}; chmod go-w {path}",
        )
