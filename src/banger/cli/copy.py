"""`banger vm cp`: files and trees between host and guest, as a tar stream.

On the host GNU tar packs and unpacks (sparse files, odd names); in the guest the agent does. What
comes from a guest is not trusted: it is unpacked into a fresh private directory and moved from
there name by name, so that nothing of it is written through a link, with a set-id bit or as a
device. Files copied in belong to root in the guest, files copied out to whoever copies.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import IO, NoReturn

import click
import msgspec
from click.shell_completion import CompletionItem

from banger.base.errors import Conflict, NotFound, Unavailable, from_wire
from banger.base.model import Vm
from banger.base.proc import PIPE, popen
from banger.cli.app import complete_vm, connect
from banger.cli.transfer import receive_stream, send_stream
from banger.rpc.client import Client
from banger.rpc.protocol import Exit

#: No set-uid, set-gid or sticky bit comes out of a guest.
_MODE_MASK = 0o777


@dataclass(frozen=True)
class GuestSide:
    """``NAME:PATH``."""

    vm: str
    path: str


class FileKind(msgspec.Struct):
    """What `vm.stat` answers."""

    exists: bool
    kind: str = ""


Side = GuestSide | str


def parse_side(text: str) -> Side:
    """A guest's path, a host's path, or ``-``. A host path with a colon is written ``./a:b``.

    Raises click.UsageError for a side without a path.
    """
    name, colon, path = text.partition(":")
    if colon and name and "/" not in name:
        if not path:
            raise click.UsageError(f'"{text}" names no path in the guest: write {name}:/path')
        # As for ssh: a relative path begins at the home of root.
        return GuestSide(name, path if path.startswith("/") else f"/root/{path}")
    if not text:
        raise click.UsageError("a path is missing")
    return text


def copy(source: str, destination: str) -> None:
    """Copy as `cp -r` does: into a destination that is a directory, else under its new name.

    The process is for this one copy: a signal that ends it takes what was not finished with it.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    src, dst = parse_side(source), parse_side(destination)
    if isinstance(src, str) and isinstance(dst, GuestSide):
        _copy_in(src, dst)
    elif isinstance(src, GuestSide) and isinstance(dst, str):
        _copy_out(src, dst)
    else:
        raise click.UsageError("one side must be NAME:PATH, the other a path of this host or -")


def _end(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _copy_in(source: str, target: GuestSide) -> None:
    if source == "-":
        with connect() as client:
            _require_directory(client, target)
            _send(client, target, PurePosixPath(target.path), "", sys.stdin.buffer)
        return
    path = Path(source)
    if not path.is_symlink() and not path.exists():
        raise NotFound(f"{source} does not exist")
    full = Path(os.path.abspath(path))  # noqa: PTH100 - not resolved: a link is copied as a link
    if full == Path("/"):
        raise click.UsageError("the root directory cannot be copied as a whole")
    directory, name = _guest_target(target, full.name, is_tree=path.is_dir())
    argv = ["tar", "--create", "--file=-", "--format=gnu", "--sparse", "--owner=root:0",
            "--group=root:0", f"--directory={full.parent}", "--", full.name]  # fmt: skip
    process = popen(argv)
    assert process.stdout is not None
    try:
        with connect() as client:
            _send(client, target, directory, name, process.stdout)
    except BaseException:
        process.kill()
        raise
    finally:
        process.stdout.close()
        status = process.wait()
    if status != 0:
        raise Unavailable(f"tar could not read all of {source}: what it read was copied")


def _send(
    client: Client, target: GuestSide, directory: PurePosixPath, name: str, data: IO[bytes]
) -> None:
    params = {"vm": target.vm, "directory": str(directory), "name": name}
    client.call("vm.copy_in", params, _Opened)
    _check(send_stream(client.session(), data, title=f"to {target.vm}:{target.path}"))


def _guest_target(target: GuestSide, name: str, *, is_tree: bool) -> tuple[PurePosixPath, str]:
    """(directory, name) that the copy gets in the guest."""
    with connect() as client:
        found = _guest_stat(client, target)
    path = PurePosixPath(target.path)
    if found.exists and found.kind == "directory":
        return path, name
    if target.path.endswith("/"):
        raise NotFound(f"{target.vm}:{target.path} is not a directory in the guest")
    if found.exists and is_tree:
        raise Conflict(f"{target.vm}:{target.path} is there and is not a directory")
    with connect() as client:
        _require_directory(client, GuestSide(target.vm, str(path.parent)))
    return path.parent, path.name


def _require_directory(client: Client, side: GuestSide) -> None:
    if _guest_stat(client, side).kind != "directory":
        raise NotFound(f"{side.vm}:{side.path} is not a directory in the guest")


def _guest_stat(client: Client, side: GuestSide) -> FileKind:
    return client.call("vm.stat", {"vm": side.vm, "path": side.path}, FileKind)


def _copy_out(source: GuestSide, destination: str) -> None:
    with connect() as client:
        if not _guest_stat(client, source).exists:
            raise NotFound(f"{source.vm}:{source.path} does not exist in the guest")
        if destination == "-":
            _receive(client, source, "", sys.stdout.buffer)
            return
        target, name = _host_target(source, destination)
        with _private_directory(target.parent) as staging:
            # --no-same-owner: as root, tar would give files to the guest's uids.
            argv = ["tar", "--extract", "--file=-", "--sparse", "--no-same-owner",
                    "--preserve-permissions", "--delay-directory-restore",
                    f"--directory={staging}"]  # fmt: skip
            process = popen(argv, stdin=PIPE, stdout=None)
            assert process.stdin is not None
            try:
                _receive(client, source, name, process.stdin)
            except BrokenPipeError:
                pass  # tar has ended: it said why, and its status counts
            except BaseException:
                process.kill()
                raise
            finally:
                with suppress(BrokenPipeError):
                    process.stdin.close()
                status = process.wait()
            staging.chmod(0o700)  # or what the archive gave it might hide what is in it
            if status != 0:
                raise Unavailable("tar refused what the guest sent: nothing was copied")
            if not os.path.lexists(staging / name):
                raise Unavailable(f"the guest did not send {source.path}: nothing was copied")
            _move(staging / name, target)


def _receive(client: Client, source: GuestSide, name: str, out: IO[bytes]) -> None:
    client.call("vm.copy_out", {"vm": source.vm, "path": source.path, "name": name}, _Opened)
    _check(receive_stream(client.session(), out, title=f"from {source.vm}:{source.path}"))


def _host_target(source: GuestSide, destination: str) -> tuple[Path, str]:
    """(final path, name) of the copy on the host."""
    path = Path(destination)
    name = PurePosixPath(source.path).name or source.vm
    if name == "..":
        raise click.UsageError(f"{source.path} ends with ..: name the directory itself")
    if path.is_dir():
        return path / name, name
    if destination.endswith("/"):
        raise NotFound(f"{destination} is not a directory")
    if not path.absolute().parent.is_dir():
        raise NotFound(f"{path.parent} is not a directory")
    return path, path.name


@contextmanager
def _private_directory(parent: Path) -> Iterator[Path]:
    """A directory on the same file system as the target, removed at the end, whatever is in it.

    It lies in one of ours alone, for an archive may say what mode the directory has in which it
    is unpacked: others could then run a set-uid file in it.
    """
    directory = Path(tempfile.mkdtemp(prefix=".banger-cp-", dir=parent))
    try:
        inner = directory / "tree"
        inner.mkdir(mode=0o700)
        yield inner
    finally:
        # A tree may hold directories without write permission.
        for root, folders, _ in os.walk(directory):
            for folder in folders:
                entry = Path(root) / folder
                if not entry.is_symlink():
                    entry.chmod(0o700)
        shutil.rmtree(directory, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Move an unpacked tree to its place, into directories that are there already.

    Files replace files; directories that are there keep their modes. A link or a file where a
    directory must be is refused with Conflict, and so is a directory where a file must be; devices
    and the like are refused too.
    """
    info = source.lstat()
    mode = info.st_mode
    if stat.S_ISDIR(mode):
        try:
            target.mkdir(mode=0o700)
            is_new = True
        except FileExistsError:
            if target.is_symlink() or not target.is_dir():
                raise Conflict(f"{target} is there and is not a directory") from None
            is_new = False
        source.chmod(0o700)
        for entry in sorted(source.iterdir()):
            _move(entry, target / entry.name)
        if is_new:
            target.chmod(stat.S_IMODE(mode) & _MODE_MASK)
            os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISFIFO(mode)):
        raise Conflict(f"{target.name} is a device or a socket in the guest: not copied")
    if not target.is_symlink() and target.is_dir():
        raise Conflict(f"{target} is there and is a directory")
    if not stat.S_ISLNK(mode):
        source.chmod(stat.S_IMODE(mode) & _MODE_MASK)
    source.replace(target)


def _check(exit_: Exit) -> None:
    """Raise what the stream ended with, if it did not end well."""
    if exit_.error is not None:
        error = exit_.error
        raise from_wire(error.code, error.message, error.hint, error.op_id)
    if exit_.status != 0:
        raise Unavailable(f"the copy failed in the guest (status {exit_.status})")


class _Opened(msgspec.Struct):
    """The result line of `vm.copy_in` and `vm.copy_out`."""

    vm: Vm


def complete_side(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Machines, or else what the shell knows: files of this host."""
    names = complete_vm(ctx, param, incomplete) if incomplete else []
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_side)
@click.argument("destination", metavar="DST", shell_complete=complete_side)
def cp(*, source: str, destination: str) -> None:
    """Copy files and folders: either side may be NAME:PATH, or - for a tar stream."""
    copy(source, destination)
