"""Bundles: packed and unpacked again, and everything hostile that a tar can hold."""

from __future__ import annotations

import asyncio
import io
import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.base.model import ImageConfig, InitMode, Kernel
from banger.images import bundle as bundle_module
from banger.images.bundle import (
    pack_image_bundle,
    pack_kernel_bundle,
    unpack_image_bundle,
    unpack_kernel_bundle,
)
from banger.images.bundle_tar import TarReader, TarWriter, write_sparsely
from records import a_kernel, an_image
from test_ext4_check import _image as make_ext4
from test_kernel_extract import make_elf

VERSION = "6.1.0-test"
VMLINUX = make_elf(b"\0Linux version 6.1.0-test (me) \0" * 9)


def quiet(stage: str, detail: str, percent: float) -> None:
    pass


def nothing() -> None:
    pass


def kernel_files(directory: Path) -> Kernel:
    """The record of a kernel whose files are in `directory`."""
    (directory / "boot-modules").mkdir(parents=True)
    (directory / "boot-modules/00-virtio.ko").write_bytes(b"virtio")
    (directory / "boot-modules/01-virtio_blk.ko").write_bytes(b"blk" * 1000)
    (directory / "vmlinux").write_bytes(VMLINUX)
    (directory / "config").write_text("CONFIG_X=y\n")
    return a_kernel(
        version=VERSION,
        architecture="x86_64",
        vmlinux_path=str(directory / "vmlinux"),
        boot_modules_path=str(directory / "boot-modules"),
        modules_path=str(make_ext4(directory / "modules.ext4")),
        config_path=str(directory / "config"),
    )


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


async def test_a_kernel_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source, dest, said = tmp_path / "source", tmp_path / "dest", list[tuple[str, float]]()
    kernel = kernel_files(source)
    dest.mkdir()
    await pack_kernel_bundle(kernel, tmp_path / "one", lambda *step: said.append(step[::2]))
    await pack_kernel_bundle(kernel, tmp_path / "two", quiet)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    built = await unpack_kernel_bundle(tmp_path / "one", dest, "x86_64", quiet)
    assert tree(dest) == tree(source)
    assert (built.version, built.vmlinux, built.config) == (
        *(VERSION, dest / "vmlinux", dest / "config"),
    )
    assert {path.stat().st_mode & 0o777 for path in dest.rglob("*.*")} == {0o600}
    assert said[-1] == ("pack", 100)


async def test_a_kernel_of_unknown_configuration_without_modules(tmp_path: Path) -> None:
    kernel = msgspec.structs.replace(kernel_files(tmp_path / "source"), config_path="")
    for module in Path(kernel.boot_modules_path).iterdir():
        module.unlink()
    (tmp_path / "dest").mkdir()
    await pack_kernel_bundle(kernel, tmp_path / "bundle", quiet)
    built = await unpack_kernel_bundle(tmp_path / "bundle", tmp_path / "dest", "x86_64", quiet)
    assert built.config is None
    assert list(built.boot_modules.iterdir()) == []


async def test_an_image_comes_out_sparse_and_with_what_it_says_of_itself(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    rootfs, seed = make_ext4(tmp_path / "registered.img"), make_ext4(tmp_path / "seed")
    with rootfs.open("r+b") as file:
        file.truncate(20 << 30)  # beyond what octal digits hold
        file.seek(10 << 30)
        file.write(b"in the middle")
    image = an_image(
        "box",
        rootfs_path=str(rootfs),
        work_seed_path=str(seed),
        init=InitMode.SYSTEMD,
        packages=("git=1",),
        config=ImageConfig(env=("A=1",), cmd=("sh",)),
    )
    await pack_image_bundle(image, "x86_64", tmp_path / "bundle", quiet)
    found = await unpack_image_bundle(
        tmp_path / "bundle", dest, "x86_64", quiet, limit_bytes=20_000
    )
    assert (found.info.init, found.info.packages) == (InitMode.SYSTEMD, ("git=1",))
    assert found.info.config == image.config
    assert found.rootfs.stat().st_size == 20 << 30
    assert found.rootfs.stat().st_blocks * 512 < 1 << 20
    with found.rootfs.open("rb") as file:
        file.seek(10 << 30)
        assert file.read(13) == b"in the middle"
    assert found.work_seed.read_bytes() == seed.read_bytes()


def test_what_is_written_is_a_tar_for_others_too(tmp_path: Path) -> None:
    """`tarfile` reads it, with a sparse file in more pieces than a header has room for."""
    file = tmp_path / "file"
    with file.open("wb") as opened:
        for piece in range(40):
            opened.seek(piece * 100_000 + 4096 - piece * 100_000 % 4096)
            opened.write(b"%d" % piece)
        opened.truncate(5_000_000)
    buffer = io.BytesIO()
    tar = TarWriter(buffer)
    tar.add("a", b"content")
    tar.add_directory("d")
    with file.open("rb") as opened:
        tar.add_file("d/sparse", opened, lambda _: None)
    tar.end()
    assert len(buffer.getvalue()) < 400_000
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as opened_tar:
        assert opened_tar.getnames() == ["a", "d", "d/sparse"]
        extracted = opened_tar.extractfile("d/sparse")
        assert extracted is not None
        assert extracted.read() == file.read_bytes()
    buffer.seek(0)
    reader = TarReader(buffer)
    for member in reader.members():
        if member.name == "d/sparse":
            with (tmp_path / "copy").open("wb") as copy:
                reader.copy(member, copy, nothing)
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks <= file.stat().st_blocks


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9000)), max_size=12), st.integers(0, 10_000)
)
def test_zeros_become_holes_and_nothing_else_does(
    runs: list[tuple[bool, int]], offset: int
) -> None:
    data = b"".join((b"x" if full else b"\0") * length for full, length in runs)
    target = io.BytesIO(bytes(offset + len(data)))
    write_sparsely(target, offset, data)
    assert target.getvalue() == bytes(offset) + data


# --- hostile ones ---


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def raw_tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def usual() -> list[tuple[tarfile.TarInfo, bytes]]:
    ext4 = io.BytesIO()
    superblock = bytearray(1024)
    struct.pack_into("<I", superblock, 0x04, 4)
    struct.pack_into("<I", superblock, 0x18, 0)
    struct.pack_into("<H", superblock, 0x38, 0xEF53)
    ext4.write(bytes(1024) + superblock + bytes(2048))
    info = {"version": VERSION, "architecture": "x86_64"}
    return [
        member("kernel.json", msgspec.json.encode(info)),
        member("vmlinux", VMLINUX),
        member("modules.ext4", ext4.getvalue()),
        member("boot-modules", type=tarfile.DIRTYPE),
        member("boot-modules/00-virtio.ko", b"virtio"),
    ]


def without(name: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [each for each in usual() if each[0].name != name]


async def unpack(tmp_path: Path, tar: bytes) -> None:
    bundle, dest = tmp_path / "bundle", tmp_path / "dest"
    dest.mkdir()
    bundle.write_bytes(zstandard.ZstdCompressor().compress(tar))
    await unpack_kernel_bundle(bundle, dest, "x86_64", quiet)


async def refused(tmp_path: Path, tar: bytes) -> str:
    with pytest.raises(PreconditionFailed) as caught:
        await unpack(tmp_path, tar)
    assert caught.value.hint
    outside = {path.name for path in tmp_path.iterdir()} - {"bundle", "dest"}
    assert outside == set()
    return caught.value.message


async def test_what_others_tars_hold_is_taken_if_it_is_what_it_should_be(tmp_path: Path) -> None:
    await unpack(tmp_path, raw_tar(*usual()))


async def test_a_tar_with_dots_before_its_names(tmp_path: Path) -> None:
    made = [member(".", type=tarfile.DIRTYPE)]
    for info, content in usual():
        info.name = f"./{info.name}"
        made.append((info, content))
    await unpack(tmp_path, raw_tar(*made))


HOSTILE = {
    "parent": (member("../x", b"x"), "../x does not belong into it"),
    "parent below": (member("boot-modules/../../x", b"x"), "does not belong into it"),
    "absolute": (member("/tmp/x", b"x"), "/tmp/x does not belong into it"),
    "other": (member("rootfs.ext4", b"x"), "rootfs.ext4 does not belong into it"),
    "other directory": (member("d", type=tarfile.DIRTYPE), "d does not belong into it"),
    "module": (member("boot-modules/x.ko", b"x"), "boot-modules/x.ko does not belong into it"),
    "twice": (member("vmlinux", b"x"), "vmlinux is in it twice"),
    "twice the info": (member("kernel.json", b"{}"), "kernel.json is in it twice"),
    "symlink": (
        member("config", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "config in it is a symbolic link",
    ),
    "hardlink": (
        member("config", type=tarfile.LNKTYPE, linkname="vmlinux"),
        "config in it is a hard link",
    ),
    "device": (member("config", type=tarfile.CHRTYPE), "config in it is a device"),
    "fifo": (member("config", type=tarfile.FIFOTYPE), "config in it is a pipe"),
    "long name": (member("x" * 200, b"x"), "in it is a long name"),
    "file as directory": (member("config", type=tarfile.DIRTYPE), "config does not belong"),
    "control characters": (member("\x1b[2J", b"x"), "a name in it is not one of a file"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_does_not_belong_into_a_bundle_is_refused(tmp_path: Path, name: str) -> None:
    extra, problem = HOSTILE[name]
    assert problem in await refused(tmp_path, raw_tar(*usual(), extra))


async def test_extended_headers_are_refused(tmp_path: Path) -> None:
    info, content = member("config", b"x")
    info.pax_headers = {"path": "../x"}
    tar = raw_tar(*usual(), (info, content), form=tarfile.PAX_FORMAT)
    assert "an extended header" in await refused(tmp_path, tar)


@pytest.mark.parametrize("name", ["kernel.json", "vmlinux", "modules.ext4"])
async def test_what_is_missing_is_named(tmp_path: Path, name: str) -> None:
    assert name in await refused(tmp_path, raw_tar(*without(name)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "kernel.json: "),
        (b"[]", "kernel.json: Expected `object`, got `array`"),
        (b'{"version": "6.1.0-test"}', "missing required field `architecture`"),
        (b'{"version": "6.1.0-test", "architecture": "arm"}', "it is for arm, and this"),
        (b'{"version": "../x", "architecture": "x86_64"}', "the version is none of a kernel"),
        (b'{"version": "6.2", "architecture": "x86_64"}', "is Linux 6.2, and is 6.1.0-test"),
        (b"[" * 100_000, "kernel.json: "),
        (b'{"version": "\xff"}', "kernel.json: "),
    ],
)
async def test_a_bundle_that_says_wrong_things_of_itself(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    tar = raw_tar(member("kernel.json", content), *without("kernel.json"))
    assert problem in await refused(tmp_path, tar)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("vmlinux", VMLINUX[:-1], "vmlinux cannot be used as a kernel: it is cut off"),
        ("vmlinux", b"", "not an ELF"),
        ("modules.ext4", bytes(5000), "modules.ext4 cannot be used: it is not an ext4"),
    ],
)
async def test_files_are_checked(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    said = await refused(tmp_path, raw_tar(member(name, content), *without(name)))
    assert problem in said
    assert str(tmp_path) not in said


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 5000])
async def test_a_tar_that_is_cut_off(tmp_path: Path, keep: int) -> None:
    assert "cut off" in await refused(tmp_path, raw_tar(*usual())[:keep])


async def test_a_bundle_that_is_cut_off_or_no_zstd(tmp_path: Path) -> None:
    whole = zstandard.ZstdCompressor().compress(raw_tar(*usual()))
    bundle = tmp_path / "bundle"
    for number, content in enumerate((whole[:-40], b"PK" + whole, b"")):
        bundle.write_bytes(content)
        dest = tmp_path / str(number)
        dest.mkdir()
        with pytest.raises(PreconditionFailed, match=r"cut off|not zstd"):
            await unpack_kernel_bundle(bundle, dest, "x86_64", quiet)


def header(name: str, size: int, kind: bytes = b"0") -> bytearray:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])


def summed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vmlinux", 600 << 20), ("kernel.json", 5 << 20), ("boot-modules/00-x.ko", 65 << 20)],
)
async def test_files_larger_than_any_is_are_refused_unread(
    tmp_path: Path, name: str, size: int
) -> None:
    assert f"{name} is too large" in await refused(tmp_path, summed(header(name, size)))


async def test_boot_modules_are_bounded_together(tmp_path: Path) -> None:
    """All of them are read into memory to make the initramfs, and holes cost nothing here."""
    many = [member(f"boot-modules/00-a{number}.ko") for number in range(100)]
    assert "too many or too large: 101 of" in await refused(tmp_path, raw_tar(*usual(), *many))


async def test_boot_modules_of_holes_are_bounded_together(tmp_path: Path) -> None:
    large = [
        sparse(33 << 20, 512, (0, 512), name=f"boot-modules/0{number}-a.ko") for number in (0, 1)
    ]
    assert "too many or too large: 2 of 66 MiB" in await refused(tmp_path, b"".join(large))


async def test_an_image_larger_than_the_setting_is_refused_unread(tmp_path: Path) -> None:
    """What is stored of its files counts, of both of them, and no holes."""
    first = sparse(1 << 30, 60_416, (0, 60_416), name="rootfs.ext4")
    second = summed(header("work-seed.ext4", 40_000))
    bundle, dest = tmp_path / "bundle", tmp_path / "dest"
    dest.mkdir()
    bundle.write_bytes(zstandard.ZstdCompressor().compress(first + second))
    with pytest.raises(PreconditionFailed, match=r"more than the 97\.7 KiB") as caught:
        await unpack_image_bundle(bundle, dest, "x86_64", quiet, limit_bytes=100_000)
    assert "image_size_limit" in caught.value.hint
    assert [path.name for path in dest.iterdir()] == ["rootfs.ext4"]


async def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory with content, which nobody takes: 1 GiB of zeros in some KiB."""
    monkeypatch.setattr(bundle_module, "_UNPACKED_MAX_BYTES", 64 << 20)
    bundle, dest = tmp_path / "bundle", tmp_path / "dest"
    dest.mkdir()
    with bundle.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as packed:
        packed.write(summed(header("boot-modules", 1 << 30, b"5")))
        for _ in range(1024):
            packed.write(bytes(1 << 20))
    assert bundle.stat().st_size < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(PreconditionFailed, match="unpacks to more than"):
            await unpack_kernel_bundle(bundle, dest, "x86_64", quiet)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


async def test_what_does_not_fit_on_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "_KEEP_FREE_BYTES", 1 << 60)
    assert "there is no room" in await refused(tmp_path, raw_tar(*usual()))


def sparse(size: int, stored: int, *extents: tuple[int, int], name: str = "modules.ext4") -> bytes:
    block = header(name, stored, b"S")
    for position, (offset, length) in enumerate(extents):
        start = 386 + 24 * position
        block[start : start + 24] = b"%011o\0%011o\0" % (offset, length)
    block[483:495] = b"%011o\0" % size
    return summed(block) + bytes(stored + -stored % 512)


@pytest.mark.parametrize(
    ("tar", "problem"),
    [
        (sparse(4096, 1024, (512, 512), (0, 512)), "overlap"),
        (sparse(4096, 1024, (0, 1024), (512, 0)), "overlap"),
        (sparse(512, 1024, (0, 1024)), "do not fit"),
        (sparse(4096, 512, (0, 1024)), "do not fit"),
        (sparse(1 << 40, 512, (0, 512)), "too large"),
    ],
)
async def test_maps_of_sparse_files_that_make_no_sense(
    tmp_path: Path, tar: bytes, problem: str
) -> None:
    assert problem in await refused(tmp_path, tar)


async def test_an_endless_map_of_a_sparse_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.images.bundle_tar._EXTENTS_MAX", 100)
    block = header("modules.ext4", 0, b"S")
    block[482] = 1
    more = bytearray(b"%011o\0%011o\0" % (0, 0) * 21).ljust(512, b"\0")
    more[504] = 1
    assert "in too many pieces" in await refused(tmp_path, summed(block) + bytes(more) * 100)


@pytest.mark.parametrize("harm", [b"9" * 12, b"-1", b"\xff" * 12, b"\x80" + b"\xff" * 11])
async def test_numbers_that_are_none(tmp_path: Path, harm: bytes) -> None:
    block = header("vmlinux", 0)
    block[124:136] = harm.ljust(12, b"\0")
    assert "a number in it" in await refused(tmp_path, summed(block))


async def test_a_header_that_is_damaged(tmp_path: Path) -> None:
    block = bytearray(summed(header("vmlinux", 0)))
    block[0] += 1
    assert "a header in it is damaged" in await refused(tmp_path, bytes(block))


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_are_members_or_refused(data: bytes, whole: bool) -> None:
    block = bytearray(data[:512].ljust(512, b"\1"))
    source = io.BytesIO((summed(block) if whole else bytes(block)) + data[512:])
    reader = TarReader(source)
    try:
        for found in reader.members():
            if found.size < 1 << 20:
                reader.copy(found, io.BytesIO(), nothing)
    except PreconditionFailed:
        pass


async def test_unpacking_ends_when_nobody_wants_it_any_more(tmp_path: Path) -> None:
    """The thread has ended when the caller hears of it: its files can be removed."""
    kernel = kernel_files(tmp_path / "source")
    Path(kernel.modules_path).write_bytes(os.urandom(1 << 20) * 64)
    await pack_kernel_bundle(kernel, tmp_path / "bundle", quiet)
    dest = tmp_path / "dest"
    dest.mkdir()
    begun = asyncio.Event()
    unpacking = unpack_kernel_bundle(
        tmp_path / "bundle", dest, "x86_64", lambda stage, detail, percent: begun.set()
    )
    task = asyncio.create_task(unpacking)
    await asyncio.wait_for(begun.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = tree(dest)
    await asyncio.sleep(0.1)
    assert tree(dest) == before
    assert sum(map(len, before.values())) < 64 << 20
