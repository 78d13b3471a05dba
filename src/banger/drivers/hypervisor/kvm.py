"""Does KVM run a guest here? Ask it: the presence of ``/dev/kvm`` proves nothing.

There are hosts (themselves virtual machines) where the device opens and makes VMs, whose vCPUs
even run a few instructions of real mode, and on which no ordinary kernel ever gets anywhere. So
QEMU boots a small program under KVM, with the CPU that a real machine gets: firmware in real mode,
then protected mode, paging, long mode, TSC, CPUID, and a loop that takes hardware some 20 ms and
one who emulates single instructions minutes. (Without the loop the program ends well on a host of
that kind.) It ends by writing to a port that ends QEMU with a
status nothing else gives.

The answer is kept for as long as the host is up and QEMU and the device stay as they are. That
nothing came within the time may only mean a busy host: this is asked again after a while, which
doubles each time, for on a host where it never comes each question costs the whole time.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base import proc, procfs
from banger.base.errors import BangerError, OperationTimeout, PreconditionFailed
from banger.drivers.hypervisor.qemu_argv import KVM_CPU
from banger.drivers.hypervisor.qemu_program import QemuProgram

DEVICE = Path("/dev/kvm")
_NO_DEVICE = (
    "load its module: modprobe kvm_intel or kvm_amd"
    " (the firmware, or the host of a virtual machine, has to allow it)"
)

#: A healthy host needs 0.2 s; one whose KVM is itself emulated (nested in TCG), several seconds.
_TIMEOUT_S = 10.0

#: How long the first time-out is believed.
_TIMEOUT_HOLDS_S = 300.0

# isa-debug-exit makes status (value << 1) | 1 of what the guest writes.
_EXIT_PORT = 0xF4
_EXIT_VALUE = 0x31
PROBE_PASSED = _EXIT_VALUE << 1 | 1

_LOOP_COUNT = 50_000_000


@dataclass(frozen=True)
class KvmProbe:
    """Whether KVM runs guests here, and how that is known, as text for `banger doctor`."""

    usable: bool
    detail: str
    #: What to do about that, where there is something.
    hint: str = ""
    #: It was not tried, as this user may not open the device: that says nothing of others.
    denied: bool = False


class _Cached(msgspec.Struct, frozen=True):
    """The file: an answer, and all that it depends on."""

    key: list[str]
    usable: bool
    detail: str
    #: A time-out: how long it is believed, and until when, by the clock that begins at boot.
    holds_s: float = 0
    until_s: float = 0

    def stands(self) -> bool:
        return not self.holds_s or _since_boot_s() < self.until_s


async def probe(cache: Path, qemu: QemuProgram, device: Path = DEVICE) -> KvmProbe:
    """Whether a vCPU runs, from `cache` when the question was answered since the host booted.

    `qemu` is what tries it. Takes 10 s at most. Never raises; a cache that cannot be read or
    written is done without. Not to be called again while it runs: who waits finds the answer in the
    cache.
    """
    obstacle = _obstacle(device)
    if obstacle is not None:
        # Not worth keeping: it is cheap to see, and changes when an administrator repairs it.
        return obstacle
    try:
        program = qemu.path()
    except PreconditionFailed as error:
        return KvmProbe(False, f"it is tried with QEMU, and {error.message}", error.hint)
    key = _key(device, program)
    cached = _read(cache)
    if cached is not None and cached.key != key:
        cached = None
    if cached is not None and cached.stands():
        return KvmProbe(cached.usable, cached.detail)
    try:
        answer = await _run(qemu)
    except OperationTimeout:
        answer = KvmProbe(False, f"a vCPU did not get anywhere within {_TIMEOUT_S:g} s")
        holds_s = 2 * cached.holds_s if cached is not None else _TIMEOUT_HOLDS_S
        until_s = _since_boot_s() + holds_s
        _write(cache, _Cached(key, False, answer.detail, holds_s, until_s))
    except BangerError as error:
        # QEMU did not start: that says nothing of KVM, and is not kept.
        return KvmProbe(False, error.message, error.hint)
    else:
        _write(cache, _Cached(key, answer.usable, answer.detail))
    return answer


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _obstacle(device: Path) -> KvmProbe | None:
    """What keeps us from even trying, if anything does."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return KvmProbe(False, f"there is no {device}", _NO_DEVICE)
    except PermissionError:
        hint = "have this user in the group kvm, log in anew, then: banger daemon restart"
        return KvmProbe(False, f"{device} may not be opened by this user", hint, denied=True)
    except OSError as error:
        return KvmProbe(False, f"{device} cannot be opened: {error.strerror}", _NO_DEVICE)
    return None


def _key(device: Path, program: str) -> list[str]:
    """What an answer depends on: this boot of the host, the device, this very QEMU."""
    device_info = device.stat()
    qemu = Path(program).stat()
    return [
        procfs.boot_id(),
        f"{device_info.st_rdev}:{stat.filemode(device_info.st_mode)}",
        f"{qemu.st_dev}:{qemu.st_ino}:{qemu.st_size}:{qemu.st_mtime_ns}",
    ]


async def _run(qemu: QemuProgram) -> KvmProbe:
    """Raises OperationTimeout, and what keeps QEMU from being started."""
    program = os.memfd_create("kvm-probe")
    try:
        os.write(program, probe_program())
        with qemu.starting() as path:
            completed = await proc.run(
                probe_argv(path, program), timeout_s=_TIMEOUT_S, check=False, pass_fds=(program,)
            )
    finally:
        os.close(program)
    if completed.returncode == PROBE_PASSED:
        return KvmProbe(True, "a vCPU ran a program")
    lines = completed.stderr.decode(errors="replace").strip().splitlines()
    name = Path(path).name
    reason = lines[0].removeprefix(f"{name}: ") if lines else f"status {completed.returncode}"
    return KvmProbe(False, f"QEMU cannot run a vCPU: {reason}")


def probe_argv(
    qemu: str, program_fd: int, accelerator: str = "kvm", cpu: str = KVM_CPU
) -> list[str]:
    """QEMU running the probe program, which it inherits as a descriptor."""
    return [
        qemu,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "microvm,x-option-roms=off,pit=off,pic=off"),
        *("-accel", accelerator, "-cpu", cpu, "-m", "64M"),
        *("-kernel", f"/proc/self/fd/{program_fd}"),
        *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=4"),
    ]


def _read(cache: Path) -> _Cached | None:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        return None


def _write(cache: Path, answer: _Cached) -> None:
    unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(msgspec.json.encode(answer))
        unfinished.replace(cache)
    except OSError:
        unfinished.unlink(missing_ok=True)


_LOAD_ADDRESS = 0x100000
_PAGE_TABLES = 0x200000
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PVH_NOTE = struct.Struct("<III4sQ")


def pvh_image(code_at: Callable[[int], bytes]) -> bytes:
    """An ELF file that QEMU starts by PVH: 32-bit protected mode, paging off, flat segments.

    `code_at` makes the machine code for the address it will have.
    The entry point is a note of type 18 and owner "Xen" (Xen's ``docs/misc/pvh.pandoc``).
    """
    note_offset = _ELF_HEADER.size + 2 * _PROGRAM_HEADER.size
    code_offset = note_offset + _PVH_NOTE.size
    entry = _LOAD_ADDRESS + code_offset
    note = _PVH_NOTE.pack(4, 8, 18, b"Xen\0", entry)
    code = code_at(entry)
    size = code_offset + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    note_address = _LOAD_ADDRESS + note_offset
    return b"".join(
        (
            # ET_EXEC, EM_X86_64, version 1; the program headers follow; no sections.
            _ELF_HEADER.pack(ident, 2, 62, 1, entry, _ELF_HEADER.size, 0, 0, 64, 56, 2, 0, 0, 0),
            # PT_LOAD (rwx) of the whole file, and PT_NOTE (r) with its 4-byte alignment.
            _PROGRAM_HEADER.pack(1, 7, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 4096),
            _PROGRAM_HEADER.pack(4, 4, note_offset, note_address, note_address, 24, 24, 4),
            note,
            code,
        )
    )


def probe_program() -> bytes:
    """The program that ends QEMU with the status `PROBE_PASSED`."""
    return pvh_image(_code)


def _code(address: int) -> bytes:
    """The machine code, to be loaded at `address`."""

    def store(where: int, value: int) -> bytes:
        return b"\xc7\x05" + struct.pack("<II", where, value)  # mov dword [where], value

    pdpt, directory = _PAGE_TABLES + 0x1000, _PAGE_TABLES + 0x2000
    enter = b"".join(
        (
            store(_PAGE_TABLES, pdpt | 3),
            store(pdpt, directory | 3),
            store(directory, 0x83),  # 2 MiB pages: this program,
            store(directory + 8, 0x200083),  # and these tables
            b"\xb8" + struct.pack("<I", _PAGE_TABLES) + b"\x0f\x22\xd8",  # cr3 = tables
            b"\x0f\x20\xe0\x83\xc8\x20\x0f\x22\xe0",  # cr4 |= PAE
            b"\xb9" + struct.pack("<I", 0xC0000080),  # ecx = EFER
            b"\x0f\x32\x0d" + struct.pack("<I", 0x100) + b"\x0f\x30",  # EFER |= LME
            b"\x0f\x20\xc0\x0d" + struct.pack("<I", 0x80000001) + b"\x0f\x22\xc0",  # cr0 |= PG | PE
        )
    )
    gdt = address + len(enter) + 14  # behind the two instructions of 7 bytes that need it
    pointer = gdt + 16
    long_mode = pointer + 6
    return b"".join(
        (
            enter,
            b"\x0f\x01\x15" + struct.pack("<I", pointer),  # lgdt [pointer]
            b"\xea" + struct.pack("<IH", long_mode, 8),  # jmp 8:long_mode
            struct.pack("<QQ", 0, 0x00AF9A000000FFFF),  # the table: null, 64-bit code
            struct.pack("<HI", 15, gdt),
            b"\x0f\x31",  # rdtsc
            b"\x31\xc0\x0f\xa2",  # eax = 0; cpuid
            b"\x48\xb9" + struct.pack("<Q", _LOOP_COUNT),  # rcx = count
            b"\x48\xff\xc9\x75\xfb",  # again: dec rcx; jnz again
            b"\xb8" + struct.pack("<I", _EXIT_VALUE),
            b"\x66\xba" + struct.pack("<H", _EXIT_PORT) + b"\xef",  # out dx, eax
            b"\xf4",  # hlt
        )
    )
