"""Logs that a guest has written, and so theirs to fill the host's disk with: a bound.

The console is the guest's to write, and what its hypervisor logs is about what the guest does: QEMU
has a line for each time that a device meets what it cannot read, Firecracker for each kind of that
four a second at most (logger/rate_limited.rs of v1.16.1). When a log takes more than the limit, its
end is kept beside it as ``….old`` and it begins anew, also while it is written to. QEMU appends
(O_APPEND), and so does what prints to a console; Firecracker's own log goes on at the place where
it was, up to which it is a hole then. So what counts is what is allocated.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from banger.base.files import write_atomically
from banger.base.log import get_logger
from banger.base.model import Vm
from banger.base.paths import Paths

#: What one boot prints is some kilobytes; a guest under emulation can write 0.6 MB a second.
LIMIT_BYTES = 16 << 20
_KEPT_BYTES = 1 << 20


def cut(log: Path, limit_bytes: int = LIMIT_BYTES) -> bool:
    """Cut a log that takes more than the limit; whether it did. What is written meanwhile is lost,
    of a log that overflows anyway. Raises OSError, also for what is no file."""
    # Who is in a jail writes to it, too: no link is followed, and opened for both no pipe blocks.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(log, flags)
    except FileNotFoundError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(log))
        if status.st_blocks * 512 <= limit_bytes:
            return False
        end = os.pread(descriptor, _KEPT_BYTES, max(0, status.st_size - _KEPT_BYTES))
        # First: where it has filled the disk, there is no room for a copy before.
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
    with suppress(OSError):  # still no room, or its directory has gone: it is cut all the same
        write_atomically(log.with_name(f"{log.name}.old"), end)
    return True


def bound(paths: Paths, vms: list[Vm]) -> None:
    """Cut the logs that need it; one that cannot be cut is logged. Blocks.

    Of VMs that have stopped, too: the last look at one may have come before most of it.
    """
    for vm in vms:
        files = paths.vm(vm.id)
        for log in (files.console_log, files.hypervisor_log):
            about = {"vm_id": vm.id, "vm_name": vm.name, "log": log.name}
            try:
                if cut(log):
                    get_logger().warning("log cut", **about)
            except OSError as error:
                get_logger().error("log not cut", **about, error=str(error))
