"""The KVM probe: what it remembers, and for how long. (The probe itself: tests/integration.)"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.base.errors import OperationTimeout
from banger.base.proc import Completed
from banger.drivers.base import Level
from banger.drivers.hypervisor import kvm
from banger.drivers.hypervisor.qemu import QemuHypervisor
from banger.drivers.hypervisor.qemu_argv import Accelerator
from banger.drivers.hypervisor.qemu_program import QemuProgram


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that opens, and a QEMU that is installed."""
    qemu = tmp_path / "qemu"
    qemu.write_text("")
    monkeypatch.setattr("banger.base.proc.which", lambda tool: str(qemu))
    device = tmp_path / "kvm"
    device.write_text("")
    return device


@pytest.fixture
def qemu_gives(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bytes], list[int]]:
    """Make QEMU end with a status and stderr; the list grows with each run."""

    def install(status: int, stderr: bytes) -> list[int]:
        runs: list[int] = []

        async def run(argv: list[str], **_: object) -> Completed:
            runs.append(status)
            return Completed(tuple(argv), status, b"", stderr)

        monkeypatch.setattr("banger.base.proc.run", run)
        return runs

    return install


async def test_an_answer_is_kept_until_qemu_or_the_boot_changes(
    device: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qemu_gives: Callable[[int, bytes], list[int]],
) -> None:
    runs = qemu_gives(kvm.PROBE_PASSED, b"")
    cache = tmp_path / "probes.json"
    for _ in range(2):
        assert await kvm.probe(cache, QemuProgram(), device) == kvm.KvmProbe(
            True, "a vCPU ran a program"
        )
    assert len(runs) == 1
    (tmp_path / "qemu").write_text("another version")
    await kvm.probe(cache, QemuProgram(), device)
    assert len(runs) == 2
    monkeypatch.setattr("banger.base.procfs.boot_id", lambda: "another boot")
    await kvm.probe(cache, QemuProgram(), device)
    assert len(runs) == 3


async def test_the_answer_is_that_of_the_qemu_which_is_configured(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    async def run(argv: list[str], **_: object) -> Completed:
        ran.append(argv[0])
        return Completed(tuple(argv), kvm.PROBE_PASSED, b"", b"")

    monkeypatch.setattr("banger.base.proc.run", run)
    monkeypatch.setattr("banger.base.proc.which", lambda tool: tool)
    cache = tmp_path / "probes.json"
    programs = [str(tmp_path / name) for name in ("one", "other")]
    for program in programs:
        Path(program).write_text(program)
        for _ in range(2):
            assert (await kvm.probe(cache, QemuProgram(program), device)).usable
    assert ran == programs


@pytest.mark.parametrize("program", ["/nowhere/qemu", "no-program"])
async def test_what_cannot_be_run_is_no_answer_and_says_which_setting_to_mend(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    async def run(argv: list[str], **_: object) -> Completed:
        raise OSError(errno.ENOEXEC, os.strerror(errno.ENOEXEC), argv[0])

    monkeypatch.setattr("banger.base.proc.run", run)
    if program == "/nowhere/qemu":
        monkeypatch.setattr("banger.base.proc.which", lambda _: None)
    cache = tmp_path / "probes.json"
    answer = await kvm.probe(cache, QemuProgram(program), device)
    assert not answer.usable
    assert any(said in answer.detail for said in ("there is no /nowhere/qemu", "cannot be run"))
    assert "qemu_bin" in answer.hint
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key":[],"usable":1}', b"\xff"])
async def test_a_broken_cache_is_no_answer(
    device: Path,
    tmp_path: Path,
    content: bytes,
    qemu_gives: Callable[[int, bytes], list[int]],
) -> None:
    cache = tmp_path / "probes.json"
    cache.write_bytes(content)
    qemu_gives(kvm.PROBE_PASSED, b"")
    assert (await kvm.probe(cache, QemuProgram(), device)).usable


async def test_qemus_own_words_are_the_reason(
    device: Path, tmp_path: Path, qemu_gives: Callable[[int, bytes], list[int]]
) -> None:
    qemu_gives(-6, b"qemu: error: failed to set MSR 0x10a\nAssertion failed\n")
    answer = await kvm.probe(tmp_path / "nowhere" / "cache", QemuProgram(), device)
    assert answer == kvm.KvmProbe(False, "QEMU cannot run a vCPU: error: failed to set MSR 0x10a")


async def test_a_vcpu_that_hangs_is_not_usable(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(argv: list[str], **_: object) -> Completed:
        raise OperationTimeout("too late")

    monkeypatch.setattr("banger.base.proc.run", run)
    answer = await kvm.probe(tmp_path / "probes.json", QemuProgram(), device)
    assert answer == kvm.KvmProbe(False, "a vCPU did not get anywhere within 10 s")


async def test_a_time_out_is_asked_again_ever_more_rarely(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    clock = 0.0

    async def run(argv: list[str], **_: object) -> Completed:
        asked.append(clock)
        if clock < 1200:
            raise OperationTimeout("too late")
        return Completed(tuple(argv), kvm.PROBE_PASSED, b"", b"")

    monkeypatch.setattr("banger.base.proc.run", run)
    monkeypatch.setattr(kvm, "_since_boot_s", lambda: clock)
    usable = []
    for minute in range(60):
        clock = minute * 60.0
        usable.append((await kvm.probe(tmp_path / "probes.json", QemuProgram(), device)).usable)
    assert [moment / 60 for moment in asked] == [0, 5, 15, 35]
    assert usable == [False] * 35 + [True] * 25


async def test_those_who_ask_at_once_share_one_probe(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[str]] = []

    async def run(argv: list[str], **_: object) -> Completed:
        runs.append(argv)
        await asyncio.sleep(0.01)
        raise OperationTimeout("too late")

    monkeypatch.setattr("banger.base.proc.run", run)
    monkeypatch.setattr(kvm.probe, "__defaults__", (device,))
    driver = QemuHypervisor("auto", tmp_path / "probes.json", QemuProgram())
    chosen = await asyncio.gather(*(driver.choose_accelerator() for _ in range(5)))
    assert {accelerator for accelerator, _ in chosen} == {Accelerator.TCG}
    assert len(runs) == 1


async def test_without_the_device_nothing_is_tried(tmp_path: Path) -> None:
    missing = tmp_path / "kvm"
    answer = await kvm.probe(tmp_path / "probes.json", QemuProgram(), missing)
    assert (answer.usable, answer.detail) == (False, f"there is no {missing}")
    assert "modprobe kvm_intel" in answer.hint


async def test_who_may_not_open_the_device_is_told_of_its_group(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # root may open anything
        answer = await kvm.probe(tmp_path / "probes.json", QemuProgram(), device)
    assert (answer.usable, answer.denied) == (False, True)
    assert "group kvm" in answer.hint


async def test_without_qemu_it_is_told_to_install_that(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.base.proc.which", lambda _: None)
    answer = await kvm.probe(tmp_path / "probes.json", QemuProgram(), device)
    assert (answer.usable, answer.denied) == (False, False)
    assert "qemu-system-x86_64 is not installed" in answer.detail
    assert "apt-get install qemu-system-x86" in answer.hint
    assert "group kvm" not in answer.hint


@pytest.mark.parametrize("setting", ["auto", "kvm"])
async def test_what_is_to_be_done_follows_what_keeps_kvm_from_being_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    async def probe(_: Path, __: QemuProgram) -> kvm.KvmProbe:
        return kvm.KvmProbe(False, "there is no device", "load its module")

    monkeypatch.setattr(kvm, "probe", probe)
    _, check = await QemuHypervisor(setting, tmp_path, QemuProgram()).choose_accelerator()
    assert "load its module" in check.hint
    assert "group kvm" not in check.hint


def test_the_program_is_an_elf_file_with_a_pvh_entry_point() -> None:
    image = kvm.probe_program()
    assert image[:4] == b"\x7fELF"
    (entry,) = struct.unpack_from("<Q", image, 24)
    note = image.index(b"Xen\0")
    assert struct.unpack_from("<I", image, note - 4) == (18,)
    assert struct.unpack_from("<Q", image, note + 4) == (entry,)


@pytest.mark.parametrize(
    ("setting", "usable", "accelerator", "level"),
    [
        ("auto", True, Accelerator.KVM, Level.OK),
        ("auto", False, Accelerator.TCG, Level.WARN),
        ("kvm", True, Accelerator.KVM, Level.OK),
        ("kvm", False, Accelerator.KVM, Level.FAIL),
        ("tcg", True, Accelerator.TCG, Level.OK),
    ],
)
async def test_the_accelerator_is_what_is_configured_or_what_works(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    usable: bool,
    accelerator: Accelerator,
    level: Level,
) -> None:
    async def probe(cache: Path, qemu: QemuProgram) -> kvm.KvmProbe:
        return kvm.KvmProbe(usable, "the reason")

    monkeypatch.setattr(kvm, "probe", probe)
    hypervisor = QemuHypervisor(setting, Path("/nowhere"), QemuProgram())
    chosen, check = await hypervisor.choose_accelerator()
    assert (chosen, check.level) == (accelerator, level)
    assert check.detail
