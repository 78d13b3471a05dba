"""The files of an image, made from a tree: its root file system and its work seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from banger.base.errors import PreconditionFailed
from banger.images.ext4 import MIB, Shape, edit_ext4, make_ext4
from banger.images.progress import UNKNOWN, Progress
from banger.images.unpack import Directory, Node, Owner, Unpacked
from banger.images.userns import temporary_tree

#: What a VM's system disk has by default (`vm_defaults.system_overlay_size`): a guest that need
#: not grow it is up a tenth of a second earlier. Sparse, so it costs nothing.
_ROOTFS_MIB = 8192
#: Small, for it is grown to the size that each VM asks for.
_WORK_SEED_MIB = 256
_ROOT_JOURNAL_MIB = 32
_WORK_JOURNAL_MIB = 16
#: What a file takes beside its content: the end of its last block, its inode, its name.
_ENTRY_BYTES = 4096 + 256 + 64
_BYTES_PER_INODE = 16384

_BELOW_HOME = b"root/"
_FROM_IMAGE = ".banger-from-image"
_KINDS = {"c": 0o020000, "b": 0o060000}
_HOME = Directory(mode=0o700, uid=0, gid=0, entries=0, bytes=0)


@dataclass(frozen=True)
class RootFiles:
    rootfs: Path
    work_seed: Path


async def make_root(
    tree: Path, content: Unpacked, dest: Path, *, progress: Progress, home: Path | None = None
) -> RootFiles:
    """Make ``rootfs.ext4`` and ``work-seed.ext4`` in `dest` from a tree that `unpack` made, or
    something like it; stage ``filesystem``.

    The seed is what lies in `home`, by default the tree's own ``/root``; `content.home` says who
    may enter it. Not synced: that is cheaper once the tree is gone. Raises as `make_ext4` does.
    """
    files = RootFiles(dest / "rootfs.ext4", dest / "work-seed.ext4")
    count = f"{content.root.entries} files" if content.root.entries else ""
    progress("filesystem", count, UNKNOWN)
    await make_ext4(tree, files.rootfs, _shape("banger-root", content.root))
    await edit_ext4(files.rootfs, _requests(content.root, content.devices, content.owners))
    # What has the name of the home may be a link, and lead anywhere on this machine.
    async with temporary_tree(dest / "empty") as empty:
        source = empty if content.home is None else home or tree / "root"
        seed = content.home or _HOME
        await make_ext4(source, files.work_seed, _shape("banger-work", seed))
    devices = [each for each in content.devices if home is None and _is_below_home(each)]
    owners = [each for each in content.owners if home is None and _is_below_home(each)]
    await edit_ext4(files.work_seed, _requests(seed, devices, owners, _BELOW_HOME))
    return files


async def make_empty_seed(file: Path) -> None:
    """Make the work seed of an image whose file system nobody here looks into.

    It is marked, and whoever boots first with it puts the image's ``/root`` there (`fill_home` in
    the agent's init.c): for templates, once for all machines.
    """
    async with temporary_tree(file.with_name("empty")) as empty:
        (empty / _FROM_IMAGE).touch(mode=0o600)
        await make_ext4(empty, file, _shape("banger-work", _HOME))
    await edit_ext4(file, _requests(_HOME, (), ()))


def _shape(label: str, of: Directory) -> Shape:
    """A file system of the usual size, or a larger one with a quarter to spare."""
    is_root = label == "banger-root"
    need_bytes = (of.bytes + of.entries * _ENTRY_BYTES) * 5 // 4
    journal_mib = _ROOT_JOURNAL_MIB if is_root else _WORK_JOURNAL_MIB
    size_mib = max(
        _ROOTFS_MIB if is_root else _WORK_SEED_MIB,
        math.ceil(need_bytes / MIB) + journal_mib + 64,
    )
    usual_inodes = (size_mib * MIB) // _BYTES_PER_INODE
    inodes = 0 if of.entries * 2 < usual_inodes else of.entries * 2
    return Shape(label, size_mib, journal_mib=journal_mib, inodes=inodes)


def _requests(
    top: Directory, devices: Iterable[Node], owners: Iterable[Owner], prefix: bytes = b""
) -> list[str]:
    """What `debugfs` is to do: mke2fs leaves the top directory 0755, and root's (until 1.47.1)."""
    requests = [
        f"set_inode_field <2> mode 04{top.mode:04o}",
        *_owned("<2>", top.uid, top.gid),
    ]
    for node in devices:
        directory, _, name = _name(_place(node).removeprefix(prefix)).rpartition("/")
        requests += [
            f'cd "/{directory}"',
            f'mknod "{name}" {node.kind} 0 0',
            # By a path: a name in angle brackets would be the number of an inode.
            *(f'set_inode_field "./{name}" {field}' for field in _device_fields(node)),
            f'set_inode_field "./{name}" mode 0{_KINDS[node.kind] | node.mode:o}',
            *_owned(f'"./{name}"', node.uid, node.gid),
            *(f'set_inode_field "./{name}" {each}time @{node.mtime_s}' for each in "amc"),
        ]
    for owner in owners:
        place = _name(_place(owner).removeprefix(prefix))
        requests += _owned(f'"/{place}"', owner.uid, owner.gid)
    return requests


def _name(place: bytes) -> str:
    """A path as it can stand in a request to debugfs, between quotes: each of its lines is a
    request, and one that begins with ``!`` is a command for this machine's shell."""
    if any(byte < 0x20 or byte in b'"\x7f' for byte in place):
        raise PreconditionFailed(
            f"{place!r} cannot be made: a device node, or a file whose owner's number is above"
            " 65535, needs a name without quotes and control characters"
        )
    return place.decode("utf-8", "surrogateescape")


def _is_below_home(noted: Node | Owner) -> bool:
    return _place(noted).startswith(_BELOW_HOME)


def _place(of: Node | Owner) -> bytes:
    return bytes.fromhex(of.place)


def _device_fields(node: Node) -> tuple[str, str]:
    """The numbers as ext4 keeps them, in one word or another (fs/ext4/ext4.h of the kernel, from
    linux/kdev_t.h). debugfs itself takes only the smaller ones."""
    if node.major < 256 and node.minor < 256:
        return f"block[0] {node.major << 8 | node.minor}", "block[1] 0"
    number = node.minor & 0xFF | node.major << 8 | (node.minor & ~0xFF) << 12
    return "block[0] 0", f"block[1] {number}"


def _owned(what: str, uid: int, gid: int) -> list[str]:
    return [f"set_inode_field {what} uid {uid}", f"set_inode_field {what} gid {gid}"]
