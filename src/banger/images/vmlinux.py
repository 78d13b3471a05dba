"""The kernel's ELF: taken out of a bzImage, and checked.

A bzImage is a setup program and a decompressor around the compressed ELF. Since boot protocol
2.08 its header says where that payload lies (the kernel's Documentation/arch/x86/boot.rst); in
what has no such header it is searched for by the magic numbers of the compressors.
"""

from __future__ import annotations

import io
import itertools
import lzma
import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import lz4.block
import zstandard

from banger.base.errors import PreconditionFailed

#: More than any kernel: a Debian one is 53 MB. Bounds the memory that a hostile file can cost.
VMLINUX_MAX_BYTES = 512 << 20
_PIECE = 1 << 20

_BOOT_FLAG = (0x1FE, b"\x55\xaa")
_HEADER_MAGIC = (0x202, b"HdrS")
_PROTOCOL_WITH_PAYLOAD = 0x0208
_SECTOR = 512
_SETUP_SECTORS_IF_ZERO = 4

_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER_BYTES = 64
_ELF_64_LITTLE_ENDIAN = b"\x02\x01"
_MACHINE_X86_64 = 62
_PROGRAM_HEADER_BYTES = 56
#: A kernel has some five; each may be notes to look through.
_PROGRAM_HEADERS_MAX = 64
_PT_LOAD = 1
_PT_NOTE = 4
_NOTES_MAX_BYTES = 1 << 20
#: The note in which a kernel says where PVH begins (include/xen/interface/elfnote.h).
_PVH_NOTE = struct.pack("<III", 4, 8, 18) + b"Xen\0"

_VERSION_MARK = b"Linux version "
_VERSION = re.compile(_VERSION_MARK + rb"([0-9][0-9A-Za-z._+~-]{0,63}) \(")
#: In a kernel are two or three, one of them the format of the others.
_VERSION_MARKS_MAX = 1000
_CONFIG = b"IKCFG_ST"
_CONFIG_MAX_BYTES = 4 << 20

_LZ4_LEGACY_BLOCK = 8 << 20
_LZ4_LEGACY_COMPRESSED_MAX = _LZ4_LEGACY_BLOCK + _LZ4_LEGACY_BLOCK // 255 + 16
_XZ_MEMORY_BYTES = 256 << 20
_ZSTD_WINDOW_BYTES = 128 << 20
_ZSTD_INPUT = 128
_SEARCH_MAX_CANDIDATES = 64

_DAMAGED = (zlib.error, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError)


def _gunzip(data: memoryview) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=31)
    # In pieces: what a step leaves unread is copied.
    for start in range(0, len(data), _PIECE):
        stored: bytes | memoryview = data[start : start + _PIECE]
        full = True
        while (stored or full) and not decompressor.eof:
            piece = decompressor.decompress(stored, _PIECE)
            stored, full = decompressor.unconsumed_tail, len(piece) == _PIECE
            yield piece
        if decompressor.eof:
            return


def _unxz(data: memoryview) -> Iterator[bytes]:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
    piece = decompressor.decompress(data, _PIECE)
    while piece:
        yield piece
        if decompressor.eof:
            return
        piece = decompressor.decompress(b"", _PIECE)


def _unzstd(data: memoryview) -> Iterator[bytes]:
    """Fed little by little, since nothing else bounds what a piece of input becomes (at most
    4 MiB: 4 bytes can stand for 128 KiB). zstandard's stream reader does it, but takes the length
    that follows the frame for another frame.
    """
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    decompressor = context.decompressobj()
    for start in range(0, len(data), _ZSTD_INPUT):
        yield decompressor.decompress(data[start : start + _ZSTD_INPUT])
        if decompressor.eof:
            return


def _unlz4_legacy(data: memoryview) -> Iterator[bytes]:
    """Blocks of 8 MiB, each after its compressed length; no mark at the end.

    The kernel's build appends the uncompressed length, 4 bytes that are no block: hence "more
    than 4 left".
    """
    offset = 4
    while offset + 4 < len(data):
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if length > min(_LZ4_LEGACY_COMPRESSED_MAX, len(data) - offset):
            return
        block = data[offset : offset + length]
        yield lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK)
        offset += length


_FORMATS: dict[bytes, Callable[[memoryview], Iterator[bytes]]] = {
    b"\x02\x21\x4c\x18": _unlz4_legacy,
    b"\x28\xb5\x2f\xfd": _unzstd,
    b"\xfd7zXZ\x00": _unxz,
    b"\x1f\x8b\x08": _gunzip,
}


def _nothing() -> None:
    pass


def extract_vmlinux(image: bytes, check: Callable[[], None] = _nothing) -> bytes:
    """The ELF inside a bzImage, or `image` itself if it is one. `check` is called now and then.

    Raises PreconditionFailed for everything else: another compression, another architecture, a
    damaged file.
    """
    if image.startswith(_ELF_MAGIC):
        return _checked(image)
    whole = memoryview(image)
    payload = _payload(whole)
    for start in itertools.chain([] if payload is None else [payload], _candidates(image)):
        elf = _decompress(start, check)
        if elf is not None:
            return _checked(elf)
    raise PreconditionFailed(
        "no kernel found in the boot image: it is damaged, or compressed in an unknown way",
        hint="gzip, xz, zstd and lz4 are known; give an uncompressed vmlinux otherwise",
    )


def _payload(image: memoryview) -> memoryview | None:
    """Where the setup header says that the compressed kernel lies."""
    if len(image) < 0x250 or any(
        image[offset : offset + len(mark)] != mark for offset, mark in (_BOOT_FLAG, _HEADER_MAGIC)
    ):
        return None
    (protocol,) = struct.unpack_from("<H", image, 0x206)
    if protocol < _PROTOCOL_WITH_PAYLOAD:
        return None
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or _SETUP_SECTORS_IF_ZERO) + 1) * _SECTOR + offset
    return image[start : start + length]


def _candidates(image: bytes) -> Iterator[memoryview]:
    """Everything that starts like compressed data, the nearest first; a bounded number."""
    found: list[int] = []
    for magic in _FORMATS:
        left = _SEARCH_MAX_CANDIDATES - len(found)
        found += itertools.islice(_places(image, magic), left)
    for offset in sorted(found):
        yield memoryview(image)[offset:]


def _decompress(data: memoryview, check: Callable[[], None]) -> bytes | None:
    """What `data` holds if that is an ELF; None for another content, or damage."""
    unpack = next((each for magic, each in _FORMATS.items() if data[: len(magic)] == magic), None)
    if unpack is None:
        return None
    elf = bytearray()
    try:
        for piece in unpack(data):
            check()
            elf += piece
            if not elf.startswith(_ELF_MAGIC[: len(elf)]) or len(elf) > VMLINUX_MAX_BYTES:
                return None
    except _DAMAGED:
        return None
    return bytes(elf)


def _checked(elf: bytes) -> bytes:
    problem = elf_problem(io.BytesIO(elf), len(elf))
    if problem:
        raise PreconditionFailed(f"the kernel in the boot image cannot be used: {problem}")
    return elf


def elf_problem(file: io.BufferedIOBase, length: int) -> str:
    """What is wrong with an x86-64 ELF of `length` bytes (elf(5)); empty if nothing is.

    Reads its headers only: enough for a foreign or cut off file.
    """
    header = file.read(_ELF_HEADER_BYTES)
    if len(header) < _ELF_HEADER_BYTES or not header.startswith(_ELF_MAGIC):
        return "it is not an ELF file"
    if header[4:6] != _ELF_64_LITTLE_ENDIAN or header[18] != _MACHINE_X86_64 or header[19]:
        return "it is not for x86-64"
    (table,) = struct.unpack_from("<Q", header, 32)
    entry_bytes, count = struct.unpack_from("<HH", header, 54)
    if entry_bytes != _PROGRAM_HEADER_BYTES or count == 0:
        return "it has no program headers"
    if count > _PROGRAM_HEADERS_MAX:
        return "it has more program headers than any kernel"
    if table + count * entry_bytes > length:
        return "it is cut off"
    file.seek(table)
    headers = file.read(count * entry_bytes)
    loadable = 0
    for offset in range(0, len(headers), entry_bytes):
        (kind,) = struct.unpack_from("<I", headers, offset)
        start, _, _, size = struct.unpack_from("<QQQQ", headers, offset + 8)
        if start + size > length:
            return "it is cut off"
        loadable += kind == _PT_LOAD
    return "" if loadable else "nothing in it can be loaded"


def linux_version(elf: bytes | mmap.mmap) -> str:
    """The release that an uncompressed kernel says it is, as uname gives it; empty for none."""
    for place in itertools.islice(_places(elf, _VERSION_MARK), _VERSION_MARKS_MAX):
        if found := _VERSION.match(elf, place):
            return found[1].decode("ascii")
    return ""


def _places(elf: bytes | mmap.mmap, mark: bytes) -> Iterator[int]:
    """Where `mark` is in it. In pieces, since the whole process waits for a search in one."""
    for start in range(0, len(elf), _PIECE):
        end = start + _PIECE + len(mark) - 1
        place = elf.find(mark, start, end)
        while place >= 0:
            yield place
            place = elf.find(mark, place + 1, end)


def embedded_config(elf: bytes) -> bytes | None:
    """The configuration that a kernel holds when it was built with CONFIG_IKCONFIG."""
    start = next(_places(elf, _CONFIG + b"\x1f\x8b"), None)
    if start is None:
        return None
    decompressor = zlib.decompressobj(wbits=31)
    try:
        packed = memoryview(elf)[start + len(_CONFIG) :]
        config = decompressor.decompress(packed, _CONFIG_MAX_BYTES)
    except zlib.error:
        return None
    return config if decompressor.eof else None


def has_pvh_entry(elf: bytes | mmap.mmap) -> bool:
    """Whether a kernel (of which `elf_problem` finds none) can be started without a boot sector:
    the only way that QEMU has to start an ELF."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    (count,) = struct.unpack_from("<H", elf, 56)
    for offset in range(table, table + count * _PROGRAM_HEADER_BYTES, _PROGRAM_HEADER_BYTES):
        (kind,) = struct.unpack_from("<I", elf, offset)
        start, _, _, size = struct.unpack_from("<QQQQ", elf, offset + 8)
        if kind == _PT_NOTE and _PVH_NOTE in elf[start : start + min(size, _NOTES_MAX_BYTES)]:
            return True
    return False
