"""Device-mapper snapshots, by dmsetup. What is ours is told by the UUID that it was given."""

from __future__ import annotations

import os
import re
import struct
from contextlib import suppress
from pathlib import Path

from banger.base import proc
from banger.base.errors import BadRequest, Conflict, PermissionDenied, PreconditionFailed
from banger.base.jail import has_jail
from banger.hostops import block_devices, loops
from banger.hostops.ops import SnapshotState

DMSETUP = "dmsetup"
_TIMEOUT_S = 20.0
#: There while the kernel's driver is.
_DRIVER = Path("/sys/class/misc/device-mapper")
#: Rules of udev's would give the node to the group of disks, again at each change. Without them
#: dmsetup makes and removes it, if it does not rely on udev for that (libdevmapper 1.02.185).
_OWN_NODE = ("--noudevrules", "--verifyudev")
#: Root's: nobody has the node by it.
_GROUP = "0"
#: What is changed costs 4 KiB at least.
CHUNK_SECTORS = 8
_CHUNK_BYTES = CHUNK_SECTORS * 512
#: Kept beyond a reboot (P). Where there is no room for a change that write fails, and what there is
#: stays good (O, of Linux 4.4).
_KIND = f"PO {CHUNK_SECTORS}"
#: struct disk_header (drivers/md/dm-snap-persistent.c), with which changes begin that have been
#: written: magic, valid, version, chunk size in sectors.
HEADER = struct.Struct("<4s3I")
MAGIC = b"SnAp"
VERSION = 1
#: Of a chunk with struct disk_exception (drivers/md/dm-snap-persistent.c), of 16 bytes each.
_EXCEPTIONS = _CHUNK_BYTES // 16
_INSTANCE = "[0-9a-f]{8}"
_STATES = {"Overflow": SnapshotState.OVERFLOWED, "Invalid": SnapshotState.INVALID}


def mapping_name(vm_id: str) -> str:
    return f"banger-{vm_id}"


def full_bytes(base_bytes: int) -> int:
    """The most that changes take: a header, and for every 256 chunks of the base as many and one
    that says whose they are; and such an area that is there before it is needed."""
    areas = -(-base_bytes // (_CHUNK_BYTES * _EXCEPTIONS)) + 1
    return (1 + areas * (1 + _EXCEPTIONS)) * _CHUNK_BYTES


async def create(vm_id: str, instance: str, base: str, changes: str, owner_uid: int) -> str:
    """Its name, over two loop devices of ours. Raises Conflict where it is another, or becomes one.

    Idempotent.
    """
    name = mapping_name(vm_id)
    table = f"0 {loops.sectors(base)} snapshot {loops.number(base)} {loops.number(changes)} {_KIND}"
    if await _is_there(vm_id, owner_uid):
        if await _table(name) != table:
            raise Conflict(f"{name} is there, and is made of other devices")
        return name
    node = (*_OWN_NODE, "--uid", str(owner_uid), "--gid", _GROUP, "--mode", "0600")
    uuid = mapping_uuid(vm_id, instance, owner_uid)
    await _dmsetup("create", name, "--uuid", uuid, *node, "--table", table)
    await _check_made(name, table)
    return name


def check_header(begins: bytes) -> None:
    """Raise BadRequest for changes that begin otherwise than those that we make: for the header's
    chunk size the kernel forgets the one that it is given, and takes memory for several chunks.

    What it has given up (it is not valid) is of no use, and does no harm.
    """
    if not begins.strip(b"\0"):
        return
    if len(begins) >= HEADER.size:
        magic, valid, *rest = HEADER.unpack_from(begins)
        if (magic, rest) == (MAGIC, [VERSION, CHUNK_SECTORS]) and valid in (0, 1):
            return
    raise BadRequest("the file of changes begins neither with zeros nor as one of ours")


async def _check_made(name: str, table: str) -> None:
    """Raise Conflict, and have it be gone, where it is another than was asked for: its owner may
    write the header of its changes between our look at it and the kernel's."""
    made = await _table(name)
    if made == table:
        return
    # With --force: one that he has open by now keeps its name, and has neither devices nor memory.
    with suppress(proc.ProcessFailed):
        await _dmsetup("remove", "--force", *_OWN_NODE, name)
    raise Conflict(f"{name} became another than was asked for: {made}, not {table}")


async def _table(name: str) -> str:
    return (await _dmsetup("table", name)).strip()


def writable_loops(vm_id: str, owner_uid: int) -> list[str]:
    """The loop devices that keep the changes of our mapping of this machine: one, if it is there.
    Blocks."""
    return [
        device
        for each in block_devices.mappings()
        if each.name == mapping_name(vm_id) and _is_ours(each.uuid, vm_id, owner_uid)
        for device in each.devices
        if not block_devices.is_read_only(device)
    ]


async def state(vm_id: str, owner_uid: int) -> SnapshotState:
    """How it stands. Raises Conflict for another's of its name."""
    if not await _is_there(vm_id, owner_uid):
        return SnapshotState.ABSENT
    # 0 16777216 snapshot 64/131072 16: used of all sectors, and how many of those are metadata.
    words = (await _dmsetup("status", mapping_name(vm_id))).split()
    return _STATES.get(words[3] if len(words) > 3 else "Invalid", SnapshotState.GOOD)


async def remove(vm_id: str, owner_uid: int) -> None:
    """Raises Conflict for one that is not ours or in use. Idempotent."""
    if not await _is_there(vm_id, owner_uid):
        return
    name = mapping_name(vm_id)
    # A jail has a node of its own, by the number, which the kernel gives to the next mapping.
    if has_jail(vm_id, owner_uid):
        raise Conflict(f"{name} is in use: its machine is in a jail", hint="stop the machine")
    try:
        # Not --retry: that waits for five seconds with all others waiting. Callers try again.
        await _dmsetup("remove", *_OWN_NODE, name)
    except proc.ProcessFailed as error:
        if b"busy" not in error.completed.stderr.lower():
            raise
        raise Conflict(f"{name} is in use") from error


async def machines(instance: str, owner_uid: int) -> list[str]:
    """The ids of those that have a mapping of ours, of this daemon's, or of any without it."""
    of = re.escape(instance) if instance else _INSTANCE
    shape = re.compile(rf"BANGER-{owner_uid}-{of}-([0-9a-f]{{12}})")
    found = [shape.fullmatch(uuid) for uuid in (await _uuids()).values()]
    return [each[1] for each in found if each is not None]


def check_mapping(device: int, vm_id: str, owner_uid: int) -> None:
    """Raise PermissionDenied for a block device, by its number, that is not our mapping of this
    machine."""
    about = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/dm")
    try:
        name, uuid = ((about / each).read_text().strip() for each in ("name", "uuid"))
    except OSError:
        name = uuid = ""
    if name != mapping_name(vm_id) or not _is_ours(uuid, vm_id, owner_uid):
        raise PermissionDenied(f"the device is not the mapping of {vm_id}")


async def _is_there(vm_id: str, owner_uid: int) -> bool:
    """Whether our mapping of this machine is. Raises Conflict for another's of its name."""
    found = (await _uuids()).get(mapping_name(vm_id))
    if found is not None and not _is_ours(found, vm_id, owner_uid):
        raise Conflict(f"there is a mapping {mapping_name(vm_id)}, which is not banger's")
    return found is not None


async def _uuids() -> dict[str, str]:
    """Of all mappings, anybody's, by their names. sysfs has none that was made half."""
    if not _DRIVER.exists():  # noqa: ASYNC240 - a look at what is in memory
        return {}
    listing = await _dmsetup(
        "info", "--columns", "--noheadings", "--separator", "/", "--options", "name,uuid"
    )
    return dict(line.strip().split("/", 1) for line in listing.splitlines() if "/" in line)


def mapping_uuid(vm_id: str, instance: str, owner_uid: int) -> str:
    return f"BANGER-{owner_uid}-{instance}-{vm_id}"


def _is_ours(uuid: str, vm_id: str, owner_uid: int) -> bool:
    return re.fullmatch(rf"BANGER-{owner_uid}-{_INSTANCE}-{vm_id}", uuid) is not None


async def _dmsetup(*words: str) -> str:
    try:
        completed = await proc.run(
            [DMSETUP, *words], timeout_s=_TIMEOUT_S, env=proc.BARE_ENVIRONMENT
        )
    except proc.ProcessFailed as error:
        if b"device-mapper driver" not in error.completed.stderr:
            raise
        raise PreconditionFailed(
            "the kernel has no device-mapper", hint="load its module: modprobe dm_snapshot"
        ) from error
    return completed.stdout.decode(errors="replace")
