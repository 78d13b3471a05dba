"""Loop devices and device-mapper snapshots of banger's, on a kernel that has them and with udev."""

from __future__ import annotations

import json

from guest_host import GuestHost

#: Each step's outcome, by name, as one object of JSON.
_STEPS = """
import asyncio, json, os, subprocess
from pathlib import Path
from banger.base.errors import BangerError
from banger.hostops.local import LocalHost
from banger.hostops.ops import AttachLoop, DetachLoop, MapSnapshot, UnmapSnapshot

ID = "0123456789ab"
NODE = Path(f"/dev/mapper/banger-{ID}")
seen = {}

def run(line):
    return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout

async def refused(step, operation):
    try:
        await host.perform(operation)
    except BangerError as error:
        seen[step] = f"{error.code}: {error.message}"

async def attach(name, flags, writable):
    with open(f"/root/{name}", "wb") as file:
        if not writable:  # what is to keep changes begins as zeros
            file.write(name.encode() * 1024)
        file.truncate(8 << 20)
    descriptor = os.open(f"/root/{name}", flags)
    device = (await host.perform(AttachLoop(file=descriptor, writable=writable))).name
    os.close(descriptor)
    return device

async def main():
    base = await attach("base", os.O_RDONLY, False)
    kept = await attach("kept", os.O_RDWR, True)
    mapping = MapSnapshot(vm_id=ID, base=base, changes=kept)
    seen["names"] = [(await host.perform(mapping)).name for _ in range(2)]
    with open(NODE, "r+b", buffering=0) as device:
        seen["begins as"] = device.read(4).decode()
        device.seek(0)
        device.write(b"mine" * 1024)
        os.fsync(device.fileno())
        await refused("while it is open", UnmapSnapshot(vm_id=ID))
    seen["base"] = Path("/root/base").read_bytes()[:4].decode()
    await refused("base while it is mapped", DetachLoop(device=base))
    await refused("made of another", MapSnapshot(vm_id=ID, base=kept, changes=base))
    for _ in range(2):
        await host.perform(UnmapSnapshot(vm_id=ID))
    await host.perform(mapping)
    with open(NODE, "rb") as device:
        seen["mapped again"] = device.read(4).decode()
    await host.perform(UnmapSnapshot(vm_id=ID))
    run(f"dmsetup create banger-{ID} --table '0 8 error'")
    await refused("map over another's", mapping)
    await refused("unmap another's", UnmapSnapshot(vm_id=ID))
    run(f"dmsetup remove banger-{ID}")
    for name in (base, kept):
        await host.perform(DetachLoop(device=name))
    for name in ("base", "kept"):
        os.unlink(f"/root/{name}")
    seen["left"] = run("dmsetup ls; losetup --all")

host = LocalHost()
asyncio.run(main())
print(json.dumps(seen))
"""


def test_a_mapping_is_made_kept_and_taken_away_and_anothers_is_left_alone(host: GuestHost) -> None:
    host.load("loop", "dm_snapshot")
    # By the interpreter that banger is installed for.
    python = host.root('head -n 1 "$(command -v banger)"').removeprefix("#!").strip()
    seen = json.loads(host.root(f"{python} -", stdin=_STEPS.encode()))
    name = "banger-0123456789ab"
    assert seen == {
        "names": [name, name],
        "begins as": "base",
        "while it is open": f"conflict: {name} is in use",
        "base": "base",
        "base while it is mapped": "conflict: loop0 is in use by dm-0",
        "made of another": "conflict: loop0 cannot be written",
        "mapped again": "mine",
        "map over another's": f"conflict: there is a mapping {name}, which is not banger's",
        "unmap another's": f"conflict: there is a mapping {name}, which is not banger's",
        "left": "No devices found\n",
    }
