"""Images and kernels: whole or not there, built once for all who ask, kept while in use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.base.errors import BadRequest, BangerError, Conflict, Internal, NotFound
from banger.base.model import Image, Operation, OperationState
from banger.base.opid import current_op_id, new_op_id
from banger.images.build import ImageBuild
from banger.images.kernel import KernelBuild
from banger.images.progress import Progress as ImageProgress
from banger.images.root import RootFiles
from banger.images.userns import remove_tree
from banger.services import artifacts, image, kernel
from banger.services.artifacts import allocated_bytes, remove_leftovers, staged
from banger.services.operations import Progress, raise_failure
from banger.services.vm_spec import CreateRequest
from fakes import failing
from world import World, ended, made_world

NAME = "debian-bookworm-minimal"


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []


async def recorded() -> None:
    """A record that is written at once."""


async def test_a_staged_directory_appears_whole_when_it_is_published(tmp_path: Path) -> None:
    final = tmp_path / "images" / "x"
    async with staged(final) as staging:
        (staging.path / "file").write_text("content")
        assert not final.exists()
        assert staging.path.parent == final.parent
        assert staging.path.stat().st_mode & 0o777 == 0o700
        await staging.publish(recorded)
    assert names(final) == ["file"]
    assert names(final.parent) == ["x"]


async def test_what_was_not_published_is_removed(tmp_path: Path) -> None:
    async def build() -> None:
        async with staged(tmp_path / "x") as staging:
            (staging.path / "file").write_text("content")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await build()
    assert names(tmp_path) == []


@pytest.mark.parametrize("syncs", [0, 1, 2])
async def test_cancelled_at_any_point_it_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int
) -> None:
    """In the block, while its content is synced, and after the rename while that is synced."""
    seen: list[Path] = []
    here = asyncio.Event()

    async def to_thread(work: object, directory: Path) -> None:
        seen.append(directory)
        if len(seen) == syncs:
            here.set()
            await asyncio.Event().wait()

    async def build() -> None:
        async with staged(tmp_path / "x") as staging:
            (staging.path / "file").write_text("content")
            monkeypatch.setattr(asyncio, "to_thread", to_thread)
            if syncs == 0:
                here.set()
                await asyncio.Event().wait()
            await staging.publish(recorded)

    task = asyncio.create_task(build())
    await here.wait()
    if syncs == 2:
        assert names(tmp_path) == ["x"]
    monkeypatch.undo()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(tmp_path) == []


async def test_cancelled_while_it_is_recorded_it_stays_with_its_record(tmp_path: Path) -> None:
    recording, go_on = asyncio.Event(), asyncio.Event()

    async def record() -> None:
        recording.set()
        await go_on.wait()

    async def build() -> None:
        async with staged(tmp_path / "x") as staging:
            await staging.publish(record)

    task = asyncio.create_task(build())
    await recording.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    go_on.set()
    await task  # it is, and whoever asked is told so
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == []


async def test_what_is_no_file_is_not_written_over(tmp_path: Path) -> None:
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / "link"
    file.touch()
    os.mkfifo(pipe)
    link.symlink_to(file)
    for there in (pipe, link, Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(BadRequest, match="not a regular file"):
            await artifacts.check_target(there)
    for good in (file, tmp_path / "new"):
        await artifacts.check_target(good)


async def test_leftovers_are_what_a_dead_daemon_was_at_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that stays stops nothing; what another state's database has is not touched."""
    for name in ("known", ".staging-dead", "unrecorded", ".deleting-b", ".deleting-c", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".staging-dead", "unrecorded"):
        (tmp_path / name / ".unrecorded").touch()
    (tmp_path / ".staging-killed-at-once").mkdir()

    async def remove(path: Path) -> None:
        if path.name == ".deleting-b":
            raise failing("not ours")
        await remove_tree(path)

    monkeypatch.setattr(artifacts, "remove_tree", remove)
    async with staged(tmp_path / "alive") as staging:
        await remove_leftovers(tmp_path, {"known"})
        assert names(tmp_path) == [".deleting-b", ".staging-alive", "foreign", "known"]
        await staging.publish(recorded)
    said = capsys.readouterr().out
    assert "not ours" in said
    assert "left alone" in said
    await remove_leftovers(tmp_path / "none", set())


async def test_an_artifact_gives_its_room_back_before_its_record_goes(tmp_path: Path) -> None:
    """On a full disk nothing else may let the database take the change."""
    directory = tmp_path / "x"
    (directory / "below").mkdir(parents=True)
    (directory / "below/file").touch()
    seen: list[list[str]] = []

    async def unrecord() -> None:
        seen.append([*names(tmp_path), *names(tmp_path / ".deleting-x")])

    async def full() -> None:
        await unrecord()
        raise failing("the disk is full")

    with pytest.raises(BangerError):
        await artifacts.delete(directory, full)
    assert names(tmp_path) == [".deleting-x"]
    await artifacts.delete(directory, unrecord)
    await artifacts.delete(directory, unrecord)
    assert seen == [[".deleting-x"], [".deleting-x"], []]
    assert names(tmp_path) == []


async def test_whatever_is_wrong_with_a_leftover_the_daemon_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".staging-file").touch()
    for name in (".staging-other", ".deleting-a", ".deleting-b"):
        (tmp_path / name).mkdir()
    real = os.listdir

    def listed(path: str) -> list[str]:
        if Path(path).name == ".staging-other":  # another user's
            raise PermissionError
        return real(path)

    async def unrecord(artifact_id: str) -> None:
        if artifact_id == "a":
            raise failing("the disk is full")

    monkeypatch.setattr(os, "listdir", listed)
    await remove_leftovers(tmp_path, set(), unrecord)
    assert names(tmp_path) == [".deleting-a", ".staging-file", ".staging-other"]


async def test_a_deletion_that_was_cut_off_takes_the_record_along(tmp_path: Path) -> None:
    for name in (".deleting-x", "y"):
        (tmp_path / name).mkdir()
    gone: list[str] = []

    async def unrecord(artifact_id: str) -> None:
        gone.append(artifact_id)

    await remove_leftovers(tmp_path, {"x", "y"}, unrecord)
    assert (gone, names(tmp_path)) == (["x"], ["y"])


def test_allocation_is_blocks_and_not_lengths(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "full").write_bytes(b"x" * 8192)
    assert 8192 <= allocated_bytes(tmp_path) < 1 << 20


class Builder:
    """Stands in for the tools that build images and kernels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.images = self.kernels = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.building = asyncio.Event()
        self.fail: BaseException | None = None
        patch.setattr(image, "build_image", self.build_image)
        patch.setattr(kernel, "build_kernel", self.build_kernel)

    async def build_image(self, name: str, dest: Path, *, progress: ImageProgress) -> ImageBuild:
        self.images += 1
        progress("install", "packages", 10)
        (dest / "rootfs.ext4").write_text(name)
        (dest / "work-seed.ext4").write_text("seed")
        self.building.set()
        await self.go_on.wait()
        if self.fail is not None:
            raise self.fail
        return ImageBuild(RootFiles(dest / "rootfs.ext4", dest / "work-seed.ext4"), ("git 1",))

    async def build_kernel(self, dest: Path, *, progress: ImageProgress) -> KernelBuild:
        self.kernels += 1
        (dest / "vmlinux").touch()
        await asyncio.sleep(0)
        return KernelBuild(
            version="6.1",
            vmlinux=dest / "vmlinux",
            boot_modules=dest / "boot",
            modules=dest / "modules.ext4",
            config=dest / "config",
        )


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    return Builder(monkeypatch)


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def begin(world: World, name: str = NAME) -> Progress:
    token = current_op_id.set(new_op_id())
    try:
        return await world.images.begin_build(name)
    finally:
        current_op_id.reset(token)


async def test_an_image_that_was_built_is_recorded_with_its_files(
    world: World, builder: Builder
) -> None:
    done = await ended(await begin(world))
    assert done.state is OperationState.COMPLETED
    made = await world.images.get(NAME)
    assert done.image == made
    assert Path(made.rootfs_path).read_text() == NAME
    assert Path(made.rootfs_path).parent == world.paths.image_dir(made.id)
    assert made.packages == ("git 1",)
    assert (await world.kernels.get(made.kernel_id)).name == "debian"


async def test_two_requests_for_one_image_share_one_build(world: World, builder: Builder) -> None:
    builder.go_on.clear()
    first, second = await begin(world), await begin(world)
    assert first is second
    ensuring = [asyncio.create_task(world.images.ensure(NAME, a_progress(world))) for _ in range(3)]
    await builder.building.wait()
    builder.go_on.set()
    found = await asyncio.wait_for(asyncio.gather(*ensuring), 10)
    assert builder.images == 1
    assert {each.id for each in found} == {(await world.images.get(NAME)).id}


def a_progress(world: World) -> Progress:
    """Of an operation that goes on."""

    async def wait(progress: Progress) -> None:
        await asyncio.Event().wait()

    token = current_op_id.set(new_op_id())
    try:
        return world.operations.begin("vm.create", "", wait)
    finally:
        current_op_id.reset(token)


async def test_an_image_that_is_there_is_not_built_again(world: World, builder: Builder) -> None:
    await ended(await begin(world))
    with pytest.raises(Conflict, match=f'image "{NAME}" already exists'):
        await begin(world)
    await world.images.ensure(NAME, a_progress(world))
    assert builder.images == 1


async def test_a_build_that_ends_while_another_is_asked_for_is_not_made_twice(
    world: World, builder: Builder
) -> None:
    """At whatever step of the first build the second is asked for."""
    for steps in range(40):
        built = builder.images
        await begin(world)
        for _ in range(steps * steps // 4):
            await asyncio.sleep(0)
        await asyncio.wait_for(world.images.ensure(NAME, a_progress(world)), 10)
        assert builder.images == built + 1
        await world.images.delete(NAME)


async def test_what_nobody_can_build_is_refused_with_what_can_be(world: World) -> None:
    with pytest.raises(BadRequest, match='does not know how to build "arch"') as caught:
        await world.images.begin_build("arch")
    assert NAME in caught.value.hint


async def test_an_image_that_is_missing_says_how_to_get_it(world: World) -> None:
    with pytest.raises(NotFound) as buildable:
        await world.images.get(NAME)
    assert buildable.value.hint == f"build it: banger image build {NAME}"
    with pytest.raises(NotFound) as other:
        await world.images.get("arch")
    assert "banger image list" in other.value.hint


async def failed(world: World) -> BangerError:
    done: Operation = await ended(await begin(world))
    with pytest.raises(BangerError) as caught:
        raise_failure(done)
    return caught.value


async def test_a_build_that_fails_leaves_nothing_and_may_be_tried_again(
    world: World, builder: Builder
) -> None:
    before = names(world.paths.images_dir)
    builder.fail = failing("no disk")
    assert (await failed(world)).message == "no disk"
    assert names(world.paths.images_dir) == before
    builder.fail = None
    assert (await ended(await begin(world))).state is OperationState.COMPLETED


async def test_a_build_that_is_cancelled_leaves_nothing(world: World, builder: Builder) -> None:
    before = names(world.paths.images_dir)
    builder.go_on.clear()
    progress = await begin(world)
    await builder.building.wait()
    assert names(world.paths.images_dir) != before
    await world.operations.cancel(progress.record.id)
    assert names(world.paths.images_dir) == before


async def test_an_image_that_cannot_be_recorded_is_removed_again(
    world: World, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(world.paths.images_dir)

    async def full(image: Image) -> None:
        raise Internal("the database failed")

    monkeypatch.setattr(world.store, "insert_image", full)
    assert (await failed(world)).message == "the database failed"
    assert names(world.paths.images_dir) == before


async def test_who_waits_for_a_build_hears_how_it_goes_and_why_it_failed(
    world: World, builder: Builder
) -> None:
    builder.fail = failing("no disk")
    progress = world.begin(CreateRequest(name="box", image=NAME))
    done = await ended(progress)
    assert done.error is not None
    assert done.error.message == "no disk"
    await world.assert_nothing_left()


def the_build(world: World) -> Progress:
    (build,) = [each for each in world.operations.all() if each.kind == "image.build"]
    return world.operations.get(build.id)


@pytest.mark.parametrize("leaver", ["run", "build"])
async def test_a_build_goes_on_when_one_of_those_who_wait_leaves(
    world: World, builder: Builder, leaver: str
) -> None:
    builder.go_on.clear()
    creation = world.begin(CreateRequest(name="box", image=NAME))
    await builder.building.wait()
    build = await begin(world)
    assert build is the_build(world)
    assert build.record.id != creation.record.id
    if leaver == "run":
        await world.operations.cancel(creation.record.id)
    else:
        await world.operations.leave(build.record.id)
    builder.go_on.set()
    assert (await ended(build)).state is OperationState.COMPLETED
    await ended(creation)


async def test_a_build_is_taken_back_when_the_last_who_waits_leaves(
    world: World, builder: Builder
) -> None:
    before = names(world.paths.images_dir)
    builder.go_on.clear()
    creations = [world.begin(CreateRequest(name=name, image=NAME)) for name in ("one", "two")]
    await builder.building.wait()
    for creation in creations:
        assert not the_build(world).record.done
        await world.operations.cancel(creation.record.id)
    assert the_build(world).record.state is OperationState.CANCELLED
    assert names(world.paths.images_dir) == before


async def test_an_image_asked_for_while_its_build_is_taken_back_is_built_anew(
    world: World, builder: Builder
) -> None:
    builder.go_on.clear()
    first = await begin(world)
    await builder.building.wait()
    leaving = asyncio.create_task(world.operations.leave(first.record.id))
    await asyncio.sleep(0)
    builder.go_on.set()
    second = await asyncio.wait_for(begin(world), 10)
    assert second is not first
    assert (await leaving).state is OperationState.CANCELLED
    assert (await ended(second)).state is OperationState.COMPLETED


async def test_an_image_in_use_is_kept_and_goes_with_its_files_afterwards(world: World) -> None:
    await world.create("box")
    with pytest.raises(Conflict) as caught:
        await world.images.delete("base")
    assert caught.value.message == 'image "base" is used by box'
    await world.delete("box", force=True)
    gone = await world.images.delete("base")
    assert not Path(gone.artifact_dir).exists()
    with pytest.raises(NotFound):
        await world.images.get("base")


async def test_one_kernel_is_built_for_all_who_need_one(
    world: World, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "DEBIAN_KERNEL", "other")
    made = await asyncio.gather(*(world.kernels.ensure(lambda *_: None) for _ in range(3)))
    assert builder.kernels == 1
    assert len({each.id for each in made}) == 1


async def test_the_initramfs_is_made_anew_for_another_agent(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = await world.kernels.get("kernel")
    first = await world.kernels.initramfs(made)
    assert await world.kernels.initramfs(made) == first
    other = tmp_path / "other"
    other.write_bytes(b"another agent")
    monkeypatch.setattr(kernel, "agent_binary", lambda _: other)
    second = await world.kernels.initramfs(made)
    assert second != first
    assert b"another agent" in second.read_bytes()
