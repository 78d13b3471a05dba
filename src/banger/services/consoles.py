"""Console logs are the guest's to write, and so theirs to fill the host's disk with: a bound.

The hypervisor appends to the file (O_APPEND), so it may be cut while it is written to. When a log
has grown past the limit, its end is kept beside it as ``console.log.old`` and it begins anew.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from banger.base.files import write_atomically
from banger.base.log import get_logger
from banger.base.model import Vm, VmState

#: What one boot prints is some kilobytes; a guest under emulation can write 0.6 MB a second.
LIMIT_BYTES = 16 << 20
_KEPT_BYTES = 1 << 20


def cut(log: Path, limit_bytes: int = LIMIT_BYTES) -> bool:
    """Cut a log that is longer than the limit; whether it was. What comes between the copy and the
    cut is lost, of a log that overflows anyway."""
    try:
        with log.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= limit_bytes:
                return False
            file.seek(size - min(_KEPT_BYTES, limit_bytes))
            write_atomically(log.with_name(f"{log.name}.old"), file.read(_KEPT_BYTES))
            file.truncate(0)
    except FileNotFoundError:
        return False
    return True


async def bound(vms: list[Vm]) -> None:
    """Cut the logs of running VMs that need it; one that cannot be cut is logged."""
    for vm in vms:
        if vm.runtime.state is VmState.RUNNING:
            try:
                if await asyncio.to_thread(cut, Path(vm.runtime.log_path)):
                    get_logger().warning("console log cut", vm_id=vm.id, vm_name=vm.name)
            except OSError as error:
                get_logger().error("console log not cut", vm_id=vm.id, error=str(error))
