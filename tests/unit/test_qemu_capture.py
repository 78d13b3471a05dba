"""What of a machine's memory is copied, and which file a disk is in. (That copies run on:
tests/integration/test_snapshots_guest.py.)"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.base.cancellation import to_its_end
from banger.base.errors import Unavailable
from banger.drivers.hypervisor import qemu_monitor
from banger.drivers.hypervisor.qemu_capture import GuestMemory, copying, file_of

PAGE = mmap.PAGESIZE
PAGES = 64


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file with holes: pages 2 and 40 have something in them."""
    path = tmp_path / "base"
    with path.open("wb") as file:
        file.truncate(PAGES * PAGE)
        for page in (2, 40):
            os.pwrite(file.fileno(), b"base" * (PAGE // 4), page * PAGE)
    return path


@pytest.fixture
def mapped(base: Path) -> Iterator[mmap.mmap]:
    with base.open("rb") as file:
        memory = mmap.mmap(
            file.fileno(),
            PAGES * PAGE,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    yield memory
    memory.close()


def address_of(path: Path) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path) in line:
            return int(line.partition("-")[0], 16)
    raise AssertionError("not mapped")


def copy_of(memory: GuestMemory, path: Path, meanwhile: bytes, mapped: mmap.mmap) -> bytes:
    with copying(memory, path) as copy:
        copy.beforehand()
        mapped[5 * PAGE : 5 * PAGE + len(meanwhile)] = meanwhile
        copy.at_rest()
    return path.read_bytes()


@pytest.mark.parametrize("gone", [False, True])
def test_a_copy_has_what_the_file_has_and_what_was_changed_at_any_time(
    tmp_path: Path, base: Path, mapped: mmap.mmap, gone: bool
) -> None:
    mapped[2 * PAGE : 2 * PAGE + 3] = b"new"
    mapped[50 * PAGE : 50 * PAGE + 4] = b"more"
    memory = GuestMemory(os.getpid(), address_of(base), PAGES * PAGE)
    if gone:
        base.unlink()
    copy = copy_of(memory, tmp_path / "copy", b"late", mapped)
    assert copy == mapped[:]
    assert (copy[2 * PAGE : 2 * PAGE + 4], copy[5 * PAGE : 5 * PAGE + 4]) == (b"newe", b"late")
    # Only pages with something in them take room.
    assert (tmp_path / "copy").stat().st_blocks * 512 < PAGES * PAGE


def test_what_was_never_touched_is_not_read(base: Path, mapped: mmap.mmap) -> None:
    mapped[7 * PAGE] = 1
    memory = GuestMemory(os.getpid(), address_of(base), PAGES * PAGE)
    assert memory.own_pages() == [(7 * PAGE, 8 * PAGE)]
    assert memory.of_file() == [(2 * PAGE, 3 * PAGE), (40 * PAGE, 41 * PAGE)]


def test_a_disk_that_has_gone_on_in_another_file_is_in_that() -> None:
    plain = {"image": {"filename": "/v/system.qcow2"}}
    assert file_of(plain) == Path("/v/system.qcow2")
    told = {"backing": {"file": {"filename": "/v/a"}}, "file": {"filename": "/v/b"}}
    node = {"image": {"filename": f"json:{json.dumps(told)}"}}
    assert file_of(node) == Path("/v/b")


async def test_a_qemu_that_hangs_in_the_middle_is_not_waited_for(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a cancellation would be put off until it has answered."""
    path = short_path / "qmp"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
        writer.write(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
        await reader.read(4096)
        writer.write(b'{"return": {}}\n')
        await reader.read()  # and not a word more
        writer.close()

    monkeypatch.setattr(qemu_monitor._Client, "_timeout_s", 0.2)
    monkeypatch.setattr(qemu_monitor, "_LATER_ANSWER_TIMEOUT_S", 0.01)
    async with (
        await asyncio.start_unix_server(serve, path),
        asyncio.timeout(10),
        qemu_monitor.conversation(path, 600) as client,
    ):
        with pytest.raises(Unavailable, match=r"hangs: it does not answer stop within 0\.2 s"):
            await to_its_end(client.execute("stop"))
        with pytest.raises(Unavailable, match=r"cont within 0\.01 s"):
            await client.execute("cont")
