"""A repository of ours over the objects and the working tree of another, gone when it is done with.

Its configuration is written here, from values that say how files are compared and never what is
run: no hook, filter or monitor of the other repository has a name in it. What git writes (an index,
objects of files that were changed) goes into it, and not into the other.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from banger.base.cancellation import to_its_end
from banger.base.errors import PreconditionFailed
from banger.base.proc import Completed
from banger.git import command
from banger.git.layout import copy_if_regular, make_git_dir
from banger.git.source import GITLINK, Source

#: How files are compared and named. Each is a plain value: none names a program or a file.
_COMPARED_BY = (
    "core.autocrlf",
    "core.eol",
    "core.filemode",
    "core.ignorecase",
    "core.precomposeunicode",
    "core.symlinks",
    "core.sparsecheckout",
    "core.sparsecheckoutcone",
)
_EXCLUDES_KEY = "core.excludesfile"
_EXCLUDES_BYTES = 1 << 20
#: Who commits what was shipped; the time is that of the commit below it, so that one working tree
#: is one commit.
_NOBODY = {
    "GIT_AUTHOR_NAME": "banger",
    "GIT_AUTHOR_EMAIL": "banger@localhost",
    "GIT_COMMITTER_NAME": "banger",
    "GIT_COMMITTER_EMAIL": "banger@localhost",
}


class Throwaway:
    """Its index begins as the other repository's."""

    def __init__(self, directory: Path, source: Source) -> None:
        self.git_dir = directory / "git"
        self.index = self.git_dir / "index"
        #: That of the last `snapshot`.
        self.snapshot_index = self.git_dir / "snapshot-index"
        self._source = source

    async def git(
        self,
        *arguments: str | Path,
        index: Path | None = None,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        limits: command.Limits = command.NO_LIMITS,
    ) -> Completed:
        """Run git in it, over the other's working tree; with another index when one is given."""
        environment = {
            "GIT_WORK_TREE": str(self._source.root),
            "GIT_INDEX_FILE": str(index or self.index),
            **(env or {}),
        }
        return await command.run(
            self.git_dir,
            *("-C", self._source.root),
            *arguments,
            stdin=stdin,
            env=environment,
            check=check,
            limits=limits,
        )

    async def submodules(self) -> dict[bytes, str]:
        """The commit of each submodule in the index, by its path."""
        listed = await self.git("ls-files", "--stage", "-z")
        return {
            path: object_id
            for mode, object_id, path in staged_entries(listed.stdout)
            if mode == GITLINK
        }

    async def left_out(self) -> set[bytes]:
        """The paths of tracked files that a sparse checkout leaves out."""
        listed = await self.git("ls-files", "-t", "-z")
        return {line[2:] for line in split(listed.stdout) if line.startswith(b"S ")}

    async def is_clean(self) -> bool:
        """Whether all tracked files are as HEAD has them."""
        tree = await self.snapshot()
        return tree == text(await self.git("rev-parse", "HEAD^{tree}"))

    async def untracked(self) -> list[bytes]:
        """The paths of files that are neither tracked nor ignored."""
        listed = await self.git("ls-files", "--others", "--exclude-standard", "-z")
        # A repository within it is one entry, with a slash at its end.
        return [path for path in split(listed.stdout) if not path.endswith(b"/")]

    async def snapshot(
        self, *, with_files: Collection[bytes] = (), submodules: Mapping[bytes, str] | None = None
    ) -> str:
        """The tree of the files that are tracked, as they are, and of others in `with_files`.

        `submodules` are the commits that those have now, for all there are.
        """
        index = self.snapshot_index
        await asyncio.to_thread(shutil.copy2, self.index, index)
        # What git itself finds of a submodule, it finds by running git in it.
        links = await self.submodules()
        await self._update_index(index, links, "--force-remove", "--stdin")
        await self.git("add", "--update", "--", ".", index=index)
        await self._update_index(index, with_files, "--add", "--stdin")
        commits = {**links, **(submodules or {})}
        entries = [b"%o %s\t%s" % (GITLINK, commits[path].encode(), path) for path in links]
        await self._update_index(index, entries, "--add", "--index-info")
        return text(await self.git("write-tree", index=index))

    async def _update_index(self, index: Path, lines: Collection[bytes], *options: str) -> None:
        """Tell an index of some lines, if there are any."""
        if lines:
            await self.git("update-index", "-z", *options, index=index, stdin=joined(lines))

    async def commit(self, tree: str, parent: str) -> str:
        """A commit of what was shipped, on top of `parent`; that itself when it has this tree."""
        if text(await self.git("rev-parse", f"{parent}^{{tree}}")) == tree:
            return parent
        when = text(await self.git("show", "--no-patch", "--format=%ct", parent))
        at = {"GIT_AUTHOR_DATE": f"@{when} +0000", "GIT_COMMITTER_DATE": f"@{when} +0000"}
        message = b"The working tree as it was shipped\n"
        return text(
            await self.git("commit-tree", tree, "-p", parent, stdin=message, env=_NOBODY | at)
        )


@asynccontextmanager
async def throwaway(source: Source, scratch: Path) -> AsyncIterator[Throwaway]:
    """A throwaway repository over `source`, in the directory `scratch`."""
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="git-", dir=scratch))
    try:
        made = Throwaway(directory, source)
        await _make(made, source)
        yield made
    finally:
        await to_its_end(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))


async def _make(made: Throwaway, source: Source) -> None:
    settings = [(key, source.setting(key)) for key in _COMPARED_BY]
    await asyncio.to_thread(make_git_dir, made.git_dir, settings, source.object_format)
    await asyncio.to_thread(_borrow, made.git_dir, source)
    # Of one piece, whatever it was: an index may be split, or have a cache of the file system.
    await made.git(
        *("update-index", "--no-split-index", "--no-untracked-cache", "--no-fsmonitor"),
        "--force-write-index",
    )
    await _look_at_all(made, source)


async def _look_at_all(made: Throwaway, source: Source) -> None:
    """Have git look at every file: an index can say of one that nobody needs to, and then its
    path is followed by others. What a sparse checkout leaves out stays out, unless it is there.

    Raises PreconditionFailed for an index with a path that no working tree has.
    """
    tagged = split((await made.git("ls-files", "-v", "-z")).stdout)
    paths = [line[2:] for line in tagged]
    if outside := [path for path in paths if not is_within(path)]:
        raise PreconditionFailed(
            f"the index of {source.root} has a path that is outside of it:"
            f" {outside[0].decode(errors='backslashreplace')}",
            hint="do not use this repository",
        )
    # Git finds entries by their order: out of it, one can stay that was to be replaced.
    if paths != sorted(paths):
        raise PreconditionFailed(
            f"the index of {source.root} is damaged: its entries are not in order",
            hint="make it anew: rm .git/index, then git reset",
        )
    unseen = {line[2:] for line in tagged if line[:1].islower()}
    sparse = [line[2:] for line in tagged if line[:1] == b"S"]
    unseen.update(await asyncio.to_thread(files_at, source.root, sparse))
    # (To take a flag away git wants to see the file.)
    await _enter_anew(made, unseen)
    # What a file is known by here, its inode say, does not go along: where it has changed no time
    # and no size of before may be in the index.
    changed = await made.git("diff-files", "--name-only", "--ignore-submodules=all", "-z")
    await _enter_anew(made, set(split(changed.stdout)))


async def _enter_anew(made: Throwaway, paths: Collection[bytes]) -> None:
    """Give the entries of the index at `paths` no flags, and nothing to know a file by."""
    if paths:
        staged = split((await made.git("ls-files", "--stage", "-z")).stdout)
        entries = (line for line in staged if line.partition(b"\t")[2] in paths)
        await made.git("update-index", "-z", "--index-info", stdin=joined(entries))


def is_within(path: bytes) -> bool:
    """Whether a path can be one of a working tree: no ``..``, no ``.git``, not absolute."""
    names = path.split(b"/")
    return not any(name in (b"", b".", b"..") or name.lower() == b".git" for name in names)


def files_at(root: Path, paths: Iterable[bytes]) -> list[bytes]:
    """Those of `paths` that are files or links."""
    there = []
    for path in paths:
        with suppress(OSError):
            if not stat.S_ISDIR(os.lstat(os.fsencode(root) + b"/" + path).st_mode):
                there.append(path)
    return there


def _borrow(git_dir: Path, source: Source) -> None:
    alternates = git_dir / "objects" / "info" / "alternates"
    alternates.write_bytes(_quoted(source.common_dir / "objects") + b"\n")
    (git_dir / "HEAD").write_text(f"{source.head_commit}\n")
    copy_if_regular(source.common_dir / "shallow", git_dir / "shallow")
    copy_if_regular(source.git_dir / "index", git_dir / "index")
    for shared in source.git_dir.glob("sharedindex.*"):
        copy_if_regular(shared, git_dir / shared.name)
    copy_if_regular(
        source.git_dir / "info" / "sparse-checkout", git_dir / "info" / "sparse-checkout"
    )
    for name in ("exclude", "attributes"):
        copy_if_regular(source.common_dir / "info" / name, git_dir / "info" / name)
    _append_excludes(git_dir / "info" / "exclude", source.root, source.setting(_EXCLUDES_KEY))


def _append_excludes(exclude: Path, root: Path, path: str) -> None:
    """What the user ignores everywhere is ignored here, too."""
    home = Path(os.environ.get("HOME") or Path.home())
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    chosen = root / Path(path).expanduser() if path else config_home / "git" / "ignore"
    if chosen.is_file():
        own = exclude.read_bytes() if exclude.exists() else b""
        with chosen.open("rb") as file:
            patterns = file.read(_EXCLUDES_BYTES)
        # Before the repository's own, which may say otherwise.
        exclude.write_bytes(patterns + b"\n" + own)


def _quoted(path: Path) -> bytes:
    """A line of ``objects/info/alternates``: quoted as C strings are, any byte may be in it."""
    special = {ord('"'): b'\\"', ord("\\"): b"\\\\"}
    quoted = b"".join(
        special.get(byte) or (b"%c" % byte if 32 <= byte < 127 else b"\\%03o" % byte)
        for byte in os.fsencode(path)
    )
    return b'"' + quoted + b'"'


def staged_entries(listed: bytes) -> list[tuple[int, str, bytes]]:
    """Mode, object and path of each line of ``ls-files --stage -z`` or ``ls-tree -z``."""
    entries = []
    for line in split(listed):
        fields, _, path = line.partition(b"\t")
        words = fields.split()
        # ls-tree has the object's type in between.
        object_id = words[2] if words[1] in (b"blob", b"tree", b"commit") else words[1]
        entries.append((int(words[0], 8), object_id.decode(), path))
    return entries


def split(listed: bytes) -> list[bytes]:
    """The names of a list whose entries end with NUL."""
    return listed.split(b"\0")[:-1]


def joined(names: Iterable[bytes]) -> bytes:
    """A list whose entries end with NUL."""
    return b"".join(name + b"\0" for name in names)


def text(completed: Completed) -> str:
    """The one word that git answered."""
    return completed.stdout.decode().strip()
