"""The dm_snapshot storage over a host in memory, which has loop devices and mappings."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from banger.base import proc, procfs
from banger.base.errors import BangerError, Conflict, PreconditionFailed, Unavailable
from banger.base.model import DiskDevices
from banger.drivers.base import Level, Room
from banger.drivers.storage import cow_file, dm_snapshot, dm_space
from banger.drivers.storage.dm_snapshot import DmSnapshotStorage
from banger.hostops import block_devices, mappings
from banger.hostops.block_devices import Mapping
from banger.hostops.ops import (
    Done,
    GrowSnapshot,
    LookAtSnapshot,
    MapSnapshot,
    Operation,
    SnapshotState,
    SweepSnapshots,
    UnmapSnapshot,
)
from test_cow_file import written

ID, OTHER = "0123456789ab", "ba9876543210"
INSTANCE = "89abcdef"
MIB = 1 << 20
GIB = 1 << 30


class Host:
    """Implements `HostOps`: `loops` are those of files, by path and whether they can be written;
    `sizes` are those that loop devices have."""

    problem = hint = ""
    installed = True

    def __init__(self) -> None:
        self.loops: dict[tuple[Path, bool], str] = {}
        self.sizes: dict[str, int] = {}
        #: By machine: the devices of base and changes, and whose it is.
        self.mapped: dict[str, tuple[str, str, str]] = {}
        self.state = SnapshotState.GOOD
        self.busy = 0
        #: What becomes of growing and looking: an error, "hangs" (for as long as that is so), or
        #: "late" (it has grown meanwhile, which nobody hears of).
        self.trouble: BangerError | str = ""
        self.takes_s = 0.0
        self.done: list[Operation] = []

    async def perform(self, operation: Operation) -> Done:
        operation.check()
        await asyncio.sleep(0)
        self.done.append(operation)
        if isinstance(operation, GrowSnapshot | LookAtSnapshot):
            if isinstance(self.trouble, BangerError):
                raise self.trouble
            if self.trouble == "late" and isinstance(operation, GrowSnapshot):
                self._resize(self.mapped[operation.vm_id][1])
            while self.trouble:
                await asyncio.sleep(0.001)
            await asyncio.sleep(self.takes_s)
        match operation:
            case MapSnapshot(vm_id=vm_id, instance=instance, base=base, changes=changes):
                under = self._attached(base, writable=False)
                over = self._attached(changes, writable=True)
                self.mapped[vm_id] = (under, over, instance)
                return Done(name=f"banger-{vm_id}")
            case GrowSnapshot(vm_id=vm_id):
                self._resize(self.mapped[vm_id][1])
            case UnmapSnapshot(vm_id=vm_id):
                if self.busy:
                    self.busy -= 1
                    raise Conflict("in use")
                self.mapped.pop(vm_id, None)
                self._detach_unused()
            case SweepSnapshots(instance=instance, keep=keep):
                for vm_id, (_, _, of) in list(self.mapped.items()):
                    if of == instance and vm_id not in keep:
                        del self.mapped[vm_id]
                self._detach_unused()
            case LookAtSnapshot():
                return Done(name=self.state)
            case _:
                raise AssertionError(operation)
        return Done()

    def _attached(self, file: int, *, writable: bool) -> str:
        path = Path(f"/proc/self/fd/{file}").readlink()
        name = self.loops.setdefault((path, writable), f"loop{len(self.sizes)}")
        self._resize(name)
        return name

    def _resize(self, name: str) -> None:
        (path,) = (path for (path, _), each in self.loops.items() if each == name)
        self.sizes[name] = path.stat().st_size
        assert self.sizes[name] % 512 == 0

    def _detach_unused(self) -> None:
        used = {name for base, changes, _ in self.mapped.values() for name in (base, changes)}
        self.loops = {file: name for file, name in self.loops.items() if name in used}

    def is_read_only(self, name: str) -> bool:
        return any(name == each and not writable for (_, writable), each in self.loops.items())

    def all_mappings(self) -> list[Mapping]:
        return [
            Mapping(
                name=f"banger-{vm_id}",
                uuid=f"BANGER-{os.getuid()}-{instance}-{vm_id}",
                size_bytes=self.sizes[base],
                devices=(base, changes),
            )
            for vm_id, (base, changes, instance) in self.mapped.items()
        ]

    def files(self) -> list[Path]:
        """Those that have a loop device."""
        return [path for path, _ in self.loops]

    @property
    def changes(self) -> str:
        """The device of the changes of the first machine."""
        return self.mapped[ID][1]


@dataclass(frozen=True)
class World:
    host: Host
    storage: DmSnapshotStorage
    base: Path
    directory: Path

    async def disk(self, vm_id: str = ID) -> Path:
        disk = self.directory / vm_id / self.storage.file_name("system")
        disk.parent.mkdir(parents=True)
        await self.storage.create_overlay(self.base, disk, 64)
        return disk

    async def opened(self, vm_id: str = ID) -> Path:
        disk = await self.disk(vm_id)
        await self.storage.open(vm_id, self.base, disk, lambda _: None)
        return disk


async def copy(argv: Sequence[str], **_: object) -> None:
    """In the place of cp."""
    await asyncio.to_thread(shutil.copyfile, argv[-2], argv[-1])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much of the host's disk is free."""

    def set_free(free_bytes: int) -> None:
        monkeypatch.setattr(dm_snapshot, "_free_bytes", lambda _: free_bytes)

    set_free(7 * GIB + 12_345)
    return set_free


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[int], None]) -> World:
    host = Host()
    monkeypatch.setattr(block_devices, "size_bytes", host.sizes.__getitem__)
    monkeypatch.setattr(block_devices, "mappings", host.all_mappings)
    monkeypatch.setattr(block_devices, "is_read_only", host.is_read_only)
    monkeypatch.setattr(procfs, "dirty_bytes", lambda: 0)
    monkeypatch.setattr(dm_snapshot, "_TRY_AGAIN_S", 0.0)
    monkeypatch.setattr(proc, "run", copy)
    base = tmp_path / "rootfs.ext4"
    base.touch()
    os.truncate(base, 64 * MIB)
    directory = tmp_path / "state/vms"
    return World(host, DmSnapshotStorage(directory, host, INSTANCE), base, directory)


async def test_it_is_recorded_that_it_is_made_before_it_is(world: World) -> None:
    disk, seen = await world.disk(), []

    def record(devices: DiskDevices) -> None:
        seen.append((len(world.host.done), devices))

    await world.storage.open(ID, world.base, disk, record)
    assert seen == [
        (0, DiskDevices(base=str(world.base))),
        (2, DiskDevices(base=str(world.base), base_loop="loop0", changes_loop="loop1",
            mapping=f"banger-{ID}")),
    ]  # fmt: skip
    assert [type(each) for each in world.host.done] == [UnmapSnapshot, MapSnapshot]
    assert world.storage.node(ID) == Path(f"/dev/mapper/banger-{ID}")


async def test_what_is_no_file_of_changes_is_refused_before_it_is_touched(world: World) -> None:
    """Its first bytes say nothing: to those that tell of changes zeros are a file that is new."""
    disk = world.directory / ID / "system.raw"
    disk.parent.mkdir(parents=True)
    content = bytes(MIB) + b"what a guest has written"
    disk.write_bytes(content)
    recorded: list[DiskDevices] = []
    with pytest.raises(PreconditionFailed, match="no file of changes") as told:
        await world.storage.open(ID, world.base, disk, recorded.append)
    assert "set storage back" in told.value.hint
    assert (recorded, world.host.done, disk.read_bytes()) == ([], [], content)


async def test_machines_of_one_image_share_its_device_to_the_last(world: World) -> None:
    disks = {vm_id: await world.opened(vm_id) for vm_id in (ID, OTHER)}
    assert len(world.host.loops) == 3
    assert world.host.mapped[ID][0] == world.host.mapped[OTHER][0]
    await world.storage.close(ID, disks[ID])
    assert world.host.files() == [world.base, disks[OTHER]]
    for _ in range(2):
        await world.storage.close(OTHER, disks[OTHER])
    assert world.host.loops == {}


async def test_what_is_busy_for_a_moment_is_waited_for(world: World) -> None:
    disk = await world.opened()
    world.host.busy = 3
    await world.storage.close(ID, disk)
    assert (world.host.mapped, world.host.loops) == ({}, {})
    await world.storage.open(ID, world.base, disk, lambda _: None)
    world.host.busy = 1000
    size = disk.stat().st_size
    with pytest.raises(Conflict):
        await world.storage.close(ID, disk)
    # What may still be written to is not cut.
    assert disk.stat().st_size == size


async def test_what_an_earlier_run_has_left_is_taken_away_before_its_file_is_cut(
    world: World,
) -> None:
    disk = await world.opened()
    world.host.busy = 1000
    size = disk.stat().st_size
    with pytest.raises(Conflict):
        await world.storage.open(ID, world.base, disk, lambda _: None)
    assert disk.stat().st_size == size
    world.host.busy = 0
    world.host.done.clear()
    await world.storage.open(ID, world.base, disk, lambda _: None)
    assert [type(each) for each in world.host.done] == [UnmapSnapshot, MapSnapshot]


async def test_what_nobody_recorded_is_swept_and_what_runs_stays(world: World) -> None:
    await world.opened(ID)
    kept = await world.opened(OTHER)
    await world.storage.sweep({OTHER})
    assert list(world.host.mapped) == [OTHER]
    assert world.host.files() == [world.base, kept]
    world.host.mapped.clear()
    await world.storage.sweep(())
    assert world.host.loops == {}


async def test_what_is_another_daemons_is_not_swept(world: World) -> None:
    await world.opened(ID)
    elsewhere = DmSnapshotStorage(world.directory, world.host, "01234567")
    await elsewhere.sweep(())
    assert list(world.host.mapped) == [ID]


async def test_without_anybody_who_makes_devices_there_are_none_to_take_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await world.disk()
    monkeypatch.setattr(world.host, "problem", "there is no helper", raising=False)
    for installed in (False, True):
        monkeypatch.setattr(world.host, "installed", installed, raising=False)
        world.host.done.clear()
        await world.storage.close(ID, disk)
        await world.storage.sweep(())
        assert [type(each) for each in world.host.done] == [
            UnmapSnapshot,
            SweepSnapshots,
        ] * installed
    # What is there all the same is not forgotten.
    monkeypatch.setattr(world.host, "installed", False, raising=False)
    await world.storage.open(ID, world.base, disk, lambda _: None)
    await world.storage.close(ID, disk)
    assert world.host.mapped == {}


async def test_its_room_is_there_while_it_runs_and_is_given_back(world: World) -> None:
    disk = await world.opened()
    assert disk.stat().st_blocks * 512 >= 64 * MIB  # all that it could ever need
    assert disk.stat().st_size == mappings.full_bytes(64 * MIB)
    written(disk, 10, ahead=1000)
    await world.storage.close(ID, disk)
    assert disk.stat().st_size == 12 * 4096


async def test_without_room_it_does_not_begin(world: World, free: Callable[[int], None]) -> None:
    free(100 * MIB)
    os.truncate(world.base, 8 * GIB)
    disk = await world.disk()
    with pytest.raises(PreconditionFailed, match="no room for what the machine changes"):
        await world.storage.open(ID, world.base, disk, lambda _: None)
    assert (world.host.loops, disk.stat().st_size) == ({}, 0)


async def test_who_is_cancelled_while_room_is_made_leaves_nobody_making_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is allocated after the clean-up has cut the file would stay."""
    disk, begun, go_on = await world.disk(), threading.Event(), threading.Event()
    allocate = cow_file.allocate

    def slowly(path: Path, size_bytes: int) -> None:
        begun.set()
        go_on.wait()
        allocate(path, size_bytes)

    monkeypatch.setattr(cow_file, "allocate", slowly)
    opening = asyncio.create_task(world.storage.open(ID, world.base, disk, lambda _: None))
    try:
        await asyncio.to_thread(begun.wait)
        opening.cancel()
        await asyncio.wait({opening}, timeout=0.05)
        assert not opening.done()
    finally:
        go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert disk.stat().st_size > 0
    await world.storage.close(ID, disk)
    assert (world.host.mapped, disk.stat().st_size) == ({}, 0)


async def test_room_is_made_before_it_is_needed_and_told_when_there_is_none(
    world: World, free: Callable[[int], None]
) -> None:
    os.truncate(world.base, 8 * GIB)
    free(2 * GIB + 4097)
    disk = await world.opened()
    changes = world.host.changes
    assert world.host.sizes[changes] == 256 * MIB + 4096  # an area would begin there

    def use(used_mib: int) -> None:
        size = disk.stat().st_size // 4096
        areas = used_mib * 256 // 257 + 1
        written(disk, used_mib * 256 - areas, ahead=0)
        os.truncate(disk, size * 4096)

    use(40)
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert world.host.sizes[changes] == 256 * MIB + 4096  # steps are not that small
    use(100)
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert world.host.sizes[changes] == disk.stat().st_size
    assert 355 * MIB < disk.stat().st_size < 357 * MIB
    free(64 * MIB)
    use(270)
    assert await world.storage.tend(ID, disk) is Room.TIGHT
    use(310)
    assert await world.storage.tend(ID, disk) is Room.SHORT
    free(2 * GIB)
    assert await world.storage.tend(ID, disk) is Room.AMPLE


async def test_what_was_allocated_in_vain_leaves_no_size_that_nobody_chose(
    world: World, monkeypatch: pytest.MonkeyPatch, free: Callable[[int], None]
) -> None:
    os.truncate(world.base, 8 * GIB)
    free(2 * GIB)
    disk = await world.opened()
    size = disk.stat().st_size
    written(disk, 50_000)
    os.truncate(disk, size)

    def allocate(path: Path, size_bytes: int) -> None:
        os.truncate(path, size_bytes - MIB)  # as far as there was room
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cow_file, "allocate", allocate)
        await world.storage.tend(ID, disk)
    assert disk.stat().st_size == world.host.sizes[world.host.changes] == size
    await world.storage.tend(ID, disk)
    assert disk.stat().st_size == world.host.sizes[world.host.changes] > size


async def test_room_is_kept_while_all_threads_that_are_shared_copy_disks(world: World) -> None:
    disk, begun, done = await world.opened(), threading.Event(), threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    def copy_disks() -> None:
        begun.set()
        done.wait()

    copying = asyncio.ensure_future(asyncio.to_thread(copy_disks))
    try:
        while not begun.is_set():
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            assert await world.storage.tend(ID, disk) is Room.AMPLE
    finally:
        done.set()
        await copying


async def test_a_machine_that_writes_nothing_is_not_looked_at_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(world.base, 8 * GIB)
    disk = await world.opened()
    looks: list[int] = []
    monkeypatch.setattr(block_devices, "mappings", counted(world.host.all_mappings, looks))
    for _ in range(3):
        assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert len(looks) == 1
    os.utime(disk)
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert len(looks) == 2


def counted(what: Callable[[], list[Mapping]], calls: list[int]) -> Callable[[], list[Mapping]]:
    def call() -> list[Mapping]:
        calls.append(1)
        return what()

    return call


async def test_what_the_host_has_yet_to_write_counts_as_written(
    world: World, monkeypatch: pytest.MonkeyPatch, free: Callable[[int], None]
) -> None:
    os.truncate(world.base, 8 * GIB)
    disk = await world.opened()
    free(64 * MIB)
    os.truncate(disk, 100 * MIB)
    world.host.sizes["loop1"] = 100 * MIB
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    monkeypatch.setattr(procfs, "dirty_bytes", lambda: 60 * MIB)
    assert await world.storage.tend(ID, disk) is Room.SHORT


async def test_what_overflowed_is_lost_and_can_be_opened_again(
    world: World, free: Callable[[int], None]
) -> None:
    os.truncate(world.base, 8 * GIB)
    disk = await world.opened()
    written(disk, 1000)
    world.host.sizes["loop1"] = disk.stat().st_size
    world.host.state = SnapshotState.OVERFLOWED
    # Room that there is now would not mend it.
    assert await world.storage.tend(ID, disk) is Room.LOST
    await world.storage.close(ID, disk)
    free(2 * GIB)
    await world.storage.open(ID, world.base, disk, lambda _: None)
    assert await world.storage.tend(ID, disk) is Room.AMPLE


async def test_changes_that_the_kernel_has_given_up_are_never_used(world: World) -> None:
    disk = await world.disk()
    written(disk, 10, valid=0)
    with pytest.raises(PreconditionFailed, match="given it up"):
        await world.storage.open(ID, world.base, disk, lambda _: None)
    assert world.host.loops == {}


async def test_a_copy_has_the_changes_and_a_life_of_its_own(world: World, tmp_path: Path) -> None:
    disk = await world.disk()
    written(disk, 300, ahead=500)
    await world.storage.share(disk, tmp_path)
    shared = tmp_path / "system.cow"
    await world.storage.branch(shared, tmp_path / "branch.cow")
    shared.unlink()
    assert (tmp_path / "branch.cow").read_bytes() == disk.read_bytes()
    assert world.storage.room_bytes("system", disk) == disk.stat().st_blocks * 512
    assert world.storage.room_bytes("system", world.base) == 0


async def test_a_system_disk_is_as_large_as_its_image(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "system.cow"
    with pytest.raises(PreconditionFailed, match="none larger than its image") as told:
        await world.storage.create_overlay(world.base, disk, 65)
    assert 'system_overlay_size = "64M"' in told.value.hint
    with pytest.raises(PreconditionFailed, match="is missing"):
        await world.storage.create_overlay(tmp_path / "none", disk, 1)
    with pytest.raises(PreconditionFailed, match="as large as the image"):
        await world.storage.grow(disk, 65)
    assert not disk.exists()


async def test_an_image_of_anothers_is_refused_with_what_to_do(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PreconditionFailed, match="own files only") as told:
        await world.storage.create_overlay(world.base, tmp_path / "system.cow", 1)
    assert "banger image import" in told.value.hint


async def test_work_disks_are_raw_files(world: World, tmp_path: Path) -> None:
    work = tmp_path / world.storage.file_name("work")
    await world.storage.create_overlay(world.base, work, 70)
    assert (work.name, await world.storage.size_mib(work)) == ("work.raw", 70)
    await world.storage.grow(work, 80)
    assert await world.storage.size_mib(work) == 80


async def test_what_is_missing_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.host, "problem", "there is no helper", raising=False)
    monkeypatch.setattr(world.host, "hint", "install one", raising=False)
    (check,) = await world.storage.checks()
    assert (check.level, check.detail, check.hint) == (
        Level.FAIL,
        "there is no helper",
        'install one; or do without: storage = "auto"',
    )
    monkeypatch.setattr(world.host, "problem", "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(proc, "which", lambda _: None)
    (check,) = await world.storage.checks()
    assert "dmsetup" in check.detail


def test_sysfs_says_what_is_made_of_what(tmp_path: Path) -> None:
    def put(name: str, content: str = "") -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    put("loop0/ro", "1\n")
    put("loop1/ro", "0\n")
    put("loop1/holders/dm-0")
    put("dm-0/dm/uuid", f"BANGER-0-{INSTANCE}-{ID}\n")
    put("dm-0/dm/name", f"banger-{ID}\n")
    put("dm-0/size", "16\n")
    put("dm-0/slaves/loop1")
    assert [block_devices.is_read_only(f"loop{n}", tmp_path) for n in (0, 1)] == [True, False]
    assert block_devices.users("loop1", tmp_path) == ["dm-0"]
    assert block_devices.mappings(tmp_path) == [
        Mapping(f"banger-{ID}", f"BANGER-0-{INSTANCE}-{ID}", 8192, ("loop1",))
    ]


def test_no_size_ends_where_the_kernels_next_area_would_begin() -> None:
    full = mappings.full_bytes(4 * GIB)
    for area in (1, 2, 77):
        bad = (1 + area * cow_file.AREA_CHUNKS) * cow_file.CHUNK_BYTES
        for size in (bad, bad + 512):
            good = dm_space.good_size(size, full)
            assert good >= size - 512
            assert good // cow_file.CHUNK_BYTES % cow_file.AREA_CHUNKS == 2
        assert dm_space.good_size(bad + cow_file.CHUNK_BYTES, full) == bad + 4096
    assert dm_space.good_size(full, full) == full


async def test_a_nearly_full_file_gets_the_last_of_its_room(world: World) -> None:
    """However little that is, for else its machine would be held for ever."""
    disk = await world.opened()
    changes = world.host.changes
    full = mappings.full_bytes(64 * MIB)
    os.truncate(disk, full - MIB)
    world.host.sizes[changes] = full - MIB
    written(disk, 15_000)
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert world.host.sizes[changes] == full


GONE = Unavailable("the helper cannot be reached")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for for long."""
    monkeypatch.setattr(dm_snapshot, "_ANSWER_TIMEOUT_S", 0.05)


@pytest.fixture
def little_free(free: Callable[[int], None]) -> None:
    """Of the host's disk, but enough: small files are written faster."""
    free(GIB)


async def used_to(world: World, left_bytes: int) -> Path:
    """A disk of 8 GiB that has so much room left."""
    os.truncate(world.base, 8 * GIB)
    disk = await world.opened()
    use_to(world, disk, left_bytes)
    return disk


def use_to(world: World, disk: Path, left_bytes: int) -> None:
    size, file_size = world.host.sizes[world.host.changes], disk.stat().st_size
    chunks = (size - left_bytes) // 4096 - 1
    written(disk, chunks - chunks // 257 - 1)
    os.truncate(disk, file_size)
    left = size - cow_file.extent(disk).end_bytes
    assert abs(left - left_bytes) <= 2 * 4096


@pytest.mark.usefixtures("quick", "little_free")
@pytest.mark.parametrize("trouble", [GONE, "hangs"], ids=["gone", "hangs"])
async def test_while_nobody_makes_devices_larger_they_have_the_room_that_they_have(
    world: World, trouble: BangerError | str
) -> None:
    """The machine is held then, for which nobody else is needed; the next answer lets it run on."""
    disk = await used_to(world, 90 * MIB)
    size = world.host.sizes[world.host.changes]
    world.host.trouble = trouble
    assert await world.storage.tend(ID, disk) is Room.TIGHT
    use_to(world, disk, 40 * MIB)
    for _ in range(2):
        assert await world.storage.tend(ID, disk) is Room.SHORT
    assert world.host.sizes[world.host.changes] == size
    world.host.trouble = ""
    assert await world.storage.tend(ID, disk) is Room.TIGHT  # what was allocated for it then
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert world.host.sizes[world.host.changes] == disk.stat().st_size > size


@pytest.mark.usefixtures("quick", "little_free")
@pytest.mark.parametrize("trouble", [GONE, "hangs"], ids=["gone", "hangs"])
async def test_one_at_its_end_has_no_room_while_nobody_tells_whether_it_is_lost(
    world: World, trouble: BangerError | str
) -> None:
    disk = await used_to(world, 0)
    world.host.trouble, world.host.state = trouble, SnapshotState.OVERFLOWED
    world.host.done.clear()
    assert await world.storage.tend(ID, disk) is Room.SHORT
    assert [type(each) for each in world.host.done] == [LookAtSnapshot]
    world.host.trouble = ""
    assert await world.storage.tend(ID, disk) is Room.LOST


@pytest.mark.usefixtures("quick", "little_free")
async def test_what_was_lost_before_an_answer_that_came_too_late_is_not_overlooked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is plenty of room by then."""
    monkeypatch.setattr(dm_snapshot, "_SOON_S", 0.05)
    disk = await used_to(world, 90 * MIB)
    world.host.trouble, world.host.state = "late", SnapshotState.OVERFLOWED
    for _ in range(2):  # it has grown at once, which nobody was told
        assert await world.storage.tend(ID, disk) is Room.AMPLE
    world.host.trouble = ""
    assert await world.storage.tend(ID, disk) is Room.LOST


async def test_what_was_allocated_for_a_device_that_was_not_told_is_enough(
    world: World, free: Callable[[int], None]
) -> None:
    free(GIB)
    disk = await used_to(world, 40 * MIB)
    world.host.trouble = GONE
    assert await world.storage.tend(ID, disk) is Room.SHORT
    free(64 * MIB)
    size = disk.stat().st_size
    assert await world.storage.tend(ID, disk) is Room.SHORT
    world.host.trouble = ""
    assert await world.storage.tend(ID, disk) is Room.AMPLE
    assert world.host.sizes[world.host.changes] == disk.stat().st_size == size


@pytest.mark.usefixtures("little_free")
async def test_who_does_not_answer_is_waited_for_as_long_as_the_machine_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    timeout = asyncio.timeout

    def noted(delay: float) -> asyncio.Timeout:
        waited.append(delay)
        return timeout(0.01)

    monkeypatch.setattr(asyncio, "timeout", noted)
    disk = await used_to(world, 90 * MIB)
    world.host.trouble = "hangs"
    for _ in range(2):
        assert await world.storage.tend(ID, disk) is Room.TIGHT
    use_to(world, disk, 40 * MIB)
    for _ in range(2):
        assert await world.storage.tend(ID, disk) is Room.SHORT
    assert waited == [2.0, 0.25, 0.25, 2.0]


@pytest.mark.usefixtures("quick", "little_free")
async def test_who_does_not_answer_is_not_asked_again_and_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question that is given up is still under way, and has a connection to the helper."""
    monkeypatch.setattr(dm_snapshot, "_SOON_S", 0.05)
    disk = await used_to(world, 90 * MIB)
    world.host.trouble = "hangs"
    world.host.done.clear()
    for _ in range(5):
        assert await world.storage.tend(ID, disk) is Room.TIGHT
    with pytest.raises(Unavailable):
        await world.storage.is_lost(ID)
    asked = [type(each) for each in world.host.done]
    assert sorted(asked, key=str) == [GrowSnapshot, LookAtSnapshot]
    world.host.trouble, world.host.state = "", SnapshotState.OVERFLOWED
    assert await world.storage.is_lost(ID)  # asked anew: the answer may tell of what was before


@pytest.mark.usefixtures("little_free")
async def test_who_answers_slowly_is_heard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm_snapshot, "_ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(dm_snapshot, "_SOON_S", 0.01)
    disk = await used_to(world, 90 * MIB)
    world.host.trouble = "hangs"
    assert await world.storage.tend(ID, disk) is Room.TIGHT
    asyncio.get_running_loop().call_later(0.02, setattr, world.host, "trouble", "")
    await asyncio.sleep(0.04)
    monkeypatch.setattr(world.host, "takes_s", 0.04)
    await world.storage.tend(ID, disk)
    assert world.host.sizes[world.host.changes] == disk.stat().st_size
    assert await world.storage.tend(ID, disk) is Room.AMPLE


@pytest.mark.usefixtures("quick")
async def test_whether_something_is_lost_is_told_or_that_nobody_can_tell(world: World) -> None:
    await world.opened()
    assert not await world.storage.is_lost(ID)
    world.host.state = SnapshotState.INVALID
    assert await world.storage.is_lost(ID)
    for trouble in (GONE, "hangs"):
        world.host.trouble = trouble
        with pytest.raises(Unavailable):
            await world.storage.is_lost(ID)


async def test_a_device_that_was_not_told_of_its_files_size_is_told(world: World) -> None:
    disk = await world.opened()
    changes = world.host.changes
    size = world.host.sizes[changes]
    world.host.sizes[changes] = size - 40 * MIB
    written(disk, 100)
    await world.storage.tend(ID, disk)
    assert world.host.sizes[changes] >= size
