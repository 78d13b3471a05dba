"""Overlays: sizes and qemu-img's command line. (That it works: tests/integration/test_qemu.py.)"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from banger.base import proc
from banger.base.errors import PreconditionFailed
from banger.drivers.base import Level
from banger.drivers.storage.qcow2 import Qcow2Storage, create_argv, layer_argv, overlay_bytes

MIB = 1 << 20


@pytest.mark.parametrize(("size_mib", "expected"), [(1, 3 * MIB), (3, 3 * MIB), (4, 4 * MIB)])
def test_an_overlay_is_never_smaller_than_its_base(
    tmp_path: Path, size_mib: int, expected: int
) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(3 * MIB))
    assert overlay_bytes(base, size_mib) == expected


def test_the_backing_files_format_is_named_and_paths_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_argv(Path("json:base"), Path("-o"), 4 * MIB) == [
        *("qemu-img", "create", "-q", "-f", "qcow2"),
        *("-b", f"{tmp_path}/json:base", "-F", "raw", f"{tmp_path}/-o", "4194304"),
    ]


def test_a_layer_names_what_is_below_it_without_a_directory(tmp_path: Path) -> None:
    """Wherever both are linked to, each finds the other there."""
    assert layer_argv("system.qcow2", tmp_path / "system-1.qcow2", MIB) == [
        *("qemu-img", "create", "-q", "-u", "-f", "qcow2"),
        *("-b", "system.qcow2", "-F", "qcow2", f"{tmp_path}/system-1.qcow2", "1048576"),
    ]


@pytest.mark.parametrize(("virtual_mib", "takes_mib"), [(100, 5), (4, 4)])
async def test_a_collapse_takes_what_the_layers_below_have_and_no_more_than_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, virtual_mib: int, takes_mib: int
) -> None:
    def info(name: str, mib: int, disk_format: str = "qcow2") -> dict[str, object]:
        path = tmp_path / name
        path.write_bytes(b"x" * mib * MIB)
        return {
            "virtual-size": virtual_mib * MIB,
            "filename": str(path),
            "format": disk_format,
        }

    infos = [info("top", 7), info("middle", 2), info("lowest", 3), info("rootfs", 9, "raw")]
    argvs: list[list[str]] = []

    async def run(argv: list[str], **_: object) -> proc.Completed:
        await asyncio.sleep(0)
        argvs.append(argv)
        return proc.Completed(tuple(argv), 0, json.dumps(infos).encode(), b"")

    monkeypatch.setattr(proc, "run", run)
    assert await Qcow2Storage().collapse_bytes(tmp_path / "top") == takes_mib * MIB
    assert "--force-share" in argvs[0]  # a machine may have it open


async def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match=r"rootfs\.ext4 is missing"):
        await Qcow2Storage().create_overlay(tmp_path / "rootfs.ext4", tmp_path / "o", 1)


async def test_a_missing_qemu_img_is_a_failed_check_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("banger.base.proc.which", lambda tool: None)
    (check,) = await Qcow2Storage().checks()
    assert check.level is Level.FAIL
    assert check.hint == "install it with: apt-get install qemu-utils"
