"""Loop devices and device-mapper snapshots of banger's, on a kernel that has them and with udev."""

from __future__ import annotations

import json

from guest_host import GuestHost

#: Each step's outcome, by name, as one object of JSON.
_STEPS = """
import asyncio, json, os, struct, subprocess
from pathlib import Path
from banger.base.errors import BangerError
from banger.hostops.local import LocalHost
from banger.hostops.ops import GrowSnapshot, MapSnapshot, SweepSnapshots, UnmapSnapshot

ID, OURS, THEIRS = "0123456789ab", "89abcdef", "01234567"
NODE = Path(f"/dev/mapper/banger-{ID}")
seen = {}

def run(line):
    return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout

def there():
    return run("dmsetup ls; losetup --all")

async def refused(step, operation):
    try:
        await host.perform(operation)
    except BangerError as error:
        seen[step] = f"{error.code}: {error.message}"

def opened(name, flags):
    return os.open(f"/root/{name}", flags)

async def main():
    for name in ("base", "kept", "other"):
        with open(f"/root/{name}", "wb") as file:
            if name == "base":  # what is to keep changes begins as zeros
                file.write(name.encode() * 1024)
            file.truncate(8 << 20)
    base, kept = opened("base", os.O_RDWR), opened("kept", os.O_RDWR)
    mapping = MapSnapshot(vm_id=ID, instance=OURS, base=base, changes=kept)
    seen["names"] = [(await host.perform(mapping)).name for _ in range(2)]
    whole = there()
    seen["loops"] = whole.count("/dev/loop")
    with open(NODE, "r+b", buffering=0) as device:
        seen["begins as"] = device.read(4).decode()
        device.seek(0)
        device.write(b"mine" * 1024)
        os.fsync(device.fileno())
        await refused("while it is open", UnmapSnapshot(vm_id=ID))
        await refused("swept while it is open", SweepSnapshots(instance=OURS))
    seen["base"] = Path("/root/base").read_bytes()[:4].decode()
    other = opened("other", os.O_RDWR)
    await refused("made of another", MapSnapshot(vm_id=ID, instance=OURS, base=base, changes=other))
    os.pwrite(other, struct.pack("<4s3I", b"SnAp", 1, 1, 1 << 21), 0)  # chunks of 1 GiB
    for step, kept_in in (("exchanged", base), ("of large chunks", other)):
        await refused(step, MapSnapshot(vm_id=ID, instance=OURS, base=kept, changes=kept_in))
    os.unlink("/root/other")
    for sweep in (SweepSnapshots(instance=THEIRS), SweepSnapshots(instance=OURS, keep=(ID,))):
        await host.perform(sweep)
    seen["still whole"] = there() == whole
    os.truncate(kept, 9 << 20)
    await host.perform(GrowSnapshot(vm_id=ID))
    seen["grown"] = run("cat /sys/block/loop*/size").split().count(str((9 << 20) // 512))
    for _ in range(2):
        await host.perform(UnmapSnapshot(vm_id=ID))
    seen["unmapped"] = there()
    await refused("grown when it is gone", GrowSnapshot(vm_id=ID))
    await host.perform(mapping)
    with open(NODE, "rb") as device:
        seen["mapped again"] = device.read(4).decode()
    os.rename("/root/base", "/root/moved")  # files are not looked for by their names
    os.unlink("/root/kept")
    await host.perform(SweepSnapshots(instance=OURS))
    seen["swept"] = there()
    run(f"dmsetup create banger-{ID} --table '0 8 error'")
    await refused("map over another's", mapping)
    await refused("unmap another's", UnmapSnapshot(vm_id=ID))
    await host.perform(SweepSnapshots())
    run(f"dmsetup remove banger-{ID}")
    # As one that is killed between two steps of the kernel's leaves it: there is no device yet.
    run(f"dmsetup create banger-{ID} --uuid BANGER-0-{OURS}-{ID} --notable")
    await host.perform(SweepSnapshots(instance=OURS))
    os.unlink("/root/moved")
    seen["left"] = there()

host = LocalHost()
asyncio.run(main())
print(json.dumps(seen))
"""


_NOT_OURS = "the file of changes begins neither with zeros nor as one of ours"


def test_a_mapping_is_made_kept_and_taken_away_and_anothers_is_left_alone(host: GuestHost) -> None:
    host.load("loop", "dm_snapshot")
    # By the interpreter that banger is installed for.
    python = host.root('head -n 1 "$(command -v banger)"').removeprefix("#!").strip()
    seen = json.loads(host.root(f"{python} -", stdin=_STEPS.encode()))
    name = "banger-0123456789ab"
    nothing = "No devices found\n"
    assert seen == {
        "names": [name, name],
        "loops": 2,
        "begins as": "base",
        "while it is open": f"conflict: {name} is in use",
        "swept while it is open": f"conflict: {name} is in use",
        "base": "base",
        "made of another": f"conflict: {name} is there, and is made of other devices",
        "exchanged": f"bad_request: {_NOT_OURS}",
        "of large chunks": f"bad_request: {_NOT_OURS}",
        "still whole": True,
        "grown": 1,
        "unmapped": nothing,
        "grown when it is gone": "conflict: there is no snapshot of 0123456789ab that could grow",
        "mapped again": "mine",
        "swept": nothing,
        "map over another's": f"conflict: there is a mapping {name}, which is not banger's",
        "unmap another's": f"conflict: there is a mapping {name}, which is not banger's",
        "left": nothing,
    }
