"""Loop devices and mappings by the helper: of the owner's files, and of nobody else's.

Device-mapper itself is not in every kernel: what is refused before it is asked is tested here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from banger.base.errors import BangerError, Conflict
from banger.hostops.client import HelperHost
from banger.hostops.local import LocalHost
from banger.hostops.ops import (
    AttachLoop,
    DetachLoop,
    MapSnapshot,
    ResizeLoop,
)
from helper_world import (
    OWNER_UID,
    World,
    helper_world,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for the helper")


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


def loops_of(directory: Path) -> str:
    listing = subprocess.run(
        ["losetup", "--noheadings", "--output", "NAME,RO,BACK-FILE"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return "\n".join(line for line in listing.splitlines() if str(directory) in line)


async def test_a_file_of_the_owners_has_one_loop_device_until_it_is_detached(world: World) -> None:
    host = HelperHost(world.socket)
    path = file_of_owner(world.directory / "disk")
    open_before = world.descriptors()
    with opened(path) as file:
        done = [await host.perform(AttachLoop(file=file, writable=True)) for _ in range(2)]
        reader = await host.perform(AttachLoop(file=file))
    try:
        assert done[0] == done[1]
        assert reader.name != done[0].name
        found = sorted(line.split()[:2] for line in loops_of(world.directory).splitlines())
        assert found == sorted([[f"/dev/{done[0].name}", "0"], [f"/dev/{reader.name}", "1"]])
        with open(f"/dev/{done[0].name}", "r+b", buffering=0) as device:
            device.write(b"x" * 4096)
            os.fsync(device.fileno())
        assert path.read_bytes()[:4096] == b"x" * 4096
        with (
            pytest.raises(OSError, match="not permitted"),
            open(f"/dev/{reader.name}", "r+b", buffering=0) as device,
        ):
            device.write(b"y" * 4096)
    finally:
        for name in (done[0].name, reader.name):
            for _ in range(2):
                await host.perform(DetachLoop(device=name))
    assert loops_of(world.directory) == ""
    assert world.descriptors() == open_before


async def test_a_loop_device_of_anothers_is_left_alone(world: World) -> None:
    host = HelperHost(world.socket)
    path = file_of_owner(world.directory / "theirs")
    argv = ["losetup", "--find", "--show", str(path)]
    foreign = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    name = foreign.stdout.strip().removeprefix("/dev/")
    before = loops_of(world.directory)
    try:
        with pytest.raises(Conflict, match="not banger's"):
            await host.perform(DetachLoop(device=name))
        with opened(path) as file:
            ours = await host.perform(AttachLoop(file=file, writable=True))
        assert ours.name != name
        with pytest.raises(Conflict, match="not banger's"):
            await host.perform(MapSnapshot(vm_id="0" * 12, base=name, changes=ours.name))
        await host.perform(DetachLoop(device=ours.name))
        assert loops_of(world.directory) == before
    finally:
        subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=True, timeout=60)


async def test_a_loop_device_of_another_owners_is_left_alone(world: World) -> None:
    host = HelperHost(world.socket)
    with opened(file_of_owner(world.directory / "roots", uid=0)) as file:
        roots = await LocalHost().perform(AttachLoop(file=file))
    try:
        with pytest.raises(Conflict, match="not banger's"):
            await host.perform(DetachLoop(device=roots.name))
    finally:
        await LocalHost().perform(DetachLoop(device=roots.name))


async def test_a_file_that_is_not_the_owners_to_use_gets_no_loop_device(world: World) -> None:
    host = HelperHost(world.socket)
    mine = file_of_owner(world.directory / "mine")
    roots = file_of_owner(world.directory / "roots", uid=0)
    refused: list[tuple[Path, int, bool, str]] = [
        (roots, os.O_RDWR, True, "belongs to uid 0"),
        (mine, os.O_RDONLY, True, "not open for"),
        (mine, os.O_WRONLY, False, "not open for"),
        (mine, os.O_PATH, False, "not open for"),
        (Path("/dev/null"), os.O_RDWR, True, "not a regular file"),
        (world.directory, os.O_RDONLY, False, "not a regular file"),
        (file_of_owner(world.directory / "odd", size=1000), os.O_RDWR, True, "whole sectors"),
        (file_of_owner(world.directory / "empty", size=0), os.O_RDWR, True, "whole sectors"),
    ]
    for path, flags, writable, message in refused:
        with opened(path, flags) as file, pytest.raises(BangerError, match=message):
            await host.perform(AttachLoop(file=file, writable=writable))
    assert loops_of(world.directory) == ""
    assert len(world.records("refused")) == len(refused)


async def test_a_mapping_takes_loop_devices_of_ours_that_can_be_written(world: World) -> None:
    host = HelperHost(world.socket)
    paths = [file_of_owner(world.directory / name) for name in ("base", "changes")]
    devices: list[str] = []
    try:
        for path in paths:
            with opened(path) as file:
                devices.append((await host.perform(AttachLoop(file=file))).name)
        base, changes = devices
        with pytest.raises(Conflict, match="cannot be written"):
            await host.perform(MapSnapshot(vm_id="0" * 12, base=base, changes=changes))
        with pytest.raises(Conflict, match="loop9999"):
            await host.perform(MapSnapshot(vm_id="0" * 12, base=base, changes="loop9999"))
    finally:
        for name in devices:
            await host.perform(DetachLoop(device=name))


async def test_a_loop_device_grows_with_its_file_when_it_is_told(world: World) -> None:
    host = HelperHost(world.socket)
    path = file_of_owner(world.directory / "disk")
    with opened(path) as file:
        device = (await host.perform(AttachLoop(file=file, writable=True))).name
    try:
        os.truncate(path, 4 << 20)
        sectors = Path("/sys/block", device, "size")
        assert int(sectors.read_text()) * 512 == 1 << 20
        for _ in range(2):
            await host.perform(ResizeLoop(device=device))
        assert int(sectors.read_text()) * 512 == 4 << 20
    finally:
        await host.perform(DetachLoop(device=device))
    with pytest.raises(Conflict):
        await host.perform(ResizeLoop(device=device))


async def test_a_loop_device_that_is_going_is_not_given_again(world: World) -> None:
    """Whoever has it open still keeps it with its file, until he closes it."""
    host = HelperHost(world.socket)
    with opened(file_of_owner(world.directory / "disk")) as file:
        first = (await host.perform(AttachLoop(file=file))).name
        with open(f"/dev/{first}", "rb"):
            await host.perform(DetachLoop(device=first))
            second = (await host.perform(AttachLoop(file=file))).name
            assert second != first
    await host.perform(DetachLoop(device=second))
    assert loops_of(world.directory) == ""
