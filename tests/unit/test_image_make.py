"""Images of one's own, on drivers in memory: what is refused, who shares a build, and that one that
is cut off leaves nothing. (With real guests: tests/integration/test_image_from_guest.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from banger.base.errors import BadRequest, Conflict, NotFound
from banger.base.model import Operation, OperationState
from banger.base.opid import current_op_id, new_op_id
from banger.guest.requests import Exec, Pack, Setup, Stat, Write
from banger.images.root import RootFiles
from banger.images.unpack import BadArchive, Directory, Layer, Unpacked
from banger.services import build_log, image_guest, image_make
from banger.services.build_log import BuildLog
from banger.services.image_guest import Script
from banger.services.image_make import SCRIPTS_MAX_BYTES, MakeRequest
from banger.services.operations import Progress
from world import World, ended, made_world

_FILE = b"f" + bytes(12)
_FAILED = b"\0\0\0\0\7"
_CONTENT = Unpacked(root=Directory(0o755, 0, 0, 0, 0), home=None)


def request(name: str = "mine", **fields: Any) -> MakeRequest:
    if not fields.keys() & {"packages", "scripts"}:
        fields["packages"] = ("tree",)
    return MakeRequest(**{"name": name, "source": "base", **fields})


class Host:
    """What the host's tools would do with the files of a guest."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.error: Exception | None = None

    async def unpack(self, layers: Sequence[Layer], tree: Path, **_: object) -> Unpacked:
        self.came = [await asyncio.to_thread(_read, layer.descriptor) for layer in layers]
        if self.error is not None:
            raise self.error
        (tree / "etc").mkdir()
        (tree / "etc/machine-id").write_text("of the build")
        return _CONTENT

    async def depersonalised(
        self, tree: Path, content: Unpacked
    ) -> tuple[Unpacked, tuple[str, ...]]:
        (tree / "etc/machine-id").unlink()
        await asyncio.sleep(0)
        return content, ("tree=2.1",)

    async def make_root(self, tree: Path, content: Unpacked, dest: Path, **_: object) -> RootFiles:
        assert content is _CONTENT
        assert not (tree / "etc/machine-id").exists()
        await asyncio.sleep(0)
        files = RootFiles(dest / "rootfs.ext4", dest / "work-seed.ext4")
        for file in (files.rootfs, files.work_seed):
            file.write_text("made")
        return files


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(image_guest, "unpack", made.unpack)
    monkeypatch.setattr(image_make, "depersonalised", made.depersonalised)
    monkeypatch.setattr(image_make, "make_root", made.make_root)
    return made


@pytest.fixture
async def world(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host
) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        made.agent.stdout[Stat.KIND] = _FILE  # there is a shell
        yield made


async def begin(world: World, wanted: MakeRequest) -> Progress:
    token = current_op_id.set(new_op_id())
    try:
        return await world.image_maker.begin(wanted)
    finally:
        current_op_id.reset(token)


async def make(world: World, wanted: MakeRequest) -> Operation:
    return await ended(await begin(world, wanted))


async def assert_nothing_left(world: World) -> None:
    await world.assert_nothing_left()
    images = [image.name for image in await world.images.all()]
    assert images == ["base"]
    assert [path.name for path in world.paths.images_dir.iterdir()] == ["id-base"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "../x"}, "not a valid image"),
        ({"name": "debian-bookworm"}, "builds itself"),
        ({"source": "X"}, "not a valid image"),
        ({"packages": ()}, "would be as"),
        ({"packages": ("-y",)}, "-y"),
        ({"packages": ("--option=x",)}, "package"),
        ({"packages": ("tree-",)}, "tree-"),
        ({"packages": ("./x.deb",)}, "package"),
        ({"packages": ("a b",)}, "package"),
        ({"packages": ("a\n",)}, "package"),
        ({"packages": ("",)}, "package"),
        ({"packages": ("a",) * 1001}, "too many"),
        ({"scripts": (Script(name="s", content=bytes(SCRIPTS_MAX_BYTES + 1)),)}, "too large"),
        ({"memory_mib": 1}, "memory"),
    ],
)
async def test_what_is_wrong_is_refused_at_once(
    world: World, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRequest, match=said):
        await world.image_maker.begin(
            MakeRequest(**({"name": "mine", "source": "base", "packages": ("tree",)} | fields))
        )
    assert world.operations.all() == []


@pytest.mark.parametrize("package", ["g++", "libc6:i386", "tree=2.1.0-1", "py3-pip~=3", "7zip"])
def test_names_of_packages_may_have_what_they_have(package: str) -> None:
    request(packages=(package,)).check()


async def test_the_image_is_what_the_guest_sent(world: World, host: Host) -> None:
    world.agent.stdout[Pack.KIND] = b"files"
    wanted = request(packages=("tree",), scripts=(Script(name="setup", content=b"#!"),))
    done = await make(world, wanted)
    assert done.error is None, done.error
    assert done.image is not None
    assert (done.kind, done.target) == ("image.build", "mine")
    assert host.came == [b"files", b"files"]
    base = await world.images.get("base")
    assert (done.image.kernel_id, done.image.source) == (base.kernel_id, "built from base")
    assert done.image.packages == ("tree=2.1",)
    assert await world.images.get("mine") == done.image
    assert world.agent.opened.count(Write.KIND) == 1
    assert world.agent.opened.count(Exec.KIND) == 3  # packages, the script, settling
    await world.assert_nothing_left()


async def test_a_name_that_is_taken_is_a_conflict_before_anything_is_done(world: World) -> None:
    with pytest.raises(Conflict, match="already exists"):
        await begin(world, request("base"))
    assert world.operations.all() == []


async def test_an_image_that_is_not_there_is_said(world: World) -> None:
    done = await make(world, request(source="nothing"))
    assert done.error is not None
    assert (done.error.code, "nothing" in done.error.message) == (NotFound.code, True)
    await assert_nothing_left(world)


async def test_equal_requests_share_a_build_and_others_for_the_name_are_refused(
    world: World,
) -> None:
    world.agent.exits[Exec.KIND] = None  # it goes on
    script = Script(name="setup", content=b"one")
    first = await begin(world, request(scripts=(script,)))
    assert await begin(world, request(scripts=(script,))) is first
    for other in (
        request(scripts=(Script(name="setup", content=b"two"),)),
        request(scripts=(script,), vcpu_count=1),
        request(packages=("tree",)),
    ):
        with pytest.raises(Conflict, match="another way"):
            await begin(world, other)
    second = await begin(world, request("other"))  # another image is nobody's business
    await world.operations.leave(first.record.id)
    assert not first.record.done
    await world.operations.leave(first.record.id)
    assert first.record.state is OperationState.CANCELLED
    await world.operations.cancel(second.record.id)
    await assert_nothing_left(world)
    world.agent.exits.clear()
    assert (await make(world, request(packages=("tree",)))).error is None


async def test_of_two_at_once_one_alone_begins(world: World) -> None:
    begun = await asyncio.gather(
        *(begin(world, request(packages=(name,))) for name in ("a", "b")), return_exceptions=True
    )
    (progress,) = (each for each in begun if isinstance(each, Progress))
    (error,) = (each for each in begun if isinstance(each, Conflict))
    assert "another way" in str(error)
    await world.operations.cancel(progress.record.id)


async def test_what_fails_in_the_guest_is_told_with_the_end_of_its_output(world: World) -> None:
    world.agent.exits[Exec.KIND] = _FAILED
    world.agent.stdout[Exec.KIND] = b"first\nlast words\n"
    for wanted, said in (
        (request(packages=("tree",)), "packages were not installed"),
        (request(scripts=(Script(name="setup", content=b""),)), 'script "setup" failed'),
    ):
        progress = await begin(world, wanted)
        done = await ended(progress)
        assert done.error is not None
        log = world.image_maker.log_of(progress)
        assert said in done.error.message
        assert "(status 7)" in done.error.message
        assert "last words" in done.error.message
        assert done.error.message.endswith(f"; inspect {log}")
        assert b"first\nlast words\n" in log.read_bytes()
        await assert_nothing_left(world)


async def test_without_a_shell_there_is_no_package_manager(world: World) -> None:
    del world.agent.stdout[Stat.KIND]
    world.agent.exits[Stat.KIND] = b"\2\0\0\0\2"  # ENOENT
    done = await make(world, request(packages=("tree",)))
    assert done.error is not None
    assert "no package manager" in done.error.message
    assert Exec.KIND not in world.agent.opened


@pytest.mark.parametrize("who", ["guest", "archive"])
async def test_files_that_cannot_be_taken_leave_nothing(world: World, host: Host, who: str) -> None:
    if who == "guest":
        world.agent.exits[Pack.KIND] = b"\2\0\0\0\5it cannot be read"
    else:
        host.error = BadArchive("it cannot be read", 0)
    done = await make(world, request())
    assert done.error is not None
    assert "it cannot be read" in done.error.message
    await assert_nothing_left(world)


async def test_a_machine_that_is_ended_ends_the_build(world: World) -> None:
    world.agent.exits[Exec.KIND] = None
    progress = await begin(world, request())
    while Exec.KIND not in world.agent.opened:
        await asyncio.sleep(0.01)
    (vm,) = await world.store.vms()
    assert vm.name.startswith("build-mine-")
    assert vm.spec.ephemeral
    await world.delete(vm.id, force=True)
    done = await ended(progress)
    assert done.error is not None
    assert f'vm "{vm.name}" has ended' in done.error.message
    await assert_nothing_left(world)


async def test_a_guest_that_does_not_come_up_leaves_its_console_and_nothing_else(
    world: World,
) -> None:
    world.agent.exits[Setup.KIND] = b"\2\0\0\0\x10busy"
    world.hypervisor.console = b"x" * (300 << 10) + b"\nKernel panic\x1b[2J\n"
    progress = await begin(world, request())
    done = await ended(progress)
    log = world.image_maker.log_of(progress)
    assert done.error is not None
    assert done.error.message.startswith("the machine of the build did not come up: ")
    assert "Kernel panic?[2J" in done.error.message
    assert done.error.message.endswith(f"; inspect {log}")
    assert "banger vm" not in done.error.hint
    assert log.read_bytes().endswith(b"\nKernel panic\x1b[2J\n")
    assert log.stat().st_size < 257 << 10
    await assert_nothing_left(world)


async def test_cut_off_while_its_guest_is_lost_it_leaves_nothing(world: World) -> None:
    world.agent.exits[Setup.KIND] = b"\2\0\0\0\x10busy"
    for steps in (*range(0, 400, 7), 10_000):
        progress = await begin(world, request())
        for _ in range(steps):
            await asyncio.sleep(0)
        await world.operations.cancel(progress.record.id)
        await assert_nothing_left(world)


async def test_cut_off_at_any_moment_it_leaves_nothing(world: World) -> None:
    steps, finished = 0, 0
    while finished < 2:
        progress = await begin(world, request())
        for _ in range(steps):
            await asyncio.sleep(0)
        done = await world.operations.cancel(progress.record.id)
        await world.assert_nothing_left()
        if done.state is OperationState.COMPLETED:
            finished += 1
            await world.images.delete("mine")
        await assert_nothing_left(world)
        steps = max(steps + 1, steps * 9 // 8)


def test_a_log_is_bounded_and_the_last_are_kept(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_log, "_LIMIT_BYTES", 100)
    paths = [short_path / "builds" / f"{number}.log" for number in range(build_log.KEEP + 3)]
    told: list[str] = []
    for path in paths:
        with BuildLog(path, told.append) as log:
            log.heading("it")
            log.write(b"one\r\ntw")
            log.write(b"o\n" + b"x" * 1000 + b"\n\x1b[2J\xff")
            assert log.tail() == f"one\ntwo\n{'x' * 400}\n\x1b[2J\ufffd"
        assert path.stat().st_size == 100
        assert path.stat().st_mode & 0o777 == 0o600
    assert told[:3] == ["one", "x" * 400, "one"]
    assert sorted((short_path / "builds").iterdir()) == sorted(paths[3:])
