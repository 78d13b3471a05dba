"""What is in a file system, all of it: mounted read only, where nobody else sees it.

Run as a program it is the half that looks at what was mounted.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

_MOUNT = """mount -o ro,loop,noload "$1" /mnt && exec "$2" "$3" --mounted /mnt"""


def tree_of(file: Path) -> dict[str, dict[str, Any]]:
    """Path to everything that is to be known of it, of an ext4 (as root)."""
    argv: list[str | Path] = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        _MOUNT,
        "sh",
        file,
        sys.executable,
        __file__,
    ]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def _entry(path: str, links: dict[int, str]) -> dict[str, Any]:
    info = os.lstat(path)
    entry: dict[str, Any] = {
        "mode": oct(info.st_mode),
        "owner": [info.st_uid, info.st_gid],
        "mtime": int(info.st_mtime),
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False).hex()
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
    }
    if stat.S_ISREG(info.st_mode):
        entry["size"] = info.st_size
        entry["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if info.st_nlink > 1:  # which of them are one file
            entry["same_as"] = links.setdefault(info.st_ino, path)
    elif stat.S_ISLNK(info.st_mode):
        entry["target"] = str(Path(path).readlink())
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        entry["device"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
    return entry


def _walk(top: str) -> dict[str, dict[str, Any]]:
    links: dict[int, str] = {}
    found = {"": _entry(top, links)}
    found[""].pop("mtime")  # mke2fs makes it
    for above, names, files in os.walk(top):
        for name in sorted((*names, *files)):
            path = f"{above}/{name}"
            place = path.removeprefix(top).encode("utf-8", "surrogateescape")
            if place != b"/lost+found":
                found[place.decode("utf-8", "backslashreplace")] = _entry(path, links)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    json.dump(_walk(sys.argv[2]), sys.stdout)
