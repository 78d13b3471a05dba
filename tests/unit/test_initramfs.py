"""The initramfs, parsed back as the kernel's unpacker reads it (init/initramfs.c)."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import PreconditionFailed
from banger.images.initramfs import Entry, build_initramfs, pack_newc


@dataclass(frozen=True)
class Member:
    name: str
    mode: int
    links: int
    device: tuple[int, int]
    data: bytes


def unpack_newc(archive: bytes) -> list[Member]:
    members: list[Member] = []
    inodes: set[int] = set()
    offset = 0
    while True:
        assert offset % 4 == 0
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, uid, gid, links, mtime, size, _, _, major, minor, name_size, check = fields
        assert (uid, gid, mtime, check) == (0, 0, 0, 0)
        name = archive[offset + 110 : offset + 110 + name_size]
        assert name.endswith(b"\0")
        offset += 110 + name_size
        offset += -offset % 4
        data = archive[offset : offset + size]
        assert len(data) == size
        offset += size
        offset += -offset % 4
        if name == b"TRAILER!!!\0":
            assert offset == len(archive)
            return members
        assert inode not in inodes  # the same inode twice would be a hard link
        inodes.add(inode)
        members.append(Member(name[:-1].decode(), mode, links, (major, minor), data))


def _inputs(tmp_path: Path) -> tuple[Path, Path]:
    agent, modules = tmp_path / "agent", tmp_path / "boot-modules"
    agent.write_bytes(b"\x7fELF agent")
    modules.mkdir()
    for name in ("01-b.ko", "10-c.ko", "00-a.ko"):
        (modules / name).write_bytes(name.encode() * 3)
    return agent, modules


def test_it_has_the_agent_as_init_the_modules_in_order_and_a_console(tmp_path: Path) -> None:
    agent, modules = _inputs(tmp_path)
    build_initramfs(tmp_path / "initramfs.cpio", agent=agent, modules=modules)
    members = unpack_newc((tmp_path / "initramfs.cpio").read_bytes())
    directory, file = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
    assert members == [
        Member("dev", directory, 2, (0, 0), b""),
        Member("modules", directory, 2, (0, 0), b""),
        Member("proc", directory, 2, (0, 0), b""),
        Member("sys", directory, 2, (0, 0), b""),
        Member("dev/console", stat.S_IFCHR | 0o600, 1, (5, 1), b""),
        Member("init", stat.S_IFREG | 0o755, 1, (0, 0), b"\x7fELF agent"),
        Member("modules/00-a.ko", file, 1, (0, 0), b"00-a.ko" * 3),
        Member("modules/01-b.ko", file, 1, (0, 0), b"01-b.ko" * 3),
        Member("modules/10-c.ko", file, 1, (0, 0), b"10-c.ko" * 3),
    ]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    agent, modules = _inputs(tmp_path)
    for name in ("one", "two"):
        build_initramfs(tmp_path / name, agent=agent, modules=modules)
        agent.touch()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(("count", "size"), [(101, 0), (1, (64 << 20) + 1)])
def test_modules_that_would_fill_the_memory_are_refused_unread(
    tmp_path: Path, count: int, size: int
) -> None:
    agent, modules = _inputs(tmp_path)
    for module in modules.iterdir():
        module.unlink()
    for number in range(count):
        with (modules / f"{number:02}-a.ko").open("wb") as file:
            file.truncate(size)
    with pytest.raises(PreconditionFailed, match="too many or too large"):
        build_initramfs(tmp_path / "initramfs.cpio", agent=agent, modules=modules)
    assert not (tmp_path / "initramfs.cpio").exists()


def test_a_missing_agent_is_an_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    agent, modules = _inputs(tmp_path)
    dest = tmp_path / "initramfs.cpio"
    build_initramfs(dest, agent=agent, modules=modules)
    before = dest.read_bytes()
    agent.unlink()
    with pytest.raises(PreconditionFailed, match="agent"):
        build_initramfs(dest, agent=agent, modules=modules)
    assert dest.read_bytes() == before


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40),
            st.binary(max_size=40),
        ),
        max_size=6,
    )
)
def test_any_names_and_contents_are_read_back(files: list[tuple[str, bytes]]) -> None:
    entries = [Entry(name, stat.S_IFREG | 0o644, data) for name, data in files]
    assert [(m.name, m.data) for m in unpack_newc(pack_newc(entries))] == files
