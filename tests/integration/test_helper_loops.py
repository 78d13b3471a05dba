"""Loop devices by the helper: of the owner's files, and of nobody else's.

Device-mapper itself is not in every kernel: what comes before it is tested here, and that nothing
is left where it is missing; the whole of it by `tests/host/test_mappings_guest.py`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from banger.base.errors import BadRequest, BangerError, PermissionDenied
from banger.hostops import loops
from banger.hostops.client import HelperHost
from banger.hostops.ops import GrowSnapshot, MapSnapshot, SweepSnapshots, UnmapSnapshot
from helper_world import (
    OWNER_UID,
    World,
    helper_world,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for the helper")

ID, INSTANCE = "0123456789ab", "89abcdef"
#: What takes away what is left of a mapping, each by itself.
SWEEPERS = [UnmapSnapshot(vm_id=ID), SweepSnapshots(), SweepSnapshots(instance=INSTANCE)]


@pytest.fixture
def world() -> Iterator[World]:
    with helper_world() as made:
        yield made


def file_of_owner(path: Path, *, uid: int = OWNER_UID, size: int = 1 << 20) -> Path:
    path.touch()
    os.truncate(path, size)
    os.chown(path, uid, uid)
    return path


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def attached(path: Path, *, uid: int = OWNER_UID, writable: bool = True) -> str:
    """As an operation that was killed leaves it."""
    with opened(path) as file:
        return loops.attach(file, uid, writable=writable)


def loops_of(directory: Path) -> list[list[str]]:
    """Those of files in it: the device, and whether it cannot be written."""
    listing = subprocess.run(
        ["losetup", "--noheadings", "--output", "NAME,RO,BACK-FILE"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return sorted(line.split()[:2] for line in listing.splitlines() if str(directory) in line)


def test_a_file_has_one_loop_device_of_each_kind(world: World) -> None:
    path = file_of_owner(world.directory / "disk")
    try:
        writer, reader = attached(path), attached(path, writable=False)
        assert (attached(path), attached(path, writable=False)) == (writer, reader)
        there = sorted([[f"/dev/{writer}", "0"], [f"/dev/{reader}", "1"]])
        assert loops_of(world.directory) == there
        with open(f"/dev/{writer}", "r+b", buffering=0) as device:
            device.write(b"x" * 4096)
            os.fsync(device.fileno())
        assert path.read_bytes()[:4096] == b"x" * 4096
        with (
            pytest.raises(OSError, match="not permitted"),
            open(f"/dev/{reader}", "r+b", buffering=0) as device,
        ):
            device.write(b"y" * 4096)
    finally:
        loops.detach_unused(OWNER_UID)
    assert loops_of(world.directory) == []


@pytest.mark.parametrize("operation", SWEEPERS)
async def test_what_is_left_of_one_that_was_killed_goes_whatever_its_file_is_called(
    world: World, operation: UnmapSnapshot | SweepSnapshots
) -> None:
    host, open_before = HelperHost(world.socket), world.descriptors()
    for name, writable in (("base", False), ("changes", True), ("gone", True)):
        attached(file_of_owner(world.directory / name), writable=writable)
    (world.directory / "gone").unlink()
    (world.directory / "changes").rename(world.directory / "moved")
    assert len(loops_of(world.directory)) == 3
    for _ in range(2):
        await host.perform(operation)
    assert loops_of(world.directory) == []
    assert world.descriptors() == open_before


@pytest.mark.parametrize("operation", SWEEPERS)
async def test_loop_devices_of_others_are_left_alone(
    world: World, operation: UnmapSnapshot | SweepSnapshots
) -> None:
    """Of the owner's files, too, and of another owner's banger."""
    host = HelperHost(world.socket)
    argv = ["losetup", "--find", "--show", str(file_of_owner(world.directory / "theirs"))]
    foreign = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    name = foreign.stdout.strip()
    try:
        other_uid = OWNER_UID + 70_000
        attached(file_of_owner(world.directory / "others", uid=other_uid), uid=other_uid)
        before = loops_of(world.directory)
        assert len(before) == 2
        await host.perform(operation)
        assert loops_of(world.directory) == before
    finally:
        loops.detach_unused(OWNER_UID + 70_000)
        subprocess.run(["losetup", "--detach", name], check=True, timeout=60)


async def test_a_file_that_is_not_the_owners_to_use_is_refused(world: World) -> None:
    host = HelperHost(world.socket)
    mine = file_of_owner(world.directory / "mine")
    good = file_of_owner(world.directory / "good")
    roots = file_of_owner(world.directory / "roots", uid=0)
    refused: list[tuple[Path, int, str]] = [
        (roots, os.O_RDWR, "belongs to uid 0"),
        (mine, os.O_WRONLY, "not open for"),
        (mine, os.O_PATH, "not open for"),
        (Path("/dev/null"), os.O_RDWR, "not a regular file"),
        (world.directory, os.O_RDONLY, "not a regular file"),
        (file_of_owner(world.directory / "odd", size=1000), os.O_RDWR, "whole sectors"),
        (file_of_owner(world.directory / "empty", size=0), os.O_RDWR, "whole sectors"),
    ]
    for path, flags, message in refused:
        with opened(path, flags) as bad, opened(good) as fine:
            for base, changes in ((bad, fine), (fine, bad)):
                operation = MapSnapshot(vm_id=ID, instance=INSTANCE, base=base, changes=changes)
                with pytest.raises((BadRequest, PermissionDenied), match=message):
                    await host.perform(operation)
    with opened(mine, os.O_RDONLY) as changes, opened(good) as base:
        operation = MapSnapshot(vm_id=ID, instance=INSTANCE, base=base, changes=changes)
        with pytest.raises(PermissionDenied, match="not open for"):
            await host.perform(operation)
    with opened(good) as one, opened(good) as two:
        operation = MapSnapshot(vm_id=ID, instance=INSTANCE, base=one, changes=two)
        with pytest.raises(BadRequest, match="its own changes"):
            await host.perform(operation)
    assert loops_of(world.directory) == []
    assert len(world.records("refused")) == 2 * len(refused) + 2


async def test_a_mapping_that_cannot_be_made_leaves_nothing(world: World) -> None:
    """Where the kernel has no device-mapper; or where it has, and another's has that name."""
    host = HelperHost(world.socket)
    foreign = ["dmsetup", "create", f"banger-{ID}", "--table", "0 8 error"]
    made = subprocess.run(foreign, capture_output=True, timeout=60, check=False).returncode == 0
    try:
        with ExitStack() as files:
            base, changes = (
                files.enter_context(opened(file_of_owner(world.directory / name)))
                for name in ("base", "changes")
            )
            operation = MapSnapshot(vm_id=ID, instance=INSTANCE, base=base, changes=changes)
            with pytest.raises(BangerError, match="which is not banger's" if made else "no device"):
                await host.perform(operation)
    finally:
        if made:
            subprocess.run(["dmsetup", "remove", f"banger-{ID}"], check=True, timeout=60)
    assert loops_of(world.directory) == []


async def test_what_keeps_a_machine_going_waits_for_nobody(world: World) -> None:
    """Others wait while somebody makes or takes away such devices, another daemon of root's say."""
    host = HelperHost(world.socket)
    with opened(Path("/dev/loop-control")) as control:
        fcntl.flock(control, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            await within(0.5, host.perform(SweepSnapshots()))
        with pytest.raises(BangerError, match="no snapshot of"):
            await within(20, host.perform(GrowSnapshot(vm_id=ID)))
    await within(20, host.perform(SweepSnapshots()))


async def within(timeout_s: float, work: Awaitable[object]) -> None:
    async with asyncio.timeout(timeout_s):
        await work


def test_a_loop_device_grows_with_its_file_when_it_is_told(world: World) -> None:
    path = file_of_owner(world.directory / "disk")
    try:
        device = attached(path)
        os.truncate(path, 4 << 20)
        assert loops.sectors(device) * 512 == 1 << 20
        for _ in range(2):
            loops.resize(device, OWNER_UID)
        assert loops.sectors(device) * 512 == 4 << 20
        with pytest.raises(BangerError, match="not banger's"):
            loops.resize(device, OWNER_UID + 1)
    finally:
        loops.detach_unused(OWNER_UID)


def test_a_loop_device_that_is_going_is_not_given_again(world: World) -> None:
    """Whoever has it open still keeps it with its file, until he closes it."""
    path = file_of_owner(world.directory / "disk")
    first = attached(path)
    try:
        with open(f"/dev/{first}", "rb"):
            loops.detach_unused(OWNER_UID)
            assert attached(path) != first
    finally:
        loops.detach_unused(OWNER_UID)
    assert loops_of(world.directory) == []
