"""One program that needs nothing else: what the smallest of images are made of in tests."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

_PT_INTERP = 3


def static_busybox() -> Path:
    """The host's busybox, which needs no loader and no library. Started under a name that begins
    with its own it takes the program to be from its first argument."""
    found = shutil.which("busybox")
    if found is None or not _is_static(Path(found)):
        pytest.fail("there is no static busybox: apt-get install busybox-static")
    return Path(found)


def _is_static(program: Path) -> bool:
    """Whether a 64-bit ELF file names no interpreter: elf(5)."""
    data = program.read_bytes()
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    kinds = {struct.unpack_from("<I", data, offset + i * size)[0] for i in range(count)}
    return _PT_INTERP not in kinds
