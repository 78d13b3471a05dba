"""A guest's console log does not fill the host's disk."""

from __future__ import annotations

from pathlib import Path

from banger.services.consoles import cut


def test_a_log_below_the_limit_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    assert not cut(log, 10)
    log.write_bytes(b"x" * 10)
    assert not cut(log, 10)
    assert log.read_bytes() == b"x" * 10


def test_a_log_past_the_limit_begins_anew_and_its_end_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"begin" + b"x" * 20 + b"end")
    with log.open("ab", buffering=0) as writer:
        assert cut(log, 10)
        assert (tmp_path / "console.log.old").read_bytes() == b"xxxxxxxend"
        assert log.read_bytes() == b""
        writer.write(b"more")  # as the hypervisor does
    assert log.read_bytes() == b"more"
