"""Kernels: the ELF out of a bzImage, checks before a boot, the modules of the initramfs."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import random
import struct
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.images import vmlinux
from banger.images.kernel import (
    BOOT_MODULES,
    boot_module_order,
    check_vmlinux,
    find_modules,
    module_name,
)
from banger.images.vmlinux import extract_vmlinux

_SETUP_SECTORS = 3
_PAYLOAD_OFFSET = 0x123
_LZ4_BLOCK = 8 << 20


def make_elf(content: bytes = b"kernel", *, machine: int = 62) -> bytes:
    """The least that can be started: a header, one PT_LOAD that covers the file, and a PT_NOTE
    that says where PVH begins."""
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1000000)
    begin = 64 + 2 * 56
    size = begin + len(note) + len(content)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, begin, 0, 0, len(note), len(note), 4)
    return header + load + notes + note + content


def _lz4_legacy(data: bytes) -> bytes:
    blocks = [
        lz4.block.compress(data[start : start + _LZ4_BLOCK], store_size=False)
        for start in range(0, len(data), _LZ4_BLOCK)
    ]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(each)) + each for each in blocks)


def _with_size(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """As the kernel's build does for all but gzip: the length follows the compressed data."""
    return lambda data: compress(data) + struct.pack("<I", len(data))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": _with_size(lambda data: lzma.compress(data, check=lzma.CHECK_CRC32)),
    "zstd": _with_size(lambda data: zstandard.ZstdCompressor().compress(data)),
    "lz4": _with_size(_lz4_legacy),
}


def make_bzimage(payload: bytes, *, header: bool = True) -> bytes:
    setup = bytearray((_SETUP_SECTORS + 1) * 512)
    if header:
        setup[0x1F1] = _SETUP_SECTORS
        setup[0x1FE:0x200] = b"\x55\xaa"
        setup[0x202:0x206] = b"HdrS"
        struct.pack_into("<H", setup, 0x206, 0x020F)
        struct.pack_into("<II", setup, 0x248, _PAYLOAD_OFFSET, len(payload))
    # A decompressor that happens to hold the magic numbers, as the real one does.
    decompressor = b"\x1f\x8b\x08 \x28\xb5\x2f\xfd".ljust(_PAYLOAD_OFFSET, b"\x90")
    return bytes(setup) + decompressor + payload + b"\xcc" * 700


@pytest.mark.parametrize("header", [True, False], ids=["by header", "by search"])
@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_the_elf_comes_out_as_it_went_in(compress: Callable[[bytes], bytes], header: bool) -> None:
    # More than one block of LZ4, more than one piece of the others, not compressible to nothing.
    elf = make_elf(random.Random(1).randbytes(1 << 20) * 9)
    assert extract_vmlinux(make_bzimage(compress(elf), header=header)) == elf


def test_an_elf_is_its_own_kernel() -> None:
    assert extract_vmlinux(make_elf()) == make_elf()


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_what_is_not_an_elf_is_refused(compress: Callable[[bytes], bytes]) -> None:
    with pytest.raises(PreconditionFailed):
        extract_vmlinux(make_bzimage(compress(b"not a kernel" * 1000)))


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_a_cut_off_image_is_refused(compress: Callable[[bytes], bytes]) -> None:
    payload = compress(make_elf(random.Random(2).randbytes(300_000)))
    whole = make_bzimage(payload)
    with pytest.raises(PreconditionFailed):
        extract_vmlinux(whole[: len(whole) - 700 - len(payload) // 2])


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_a_decompression_bomb_costs_no_more_than_the_limit(
    compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmlinux, "VMLINUX_MAX_BYTES", 4 << 20)
    image = make_bzimage(compress(make_elf(bytes(64 << 20))))
    tracemalloc.start()
    try:
        with pytest.raises(PreconditionFailed):
            extract_vmlinux(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20


def test_another_architecture_is_refused() -> None:
    with pytest.raises(PreconditionFailed, match="x86-64"):
        extract_vmlinux(make_bzimage(gzip.compress(make_elf(machine=183))))


@given(st.binary(max_size=4096), st.sampled_from([b"", *vmlinux._FORMATS, b"\x7fELF\x02\x01"]))
def test_garbage_is_refused_and_nothing_worse(garbage: bytes, magic: bytes) -> None:
    for image in (magic + garbage, make_bzimage(magic + garbage)):
        with pytest.raises(PreconditionFailed):
            extract_vmlinux(image)


@given(st.data(), st.sampled_from(list(COMPRESSORS)))
def test_a_damaged_image_gives_a_kernel_or_an_error(data: st.DataObject, name: str) -> None:
    image = bytearray(make_bzimage(COMPRESSORS[name](make_elf(bytes(range(256)) * 8))))
    for _ in range(data.draw(st.integers(1, 8))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PreconditionFailed):
        assert extract_vmlinux(bytes(image)).startswith(b"\x7fELF")


def test_check_vmlinux_takes_a_whole_kernel(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(make_elf())
    check_vmlinux(kernel)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "not an ELF"),
        (b"MZ" + bytes(1000), "not an ELF"),
        (make_elf()[:-1], "cut off"),
        (make_elf()[:100], "cut off"),
        (make_elf(machine=3), "not for x86-64"),
    ],
)
def test_check_vmlinux_says_what_is_wrong(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    kernel = tmp_path / "vmlinux"
    if content is not None:
        kernel.write_bytes(content)
    with pytest.raises(PreconditionFailed, match=problem) as caught:
        check_vmlinux(kernel)
    assert str(kernel) in caught.value.message
    assert caught.value.hint


@given(st.binary(max_size=300))
def test_check_vmlinux_of_any_elf_header_is_an_answer(tail: bytes) -> None:
    content = b"\x7fELF\x02\x01" + tail
    assert isinstance(vmlinux.elf_problem(io.BytesIO(content), len(content)), str)


def _modules(tmp_path: Path, dep: str, builtin: str = "") -> Path:
    modules = tmp_path / "lib/modules/6.1.0-test"
    modules.mkdir(parents=True)
    (modules / "modules.order").touch()
    (modules / "modules.dep").write_text(dep)
    (modules / "modules.builtin").write_text(builtin)
    return modules


_DEP = """\
kernel/net/core/failover.ko:
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/modern.ko kernel/drivers/virtio/base.ko
kernel/drivers/virtio/modern.ko: kernel/drivers/virtio/base.ko
kernel/drivers/virtio/base.ko:
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio_ring.ko kernel/x/deep.ko
kernel/x/deep.ko: kernel/x/deeper.ko
kernel/x/deeper.ko:
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko
kernel/drivers/unrelated.ko:
"""


def test_every_boot_module_comes_after_what_it_needs(tmp_path: Path) -> None:
    builtin = "kernel/drivers/virtio/virtio_mmio.ko\nkernel/drivers/char/virtio_console.ko\n"
    modules = _modules(tmp_path, _DEP, builtin)
    order = [module_name(file) for file in boot_module_order(modules)]
    assert order == [
        *("failover", "net_failover", "virtio", "virtio_ring", "base", "modern", "virtio_pci"),
        *("deeper", "deep", "virtio_blk", "virtio_net"),
    ]


def test_a_kernel_without_a_boot_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match=r"6\.1\.0-test has no module virtio_mmio"):
        boot_module_order(_modules(tmp_path, _DEP))


def test_compressed_modules_are_refused(tmp_path: Path) -> None:
    builtin = "virtio_mmio.ko virtio_console.ko"
    modules = _modules(tmp_path, _DEP.replace("block/virtio_blk.ko", "virtio_blk.ko.xz"), builtin)
    with pytest.raises(PreconditionFailed, match=r"virtio_blk\.ko\.xz") as caught:
        boot_module_order(modules)
    assert caught.value.hint == "unpack them: unxz or unzstd, then depmod"


_VSOCK = """\
kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/net/vmw_vsock/vsock.ko
kernel/net/vmw_vsock/vsock.ko:
"""


@pytest.mark.parametrize(
    ("vsock", "found"),
    [
        (_VSOCK, ["vsock", "vmw_vsock_virtio_transport"]),
        (_VSOCK.replace("transport.ko", "transport.ko.zst"), []),
        (
            _VSOCK.replace("vsock.ko:", "vsock.ko.zst:").replace("/vsock.ko\n", "/vsock.ko.zst\n"),
            [],
        ),
        (_VSOCK.partition("\n")[0] + "\n", []),
    ],
    ids=["whole", "compressed", "what it needs is compressed", "damaged"],
)
def test_a_vsock_is_taken_where_it_can_be_had(tmp_path: Path, vsock: str, found: list[str]) -> None:
    """A kernel without it is as good as before, for all but Firecracker."""
    builtin = "virtio_mmio.ko virtio_console.ko"
    order = boot_module_order(_modules(tmp_path, _DEP + vsock, builtin))
    assert [module_name(file) for file in order][11:] == found


def test_a_balloon_is_taken_where_it_can_be_had_with_or_without_a_vsock(tmp_path: Path) -> None:
    builtin = "virtio_mmio.ko virtio_console.ko"
    balloon = "kernel/drivers/virtio/virtio_balloon.ko:\n"
    for number, (vsock, found) in enumerate(
        ((_VSOCK, ["vsock", "vmw_vsock_virtio_transport"]), ("", []))
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        order = boot_module_order(_modules(directory, _DEP + vsock + balloon, builtin))
        assert [module_name(file) for file in order][11:] == [*found, "virtio_balloon"]


def _chain(length: int) -> str:
    """failover needs x0, which needs x1 …: what depmod says in one line."""
    names = ["kernel/failover.ko", *(f"kernel/x{number}.ko" for number in range(length))]
    return "".join(f"{a}: {b}\n" for a, b in pairwise(names)) + f"{names[-1]}:\n"


@pytest.mark.parametrize(("length", "problem"), [(5000, "is damaged"), (98, "has no module net_")])
def test_a_chain_of_needs_that_depmod_would_not_write_is_refused(
    tmp_path: Path, length: int, problem: str
) -> None:
    with pytest.raises(PreconditionFailed, match=problem):
        boot_module_order(_modules(tmp_path, _chain(length)))


def test_more_modules_than_an_initramfs_may_have_are_refused(tmp_path: Path) -> None:
    many = [f"kernel/x{number}.ko" for number in range(100)]
    dep = f"kernel/failover.ko: {' '.join(many)}\n" + "".join(f"{each}:\n" for each in many)
    modules = _modules(tmp_path, dep, " ".join(BOOT_MODULES[1:]))
    with pytest.raises(PreconditionFailed, match="too many or too large: 101 of"):
        boot_module_order(modules)


def test_program_headers_without_end_are_refused(tmp_path: Path) -> None:
    """Each may be notes of 1 MiB to look through."""
    for count, problem in ((65, "more program headers"), (64, "cut off")):
        elf = bytearray(make_elf())
        struct.pack_into("<H", elf, 56, count)
        (tmp_path / "vmlinux").write_bytes(elf)
        with pytest.raises(PreconditionFailed, match=problem):
            check_vmlinux(tmp_path / "vmlinux")


def test_the_kernel_of_a_tree_is_the_only_one(tmp_path: Path) -> None:
    modules = _modules(tmp_path, _DEP)
    assert find_modules(tmp_path) == modules
    modules.with_name("6.1.0-other").mkdir()
    (modules.with_name("6.1.0-other") / "modules.order").touch()
    with pytest.raises(PreconditionFailed, match="2 kernels"):
        find_modules(tmp_path)
