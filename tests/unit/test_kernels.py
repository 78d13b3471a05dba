"""Kernels: imported, pulled, built once for all who ask, kept while something needs them."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import platform
import sqlite3
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.base.errors import BadRequest, BangerError, Conflict, NotFound, PreconditionFailed
from banger.base.files import move_into_place
from banger.base.model import Kernel, Operation, OperationState
from banger.base.opid import current_op_id, new_op_id
from banger.images import kernel_import
from banger.images.bundle import unpack_kernel_bundle
from banger.images.ext4 import Shape
from banger.images.kernel_import import KernelFiles, configured, import_kernel
from banger.images.progress import Progress as Tell
from banger.images.vmlinux import embedded_config, has_pvh_entry, linux_version
from banger.services import kernel as kernel_module
from banger.services.kernel import KernelService
from banger.services.operations import Progress
from banger.store.store import Store, migrations
from records import a_kernel, a_snapshot, a_vm, an_image
from test_bundle import kernel_files
from test_ext4_check import _image as write_ext4
from test_kernel_extract import make_bzimage
from world import World, ended, made_world

VERSION = "6.1.0-test"
BUILT_IN = """\
CONFIG_FAILOVER=y
CONFIG_NET_FAILOVER=y
CONFIG_VIRTIO=y
CONFIG_VIRTIO_MMIO=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_CONSOLE=y
CONFIG_EXT4_FS=y
"""
NAMES = ("failover", "net_failover", "virtio", "virtio_ring", "virtio_mmio", "virtio_pci",
         "virtio_blk", "virtio_net", "virtio_console")  # fmt: skip


def linux(content: bytes = b"", *, pvh: bool = True, version: str = VERSION) -> bytes:
    """An ELF that says it is Linux, with a PT_LOAD and the note of PVH."""
    banner = f"\0Linux version {version} (me@here) \0".encode() if version else b""
    note = struct.pack("<III", 4, 8, 18 if pvh else 17) + b"Xen\0" + bytes(8)
    body = note + banner + content
    begin = 64 + 2 * 56
    size = begin + len(body)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, begin, 0, 0, len(note), len(note), 4)
    return header + load + notes + body


def module(version: str = VERSION) -> bytes:
    return b"\x7fELF\0license=GPL\0vermagic=" + version.encode() + b" SMP mod_unload \0"


@pytest.fixture(autouse=True)
def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making file systems takes a tool; here an empty one will do."""

    async def make(source: Path, image: Path, shape: Shape) -> None:
        assert {path.stat().st_mode & 0o777 for path in source.rglob("*")} <= {0o755, 0o644}
        write_ext4(image)

    monkeypatch.setattr(kernel_import, "make_ext4", make)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "vmlinux"
    file.write_bytes(linux())
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config"
    file.write_text(BUILT_IN)
    return file


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A lib/modules/VERSION directory as an installation leaves it."""
    directory = tmp_path / "modules"
    (directory / "kernel/drivers").mkdir(parents=True)
    for name in NAMES:
        (directory / f"kernel/drivers/{name}.ko").write_bytes(module())
    listed = "".join(f"kernel/drivers/{name}.ko:\n" for name in NAMES)
    (directory / "modules.dep").write_text(listed)
    (directory / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    for name in ("build", "source"):
        (directory / name).symlink_to("/usr/src/linux")
    return directory


def quiet(stage: str, detail: str, percent: float) -> None:
    pass


async def imported(tmp_path: Path, files: KernelFiles) -> Path:
    dest = tmp_path / "dest"
    dest.mkdir()
    mask = os.umask(0o077)
    try:
        await import_kernel(files, dest, progress=quiet)
    finally:
        os.umask(mask)
    return dest


async def refused(tmp_path: Path, files: KernelFiles) -> str:
    with pytest.raises(PreconditionFailed) as caught:
        await imported(tmp_path, files)
    assert not (tmp_path / "dest/scratch").exists()
    return caught.value.message


# --- importing ---


async def test_a_kernel_with_modules(tmp_path: Path, image: Path, modules: Path) -> None:
    dest = await imported(tmp_path, KernelFiles(image, modules))
    assert sorted(path.name for path in dest.iterdir()) == [
        *("boot-modules", "modules.ext4", "vmlinux"),
    ]
    assert sorted(path.name for path in (dest / "boot-modules").iterdir()) == [
        f"{number:02}-{name}.ko" for number, name in enumerate(NAMES)
    ]


async def test_a_packed_kernel_that_has_all_built_in(tmp_path: Path, config: Path) -> None:
    packed = tmp_path / "bzImage"
    packed.write_bytes(make_bzimage(gzip.compress(linux())))
    dest = await imported(tmp_path, KernelFiles(packed, config=config))
    assert (dest / "vmlinux").read_bytes() == linux()
    assert (dest / "config").read_text() == BUILT_IN
    assert list((dest / "boot-modules").iterdir()) == []


async def test_a_kernel_that_holds_its_configuration(tmp_path: Path, image: Path) -> None:
    image.write_bytes(linux(b"IKCFG_ST" + gzip.compress(BUILT_IN.encode()) + b"IKCFG_ED"))
    dest = await imported(tmp_path, KernelFiles(image))
    assert (dest / "config").read_text() == BUILT_IN


async def test_what_is_neither_built_in_nor_a_module_is_named(
    tmp_path: Path, image: Path, config: Path
) -> None:
    config.write_text(BUILT_IN.replace("CONFIG_VIRTIO_NET=y", "CONFIG_VIRTIO_NET=m"))
    said = await refused(tmp_path, KernelFiles(image, config=config))
    assert said == f"kernel {VERSION} has no module virtio_net"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no kernel found in the boot image"),
        (b"#!/bin/sh\n", "no kernel found in the boot image"),
        (linux()[:-1], "cut off"),
        (linux(version=""), "is not a Linux kernel"),
        (linux(version="../x"), "is not a Linux kernel"),
        (linux(pvh=False), "it has no PVH entry"),
        (linux(), "does not say what is built into it"),
        (linux(b"IKCFG_ST\x1f\x8bdamaged"), "does not say what is built into it"),
    ],
)
async def test_what_cannot_be_booted_is_refused(
    tmp_path: Path, image: Path, content: bytes, problem: str
) -> None:
    image.write_bytes(content)
    assert problem in await refused(tmp_path, KernelFiles(image))


async def test_ext4_has_to_be_built_in(tmp_path: Path, image: Path, modules: Path) -> None:
    (modules / "modules.builtin").unlink()
    assert "has no ext4 built in" in await refused(tmp_path, KernelFiles(image, modules))


async def test_modules_of_another_kernel_are_refused(
    tmp_path: Path, image: Path, modules: Path
) -> None:
    (modules / "kernel/drivers/virtio_blk.ko").write_bytes(module("6.1.0-other"))
    said = await refused(tmp_path, KernelFiles(image, modules))
    assert said == (
        f"kernel/drivers/virtio_blk.ko is for Linux 6.1.0-other, and the kernel is {VERSION}"
    )


@pytest.mark.parametrize(
    "dep",
    [
        "kernel/drivers/virtio.ko: ../../../etc/passwd.ko\n",
        "kernel/drivers/virtio.ko: /etc/passwd.ko\n",
        "kernel/drivers/virtio.ko: kernel/drivers/virtio.ko\n",
        "kernel/drivers/virtio.ko: kernel/b.ko\nkernel/b.ko: kernel/drivers/virtio.ko\n",
    ],
)
async def test_lists_that_lead_elsewhere_or_in_circles_are_refused(
    tmp_path: Path, image: Path, modules: Path, dep: str
) -> None:
    (modules / "modules.dep").write_text((modules / "modules.dep").read_text() + dep)
    assert "is damaged" in await refused(tmp_path, KernelFiles(image, modules))


async def test_a_module_that_lies_elsewhere_is_not_one(
    tmp_path: Path, image: Path, modules: Path
) -> None:
    (tmp_path / "virtio_blk.ko").write_bytes(module())
    listed = (modules / "modules.dep").read_text()
    elsewhere = listed.replace("kernel/drivers/virtio_blk", f"{tmp_path}/virtio_blk")
    (modules / "modules.dep").write_text(elsewhere)
    said = await refused(tmp_path, KernelFiles(image, modules))
    assert said.endswith("has no module virtio_blk")


@pytest.mark.parametrize("name", ["link", "fifo", "device", "deep", "unprintable"])
async def test_a_tree_of_anything_but_files_is_refused(
    tmp_path: Path, image: Path, modules: Path, name: str
) -> None:
    place = modules / "kernel" / name
    if name == "link":
        place.symlink_to("/etc/passwd")
    elif name == "fifo":
        os.mkfifo(place)
    elif name == "device":
        (modules / "kernel/build").symlink_to("/dev/zero")  # only at the top is it usual
    elif name == "deep":
        (place / "/".join("d" * 40)).mkdir(parents=True)
    else:
        (modules / "kernel/\x1b[2J").touch()
    said = await refused(tmp_path, KernelFiles(image, modules))
    assert any(word in said for word in ("neither a file", "too large", "cannot be printed"))


async def test_a_tree_that_is_too_large_is_refused(
    tmp_path: Path, image: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_import, "_MODULES_MAX_BYTES", 100)
    assert "too large for modules" in await refused(tmp_path, KernelFiles(image, modules))


async def test_modules_without_their_list_are_refused_with_how_to_make_it(
    tmp_path: Path, image: Path, modules: Path
) -> None:
    (modules / "modules.dep").unlink()
    said = await refused(tmp_path, KernelFiles(image, modules))
    assert said == f"{modules} has no modules.dep"


@pytest.mark.parametrize("name", ["modules.dep", "modules.builtin"])
async def test_lists_larger_than_any_are_refused_unread(
    tmp_path: Path, image: Path, modules: Path, name: str
) -> None:
    with (modules / name).open("r+b") as file:
        file.truncate((16 << 20) + 1)
    said = await refused(tmp_path, KernelFiles(image, modules))
    assert said == f"{name} is larger than 16 MiB"


@pytest.mark.parametrize("step", ["_read", "_write", "_boot_modules"])
async def test_cancelled_it_ends_when_its_thread_has_ended(
    tmp_path: Path, image: Path, modules: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whoever removes its files has them to itself then."""
    real, inside, go_on = getattr(kernel_import, step), threading.Event(), threading.Event()

    def slow(*arguments: Any) -> object:
        inside.set()
        assert go_on.wait(10)
        return real(*arguments)

    monkeypatch.setattr(kernel_import, step, slow)
    dest = tmp_path / "dest"
    dest.mkdir()
    work = import_kernel(KernelFiles(image, modules), dest, progress=quiet)
    task = asyncio.create_task(work)
    assert await asyncio.to_thread(inside.wait, 10)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (dest / "boot-modules").exists()


def test_what_a_hostile_kernel_says_does_not_hold_others_up() -> None:
    """A thousand times the beginning of a version; and a version across two pieces."""
    version = b"Linux version 6.1.0-test (me@here)"
    assert linux_version(b"Linux version 1" * 999 + version) == VERSION
    assert linux_version(b"Linux version 1" * 1000 + version) == ""
    for before in range((1 << 20) - len(version), 1 << 20):
        assert linux_version(bytes(before) + version) == VERSION
    packed = b"IKCFG_ST" + gzip.compress(b"CONFIG_X=y")
    assert embedded_config(bytes((1 << 20) - 4) + packed) == b"CONFIG_X=y"


def test_what_a_kernel_says_of_itself() -> None:
    assert linux_version(linux()) == VERSION
    assert linux_version(b"Linux version %s (%s)") == ""
    assert has_pvh_entry(linux())
    assert not has_pvh_entry(linux(pvh=False))
    assert embedded_config(b"IKCFG_ST" + gzip.compress(b"\0" * (5 << 20))) is None
    assert configured(b"CONFIG_VIRTIO=y\n# CONFIG_VIRTIO_BLK is not set\n") == {
        *("virtio", "virtio_ring"),
    }


# --- the service ---


@pytest.fixture
async def world(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with made_world(short_path, monkeypatch) as made:
        yield made


async def begun(begin: Awaitable[Progress]) -> Operation:
    token = current_op_id.set(new_op_id())
    try:
        progress = await begin
    finally:
        current_op_id.reset(token)
    return await ended(progress)


def directories(world: World) -> set[str]:
    return {path.name for path in world.paths.kernels_dir.iterdir()}


async def test_an_import_is_recorded_with_where_it_is_from(
    world: World, image: Path, modules: Path
) -> None:
    done = await begun(world.kernels.begin_import("mine", KernelFiles(image, modules)))
    assert done.error is None
    made = await world.kernels.named("mine")
    assert done.kernel == made
    assert (made.version, made.source) == (VERSION, f"imported from {image}")
    directory = world.paths.kernel_dir(made.id)
    assert (directory / "vmlinux").read_bytes() == linux()
    record = msgspec.json.decode((directory / "kernel.json").read_bytes(), type=Kernel)
    assert record == made
    with pytest.raises(Conflict, match='kernel "mine" already exists'):
        await begun(world.kernels.begin_import("mine", KernelFiles(image, modules)))


async def test_an_import_that_fails_leaves_nothing(world: World, image: Path) -> None:
    before = directories(world)
    done = await begun(world.kernels.begin_import("mine", KernelFiles(image)))
    assert done.state is OperationState.FAILED
    assert directories(world) == before


async def test_of_two_imports_under_one_name_the_later_fails(
    world: World, image: Path, config: Path, modules: Path
) -> None:
    """They are not one: their files differ."""
    both = await asyncio.gather(
        begun(world.kernels.begin_import("mine", KernelFiles(image, config=config))),
        begun(world.kernels.begin_import("mine", KernelFiles(image, modules))),
    )
    assert sorted(each.state for each in both) == [OperationState.COMPLETED, OperationState.FAILED]
    (error,) = [each.error for each in both if each.error is not None]
    assert error.message == 'kernel "mine" already exists'
    assert len(directories(world)) == 2


async def test_one_import_asked_for_twice_is_made_once(
    world: World, image: Path, config: Path
) -> None:
    files = KernelFiles(image, config=config)
    one, two = await asyncio.gather(
        *(begun(world.kernels.begin_import("mine", files)) for _ in range(2))
    )
    assert one.id == two.id


async def test_names_and_paths_are_checked_before_anything_begins(world: World) -> None:
    for begin in (
        world.kernels.begin_import("../x", KernelFiles(Path("/x"))),
        world.kernels.begin_import("x", KernelFiles(Path("x"))),
        world.kernels.begin_import("x", KernelFiles(Path("/x"), Path("x"))),
        world.kernels.begin_pull("../x"),
        world.kernels.begin_build("../x"),
        world.kernels.begin_build("mine"),
    ):
        with pytest.raises(BadRequest):
            await begin
    assert world.operations.all() == []


async def test_a_kernel_that_is_missing_says_how_to_get_it(world: World) -> None:
    with pytest.raises(NotFound) as mine:
        await world.kernels.named("mine")
    assert mine.value.hint.startswith("there is: debian; ")
    await world.store.delete_kernel("kernel")
    with pytest.raises(NotFound) as usual:
        await world.kernels.named("debian")
    assert usual.value.hint == "build it: banger kernel build debian"


async def test_a_build_for_an_image_and_one_asked_for_are_one(
    world: World, image: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store.delete_kernel("kernel")
    builds, go_on = 0, asyncio.Event()

    async def build(dest: Path, *, progress: Tell) -> object:
        nonlocal builds
        builds += 1
        progress("download", "packages", 10)
        await go_on.wait()
        return await import_kernel(KernelFiles(image, config=config), dest, progress=progress)

    monkeypatch.setattr(kernel_module, "build_kernel", build)
    said: list[tuple[str, str, float]] = []
    ensuring = asyncio.create_task(world.kernels.ensure(lambda *step: said.append(step)))
    asked = asyncio.create_task(begun(world.kernels.begin_build("debian")))
    while ("download", "packages", 10) not in said:
        await asyncio.sleep(0)
    go_on.set()
    assert (await asked).kernel == await ensuring
    assert builds == 1
    assert "" not in {stage for stage, _, _ in said}


async def test_a_kernel_that_came_another_way_during_its_build_is_taken(
    world: World, image: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store.delete_kernel("kernel")
    begun_to, go_on = asyncio.Event(), asyncio.Event()

    async def build(dest: Path, *, progress: Tell) -> object:
        begun_to.set()
        await go_on.wait()
        return await import_kernel(KernelFiles(image, config=config), dest, progress=progress)

    monkeypatch.setattr(kernel_module, "build_kernel", build)
    ensuring = asyncio.create_task(world.kernels.ensure(quiet))
    await begun_to.wait()
    done = await begun(world.kernels.begin_import("debian", KernelFiles(image, config=config)))
    go_on.set()
    assert done.kernel is not None
    assert await ensuring == done.kernel
    assert directories(world) == {"kernel", done.kernel.id}


async def test_a_kernel_in_use_is_kept_and_goes_with_its_files_afterwards(world: World) -> None:
    vm = await world.create("box")
    await world.store.insert_snapshot(a_snapshot("snap", kernel_id="kernel"))
    with pytest.raises(Conflict) as caught:
        await world.kernels.delete("debian")
    assert caught.value.message == ('kernel "debian" is used by image base, snapshot snap, vm box')
    await world.delete(vm.name, force=True)
    await world.images.delete("base")
    with pytest.raises(Conflict, match="is used by snapshot snap"):
        await world.kernels.delete("debian")
    await world.store.delete_snapshot(a_snapshot("snap").id)
    gone = await world.kernels.delete("debian")
    assert not Path(gone.artifact_dir).exists()
    assert await world.kernels.all() == []


async def test_a_kernel_is_not_deleted_while_somebody_begins_to_use_it(world: World) -> None:
    kernel = a_kernel("mine", id="mine", artifact_dir=str(world.paths.kernel_dir("mine")))
    await world.store.insert_kernel(kernel)
    async with world.kernels.kept(kernel):
        deleting = asyncio.create_task(world.kernels.delete("mine"))
        await asyncio.sleep(0.05)
        await world.store.insert_image(an_image("new", kernel_id="mine"))
    with pytest.raises(Conflict, match="is used by image new"):
        await deleting
    await world.store.delete_image(an_image("new").id)
    await world.kernels.delete("mine")
    with pytest.raises(Conflict, match="was deleted meanwhile"):
        async with world.kernels.kept(kernel):
            pass


# --- pulling and exporting ---


async def exported(world: World, tmp_path: Path) -> Path:
    """The bundle of a kernel called ``mine``, which is then gone, and a catalog beside it."""
    kernel = kernel_files(tmp_path / "kernel")
    await world.store.insert_kernel(msgspec.structs.replace(kernel, name="mine", id="mine"))
    file = tmp_path / "mine.tar.zst"
    done = await begun(world.kernels.begin_export("mine", file, 0o027))
    assert done.error is None
    assert file.stat().st_mode & 0o777 == 0o640
    await world.store.delete_kernel("mine")
    (tmp_path / "catalog.toml").write_text(
        f'version = 1\n[[kernels]]\nname = "mine"\nurl = "{file.name}"\n'
        f'sha256 = "{hashlib.sha256(file.read_bytes()).hexdigest()}"\n'
        f'size_bytes = {file.stat().st_size}\narchitecture = "{platform.machine()}"\n'
    )
    return file


def service(world: World, tmp_path: Path) -> KernelService:
    catalog = str(tmp_path / "catalog.toml")
    return KernelService(world.paths, world.store, world.operations, world.image_cache, catalog)


async def test_a_kernel_that_was_exported_can_be_pulled(world: World, tmp_path: Path) -> None:
    file = await exported(world, tmp_path)
    assert directories(world) == {"kernel"}
    kernels = service(world, tmp_path)
    done = await begun(kernels.begin_pull("mine"))
    assert done.error is None
    made = await kernels.named("mine")
    assert made.source == f"pulled from {file.as_uri()}"
    assert Path(made.vmlinux_path).read_bytes() == (tmp_path / "kernel/vmlinux").read_bytes()
    assert list(world.paths.downloads_dir.iterdir()) == []
    with pytest.raises(Conflict, match="already exists"):
        await begun(kernels.begin_pull("mine"))


async def test_a_pull_that_fails_leaves_nothing(world: World, tmp_path: Path) -> None:
    file = await exported(world, tmp_path)
    kernels = service(world, tmp_path)
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    done = await begun(kernels.begin_pull("mine"))
    assert done.error is not None
    assert "it is not what it should be" in done.error.message
    done = await begun(kernels.begin_pull("other"))
    assert done.error is not None
    assert done.error.message.startswith('there is no kernel "other" in file:///')
    assert directories(world) == {"kernel"}
    assert list(world.paths.downloads_dir.iterdir()) == []


async def test_without_a_catalog_nothing_can_be_pulled(world: World) -> None:
    done = await begun(world.kernels.begin_pull("mine"))
    assert done.error is not None
    assert done.error.message == "there is no catalog to pull from"


async def test_an_export_replaces_a_file_and_leaves_nothing_else(
    world: World, tmp_path: Path
) -> None:
    file = await exported(world, tmp_path)
    await world.store.insert_kernel(
        msgspec.structs.replace(kernel_files(tmp_path / "again"), name="mine", id="mine")
    )
    before = {path.name for path in tmp_path.iterdir()}
    file.write_text("old")
    assert (await begun(world.kernels.begin_export("mine", file, 0))).error is None
    dest = tmp_path / "dest"
    dest.mkdir()
    await unpack_kernel_bundle(file, dest, "x86_64", quiet)
    assert {path.name for path in tmp_path.iterdir()} == before | {"dest"}
    assert directories(world) == {"kernel"}
    for place in (tmp_path, tmp_path / "none/x", Path("relative")):
        with pytest.raises(BadRequest):
            await world.kernels.begin_export("mine", place, 0)


# --- the store ---


async def test_the_kernel_of_an_older_version_has_the_new_name(tmp_path: Path) -> None:
    path = tmp_path / "db"
    old = a_kernel("debian-cloud")
    record = msgspec.to_builtins(old)
    del record["source"]
    with sqlite3.connect(path) as db:
        for number, script in migrations():
            if number < 6:
                db.executescript(f"{script}; PRAGMA user_version = {number};")
        for row in (old.id, "other"):
            named = record | {"id": row, "name": "debian-cloud" if row == old.id else "other"}
            db.execute(
                "INSERT INTO kernels (id, name, record) VALUES (?, ?, ?)",
                (row, named["name"], msgspec.json.encode(named).decode()),
            )
    db.close()
    store = await Store.open(path)
    try:
        assert await store.kernel_named("debian") == msgspec.structs.replace(old, name="debian")
        assert [each.name for each in await store.kernels()] == ["debian", "other"]
        with pytest.raises(BangerError, match='kernel "debian" already exists'):
            await store.insert_kernel(a_kernel("debian", id="third"))
    finally:
        await store.close()


async def test_the_users_of_a_kernel_are_named(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "db")
    try:
        await store.insert_image(an_image("i", kernel_id="k"))
        await store.insert_vm(msgspec.structs.replace(a_vm("v"), kernel_id="k"))
        await store.insert_vm(a_vm("w"))
        await store.insert_snapshot(a_snapshot("s", kernel_id="k"))
        assert await store.users_of_kernel("k") == ["image i", "snapshot s", "vm v"]
        assert await store.users_of_kernel("none") == []
    finally:
        await store.close()


def test_a_file_is_moved_from_one_disk_to_another(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        other = Path(name)
        if other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is not a file system of its own")
        (other / "file").write_text("old")
        source = tmp_path / "source"
        source.write_text("new")
        move_into_place(source, other / "file", 0o640)
        assert [(each.name, each.read_text()) for each in other.iterdir()] == [("file", "new")]
        assert (other / "file").stat().st_mode & 0o777 == 0o640
        assert not source.exists()
        source.write_text("newer")
        (other / "directory").mkdir()
        with pytest.raises(OSError, match="directory"):
            move_into_place(source, other / "directory", 0o640)
        assert sorted(each.name for each in other.iterdir()) == ["directory", "file"]
