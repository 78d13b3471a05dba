"""A tree of files, written from the members of archives that nobody vouches for.

The process has the tree as its root (`unpacker`), so nothing it does can touch what is outside.
Beyond that each name is looked at here: who asks for a path outside, or for one twice, is refused
and not quietly put right. Layers are applied as the OCI image specification has it
(https://github.com/opencontainers/image-spec/blob/main/layer.md).

What an ordinary user cannot make, device nodes and owners without a mapping, is not made for root
either but noted, and put into the file system by `root.make_root`: both get the same image.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from banger.images.tar_stream import ArchiveError, TarStream

T = TypeVar("T")

_NAME_BYTES = 255
_PATH_BYTES = 4095
#: Without links on the way. (mke2fs 1.47.0 damages its memory at 2040 bytes.)
_PLACE_BYTES = 1023
_DEPTH = 256
_LINKS_FOLLOWED = 40
_FULL_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
#: The last second that every ext4 can hold.
_TIME_MAX_S = (1 << 31) - 1

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
#: Others that begin so are notes of the tool that made the layer.
_WHITEOUT_NOTE = b".wh..wh."

#: Of directories that no layer mentions.
_MISSING_MODE = 0o755
_XATTR = "SCHILY.xattr."
#: Those that mean the same on every machine; the rest belongs to the one it was made on.
_XATTRS_KEPT = ("user.", "security.capability", "system.posix_acl_")

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
_NOTED_MAX = 10_000
_DEVICES = {tarfile.CHRTYPE: "c", tarfile.BLKTYPE: "b"}


@dataclass(frozen=True)
class Device:
    """A device node, or another file whose owner could not be set; times in seconds."""

    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    mtime_s: int


class TreeWriter:
    """Writes below the root directory of this process. Paths are bytes without a leading slash:
    `path` as an archive has it, `place` with no links in it."""

    def __init__(self, *, limit_bytes: int, limit_entries: int) -> None:
        self._left_bytes = limit_bytes
        self._left_entries = limit_entries
        self.devices: dict[bytes, Device] = {}
        #: Owners that have no mapping here.
        self.owners: dict[bytes, tuple[int, int]] = {}
        #: path -> place, of directories.
        self._places: dict[bytes, bytes] = {b"": b""}
        self._times: dict[bytes, int] = {}
        #: Of the layer at hand: its members, which of them are directories, and what leads to them.
        self._members: dict[bytes, bool] = {}
        self._ancestors: set[bytes] = set()
        #: Its opaque directories.
        self._cleared: set[bytes] = set()

    def begin_layer(self) -> None:
        self._members.clear()
        self._ancestors.clear()
        self._cleared.clear()

    def add(self, member: tarfile.TarInfo, stream: TarStream, *, whiteouts: bool) -> None:
        """Apply one member of a layer; its data is what `stream` gives next."""
        self._left_entries -= 1
        if self._left_entries < 0:
            raise ArchiveError("it holds more files than any image")
        path = _checked(member.name)
        above, _, name = path.rpartition(b"/")
        if whiteouts and name.startswith(_WHITEOUT):
            self._hide(above, name)
            return
        is_directory = member.isdir()
        if path in self._members and not (is_directory and self._members[path]):
            raise ArchiveError(f"{_shown(path)} is in it twice")
        self._note_member(path, is_directory)
        if not path:
            if not is_directory:
                raise ArchiveError("its root is not a directory")
            self._finish(b"", member, None)
            return
        directory = self._place(above, _seconds(member))
        assert directory is not None  # it is made when it is missing
        place = _bounded(_join(directory, name))
        if not (is_directory and _is_directory(place)):
            self._remove(place)
        self._make(place, member, stream)

    def end(self) -> None:
        """Directories get their times, which what was written into them has changed."""
        for place, seconds in self._times.items():
            if _is_directory(place):  # a later layer may have something else there
                os.utime(_at(place), (seconds, seconds), follow_symlinks=False)

    def _note_member(self, path: bytes, is_directory: bool) -> None:
        self._members[path] = is_directory
        above = path.rpartition(b"/")[0]
        while above and above not in self._ancestors:
            self._ancestors.add(above)
            above = above.rpartition(b"/")[0]

    def _make(self, place: bytes, member: tarfile.TarInfo, stream: TarStream) -> None:
        if member.type in _REGULAR:
            self._write(place, member, stream)
        elif member.type == tarfile.DIRTYPE:
            with suppress(FileExistsError):
                os.mkdir(_at(place), 0o700)
            self._finish(place, member, None)
        elif member.type == tarfile.SYMTYPE:
            target = member.linkname.encode("utf-8", "surrogateescape")
            if not target:
                raise ArchiveError(f"{_shown(place)} is a link to nothing")
            os.symlink(target, _at(place))
            self._finish(place, member, None)
        elif member.type == tarfile.LNKTYPE:
            # Some builders say where it lies in the image, rather than in the archive.
            self._link(place, _checked(member.linkname.lstrip("/")))
        elif member.type == tarfile.FIFOTYPE:
            os.mkfifo(_at(place), 0o600)
            self._finish(place, member, None)
        elif member.type in _DEVICES:
            device = Device(
                _DEVICES[member.type],
                *(member.devmajor & 0xFFF, member.devminor & 0xFFFFF, member.mode & 0o7777),
                *(*_owner(place, member), _seconds(member)),
            )
            self._note(self.devices, place, device)
        else:
            raise ArchiveError(f"{_shown(place)} is of no known type ({member.type!r})")

    def _note(self, noted: dict[bytes, T], place: bytes, what: T) -> None:
        """For `root.make_root`, which cannot take every name, nor any number of them."""
        if any(byte < 0x20 or byte in b'"\x7f' for byte in place):
            raise ArchiveError(f"{_shown(place)} is no name for a device node or such an owner")
        if len(self.devices) + len(self.owners) >= _NOTED_MAX:
            raise ArchiveError("it holds more device nodes, or owners above 65535, than any image")
        noted[place] = what

    def _write(self, place: bytes, member: tarfile.TarInfo, stream: TarStream) -> None:
        if member.size < 0:
            raise ArchiveError(f"the size of {_shown(place)} is negative")
        pieces: Iterable[tuple[int, int]] = [(0, member.size)]
        if (sparse := getattr(member, "sparse", None)) is not None:
            pieces = [piece for piece in sparse if piece[1]]  # unused places of a map are 0
        self._take_room(member.size)
        descriptor = os.open(_at(place), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            position = 0
            for offset, size in pieces:
                if offset < position or size < 0 or offset + size > member.size:
                    raise ArchiveError(f"the map of {_shown(place)} is damaged")
                os.lseek(descriptor, offset, os.SEEK_SET)
                _copy(stream, descriptor, size)
                position = offset + size
            if position < member.size:
                os.ftruncate(descriptor, member.size)
            self._finish(place, member, descriptor)
        finally:
            os.close(descriptor)

    def _take_room(self, size: int) -> None:
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise ArchiveError("its files are larger together than an image may be")

    def _finish(self, place: bytes, member: tarfile.TarInfo, descriptor: int | None) -> None:
        """Owner, mode, attributes, time: in this order, for each undoes some of those after it."""
        what: bytes | int = _at(place) if descriptor is None else descriptor
        follow = descriptor is not None
        is_link = member.type == tarfile.SYMTYPE
        uid, gid = _owner(place, member)
        try:
            if follow:
                os.chown(what, uid, gid)
            else:
                os.chown(what, uid, gid, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
            self._note(self.owners, place, (uid, gid))
        else:
            self.owners.pop(place, None)  # of a layer below
        if not is_link:
            _clear_attributes(what)
            os.chmod(what, member.mode & 0o7777)
        self._set_attributes(what, place, member)
        if member.isdir():
            self._times[place] = _seconds(member)
        elif follow:
            os.utime(what, (_seconds(member),) * 2)
        else:
            os.utime(what, (_seconds(member),) * 2, follow_symlinks=False)

    def _set_attributes(self, what: bytes | int, place: bytes, member: tarfile.TarInfo) -> None:
        for key, value in member.pax_headers.items():
            name = key.removeprefix(_XATTR)
            if name == key or not name.startswith(_XATTRS_KEPT):
                continue
            data = value.encode("utf-8", "surrogateescape")
            try:
                if isinstance(what, int):
                    os.setxattr(what, name, data)
                else:
                    os.setxattr(what, name, data, follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.ENOSPC and _is_full():
                    raise
                raise ArchiveError(
                    f"{_shown(place)} cannot have the attribute {name}: {error.strerror}"
                ) from None

    def _link(self, place: bytes, path: bytes) -> None:
        above, _, name = path.rpartition(b"/")
        directory = self._place(above)
        target = None if directory is None else _join(directory, name)
        if target is not None and target in self.devices:
            self._note(self.devices, place, self.devices[target])
            return
        if target is None or not path or not os.path.lexists(_at(target)):
            raise ArchiveError(f"{_shown(place)} is a hard link to what is not there")
        if _is_directory(target):
            raise ArchiveError(f"{_shown(place)} is a hard link to a directory")
        os.link(_at(target), _at(place), follow_symlinks=False)
        if target in self.owners:  # it is one file, whichever of its names stays
            self._note(self.owners, place, self.owners[target])

    # --- whiteouts

    def _hide(self, above: bytes, name: bytes) -> None:
        directory = self._place(above)
        if name == _OPAQUE:
            if directory is not None and above not in self._cleared:
                self._cleared.add(above)
                self._clear(directory, above)
            return
        if name.startswith(_WHITEOUT_NOTE):
            return
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise ArchiveError(f"{_shown(_join(above, name))} hides nothing that can be")
        if directory is not None:
            self._hide_entry(_join(directory, hidden), _join(above, hidden))

    def _clear(self, place: bytes, path: bytes) -> None:
        """Remove from a directory what this layer has not put there."""
        names = set(os.listdir(_at(place)))
        names.update(
            each.rpartition(b"/")[2] for each in self.devices if each.rpartition(b"/")[0] == place
        )
        for name in names:
            self._hide_entry(_join(place, name), _join(path, name))

    def _hide_entry(self, place: bytes, path: bytes) -> None:
        if path not in self._members and path not in self._ancestors:
            self._remove(place)
        elif _is_directory(place):
            self._clear(place, path)

    def _remove(self, place: bytes) -> None:
        """Remove whatever is there, all of it; nothing need be."""
        self.devices.pop(place, None)
        self.owners.pop(place, None)
        try:
            os.unlink(_at(place))
        except FileNotFoundError:
            return
        except IsADirectoryError:
            shutil.rmtree(_at(place))
            below = place + b"/"
            for noted in (self.devices, self.owners):
                for gone in [each for each in noted if each.startswith(below)]:
                    noted.pop(gone, None)
        # A directory or a link that led to one may be gone.
        self._places = {b"": b""}

    # --- where a path leads

    def _place(self, path: bytes, make_at_s: int | None = None) -> bytes | None:
        """Where the directory `path` is: one that is missing is made, with this time, or None.

        Links within the tree are followed, as in every system that has the image as its root;
        one that leads out of it is refused.
        """
        known = self._places.get(path)
        if known is not None:
            return known
        above, _, name = path.rpartition(b"/")
        parts = [name]
        while (place := self._places.get(above)) is None:
            above, _, name = above.rpartition(b"/")
            parts.append(name)
        for name in reversed(parts):
            place = _join(place, name)
            if not self._is_there(place):
                if make_at_s is None:
                    return None
                self._make_directory(place, make_at_s)
            place = self._followed(place)
            above = _join(above, name)
            self._places[above] = place
        return place

    def _is_there(self, place: bytes) -> bool:
        return os.path.lexists(_at(place))

    def _make_directory(self, place: bytes, seconds: int) -> None:
        if place in self.devices:
            raise ArchiveError(f"{_shown(place)} is not a directory")
        _bounded(place)
        os.mkdir(_at(place))
        _clear_attributes(_at(place))
        os.chmod(_at(place), _MISSING_MODE)
        self._times[place] = seconds

    def _followed(self, place: bytes) -> bytes:
        """Where the directory at `place` is, which may be a link to one."""
        mode = _mode(place)
        if mode is not None and stat.S_ISDIR(mode):
            return place
        links, reached = 0, b""
        pending = place.split(b"/")[::-1]
        while pending:
            name = pending.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if not reached:
                    raise ArchiveError(f"{_shown(place)} is a link that leads out of the image")
                reached = reached.rpartition(b"/")[0]
                continue
            at = _join(reached, name)
            mode = _mode(at)
            if mode is None or not (stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
                what = "leads to no directory" if at != place else "is not a directory"
                raise ArchiveError(f"{_shown(place)} {what}, but there are files in it")
            if stat.S_ISDIR(mode):
                reached = at
                continue
            links += 1
            if links > _LINKS_FOLLOWED:
                raise ArchiveError(f"{_shown(place)} is a link that leads nowhere")
            target = os.readlink(_at(at))
            if target.startswith(b"/"):
                reached = b""
            pending.extend(target.split(b"/")[::-1])
        return reached


def _checked(name: str) -> bytes:
    """A name of the archive as a path. ArchiveError for one that leads out, or is none."""
    raw = name.encode("utf-8", "surrogateescape")
    if raw.startswith(b"/"):
        raise ArchiveError(f"{_shown(raw)} is an absolute path")
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ArchiveError(f"{_shown(raw)} leads out of the image")
    path = b"/".join(parts)
    if len(path) > _PATH_BYTES or b"\0" in path or any(len(part) > _NAME_BYTES for part in parts):
        raise ArchiveError(f"{_shown(raw[:80])} cannot be the name of a file")
    return path


def _bounded(place: bytes) -> bytes:
    """A place that all who come after can take: mke2fs and those who remove a tree go down it."""
    if len(place) > _PLACE_BYTES or place.count(b"/") > _DEPTH:
        raise ArchiveError(f"{_shown(place[:80])}… lies deeper than any image needs")
    return place


def _seconds(member: tarfile.TarInfo) -> int:
    try:
        return max(0, min(int(member.mtime), _TIME_MAX_S))
    except (ValueError, OverflowError):
        raise ArchiveError("a time in it is no number") from None


def _owner(place: bytes, member: tarfile.TarInfo) -> tuple[int, int]:
    if not (0 <= member.uid < 1 << 32 and 0 <= member.gid < 1 << 32):
        raise ArchiveError(f"the owner of {_shown(place)} is damaged")
    return member.uid, member.gid


def _clear_attributes(what: bytes | int) -> None:
    """What is new may have inherited an ACL; a directory may have attributes of a layer below."""
    try:
        names = os.listxattr(what)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return
    for name in names:
        if name.startswith(_XATTRS_KEPT):
            os.removexattr(what, name)


def _is_full() -> bool:
    """The disk, and not the place for the attributes of one file."""
    info = os.statvfs("/")
    return info.f_bavail * info.f_frsize < _FULL_BYTES


def _shown(path: bytes) -> str:
    """For people: bytes that are no text, and control characters, as escapes."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text) or "/"


def _at(place: bytes) -> bytes:
    return b"/" + place


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _mode(place: bytes) -> int | None:
    try:
        return os.lstat(_at(place)).st_mode
    except FileNotFoundError:
        return None


def _is_directory(place: bytes) -> bool:
    mode = _mode(place)
    return mode is not None and stat.S_ISDIR(mode)


def _copy(stream: TarStream, descriptor: int, size: int) -> None:
    while size > 0:
        part = stream.some(min(size, _PIECE_BYTES))
        if not part:
            raise ArchiveError("it is cut off")
        size -= len(part)
        while part:
            part = part[os.write(descriptor, part) :]
