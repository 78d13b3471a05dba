"""Mappings and loop devices of the host, as anybody may see them in sysfs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SYS_BLOCK = Path("/sys/block")
_SECTOR = 512


@dataclass(frozen=True)
class Mapping:
    """What device-mapper has made: its own name for that, whose it is. ``devices`` are the names of
    those that it is made of (``loop0``)."""

    name: str
    uuid: str
    size_bytes: int
    devices: tuple[str, ...]


def mappings(sys_block: Path = SYS_BLOCK) -> list[Mapping]:
    """All of them, anybody's."""
    found = []
    for path in sorted(sys_block.glob("dm-*/dm/uuid")):
        device = path.parents[1]
        with suppress(OSError):  # it was taken away meanwhile
            found.append(
                Mapping(
                    name=(device / "dm" / "name").read_text().strip(),
                    uuid=path.read_text().strip(),
                    size_bytes=size_bytes(device.name, sys_block),
                    devices=tuple(sorted(each.name for each in (device / "slaves").iterdir())),
                )
            )
    return found


def is_read_only(name: str, sys_block: Path = SYS_BLOCK) -> bool:
    """Whether a block device cannot be written."""
    return (sys_block / name / "ro").read_text().strip() == "1"


def size_bytes(name: str, sys_block: Path = SYS_BLOCK) -> int:
    """Of a block device."""
    return int((sys_block / name / "size").read_text()) * _SECTOR


def users(name: str, sys_block: Path = SYS_BLOCK) -> list[str]:
    """The devices that are made of one (``dm-0``)."""
    return sorted(each.name for each in (sys_block / name / "holders").iterdir())
