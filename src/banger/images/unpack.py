"""Archives that nobody vouches for, unpacked into a tree: tar files, and the layers of images.

The work is done by a process of its own (`unpacker`) in namespaces (`userns`), with the tree as its
root directory. Rootless or not, what comes of it is the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.images.bootstrap import build_environment
from banger.images.userns import contained

_TIMEOUT_S = 4 * 3600
_FULL_HINT = "free some space, or point XDG_DATA_HOME at a larger disk"

#: Called with the number of the layer and how much of it, as it is stored, was read.
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Layer:
    """An archive, compressed or not, read from an open file or pipe."""

    #: For messages.
    name: str
    descriptor: int
    #: Whether it takes files of the layers below away, as those of OCI images do.
    whiteouts: bool = False
    #: An archive without the mark of its end was cut off; false where a digest tells.
    complete: bool = True


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold: the sizes of its files together, and how many they are."""

    content_bytes: int
    entries: int = 4_000_000


class Node(msgspec.Struct, frozen=True):
    """A device node that is not in the tree: `place` is its path below the root, in hex."""

    place: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    mtime_s: int


class Owner(msgspec.Struct, frozen=True):
    """The owner that a file in the tree ought to have, but for which there is no mapping."""

    place: str
    uid: int
    gid: int


class Directory(msgspec.Struct, frozen=True):
    """A directory of the tree, with all that is below it."""

    mode: int
    uid: int
    gid: int
    entries: int
    bytes: int


class Unpacked(msgspec.Struct, frozen=True):
    """What lies in a tree, or belongs there and could not be made by everybody."""

    root: Directory
    #: ``/root``, where it is a directory.
    home: Directory | None
    devices: tuple[Node, ...] = ()
    owners: tuple[Owner, ...] = ()
    #: Of each layer, decompressed: sha256 in hex.
    digests: tuple[str, ...] = ()


def interpreter() -> dict[str, str]:
    """What this interpreter needs to be started once more."""
    names = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in names if name in os.environ}


class BadArchive(PreconditionFailed):
    """The archive cannot be unpacked; `layer` is its number."""

    def __init__(self, message: str, layer: int, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.layer = layer


async def unpack(
    layers: Sequence[Layer], tree: Path, *, limits: Limits, advance: Advance | None = None
) -> Unpacked:
    """Unpack `layers`, one over the other, into the empty directory `tree`.

    The descriptors stay the caller's to close. Raises BadArchive for what is damaged, cut off, too
    large, or wants to write outside of the tree; PreconditionFailed when the disk is full. The
    tree is then incomplete, and for the caller to remove (`userns.remove_tree`).
    """
    job = {
        "tree": str(tree),
        "limit_bytes": limits.content_bytes,
        "limit_entries": limits.entries,
        "layers": [
            {
                "descriptor": layer.descriptor,
                "whiteouts": layer.whiteouts,
                "complete": layer.complete,
            }
            for layer in layers
        ],
    }

    def hear(line: str) -> None:
        number, _, read_bytes = line.partition(" ")
        if advance is not None and number.isdecimal() and read_bytes.isdecimal():
            advance(int(number), int(read_bytes))

    program = [sys.executable, "-P", "-X", "utf8", "-m", "banger.images.unpacker"]
    done = await proc.run(
        contained([*program, json.dumps(job)]),
        timeout_s=_TIMEOUT_S,
        env=build_environment(tree.parent) | interpreter(),
        pass_fds=[layer.descriptor for layer in layers],
        on_stderr_line=hear,
    )
    outcome: dict[str, Any] = json.loads(done.stdout)
    if "bad" in outcome:
        number = outcome["layer"]
        raise BadArchive(f"cannot unpack {layers[number].name}: {outcome['bad']}", number)
    if "failed" in outcome:
        raise PreconditionFailed(
            f"cannot unpack into {tree.parent}: {outcome['failed']}",
            hint=_FULL_HINT if outcome["full"] else "",
        )
    return msgspec.convert(outcome, Unpacked)
