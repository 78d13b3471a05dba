"""A machine's logs do not fill the host's disk, whatever its guest has written there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from banger.services.machine_logs import cut

_LIMIT = 64 << 10
_LONG = b"begin" + b"x" * (2 * _LIMIT) + b"end"
#: As Firecracker opens what it logs to (`open_file_nonblock` of v1.16.1).
_AS_FIRECRACKER = os.O_CREAT | os.O_RDWR | os.O_NONBLOCK


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_log_within_the_limit_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    assert not cut(log, _LIMIT)
    log.write_bytes(b"x" * _LIMIT)
    assert not cut(log, allocated(log))
    assert log.read_bytes() == b"x" * _LIMIT


def test_a_log_past_the_limit_begins_anew_and_its_end_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"first" + b"y" * (1 << 20) + _LONG)
    with log.open("ab", buffering=0) as writer:
        assert cut(log, _LIMIT)
        kept = (tmp_path / "console.log.old").read_bytes()
        assert len(kept) == 1 << 20
        assert kept.endswith(_LONG)
        assert log.read_bytes() == b""
        writer.write(b"more")  # as QEMU does, and who prints to a console
    assert log.read_bytes() == b"more"


def test_what_firecracker_logs_is_cut_by_what_it_takes_and_not_by_where_it_is(
    tmp_path: Path,
) -> None:
    """It does not append: after a cut it goes on where it was, far behind the limit."""
    log, old = tmp_path / "hypervisor.log", tmp_path / "hypervisor.log.old"
    writer = os.open(log, _AS_FIRECRACKER, 0o600)
    try:
        os.write(writer, _LONG)
        assert cut(log, _LIMIT)
        os.write(writer, b"the newest line\n")
        assert log.stat().st_size > _LIMIT >= allocated(log)
        assert log.read_bytes().strip(b"\0") == b"the newest line\n"
        assert not cut(log, _LIMIT)
        assert old.read_bytes() == _LONG
        os.write(writer, _LONG)
        assert cut(log, _LIMIT)
        assert old.read_bytes().endswith(b"the newest line\n" + _LONG)
        assert allocated(log) == 0
    finally:
        os.close(writer)


def test_a_log_is_cut_though_its_end_cannot_be_kept(tmp_path: Path) -> None:
    """Where it has filled the disk there is no room for the end of it."""
    log = tmp_path / "console.log"
    log.write_bytes(_LONG)
    (tmp_path / "console.log.old").mkdir()
    assert cut(log, _LIMIT)
    assert log.read_bytes() == b""
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["console.log"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_not_cut(tmp_path: Path, kind: str) -> None:
    log, other = tmp_path / "hypervisor.log", tmp_path / "disk"
    other.write_bytes(_LONG)
    if kind == "link":
        log.symlink_to(other)
    else:
        os.mkfifo(log)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one, is below
        cut(log, _LIMIT)
    assert caught.value.errno == (errno.ELOOP if kind == "link" else errno.EINVAL)
    assert other.read_bytes() == _LONG
