"""Loop devices and mappings of the host, as anybody may see them in sysfs: who has which file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SYS_BLOCK = Path("/sys/block")
_DELETED = " (deleted)"
_SECTOR = 512


@dataclass(frozen=True)
class Loop:
    """A loop device with a file. ``holders`` are the devices that are made of it (``dm-0``)."""

    name: str
    file: Path
    read_only: bool
    holders: tuple[str, ...]


@dataclass(frozen=True)
class Mapping:
    """What device-mapper has made: ``dm-0``, its own name for that, whose it is. ``loops`` are the
    devices that it is made of."""

    device: str
    name: str
    uuid: str
    size_bytes: int
    loops: tuple[str, ...]


def loops(sys_block: Path = SYS_BLOCK) -> list[Loop]:
    """Those that have a file."""
    found = []
    for path in sorted(sys_block.glob("loop*/loop/backing_file")):
        device = path.parents[1]
        with suppress(OSError):  # it was detached meanwhile
            found.append(
                Loop(
                    name=device.name,
                    file=Path(path.read_text().removesuffix("\n").removesuffix(_DELETED)),
                    read_only=(device / "ro").read_text().strip() == "1",
                    holders=_names(device / "holders"),
                )
            )
    return found


def loops_of(file: Path, sys_block: Path = SYS_BLOCK) -> list[Loop]:
    """Those that have this file."""
    there = file.resolve()
    return [each for each in loops(sys_block) if each.file == there]


def writable(names: tuple[str, ...], sys_block: Path = SYS_BLOCK) -> list[str]:
    """Those of the loop devices that can be written."""
    return [each.name for each in loops(sys_block) if each.name in names and not each.read_only]


def size_bytes(name: str, sys_block: Path = SYS_BLOCK) -> int:
    """Of a block device."""
    return int((sys_block / name / "size").read_text()) * _SECTOR


def mappings(sys_block: Path = SYS_BLOCK) -> list[Mapping]:
    """All of them, anybody's."""
    found = []
    for path in sorted(sys_block.glob("dm-*/dm/uuid")):
        device = path.parents[1]
        with suppress(OSError):
            found.append(
                Mapping(
                    device=device.name,
                    name=(device / "dm" / "name").read_text().strip(),
                    uuid=path.read_text().strip(),
                    size_bytes=int((device / "size").read_text()) * _SECTOR,
                    loops=_names(device / "slaves"),
                )
            )
    return found


def _names(directory: Path) -> tuple[str, ...]:
    return tuple(sorted(each.name for each in directory.iterdir()))
