"""Handles: a cache that answers, and a scratch file that the next daemon can trust."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.base.model import Handles, ProcessId
from banger.base.paths import Paths
from banger.services.handles import HandleCache

HANDLES = Handles(
    pid=7, pid_start_ticks=8, boot_id="b", network=(ProcessId(pid=9, start_ticks=10),)
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(tmp_path, tmp_path, tmp_path, tmp_path / "run", tmp_path)
    made.vm("v").directory.mkdir(parents=True)
    return made


def test_what_is_set_is_there_now_and_for_the_next_daemon(paths: Paths) -> None:
    cache = HandleCache(paths)
    assert cache.get("v") == Handles()
    cache.set("v", HANDLES)
    assert cache.get("v") == HANDLES
    assert paths.vm("v").handles.stat().st_mode & 0o777 == 0o600
    following = HandleCache(paths)
    assert following.get("v") == Handles()
    assert following.load("v") == HANDLES
    assert following.get("v") == HANDLES


def test_clearing_removes_both_and_may_be_done_again(paths: Paths) -> None:
    cache = HandleCache(paths)
    cache.set("v", HANDLES)
    cache.clear("v")
    cache.clear("v")
    assert cache.get("v") == Handles()
    assert not paths.vm("v").handles.exists()


def test_a_missing_file_is_no_handles(paths: Paths) -> None:
    assert HandleCache(paths).load("v") == Handles()
    assert HandleCache(paths).load("unknown") == Handles()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"pid":"7"}', b'{"pid":1.5}', b"\xff\xfe", b"\0" * 64],
)
def test_a_corrupt_file_is_no_handles_is_logged_and_hides_nothing_older(
    paths: Paths, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = HandleCache(paths)
    cache.set("v", HANDLES)
    paths.vm("v").handles.write_bytes(content)
    assert cache.load("v") == Handles()
    assert cache.get("v") == Handles()
    assert "handles unreadable" in capsys.readouterr().out
    cache.set("v", HANDLES)
    assert HandleCache(paths).load("v") == HANDLES


def test_a_directory_in_its_place_is_no_handles(paths: Paths) -> None:
    paths.vm("v").handles.mkdir()
    assert HandleCache(paths).load("v") == Handles()


@given(
    st.binary(max_size=100)
    | st.builds(lambda pid: json.dumps({"pid": pid}).encode(), st.integers())
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_gives_a_record_with_a_pid_that_can_be_asked_about(
    paths: Paths, content: bytes
) -> None:
    paths.vm("v").handles.write_bytes(content)
    handles = HandleCache(paths).load("v")
    assert 0 <= handles.pid < 2**31
    assert all(0 <= process.pid < 2**31 for process in handles.network)


def test_unknown_fields_are_ignored_and_an_empty_record_is_empty(paths: Paths) -> None:
    file = paths.vm("v").handles
    file.write_text('{"pid":7,"of_tomorrow":{}}')
    assert HandleCache(paths).load("v") == Handles(pid=7)
    file.write_text("{}")
    assert HandleCache(paths).load("v") == Handles()


def test_a_write_that_fails_leaves_the_file_as_it_was(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HandleCache(paths)
    cache.set("v", HANDLES)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        cache.set("v", Handles(pid=1))
    assert HandleCache(paths).load("v") == HANDLES
    # The cache knows of it all the same: what was started must be found, to be ended.
    assert cache.get("v") == Handles(pid=1)
