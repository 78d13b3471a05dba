"""The files that a caller has opened for a jail: what `jails` takes of them, what it refuses."""

from __future__ import annotations

import fcntl
import os
import pwd
import stat
from collections.abc import Callable

import msgspec

from banger.base.errors import BadRequest, PermissionDenied
from banger.base.jail import OUT
from banger.hostops import mappings
from banger.hostops.jail_launcher import LOG, JailFile
from banger.hostops.ops import LaunchJail


class Owner(msgspec.Struct, frozen=True):
    """Whose files are taken, and the groups that they may have."""

    uid: int
    gids: frozenset[int]


def owner_of(uid: int) -> Owner:
    """A user, without groups where there is no account. Blocks: a server may be asked."""
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return Owner(uid, frozenset())
    return Owner(uid, frozenset(os.getgrouplist(account.pw_name, account.pw_gid)))


def lent(operation: LaunchJail) -> tuple[JailFile, ...]:
    """All that a jail is to have, by the names there."""
    files = (
        JailFile(name=each.name, descriptor=fd, read_only=each.read_only)
        for each, fd in zip(operation.files, operation.inputs, strict=True)
    )
    return (
        JailFile(name=OUT, descriptor=operation.out, read_only=False),
        JailFile(name=LOG, descriptor=operation.log, read_only=False),
        *files,
    )


def check(operation: LaunchJail, owner: Owner) -> None:
    """Raise BadRequest and PermissionDenied for what is not the owner's, or not open for this."""
    out = "the directory for its files"
    _check_kind(out, operation.out, stat.S_ISDIR, owner)
    _check_writable(out, operation.out)
    if os.fstat(operation.out).st_mode & 0o077:
        raise PermissionDenied("the directory for a jail's files is open to others")
    for name, descriptor in (("console", operation.console), ("log", operation.log)):
        _check_kind(f"the {name}", descriptor, stat.S_ISREG, owner)
        _check_writable(f"the {name}", descriptor)
        flags = _flags(descriptor)
        if flags & os.O_ACCMODE != os.O_WRONLY or not flags & os.O_APPEND:
            raise PermissionDenied(f"the {name} of a jail is not open to be appended to")
    for each, descriptor in zip(operation.files, operation.inputs, strict=True):
        _check_opened(each.name, descriptor)
        if stat.S_ISBLK(os.fstat(descriptor).st_mode):
            mappings.check_mapping(os.fstat(descriptor).st_rdev, operation.vm_id, owner.uid)
        else:
            _check_kind(each.name, descriptor, stat.S_ISREG, owner)
            if not each.read_only:
                _check_writable(each.name, descriptor)
        allowed = (os.O_RDONLY, os.O_RDWR) if each.read_only else (os.O_RDWR,)
        if _flags(descriptor) & os.O_ACCMODE not in allowed:
            raise PermissionDenied(f"{each.name} is not open for what is asked")


def _check_kind(name: str, descriptor: int, is_kind: Callable[[int], bool], owner: Owner) -> None:
    status = os.fstat(descriptor)
    if not is_kind(status.st_mode):
        raise BadRequest(f"{name} of a jail is not of the kind of file that belongs there")
    if status.st_uid != owner.uid:
        raise PermissionDenied(
            f"{name} of a jail belongs to uid {status.st_uid}, not to {owner.uid}",
            hint="import it, which makes a copy that is yours",
        )
    # The jail gets what the file's group may do; and files that it makes get this group.
    if status.st_gid not in owner.gids:
        raise PermissionDenied(
            f"{name} of a jail belongs to group {status.st_gid}, which uid {owner.uid} is not in",
            hint="give it to a group of yours: chgrp",
        )
    _check_opened(name, descriptor)


def _check_opened(name: str, descriptor: int) -> None:
    # With O_PATH anybody opens anything that he can name.
    if _flags(descriptor) & os.O_PATH:
        raise PermissionDenied(f"{name} of a jail is not open, only named")


def _check_writable(name: str, descriptor: int) -> None:
    """The jail has a mount of its own, which can be written whatever the caller's is."""
    if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
        raise PermissionDenied(f"{name} of a jail is where nothing can be written")


def _flags(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)
