"""Which mappings are whose, by what dmsetup says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.base import proc
from banger.base.errors import Conflict
from banger.hostops import loops, mappings
from banger.hostops.ops import SnapshotState

ID, OTHER = "0123456789ab", "ba9876543210"
OURS, THEIRS = "89abcdef", "01234567"
_LISTING = f"""\
banger-{ID}/BANGER-7-{OURS}-{ID}
banger-{OTHER}/BANGER-7-{THEIRS}-{OTHER}
banger-ffffffffffff/BANGER-70-{OURS}-ffffffffffff
banger-eeeeeeeeeeee/BANGER-7-{OURS}-eeeeeeeeeeee-more
vg-root/LVM-7-{OURS}
plain/
"""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """What dmsetup was called with."""
    calls: list[tuple[str, ...]] = []

    async def dmsetup(*words: str) -> str:
        calls.append(words)
        return _LISTING if words[0] == "info" else ""

    monkeypatch.setattr(mappings, "_dmsetup", dmsetup)
    monkeypatch.setattr(mappings, "_DRIVER", tmp_path)
    return calls


async def test_what_is_busy_is_not_waited_for_here(said: list[tuple[str, ...]]) -> None:
    """All others would wait, too: who wants it gone tries again."""
    await mappings.remove(ID, 7)
    assert said[-1] == ("remove", "--noudevrules", "--verifyudev", f"banger-{ID}")


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize(
    ("instance", "uid", "found"),
    [(OURS, 7, [ID]), (THEIRS, 7, [OTHER]), ("", 7, [ID, OTHER]), ("00000000", 7, []), ("", 8, [])],
)
async def test_machines_are_those_of_the_daemon_or_of_all_of_the_owners(
    instance: str, uid: int, found: list[str]
) -> None:
    assert await mappings.machines(instance, uid) == found


_TABLE = "0 128 snapshot 7:1 7:2 PO 8"


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("made", [_TABLE, "0 128 snapshot 7:1 7:2 PO 2097152"])
async def test_what_the_kernel_makes_of_a_header_that_nobody_saw_goes_again(
    said: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, made: str, is_open: bool
) -> None:
    """Its owner may write it when it was looked at; and open what came of it at once."""
    monkeypatch.setattr(loops, "sectors", lambda _: 128)
    monkeypatch.setattr(loops, "number", {"loop1": "7:1", "loop2": "7:2"}.__getitem__)
    listing = mappings._dmsetup

    async def dmsetup(*words: str) -> str:
        found = await listing(*words)
        if words[0] == "remove" and is_open:
            raise proc.ProcessFailed(proc.Completed(("dmsetup",), 1, b"", b"busy"))
        return f"{made}\n" if words[0] == "table" else found

    monkeypatch.setattr(mappings, "_dmsetup", dmsetup)
    name = "banger-dddddddddddd"
    making = mappings.create("dddddddddddd", OURS, "loop1", "loop2", 7)
    if made == _TABLE:
        assert await making == name
    else:
        with pytest.raises(Conflict, match="became another than was asked for"):
            await making
        assert said[-1] == ("remove", "--force", "--noudevrules", "--verifyudev", name)
    created = [words for words in said if words[0] == "create"]
    assert [(words[1], words[-1]) for words in created] == [(name, _TABLE)]


async def test_anothers_is_never_removed(said: list[tuple[str, ...]]) -> None:
    for vm_id in ("ffffffffffff", "eeeeeeeeeeee"):
        with pytest.raises(Conflict, match="not banger's"):
            await mappings.remove(vm_id, 7)
    await mappings.remove("dddddddddddd", 7)  # there is none
    assert {words[0] for words in said} == {"info"}


@pytest.mark.parametrize("mib", [1, 2, 1024, 8192])
def test_when_every_chunk_is_changed_it_is_not_full_yet(mib: int) -> None:
    chunks = mib * 256
    areas = chunks // 256 + 1  # an area that is full has one after it
    full = mappings.full_bytes(mib << 20)
    assert full >= (1 + areas + chunks) * 4096
    assert full - chunks * 4096 < chunks * 4096 // 200 + 300 * 4096
    assert mappings.full_bytes((mib << 20) + 512) == full + 257 * 4096


async def test_a_kernel_without_device_mapper_has_none_and_is_not_asked(
    said: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mappings, "_DRIVER", tmp_path / "none")
    assert await mappings.machines("", 7) == []
    await mappings.remove(ID, 7)
    assert await mappings.state(ID, 7) is SnapshotState.ABSENT
    assert said == []
