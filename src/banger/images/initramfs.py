"""The initramfs: the guest agent as /init, and the modules it needs to reach its disks.

Written by our own code as an uncompressed cpio in the newc format (the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst): equal input gives equal bytes, since
a template's key is made from them.
"""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass
from pathlib import Path

from banger.base.errors import PreconditionFailed
from banger.base.files import write_atomically
from banger.base.units import format_size

#: Of the modules of one, more than any kernel needs (Debian's, some ten): all of it is in memory,
#: here while it is made, and in each guest.
BOOT_MODULES_MAX = 100
BOOT_MODULES_MAX_BYTES = 64 << 20

_ALIGN = 4
_CONSOLE = (5, 1)


@dataclass(frozen=True)
class Entry:
    """One member of the archive; ``device`` is major and minor of a node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build_initramfs(dest: Path, *, agent: Path, modules: Path) -> None:
    """Write `dest` from the agent's binary and the ``NN-name.ko`` files in `modules`.

    Atomic: a reader sees the old one or the new one. Raises PreconditionFailed when an input
    cannot be read or there are too many modules. Blocks for some milliseconds: a few MB, synced.
    """
    try:
        init = agent.read_bytes()
        files = sorted(modules.glob("*.ko"))
        check_boot_modules(len(files), sum(each.stat().st_size for each in files))
        content = [(each.name, each.read_bytes()) for each in files]
    except OSError as error:
        raise PreconditionFailed(
            f"cannot make the initramfs: {error.filename}: {error.strerror}",
            hint="install banger again: the guest agent is part of it",
        ) from error
    write_atomically(dest, pack_newc(initramfs_entries(init, content)))


def check_boot_modules(count: int, size_bytes: int) -> None:
    """Raise PreconditionFailed for more modules than an initramfs may have."""
    if count > BOOT_MODULES_MAX or size_bytes > BOOT_MODULES_MAX_BYTES:
        raise PreconditionFailed(
            f"the modules that a guest needs to boot are too many or too large: {count} of"
            f" {format_size(size_bytes)} (up to {BOOT_MODULES_MAX} of"
            f" {format_size(BOOT_MODULES_MAX_BYTES)})",
            hint="strip them of what debuggers need: strip --strip-debug",
        )


def initramfs_entries(init: bytes, modules: list[tuple[str, bytes]]) -> list[Entry]:
    """What is in it, in order; `modules` as (file name, content)."""
    directory = stat.S_IFDIR | 0o755
    return [
        *(Entry(name, directory) for name in ("dev", "modules", "proc", "sys")),
        # The kernel opens it as the standard streams of /init.
        Entry("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE),
        Entry("init", stat.S_IFREG | 0o755, init),
        *(Entry(f"modules/{name}", stat.S_IFREG | 0o644, data) for name, data in modules),
    ]


def pack_newc(entries: list[Entry]) -> bytes:
    """The archive: owner root, time 0, inode numbers by position."""
    archive = io.BytesIO()
    for inode, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (
            *(inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0),
            *(*entry.device, len(name), 0),
        )
        archive.write(b"070701" + b"".join(b"%08X" % field for field in fields))
        for part in (name, entry.data):
            archive.write(part)
            archive.write(bytes(-archive.tell() % _ALIGN))
    return archive.getvalue()
