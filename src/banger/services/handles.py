"""What is true right now of the VMs' processes: a cache, and a scratch file for each VM.

The file is for the next daemon: the cache answers. Used from the event loop only, where no call
here yields, so each is atomic. Nothing of this is ever in the database.
"""

from __future__ import annotations

import msgspec

from banger.base.files import write_atomically
from banger.base.log import get_logger
from banger.base.malformed import MALFORMED
from banger.base.model import Handles
from banger.base.paths import Paths


class HandleCache:
    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._cache: dict[str, Handles] = {}

    def get(self, vm_id: str) -> Handles:
        """The handles of a VM; the empty record when there are none."""
        return self._cache.get(vm_id, Handles())

    def set(self, vm_id: str, handles: Handles) -> None:
        """Remember them, here and in the VM's scratch file."""
        self._cache[vm_id] = handles
        # They say nothing of another boot of the host, so they need not outlive this one.
        file = self._paths.vm(vm_id).handles
        write_atomically(file, msgspec.json.encode(handles), durable=False)

    def load(self, vm_id: str) -> Handles:
        """Read the scratch file into the cache. A missing or corrupt file is the empty record."""
        path = self._paths.vm(vm_id).handles
        handles = Handles()
        try:
            handles = msgspec.json.decode(path.read_bytes(), type=Handles)
        except FileNotFoundError:
            pass
        except (OSError, *MALFORMED) as error:
            get_logger().error("handles unreadable", vm_id=vm_id, path=str(path), error=str(error))
        self._cache[vm_id] = handles
        return handles

    def clear(self, vm_id: str) -> None:
        """Forget them in both places. Idempotent."""
        self._cache.pop(vm_id, None)
        self._paths.vm(vm_id).handles.unlink(missing_ok=True)
