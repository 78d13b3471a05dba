"""A guest's patch on a repository of the host: looked at, and applied all or not at all.

The patch is not trusted, and neither is the repository's configuration. Git itself refuses a patch
that leaves the tree, goes through a link or into ``.git``. It is applied to trees in a throwaway
repository; only what came of that is checked out, by git's own merge of two trees, which looks at
every file before it touches the first.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from banger.base.cancellation import to_its_end
from banger.base.errors import BadRequest, BangerError, Conflict, Unavailable
from banger.base.proc import ProcessFailed
from banger.git import command
from banger.git.command import Limits
from banger.git.layout import make_git_dir
from banger.git.source import GITLINK, Source
from banger.git.throwaway import (
    Throwaway,
    files_at,
    is_within,
    split,
    staged_entries,
    text,
    throwaway,
)

#: A longer patch is refused.
PATCH_LIMIT_BYTES = 1 << 30
#: And one that changes more files.
_FILES_MAX = 200_000
#: What is packed in a patch is unpacked in memory.
_UNPACKED = Limits(memory_bytes=4 << 30)
_NAMED_MAX = 10
_SAID_BYTES = 2000


@dataclass(frozen=True)
class Change:
    """What a patch does to one file. Lines are None for a binary one."""

    path: bytes
    insertions: int | None
    deletions: int | None


@dataclass(frozen=True)
class _Entry:
    """What a raw diff says of one path."""

    modes: tuple[int, int]
    new_object: str


async def changes(patch: Path, scratch: Path) -> list[Change]:
    """What `patch` says it changes. BadRequest for what is no patch, or changes too much."""
    if not await asyncio.to_thread(_has_content, patch):
        return []
    with tempfile.TemporaryDirectory(prefix="git-", dir=scratch) as directory:
        nowhere = Path(directory) / "git"
        await asyncio.to_thread(make_git_dir, nowhere, (), "sha1")
        try:
            listed = await command.run(nowhere, "apply", "--numstat", "-z", patch, limits=_UNPACKED)
        except ProcessFailed as error:
            raise BadRequest(f"that is no patch: {_said(error)}") from error
    return await asyncio.to_thread(_parsed, listed.stdout)


def _parsed(listed: bytes) -> list[Change]:
    if listed.count(b"\0") > _FILES_MAX:
        raise BadRequest(f"the patch changes more than {_FILES_MAX} files: refused")
    found = []
    for line in split(listed):
        insertions, deletions, path = line.split(b"\t", 2)
        found.append(Change(path, _count(insertions), _count(deletions)))
    return found


async def apply(source: Source, patch: Path, scratch: Path, umask: int = -1) -> list[Change]:
    """Apply `patch` to the working tree of `source`: all of it, or nothing.

    Where HEAD has moved on since, the two are merged. The index is not touched, and neither are
    files that the patch does not name. Raises BadRequest for a patch that leaves the tree, Conflict
    when it does not fit what is there now, or would touch what was changed here. `umask` is of the
    files that it makes: ours unless given.
    """
    found = await changes(patch, scratch)
    if not found:
        return []
    async with throwaway(source, scratch) as repository:
        for change in found:
            _check_path(change.path)
        _check_no_submodule(found, await repository.submodules())
        before = await _before(repository, source, found)
        after = await _after(repository, before, patch)
        await _check_touched(repository, source, before, after, patch)
        await to_its_end(_check_out(repository, before, after, Limits(umask=umask)))
        return found


def _check_path(path: bytes) -> None:
    """Raise BadRequest for a path that git would refuse, too: this names it in our words."""
    if not is_within(path):
        raise BadRequest(
            f"the patch writes to {_shown([path])}, which is not in the working tree: refused"
        )


def _check_no_submodule(found: Sequence[Change], submodules: Iterable[bytes]) -> None:
    """Raise Conflict when a file is in a submodule, which is a repository of its own."""
    inside = tuple(path + b"/" for path in submodules)
    if theirs := [change.path for change in found if change.path.startswith(inside)]:
        raise Conflict(
            f"the patch changes files of submodules: {_shown(theirs)}",
            hint="write it to a file with -o FILE, and: git apply FILE",
        )


async def _before(repository: Throwaway, source: Source, found: Sequence[Change]) -> str:
    """The tree of what is there now, of files that only the patch knows, too."""
    tracked = set(split((await repository.git("ls-files", "-z")).stdout))
    beside = [change.path for change in found if change.path not in tracked]
    there = await asyncio.to_thread(files_at, source.root, beside)
    try:
        return await repository.snapshot(with_files=there)
    except ProcessFailed as error:
        raise _does_not_fit(source, _said(error)) from error


async def _after(repository: Throwaway, before: str, patch: Path) -> str:
    """The tree that the patch makes of `before`. Conflict when it cannot."""
    index = repository.git_dir / "patched-index"
    await repository.git("read-tree", before, index=index)
    applied = await repository.git(
        *("apply", "--cached", "--3way", "--whitespace=nowarn", patch),
        index=index,
        check=False,
        limits=_UNPACKED,
    )
    unmerged = await repository.git("ls-files", "--unmerged", "-z", index=index)
    if conflicts := {path for _, _, path in staged_entries(unmerged.stdout)}:
        raise Conflict(
            f"the guest and this repository have both changed {_shown(sorted(conflicts))}",
            hint="commit what is here and merge by hand: banger vm workspace export -o FILE",
        )
    if applied.returncode != 0:
        raise Conflict(
            f"the patch does not fit what is here: {_tail(applied.stderr)}",
            hint="nothing was changed; keep it with: banger vm workspace export -o FILE",
        )
    return text(await repository.git("write-tree", index=index))


async def _check_touched(
    repository: Throwaway, source: Source, before: str, after: str, patch: Path
) -> None:
    """Raise Conflict when the patch touches a file that was changed here, unless the guest was
    given it as it is."""
    touched = await _entries(repository, "diff-tree", "-r", "-z", before, after)
    if links := [path for path, entry in touched.items() if GITLINK in entry.modes]:
        raise Conflict(
            f"the patch changes the submodule or nested repository {_shown(links)}: refused",
            hint="bring what is in it by itself: banger vm cp",
        )
    made = [path for path, entry in touched.items() if not entry.modes[0]]
    there = await repository.git("ls-tree", "-r", "-z", "--name-only", before)
    known = frozenset(split(there.stdout))
    if hidden := await asyncio.to_thread(_in_the_way, os.fsencode(source.root), made, known):
        raise Conflict(
            f"it would replace what git does not track here: {_shown(hidden)}",
            hint="move that out of the way; nothing was changed",
        )
    changed = await _entries(repository, "diff-tree", "-r", "-z", source.head_commit, before)
    given = await _given(repository, patch)
    nothing = "0" * len(before)
    refused = [
        path
        for path in touched
        if path in changed
        and (given is None or given.get(path, nothing) != changed[path].new_object)
    ]
    if refused:
        raise Conflict(
            f"it would touch what was changed here: {_shown(refused)}",
            hint="commit or stash that first; nothing was changed",
        )


def _in_the_way(root: bytes, made: Sequence[bytes], known: AbstractSet[bytes]) -> list[bytes]:
    """What is where the patch makes files, or above them, and is not `known`: git would give up
    ignored files for them, and whole directories of those."""
    found = set()
    for path in made:
        above = path
        while above := above.rpartition(b"/")[0]:
            with suppress(OSError):
                if not stat.S_ISDIR(os.lstat(root + b"/" + above).st_mode) and above not in known:
                    found.add(above)
        if os.path.isdir(root + b"/" + path) and not os.path.islink(root + b"/" + path):  # noqa: PTH112, PTH114
            for directory, folders, files in os.walk(root + b"/" + path):
                links = [name for name in folders if os.path.islink(directory + b"/" + name)]  # noqa: PTH114
                inside = (directory[len(root) + 1 :] + b"/" + name for name in (*files, *links))
                found.update(each for each in inside if each not in known)
    return sorted(found)


async def _given(repository: Throwaway, patch: Path) -> dict[bytes, str] | None:
    """The objects that the files were for the guest before it changed them; None when some of
    them are not known here."""
    index = repository.git_dir / "given-index"
    # What a patch changes nothing but the mode of is taken from the index.
    built = await repository.git(
        *("apply", f"--build-fake-ancestor={index}", patch),
        index=repository.snapshot_index, check=False,
    )  # fmt: skip
    if built.returncode != 0:
        return None
    listed = await repository.git("ls-files", "--stage", "-z", index=index)
    return {path: object_id for _, object_id, path in staged_entries(listed.stdout)}


async def _entries(repository: Throwaway, *arguments: str) -> dict[bytes, _Entry]:
    """The entries of a raw diff without renames, by path."""
    fields = split(
        (await repository.git(*arguments, "--no-renames", "--raw", "--no-abbrev")).stdout
    )
    entries = {}
    for about, path in zip(fields[::2], fields[1::2], strict=True):
        words = about.removeprefix(b":").split()
        modes = (int(words[0], 8), int(words[1], 8))
        entries[path] = _Entry(modes, words[3].decode())
    return entries


async def _check_out(repository: Throwaway, before: str, after: str, limits: Limits) -> None:
    """Bring the files from one tree to the other. Conflict, with nothing changed, when something
    is in the way."""
    merge = ("-c", "core.sparseCheckout=false", "read-tree", "-m", "-u")
    index = repository.snapshot_index
    try:
        await repository.git(*merge, "-n", before, after, index=index)
    except ProcessFailed as error:
        raise Conflict(
            f"something is in the way of the patch: {_said(error)}", hint="nothing was changed"
        ) from error
    try:
        await repository.git(*merge, before, after, index=index, limits=limits)
    except BangerError as error:
        # A full disk, say. All that was there is an object of the throwaway repository.
        await repository.git("read-tree", "--reset", "-u", before, index=index, limits=limits)
        raise Unavailable(f"the patch could not be written: {error}") from error


def _does_not_fit(source: Source, why: str) -> Conflict:
    return Conflict(f"the patch does not fit {source.root}: {why}", hint="nothing was changed")


def _has_content(patch: Path) -> bool:
    return patch.stat().st_size > 0


def _count(lines: bytes) -> int | None:
    return None if lines == b"-" else int(lines)


def _said(error: ProcessFailed) -> str:
    return _tail(error.completed.stderr)


def _tail(stderr: bytes) -> str:
    return stderr.decode(errors="backslashreplace").strip()[-_SAID_BYTES:]


def _shown(paths: Sequence[bytes]) -> str:
    """Some names, as they can be printed."""
    names = ", ".join(repr(os.fsdecode(path))[1:-1] for path in paths[:_NAMED_MAX])
    return names + (f" and {len(paths) - _NAMED_MAX} more" if len(paths) > _NAMED_MAX else "")
