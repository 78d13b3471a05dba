"""Debian packages into a directory, by mmdebstrap: its arguments, its progress, its failures.

apt inside mmdebstrap verifies every signature; mirrors are its defaults for the suite. It runs in
its root mode, as the root of `userns.contained`: the same for root and for ordinary users.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.base import proc
from banger.base.errors import BangerError, PreconditionFailed, Unavailable
from banger.images.progress import UNKNOWN, Progress
from banger.images.userns import contained

SUITE = "bookworm"
_TIMEOUT_S = 2 * 3600
_TAIL_LINES = 12

_PROXIES = ("http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Bootstrap:
    """What to put into the tree. Variants are mmdebstrap's: ``minbase`` installs, ``extract``
    only unpacks the packages and those they depend on."""

    variant: str
    packages: tuple[str, ...]


def mmdebstrap_argv(what: Bootstrap, tree: Path) -> list[str]:
    """Arguments that make `tree`, telling apt's and dpkg's progress on stderr."""
    return [
        *("mmdebstrap", "--verbose", "--mode=root", f"--variant={what.variant}"),
        *("--format=directory", f"--include={','.join(what.packages)}", SUITE, str(tree)),
    ]


def build_environment(scratch: Path) -> dict[str, str]:
    """The environment of a build: the user's proxies, plain messages, temporary files in
    `scratch`, where they go with it when the build is killed."""
    kept = {name: os.environ[name] for name in _PROXIES if name in os.environ}
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "TMPDIR": str(scratch),
        **kept,
    }


async def bootstrap(what: Bootstrap, tree: Path, scratch: Path, progress: Progress) -> None:
    """Fill the empty directory `tree`; stages ``download``, ``install``.

    When cancelled, no process and no mount is left. Raises Unavailable when packages cannot be
    fetched, PreconditionFailed when the disk is full or the archive's keys are missing.
    """
    try:
        await proc.run(
            contained(mmdebstrap_argv(what, tree)),
            timeout_s=_TIMEOUT_S,
            env=build_environment(scratch),
            on_stderr_line=BootstrapProgress(progress).line,
        )
    except proc.ProcessFailed as error:
        stderr = error.completed.stderr.decode(errors="replace")
        raise bootstrap_failure(stderr, tree) from error


class BootstrapProgress:
    """Reads what mmdebstrap, apt and dpkg print (in English) and says where they stand.

    apt runs twice, for the essential packages and for the others, and each run says first how
    many there are. The share of the whole is therefore known from the second run on.
    """

    _PLANNED = re.compile(r"\d+ upgraded, (\d+) newly installed")
    _FETCHED = re.compile(r"Get:\d+ \S+ \S+ \S+ (\S+) .*\[([\d.]+) ([kM]?)B\]")
    _TO_FETCH = re.compile(r"Need to get ([\d.,]+) ([kMG]?)B")
    _STEP = re.compile(r"(Unpacking|Setting up) ([^\s:]+)")
    _LAST_RUN = "I: installing remaining packages"
    _UNIT = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3}  # noqa: RUF012 - never changed

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._planned = self._unpacked = self._set_up = 0
        self._fetched_bytes = self._to_fetch_bytes = 0.0
        self._last_run = False

    def line(self, text: str) -> None:
        """One line of stderr; those that say nothing about progress are passed over."""
        if match := self._STEP.match(text):
            self._step(match[1], match[2])
        elif match := self._FETCHED.match(text):
            self._fetched_bytes += float(match[2]) * self._UNIT[match[3]]
            if self._to_fetch_bytes:  # package lists come before it is known
                self._download(match[1])
        elif match := self._PLANNED.match(text):
            self._planned += int(match[1])
        elif match := self._TO_FETCH.match(text):
            self._fetched_bytes = 0.0
            self._to_fetch_bytes = float(match[1].replace(",", "")) * self._UNIT[match[2]]
        elif text.startswith("I: running apt-get update"):
            self._progress("download", "package lists", UNKNOWN)
        elif text.startswith("I: extracting archives"):
            self._progress("install", "unpacking", UNKNOWN)
        elif text.startswith(self._LAST_RUN):
            self._last_run = True

    def _download(self, package: str) -> None:
        percent = min(100.0, 100 * self._fetched_bytes / self._to_fetch_bytes)
        done, total = self._fetched_bytes / 1e6, self._to_fetch_bytes / 1e6
        self._progress("download", f"{done:.1f} of {total:.1f} MB ({package})", percent)

    def _step(self, verb: str, package: str) -> None:
        if verb == "Unpacking":
            self._unpacked += 1
        else:
            self._set_up += 1
        steps = self._unpacked + self._set_up
        if self._last_run and self._planned:
            percent = min(100.0, 100 * steps / (2 * self._planned))
            count = f"{self._set_up} of {self._planned} packages"
        else:
            percent, count = UNKNOWN, f"{self._set_up} packages"
        self._progress("install", f"{count} ({package})", percent)


#: What in the output tells which failure it was, tried in order.
_SIGNS: Sequence[tuple[str, type[BangerError], str, str]] = (
    (
        r"No space left on device|You don't have enough free space",
        PreconditionFailed,
        "the disk is full",
        "free some space, or point XDG_DATA_HOME at a larger disk",
    ),
    (
        r"NO_PUBKEY|keyring|is not signed",
        PreconditionFailed,
        "Debian's signatures could not be verified",
        "install or update the keys with: apt-get install debian-archive-keyring",
    ),
    (
        r"is not valid yet|is expired|Release file .* expired",
        PreconditionFailed,
        "the package lists are from another time",
        "check this machine's clock",
    ),
    (
        r"Could not resolve|failure resolving|(Could not|Unable to) connect|Failed to fetch",
        Unavailable,
        "the package mirror cannot be reached",
        "check the network; behind a proxy set http_proxy before the daemon starts",
    ),
)


def bootstrap_failure(stderr: str, tree: Path) -> BangerError:
    """The error for a failed mmdebstrap, with the end of what it said."""
    telling = [line for line in stderr.splitlines() if re.match(r"[EW]: |Err|dpkg: error", line)]
    tail = "\n".join((telling or stderr.strip().splitlines())[-_TAIL_LINES:])
    for pattern, kind, what, hint in _SIGNS:
        if re.search(pattern, stderr):
            return kind(f"cannot install packages into {tree}: {what}\n{tail}", hint=hint)
    return Unavailable(f"cannot install packages into {tree}\n{tail}", hint="try again later")
