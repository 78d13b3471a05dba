"""What is checked before a VM is made, and names for those who choose none."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from banger.base.errors import PreconditionFailed
from banger.base.model import check_vm_name
from banger.drivers.base import Check, Level
from banger.services import names
from banger.services.names import generate_name
from banger.services.preflight import (
    agent_checks,
    check_artifacts,
    check_free_disk,
    require,
)
from fakes import Agent, Hypervisor, Processes
from records import a_kernel, an_image

_checks = st.builds(
    Check,
    st.text("abc", min_size=1, max_size=3),
    st.sampled_from(Level),
    st.text("xyz", min_size=1, max_size=3),
    st.sampled_from(["", "do this", "do that"]),
)


@given(st.lists(_checks, max_size=6))
def test_every_failed_check_is_in_the_one_error_and_no_other(checks: list[Check]) -> None:
    failed = [check for check in checks if check.level is Level.FAIL]
    try:
        require(checks)
    except PreconditionFailed as error:
        problems = error.message.removeprefix("cannot start a VM here: ").split("; ")
        assert problems == [f"{check.name}: {check.detail}" for check in failed]
        hints = [each for each in error.hint.split("; ") if each]
        assert sorted(hints) == sorted({check.hint for check in failed if check.hint})
    else:
        assert not failed


def test_room_is_looked_for_where_the_directory_will_be(tmp_path: Path) -> None:
    plenty = check_free_disk(tmp_path / "not" / "yet" / "there", needed_bytes=1)
    assert plenty.level is Level.OK
    assert str(tmp_path) in plenty.detail
    full = check_free_disk(tmp_path, needed_bytes=1 << 60)
    assert full.level is Level.FAIL
    assert str(tmp_path) in full.detail
    assert full.hint


def test_each_missing_file_is_named() -> None:
    checks = check_artifacts(
        an_image("debian", rootfs_path="/nonexistent/r", work_seed_path="/nonexistent/w"),
        a_kernel(vmlinux_path="/nonexistent/v", modules_path="/nonexistent/m"),
    )
    assert [check.level for check in checks] == [Level.FAIL] * 4
    for check, part in zip(checks, "rwvm", strict=True):
        assert f"/nonexistent/{part}" in check.detail


@pytest.mark.parametrize(
    ("file", "config", "level"),
    [
        ("07-vmw_vsock_virtio_transport.ko", "", None),
        ("", "CONFIG_X=y\nCONFIG_VIRTIO_VSOCKETS=y\n", None),
        ("", "CONFIG_X=y\nCONFIG_VIRTIO_VSOCKETS=m\n", Level.FAIL),
        ("06-vsock.ko", "# CONFIG_VIRTIO_VSOCKETS is not set\n", Level.FAIL),
        ("", None, None),
    ],
    ids=["module", "built in", "module that is not there", "none", "not known"],
)
def test_a_kernel_without_a_vsock_is_told_of_where_the_agent_needs_one(
    tmp_path: Path, file: str, config: str | None, level: Level | None
) -> None:
    with closing(Processes()) as processes:
        hypervisor = Hypervisor(processes, Agent())
        if file:
            (tmp_path / file).touch()
        (tmp_path / "config").write_text(config or "")
        known = str(tmp_path / "config") if config is not None else ""
        kernel = replace(a_kernel(), boot_modules_path=str(tmp_path), config_path=known)
        assert agent_checks(hypervisor, kernel) == []
        hypervisor.features = dataclasses.replace(hypervisor.features, agent_vsock_port=1023)
        assert [each.level for each in agent_checks(hypervisor, kernel)] == [level] * bool(level)


def test_generated_names_are_valid_and_free() -> None:
    taken: set[str] = set()
    for _ in range(300):
        name = generate_name(taken)
        assert check_vm_name(name) not in taken
        taken.add(name)


def test_every_pair_of_words_is_a_valid_name() -> None:
    words = names._ADJECTIVES + names._NOUNS
    assert all(word.isalpha() and word.islower() and word.isascii() for word in words)
    assert len(set(names._ADJECTIVES)) == len(names._ADJECTIVES)
    assert len(set(names._NOUNS)) == len(names._NOUNS)


def test_when_luck_runs_out_a_name_gets_digits() -> None:
    class Everything:
        def __contains__(self, name: object) -> bool:
            return True

    name = generate_name(Everything())
    assert check_vm_name(name).count("-") == 2
