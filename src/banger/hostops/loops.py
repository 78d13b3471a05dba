"""Loop devices by the kernel's own interface (linux/loop.h). All of it blocks for milliseconds.

What is ours is told by the name that a device was given for its file, which has whose it is; the
file is named by nobody: it comes open. No device is named by a caller, either.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from banger.base.errors import BadRequest, Conflict, PermissionDenied, PreconditionFailed
from banger.hostops import block_devices

_CONTROL = Path("/dev/loop-control")
_DEV = Path("/dev")
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LO_FLAGS_READ_ONLY = 1
#: It loses its file when the last who has it open closes it: it was detached meanwhile.
_LO_FLAGS_AUTOCLEAR = 4
#: struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt_type,
#: encrypt_key_size, flags; file_name, crypt_name, encrypt_key, init.
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
#: struct loop_config: fd, block_size, info, reserved.
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64x")
_SECTOR = 512
#: Others take devices, too: a free one may be gone when we have its number.
_TRIES = 16


@dataclass(frozen=True)
class _Status:
    file: tuple[int, int]
    writable: bool
    mark: bytes
    is_going: bool = False


def open_control() -> int:
    """The descriptor by which the kernel is asked for devices, the caller's to close. Raises
    PreconditionFailed where there is none."""
    try:
        return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionFailed(
            f"{_CONTROL}: {error.strerror}", hint="load its module: modprobe loop"
        ) from error


def there_may_be_any() -> bool:
    """Whether the kernel has loop devices at all."""
    return _CONTROL.exists()


def attach(file: int, owner_uid: int, *, writable: bool) -> str:
    """The name of a device of ours for this file. One that has it already is that.

    Raises PermissionDenied for a file of another's or not open for this, BadRequest for what is
    none.
    """
    _check_file(file, owner_uid, writable=writable)
    status = os.fstat(file)
    wanted = _Status((status.st_dev, status.st_ino), writable, _mark(owner_uid))
    for name in _with_files():
        with suppress(OSError), _opened(name) as device:
            if _status(device) == wanted:
                return name
    return _attach_new(file, wanted)


def detach_unused(owner_uid: int) -> None:
    """Detach all devices of ours that nothing is made of. Idempotent."""
    for name in _with_files():
        with suppress(OSError):  # it may go meanwhile
            # First: for its status the kernel asks after the file, on a server that hangs, say.
            if block_devices.users(name):
                continue
            with _opened(name) as device:
                if _status(device).mark == _mark(owner_uid):
                    # Whoever else has it open keeps it until he closes it.
                    fcntl.ioctl(device, _LOOP_CLR_FD)


def resize(name: str, owner_uid: int) -> None:
    """Have it be as large as its file. Raises Conflict for one that is not ours. Idempotent."""
    try:
        with _opened(name) as device:
            if _status(device).mark != _mark(owner_uid):
                raise Conflict(f"{name} is not banger's")
            fcntl.ioctl(device, _LOOP_SET_CAPACITY)
    except OSError as error:
        raise Conflict(f"{name}: {error.strerror}") from error


def sectors(name: str) -> int:
    """Its size, in sectors of 512 bytes."""
    return block_devices.size_bytes(name) // _SECTOR


def number(name: str) -> str:
    """``major:minor``."""
    return (block_devices.SYS_BLOCK / name / "dev").read_text().strip()


def _with_files() -> list[str]:
    """The names of all devices that have a file, anybody's."""
    found = block_devices.SYS_BLOCK.glob("loop*/loop/backing_file")
    return [path.parent.parent.name for path in found]


def _attach_new(file: int, wanted: _Status) -> str:
    flags = 0 if wanted.writable else _LO_FLAGS_READ_ONLY
    info = _INFO.pack(*[0] * 8, flags, wanted.mark, b"", b"", 0, 0)
    config = _CONFIG.pack(file, 0, info)
    for _ in range(_TRIES):
        name = f"loop{_free()}"
        try:
            with _opened(name, os.O_RDWR) as device:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            return name
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
    raise Conflict("others take all loop devices", hint="look with: losetup -a")


def _check_file(file: int, owner_uid: int, *, writable: bool) -> None:
    status = os.fstat(file)
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if not stat.S_ISREG(status.st_mode):
        raise BadRequest("what is to be a loop device is not a regular file")
    if status.st_uid != owner_uid:
        raise PermissionDenied(f"the file belongs to uid {status.st_uid}, not to {owner_uid}")
    # With O_PATH anybody opens anything that he can name.
    allowed = (os.O_RDWR,) if writable else (os.O_RDONLY, os.O_RDWR)
    if flags & os.O_PATH or flags & os.O_ACCMODE not in allowed:
        raise PermissionDenied("the file is not open for what is asked")
    if not status.st_size or status.st_size % _SECTOR:
        raise BadRequest(f"a file of {status.st_size} bytes is not whole sectors")


def _mark(owner_uid: int) -> bytes:
    return f"banger-{owner_uid}".encode()


def _status(device: int) -> _Status:
    """Raises OSError (ENXIO) for one without a file."""
    values = _INFO.unpack(fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_INFO.size)))
    return _Status(
        file=(_kernels_device(values[0]), values[1]),
        writable=not values[8] & _LO_FLAGS_READ_ONLY,
        mark=values[9].rstrip(b"\0"),
        is_going=bool(values[8] & _LO_FLAGS_AUTOCLEAR),
    )


def _kernels_device(encoded: int) -> int:
    """What the kernel calls a device (huge_encode_dev in linux/kdev_t.h), as st_dev has it."""
    return os.makedev(encoded >> 8 & 0xFFF, encoded & 0xFF | encoded >> 12 & 0xFFF00)


def _free() -> int:
    control = open_control()
    try:
        return fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


@contextmanager
def _opened(name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    device = os.open(_DEV / name, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield device
    finally:
        os.close(device)
