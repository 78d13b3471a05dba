"""Copying a machine that runs: its memory, the rest of its state, and where its disks go on.

QEMU's live migration would do it, but what it copied of a running machine under emulation (QEMU
7.2) was not whole: the copy's kernel crashed. So the memory is read from outside, by /proc/PID/mem:
once while the machine runs, and what its process has to itself again while it is paused, into pages
that are there already. All that is neither memory nor disk QEMU writes itself, some dozen KiB in a
millisecond.
"""

from __future__ import annotations

import asyncio
import errno
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qemu.qmp import QMPClient

from banger.base.errors import PermissionDenied, PreconditionFailed, Unavailable
from banger.base.files import reserve_if_reading_takes_room

#: Collapsing is work of seconds, and QEMU sends no event of how far it is.
_POLL_S = 0.05

_PAGE = mmap.PAGESIZE
#: Read in one call at most.
_CHUNK = 4 << 20
#: What is all zero in so large a block stays a hole of the copy.
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)

#: The highest byte of an entry of /proc/PID/pagemap has present (bit 63), swapped (62) and
#: "of a file or shared" (61): a page is the process's own when it is there and not of a file.
_OWN = bytes(int(bool(flags & 0xC0) and not flags & 0x20) for flags in range(256))
_RUN = re.compile(rb"\x01+")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) *(.*)")

Range = tuple[int, int]


@dataclass(frozen=True)
class GuestMemory:
    """Where the memory of a machine lies in the process `pid`."""

    pid: int
    address: int
    size_bytes: int

    def own_pages(self) -> list[Range]:
        """What the process has changed or made, as offsets: the rest is zero, or of a file."""
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(self.address // _PAGE * 8)
            entries = pagemap.read(self.size_bytes // _PAGE * 8)
        flags = entries[7::8].translate(_OWN)
        return [(run.start() * _PAGE, run.end() * _PAGE) for run in _RUN.finditer(flags)]

    def of_file(self) -> list[Range]:
        """What may be other than zero of the file that is mapped, if one is."""
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            found = _MAPPING.match(line)
            if found and int(found[1], 16) <= self.address < int(found[2], 16):
                return [] if found[3] == "0" else self._data(Path(found[4]), int(found[3]))
        return []

    def _data(self, path: Path, inode: int) -> list[Range]:
        """The file's extents; all of it when it is gone: then only the process can read it."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return [(0, self.size_bytes)]
        try:
            if os.fstat(descriptor).st_ino != inode:
                return [(0, self.size_bytes)]
            return list(_extents(descriptor, self.size_bytes))
        finally:
            os.close(descriptor)


def _extents(descriptor: int, size: int) -> Iterator[Range]:
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start // _PAGE * _PAGE, min(-(-end // _PAGE) * _PAGE, size)


class MemoryCopy:
    """The copy of a machine's memory in a file, while it is made."""

    def __init__(self, memory: GuestMemory, source: int, copy: int, view: memoryview) -> None:
        self._memory = memory
        self._source = source
        self._copy = copy
        self._view = view

    def beforehand(self) -> None:
        """All of it, while the machine runs: what changes meanwhile is copied again.

        Raises OSError, when the disk is full, too.
        """
        for ranges in (self._memory.of_file(), self._memory.own_pages()):
            for start, end in _pieces(ranges, _BLOCK):
                at = start
                while at < end:
                    data = os.pread(self._source, end - at, self._memory.address + at)
                    if data != _ZEROS[: len(data)]:
                        os.pwrite(self._copy, data, at)
                    at += _some(len(data))

    def at_rest(self) -> None:
        """What the process has to itself, while the machine is paused: the copy is whole then."""
        for start, end in _pieces(self._memory.own_pages(), _CHUNK):
            at = start
            while at < end:
                # Straight into the file's pages. A full disk is EFAULT, not SIGBUS, for it is the
                # kernel that writes.
                with self._view[at:end] as pages:
                    read = os.preadv(self._source, [pages], self._memory.address + at)
                at += _some(read)


def _pieces(ranges: list[Range], size: int) -> Iterator[Range]:
    for start, end in ranges:
        for at in range(start, end, size):
            yield at, min(at + size, end)


def _some(read: int) -> int:
    if not read:
        raise OSError(errno.EIO, "the machine's memory cannot be read to its end")
    return read


@contextmanager
def copying(memory: GuestMemory, path: Path) -> Iterator[MemoryCopy]:
    """A copy of `memory` in a new file. Raises PermissionDenied where it may not be read."""
    try:
        source = os.open(f"/proc/{memory.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise PermissionDenied(
            f"the memory of process {memory.pid} may not be read",
            hint="with kernel.yama.ptrace_scope = 0 it may (the system's default differs)",
        ) from error
    try:
        copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(copy, memory.size_bytes)
            reserve_if_reading_takes_room(copy)
            with mmap.mmap(copy, memory.size_bytes) as mapped, memoryview(mapped) as view:
                yield MemoryCopy(memory, source, copy, view)
        finally:
            os.close(copy)
    finally:
        os.close(source)


async def find_memory(client: QMPClient, pid: int) -> GuestMemory:
    """Where the machine's memory begins: no command but this one of the human monitor tells."""
    answer = await client.execute("human-monitor-command", {"command-line": "gpa2hva 0"})
    found = re.search(r"\(memory\) is (0x[0-9a-f]+)", str(answer))
    devices = cast("dict[str, Any]", await client.execute("query-memory-size-summary"))
    if found is None:
        raise Unavailable(f"QEMU does not tell where the machine's memory is: {answer}")
    return GuestMemory(pid, int(found[1], 16), int(devices["base-memory"]))


async def top_nodes(client: QMPClient) -> dict[str, dict[str, Any]]:
    """What QEMU says of the topmost node of each disk that can be written to, by the disk's name.

    A node that a snapshot has put on top is called NAME-…, see `add_overlays`.
    """
    devices = cast("list[dict[str, Any]]", await client.execute("query-block"))
    inserted = [device["inserted"] for device in devices if "inserted" in device]
    return {
        each["node-name"].partition("-")[0]: each
        for each in inserted
        if each["node-name"] and not each["ro"]
    }


def file_of(node: dict[str, Any]) -> Path:
    """The file of a qcow2 node. One that QEMU itself has put on top it calls by a JSON."""
    name = str(node["image"]["filename"])
    if name.startswith("json:"):
        name = json.loads(name.removeprefix("json:"))["file"]["filename"]
    return Path(name)


async def add_overlays(client: QMPClient, overlays: dict[str, Path]) -> list[dict[str, Any]]:
    """Open the files that disks are to go on in; the actions of the transaction that does it."""
    tops = await top_nodes(client)
    if missing := set(overlays) - set(tops):
        raise PreconditionFailed(f"the machine has no disk {', '.join(sorted(missing))}")
    actions: list[dict[str, Any]] = []
    for name, path in overlays.items():
        node = f"{name}-{os.urandom(6).hex()}"
        file = {"driver": "file", "filename": str(path), "discard": "unmap"}
        arguments = {
            "driver": "qcow2",
            "node-name": node,
            "backing": None,
            "discard": "unmap",
            "file": file,
        }
        await client.execute("blockdev-add", arguments)
        data = {"node": tops[name]["node-name"], "overlay": node}
        actions.append({"type": "blockdev-snapshot", "data": data})
    return actions


async def drop_overlays(client: QMPClient, actions: list[dict[str, Any]]) -> None:
    """Close again what `add_overlays` has opened and no transaction has used."""
    for action in actions:
        await client.execute("blockdev-del", {"node-name": action["data"]["overlay"]})


async def stream_down(client: QMPClient, name: str, tell: Callable[[float], None]) -> None:
    """Copy what lies between a disk's top and its raw base into the top; the layers are closed.

    `tell` hears how far it is, 0 to 100.
    """
    top = (await top_nodes(client))[name]
    base = top["image"]
    while "backing-image" in base:
        base = base["backing-image"]
    nodes = cast("list[dict[str, Any]]", await client.execute("query-named-block-nodes"))
    (node,) = {
        each["node-name"]
        for each in nodes
        if each["drv"] == "raw" and each["file"] == base["filename"]
    }
    job = f"collapse-{name}"
    arguments = {"job-id": job, "device": top["node-name"], "base-node": node}
    await client.execute("block-stream", arguments)
    try:
        await _job_done(client, job, tell)
    except asyncio.CancelledError:
        await client.execute("block-job-cancel", {"device": job})
        raise
    if (await top_nodes(client))[name]["backing_file_depth"] != 1:
        raise Unavailable(f"QEMU could not collapse the layers of disk {name}")


async def _job_done(client: QMPClient, job: str, tell: Callable[[float], None]) -> None:
    while True:
        jobs = cast("list[dict[str, Any]]", await client.execute("query-block-jobs"))
        mine = [each for each in jobs if each["device"] == job]
        if not mine:
            return
        tell(100 * mine[0]["offset"] / max(mine[0]["len"], 1))
        await asyncio.sleep(_POLL_S)
