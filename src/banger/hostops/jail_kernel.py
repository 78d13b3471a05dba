"""Calls of the kernel's that Python has no names for, as `jail_launcher` needs them.

All raise OSError. Numbers of system calls from 424 on are the same on all architectures; flags are
those of linux/mount.h and linux/sched.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

ATTR_RDONLY = 0x1
ATTR_NOSUID = 0x2
ATTR_NODEV = 0x4
ATTR_NOEXEC = 0x8
ATTR_IDMAP = 0x100000
ATTR_NOSYMFOLLOW = 0x200000

MS_NOSUID = 0x2
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 0x1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
#: keyctl(2) is older than the common numbers.
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
#: struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
_MOUNT_ATTR = struct.Struct("=4Q")

_libc = ctypes.CDLL(None, use_errno=True)


def clone_mount(descriptor: int) -> int:
    """A mount that is nowhere yet, of what a descriptor names and nothing else (open_tree(2))."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    return _call(_SYS_OPEN_TREE, descriptor, b"", flags)


def set_attributes(mount: int, attributes: int, clear: int, user_namespace: int) -> None:
    """Of a mount that is nowhere yet (mount_setattr(2), Linux 5.12)."""
    attr = _MOUNT_ATTR.pack(attributes, clear, 0, user_namespace)
    _call(_SYS_MOUNT_SETATTR, mount, b"", _AT_EMPTY_PATH, attr, _MOUNT_ATTR.size)


def attach_mount(mount: int, path: Path) -> None:
    """Have it at a path (move_mount(2))."""
    _call(
        _SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH
    )  # fmt: skip


def mount_tmpfs(path: Path, options: str) -> None:
    _checked(_libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", MS_NOSUID, options.encode()))


def keep_mounts_private() -> None:
    """Nothing that is mounted here is seen elsewhere, nor the other way round."""
    _checked(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))


def unshare(namespaces: int) -> None:
    """Have namespaces of one's own. (Python's own is of 3.12.)"""
    _checked(_libc.unshare(namespaces))


def enter_network(namespace: int) -> None:
    _checked(_libc.setns(namespace, CLONE_NEWNET))


def end_with(parent: int) -> None:
    """End when the parent, which is to be this process, ends. Raises ProcessLookupError where it
    has."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, "whoever started it has ended")


def gain_nothing() -> None:
    """Neither this process nor its children get privileges by what they run."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def leave_keyring() -> None:
    """Have a session keyring of one's own, without what root has in his (keyctl(2))."""
    try:
        _call(_SYS_KEYCTL[os.uname().machine], _KEYCTL_JOIN_SESSION_KEYRING, 0)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without CONFIG_KEYS
            raise


def _call(number: int, *arguments: int | bytes) -> int:
    words = [
        ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each)
        for each in arguments
    ]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *words)))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
