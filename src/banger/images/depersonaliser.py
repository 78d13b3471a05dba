"""The process that takes out of a tree what belongs to one machine, and says what is installed.

The files were written by a guest: its links may lead anywhere, and its owners are subordinate ids,
whose directories an ordinary user may not enter. So the work is done by the root of namespaces
(`userns`), with the tree as its root directory, as `unpacker` does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import msgspec

from banger.base import proc
from banger.base.errors import BangerError, PreconditionFailed
from banger.images.bootstrap import build_environment
from banger.images.build import depersonalise, installed_packages
from banger.images.shut_in import shut_in
from banger.images.unpack import Unpacked, interpreter
from banger.images.userns import contained

_TIMEOUT_S = 600
#: How long a list of packages may be that is read, and what is kept of it in the image's record:
#: several times what any system has.
_STATUS_MAX_BYTES = 64 << 20
_PACKAGES_MAX_BYTES = 1 << 20


class _Answer(msgspec.Struct):
    packages: tuple[str, ...]
    #: Places in hex, as they came.
    gone: frozenset[str]


async def depersonalised(tree: Path, content: Unpacked) -> tuple[Unpacked, tuple[str, ...]]:
    """`build.depersonalise` for a tree of unknown origin: what is left of its content, and its
    packages, where dpkg has a list."""
    places = {
        "owners": [each.place for each in content.owners],
        "devices": [each.place for each in content.devices],
    }
    program = [sys.executable, "-P", "-X", "utf8", "-m", "banger.images.depersonaliser"]
    try:
        done = await proc.run(
            contained([*program, str(tree)]),
            stdin=msgspec.json.encode(places),
            timeout_s=_TIMEOUT_S,
            env=build_environment(tree.parent) | interpreter(),
        )
    except proc.ProcessFailed as error:
        raise PreconditionFailed(
            f"cannot take what belongs to one machine out of the image: {error.message}"
        ) from error
    answer = msgspec.json.decode(done.stdout, type=_Answer)
    left = msgspec.structs.replace(
        content,
        owners=tuple(each for each in content.owners if each.place not in answer.gone),
        devices=tuple(each for each in content.devices if each.place not in answer.gone),
    )
    return left, answer.packages


def _packages() -> tuple[str, ...]:
    status = Path("/var/lib/dpkg/status")
    if not status.is_file() or status.stat().st_size > _STATUS_MAX_BYTES:
        return ()
    packages = installed_packages(Path("/"))
    return packages if sum(map(len, packages)) <= _PACKAGES_MAX_BYTES else ()


def _gone(owners: list[str], devices: list[str]) -> list[str]:
    """Those files that are not there, and those device nodes, still to be made, that have lost
    their directory."""
    gone = [each for each in owners if not os.path.lexists(_at(each))]
    return gone + [
        each for each in devices if not os.path.lexists(_at(each).rpartition(b"/")[0] or b"/")
    ]


def _at(place: str) -> bytes:
    return b"/" + bytes.fromhex(place)


def main() -> None:
    os.umask(0o022)
    try:
        places = json.load(sys.stdin)
        shut_in(sys.argv[1])
        packages = _packages()
        depersonalise(Path("/"))
        gone = _gone(places["owners"], places["devices"])
    except (BangerError, OSError) as error:
        sys.stderr.write(str(error))
        os._exit(1)
    except BaseException as error:  # no traceback: it would look for its source in the tree
        sys.stderr.write(type(error).__name__)
        os._exit(1)
    sys.stdout.write(json.dumps({"packages": packages, "gone": gone}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
