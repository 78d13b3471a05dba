"""Whether the host's kernel makes loop devices and snapshots of device-mapper's."""

from __future__ import annotations

import os
from pathlib import Path

from banger.drivers.base import Check, Level

#: What has to be there, by module: a device that is there with it, or None.
_NEEDED = {
    "loop": Path("/dev/loop-control"),
    "dm_mod": Path("/dev/mapper/control"),
    "dm_snapshot": None,
}


def kernel_checks(name: str) -> list[Check]:
    """What of it is missing, each as a failed check called so; one that is well if nothing is."""
    absent = [
        module
        for module, device in _NEEDED.items()
        if not (device is not None and device.exists()) and not Path("/sys/module", module).is_dir()
    ]
    if missing := sorted(set(absent) - _modules() if absent else ()):
        detail = f"the kernel has no {', '.join(missing)}"
        hint = f'load what it has: modprobe -a {" ".join(missing)}; or set storage = "auto"'
        return [Check(name, Level.FAIL, detail, hint)]
    return [Check(name, Level.OK, "device-mapper snapshots over one loop device for each image")]


def _modules() -> frozenset[str]:
    """Those that the kernel has built in, or finds when they are needed (kmod(8))."""
    directory = Path("/lib/modules", os.uname().release)
    found = set()
    for listing in ("modules.dep", "modules.builtin"):
        try:
            lines = (directory / listing).read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            file = line.partition(":")[0].rpartition("/")[2]
            found.add(file.partition(".ko")[0].replace("-", "_"))
    return frozenset(found)
