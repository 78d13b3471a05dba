"""The process that unpacks archives: ``python -m banger.images.unpacker JOB``, run by `unpack`.

It is root of its namespaces, makes the tree its root directory, and knows no way out of it but the
descriptors it was given. The job and its outcome are JSON; `unpack` says what is in them. Lines on
stderr say how far it is: the number of the layer, and how much of it was read.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import stat
import sys
import time
from typing import Any

from banger.images.shut_in import shut_in
from banger.images.tar_stream import ArchiveError, TarStream, members
from banger.images.tree_writer import TreeWriter

#: What no archive needs, whatever is in its headers.
_MEMORY_BYTES = 2 << 30
#: Headers may follow headers; what is deeper is damaged.
_RECURSION = 2000
_REPORT_S = 0.2
#: The archive around the files: names, times, padding.
_OVERHEAD_BYTES = 2 << 30


class Reporter:
    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._next = 0.0

    def at(self, read_bytes: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_S
            sys.stderr.write(f"{self._layer} {read_bytes}\n")
            sys.stderr.flush()


def _unpack(job: dict[str, Any]) -> dict[str, Any]:
    writer = TreeWriter(limit_bytes=job["limit_bytes"], limit_entries=job["limit_entries"])
    left_bytes = job["limit_bytes"] + _OVERHEAD_BYTES
    digests = []
    for number, layer in enumerate(job["layers"]):
        stream = TarStream(layer["descriptor"], left_bytes)
        reporter = Reporter(number)
        writer.begin_layer()
        try:
            for member in members(stream, complete=layer["complete"]):
                writer.add(member, stream, whiteouts=layer["whiteouts"])
                reporter.at(stream.read_bytes)
            digests.append(stream.finish())
        except ArchiveError as error:
            return {"layer": number, "bad": str(error)}
        except MemoryError:
            return {"layer": number, "bad": "it takes more memory than any image needs"}
        except (ValueError, TypeError, OverflowError, RecursionError, AttributeError) as error:
            return {"layer": number, "bad": f"a header of it is damaged ({type(error).__name__})"}
        left_bytes -= stream.total_bytes
    writer.end()
    return {
        "digests": digests,
        "home": _directory("/root"),
        "root": _directory("/"),
        "devices": [
            {"place": place.hex(), **dataclasses.asdict(device)}
            for place, device in writer.devices.items()
        ],
        "owners": [
            {"place": place.hex(), "uid": uid, "gid": gid}
            for place, (uid, gid) in writer.owners.items()
        ],
    }


def _directory(path: str) -> dict[str, int] | None:
    """Who may enter a directory, and what is in it; None when it is none, or a link to one."""
    info = os.lstat(path) if os.path.lexists(path) else None
    if info is None or not stat.S_ISDIR(info.st_mode):
        return None
    entries = size = 0
    for above, names, files in os.walk(path):
        entries += len(names) + len(files)
        size += sum(os.lstat(f"{above}/{each}").st_size for each in files)
    return {
        "mode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "entries": entries,
        "bytes": size,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    sys.setrecursionlimit(_RECURSION)
    os.umask(0)
    outcome: dict[str, Any]
    try:
        shut_in(job["tree"])
        outcome = _unpack(job)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        outcome = {"failed": error.strerror or str(error), "full": full}
    except BaseException as error:  # no traceback: it would look for its source in the tree
        outcome = {"failed": type(error).__name__, "full": False}
    data = json.dumps(outcome).encode()
    while data:
        data = data[os.write(1, data) :]
    os._exit(0)  # not waiting for a thread that decompresses what nobody wants


if __name__ == "__main__":
    main()
