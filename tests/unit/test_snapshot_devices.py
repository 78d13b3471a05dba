"""Devices of snapshots, as far as they need no kernel's: what is asked, refused and waited for."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from banger.base.errors import BadRequest, Unavailable
from banger.hostops import block_devices, loops, mappings, snapshots
from banger.hostops.ops import MapSnapshot

UID = 7


@contextmanager
def opened(path: Path) -> Iterator[int]:
    path.touch()
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def test_a_lock_that_somebody_keeps_is_not_what_callers_try_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = tmp_path / "control"
    monkeypatch.setattr(loops, "open_control", lambda: os.open(control, os.O_RDWR))
    monkeypatch.setattr(snapshots, "_LOCK_TIMEOUT_S", 0.0)
    with opened(control) as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="another banger"):
            async with snapshots._alone():
                pass
        fcntl.flock(kept, fcntl.LOCK_UN)
        async with snapshots._alone():
            pass


def test_a_device_that_something_is_made_of_is_not_asked_after_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that hangs, the question would hang, too."""
    mark, asked = loops._mark(UID), []

    @contextmanager
    def device(name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        asked.append(name)
        with opened(tmp_path / name) as descriptor:
            yield descriptor

    def ioctl(descriptor: int, request: int) -> None:
        assert request == loops._LOOP_CLR_FD
        detached.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    detached: list[str] = []
    monkeypatch.setattr(loops, "_with_files", lambda: ["loop0", "loop1", "gone", "loop2"])
    monkeypatch.setattr(loops, "_opened", device)
    monkeypatch.setattr(loops, "_status", lambda _: loops._Status((0, 0), True, mark))
    monkeypatch.setattr(block_devices, "users", users)
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    loops.detach_unused(UID)
    assert asked == detached == ["loop1", "loop2"]


def users(name: str) -> list[str]:
    if name == "gone":
        raise FileNotFoundError(name)
    return ["dm-0"] if name == "loop0" else []


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of the devices of base and changes, whatever their files."""
    found = {"base": 64 << 20, "changes": 4096}
    monkeypatch.setattr(
        loops, "attach", lambda _file, _uid, *, writable: "changes" if writable else "base"
    )
    monkeypatch.setattr(loops, "resize", lambda _name, _uid: None)
    monkeypatch.setattr(block_devices, "size_bytes", found.__getitem__)
    return found


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    ("header", "is_ours"),
    [
        (bytes(4096), True),
        (struct.pack("<4s3I", b"SnAp", 1, 1, 8), True),
        (struct.pack("<4s3I", b"SnAp", 0, 1, 8), True),  # the kernel has given it up
        (struct.pack("<4s3I", b"SnAp", 1, 1, 1 << 21), False),  # chunks of 1 GiB
        (struct.pack("<4s3I", b"SnAp", 1, 1, 0), False),
        (struct.pack("<4s3I", b"SnAp", 1, 2, 8), False),
        (struct.pack("<4s3I", b"SnAp", 2, 1, 8), False),
        (struct.pack("<4s3I", b"snap", 1, 1, 8), False),
        # To the kernel one without a magic is new: nothing of ours has more.
        (struct.pack("<4s3I", bytes(4), 1, 1, 1 << 21), False),
        (b"SnAp", False),
    ],
)
def test_changes_that_are_none_of_ours_are_refused(
    tmp_path: Path, header: bytes, is_ours: bool
) -> None:
    (tmp_path / "changes").write_bytes(header)
    with opened(tmp_path / "base") as base, opened(tmp_path / "changes") as changes:
        mapping = MapSnapshot(vm_id="0123456789ab", instance="89abcdef", base=base, changes=changes)
        if is_ours:
            assert snapshots._attach(mapping, UID) == ("base", "changes")
            return
        with pytest.raises(BadRequest, match="neither with zeros nor as one of ours"):
            snapshots._attach(mapping, UID)


def test_changes_that_no_disk_could_have_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with opened(tmp_path / "base") as base, opened(tmp_path / "changes") as changes:
        mapping = MapSnapshot(vm_id="0123456789ab", instance="89abcdef", base=base, changes=changes)
        sizes["changes"] = mappings.full_bytes(sizes["base"])
        assert snapshots._attach(mapping, UID) == ("base", "changes")
        sizes["changes"] += 512
        with pytest.raises(BadRequest, match="more than the changes"):
            snapshots._attach(mapping, UID)
