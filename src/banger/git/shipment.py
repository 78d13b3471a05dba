"""What of a repository goes to a guest: a ``.git`` of its own, and the files beside it.

The guest's ``.git`` is made here, whole: a pack of the objects it needs, the references, a
configuration with nothing in it that could run, and the index, whose entries match the files once
those are unpacked with their times. So the guest needs no git to be given a working tree that its
git finds clean, or modified exactly where the host's was.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from banger.base.errors import PreconditionFailed
from banger.base.model import WorkspaceMode
from banger.base.proc import ProcessFailed
from banger.git.layout import Setting, copy_if_regular, make_git_dir
from banger.git.source import GITLINK, Source, inspect, regular_file
from banger.git.throwaway import (
    Throwaway,
    staged_entries,
    throwaway,
)

#: The base of an export in the guest's repository: what it was when it came.
BASE_REF = "refs/banger/base"
#: Entries of files that changed so shortly before are compared by content (git's "racy" entries):
#: only whole seconds of a file's time count in the guest.
_RACY_S = 3
#: Settings of the host's that the guest's copy has, too.
_COPIED = (
    "core.autocrlf",
    "core.eol",
    "core.sparsecheckout",
    "core.sparsecheckoutcone",
    "user.name",
    "user.email",
)


@dataclass(frozen=True)
class Wish:
    """What somebody wants of a repository."""

    mode: WorkspaceMode = WorkspaceMode.SHALLOW_OVERLAY
    #: The commit that the guest's HEAD is at; empty: the host's HEAD.
    commit: str = ""
    #: A branch to be made there; empty: the branch of the host.
    branch: str = ""
    include_untracked: bool = False


@dataclass(frozen=True)
class Tree:
    """A working tree and the ``.git`` that goes into it."""

    source: Source
    #: Where in the guest's copy it is: ``b""``, or the path of a submodule.
    prefix: bytes
    git_dir: Path
    #: Files to be packed from the host's working tree; none: the guest checks out HEAD.
    files: Sequence[bytes]
    #: Directories of submodules, which may be empty.
    directories: Sequence[bytes]
    checks_out: bool
    base_commit: str


@dataclass(frozen=True)
class Shipment:
    trees: Sequence[Tree]
    #: Bytes that go, but for headers.
    size_bytes: int
    untracked: Sequence[bytes] = field(repr=False, default=())

    @property
    def base_commit(self) -> str:
        return self.trees[0].base_commit

    @property
    def submodules(self) -> tuple[tuple[str, str], ...]:
        """Where those are that go along, and the base of each."""
        return tuple(
            (tree.prefix.rstrip(b"/").decode(), tree.base_commit) for tree in self.trees[1:]
        )

    @property
    def file_count(self) -> int:
        return sum(len(tree.files) for tree in self.trees)


async def pack(source: Source, wish: Wish, directory: Path) -> Shipment:
    """Pack what is wished for into `directory`, which is as large as the objects that go.

    Raises PreconditionFailed for what the mode cannot have: see `check`.
    """
    async with throwaway(source, directory) as repository:
        submodules = await repository.submodules()
        check_submodules(source, wish.mode, submodules)
        untracked = await repository.untracked() if wish.include_untracked else []
        trees = await _trees(source, wish, repository, directory, b"", untracked)
    try:
        size = await asyncio.to_thread(_size_bytes, trees)
    except OSError as error:
        raise PreconditionFailed(
            f"{source.root} changes while it is read: {shown(error.filename or b'')}:"
            f" {error.strerror}",
            hint="try again",
        ) from error
    return Shipment(trees, size, untracked)


def check_submodules(source: Source, mode: WorkspaceMode, submodules: Mapping[bytes, str]) -> None:
    """Raise PreconditionFailed for submodules in a mode that does not take them along."""
    if submodules and mode is not WorkspaceMode.FULL_COPY:
        names = ", ".join(os.fsdecode(path) for path in submodules)
        raise PreconditionFailed(
            f'workspace mode "{mode}" does not support git submodules in {source.root} ({names});'
            " use --mode full_copy"
        )


async def _trees(
    source: Source,
    wish: Wish,
    repository: Throwaway,
    directory: Path,
    prefix: bytes,
    untracked: Sequence[bytes],
) -> list[Tree]:
    """The tree of `source`, and those of its submodules, each in a directory of its own."""
    inner: list[Tree] = []
    commits: dict[bytes, str] = {}
    if wish.mode is WorkspaceMode.FULL_COPY:
        for at, path in enumerate(await repository.submodules()):
            submodule = await _submodule(source, path)
            if submodule is None:
                continue  # it was never initialised: an empty directory
            _check_text(path)
            commits[path] = submodule.head_commit
            async with throwaway(submodule, directory) as below:
                whole = Wish(WorkspaceMode.FULL_COPY)
                beside = directory / f"sub{at}"
                beside.mkdir()
                inner += await _trees(submodule, whole, below, beside, prefix + path + b"/", ())
    head = wish.commit or source.head_commit
    checks_out = wish.mode is WorkspaceMode.METADATA_ONLY or head != source.head_commit
    base, entries = head, []
    if not checks_out:
        tree = await repository.snapshot(with_files=untracked, submodules=commits)
        base = await repository.commit(tree, head)
        listed = await repository.git("ls-tree", "-r", "-z", tree)
        left_out = await repository.left_out()
        entries = [each for each in staged_entries(listed.stdout) if each[2] not in left_out]
    git_dir = directory / "git"
    await asyncio.to_thread(make_git_dir, git_dir, _settings(source), source.object_format)
    await _objects(source, wish, repository, git_dir, [head, base], staged=not checks_out)
    await _references(source, wish, repository, git_dir, head, base)
    await asyncio.to_thread(_copy_local, git_dir, source, None if checks_out else repository)
    files = [path for mode, _, path in entries if mode != GITLINK]
    links = [path for mode, _, path in entries if mode == GITLINK]
    return [Tree(source, prefix, git_dir, files, links, checks_out, base), *inner]


def _check_text(path: bytes) -> None:
    try:
        path.decode()
    except UnicodeDecodeError:
        shown = path.decode(errors="backslashreplace")
        raise PreconditionFailed(
            f"the path of the submodule {shown} is not UTF-8", hint="rename it: git mv"
        ) from None


async def _submodule(source: Source, path: bytes) -> Source | None:
    """The repository of a submodule; None when it has none of its own."""
    directory = source.root / os.fsdecode(path)
    if not (directory / ".git").exists():
        return None
    submodule = await inspect(directory, submodule=True)
    inside = submodule.git_dir.is_relative_to(source.common_dir)
    if submodule.root != directory or not (inside or submodule.git_dir == directory / ".git"):
        raise PreconditionFailed(
            f"the submodule {directory} is somewhere else: {submodule.root}",
            hint="see: git submodule status",
        )
    return submodule


async def _objects(
    source: Source,
    wish: Wish,
    repository: Throwaway,
    git_dir: Path,
    commits: Sequence[str],
    *,
    staged: bool,
) -> None:
    """The objects that the guest's repository has, in a pack; those that are `staged`, too."""
    shallow = source.common_dir / "shallow"
    if wish.mode is WorkspaceMode.SHALLOW_OVERLAY:
        (repository.git_dir / "shallow").write_text(f"{commits[0]}\n")
        shutil.copyfile(repository.git_dir / "shallow", git_dir / "shallow")
    elif regular_file(shallow):
        shutil.copyfile(shallow, git_dir / "shallow")
    revisions = list(dict.fromkeys(commits))
    if wish.mode is WorkspaceMode.FULL_COPY:
        listed = await repository.git(
            "--git-dir", source.common_dir, "for-each-ref", "--format=%(objectname)"
        )
        revisions += listed.stdout.decode().split()
    try:
        await repository.git(
            *("pack-objects", "--quiet", "--revs", "--delta-base-offset", "--window=0"),
            *(("--indexed-objects",) if staged else ()),
            git_dir / "objects" / "pack" / "pack",
            stdin="".join(f"{revision}\n" for revision in revisions).encode(),
        )
    except ProcessFailed as error:
        hint = ""
        if "promisor" in str(error) or source.config.get("extensions.partialclone"):
            hint = "a partial clone lacks objects: git -C PATH fetch --refetch --no-filter"
        raise PreconditionFailed(
            f"the objects of {source.root} cannot be packed: {error}", hint=hint
        ) from error


async def _references(
    source: Source, wish: Wish, repository: Throwaway, git_dir: Path, head: str, base: str
) -> None:
    branch = wish.branch or source.branch
    references: dict[str, str] = {}
    if wish.mode is WorkspaceMode.FULL_COPY:
        listed = await repository.git(
            *("--git-dir", source.common_dir, "for-each-ref"),
            "--format=%(objectname) %(refname)",
        )
        for line in listed.stdout.splitlines():
            object_id, _, name = line.partition(b" ")
            references[os.fsdecode(name)] = object_id.decode()
    if branch:
        references[f"refs/heads/{branch}"] = head
    references[BASE_REF] = base
    lines = [f"{object_id} {name}\n" for name, object_id in sorted(references.items())]
    packed = os.fsencode("# pack-refs with: sorted \n" + "".join(lines))
    (git_dir / "packed-refs").write_bytes(packed)
    at = f"ref: refs/heads/{branch}\n" if branch else f"{head}\n"
    (git_dir / "HEAD").write_bytes(os.fsencode(at))


def _copy_local(git_dir: Path, source: Source, repository: Throwaway | None) -> None:
    """What of a repository is neither object nor reference; the index, where one is to go."""
    copy_if_regular(source.common_dir / "info" / "exclude", git_dir / "info" / "exclude")
    sparse = Path("info") / "sparse-checkout"
    copy_if_regular(source.git_dir / sparse, git_dir / sparse)
    if repository is not None:
        index = git_dir / "index"
        shutil.copyfile(repository.index, index)
        before = time.time() - _RACY_S
        os.utime(index, (before, before))


def _settings(source: Source) -> list[Setting]:
    """The configuration of the guest's copy: how files compare, who commits, where it is from."""
    keys = [*_COPIED]
    origin = source.setting("remote.origin.url")
    settings = [
        ("core.filemode", "true"),
        ("core.logallrefupdates", "true"),
        # Of what the host's files were compared by only time and size are the same in a guest.
        ("core.checkstat", "minimal"),
        ("core.trustctime", "false"),
        ("remote.origin.url", without_secret(origin)),
        ("remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*" if origin else ""),
    ]
    if source.setting(f"branch.{source.branch}.remote") == "origin":
        keys += [f"branch.{source.branch}.remote", f"branch.{source.branch}.merge"]
    return [*settings, *((key, source.setting(key)) for key in keys)]


def without_secret(url: str) -> str:
    """A remote's URL without the password or the token that may be in it."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", "ftp", "ftps") or "@" not in parts.netloc:
            return url
    except ValueError:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _size_bytes(trees: Sequence[Tree]) -> int:
    total = 0
    for tree in trees:
        total += sum(path.lstat().st_size for path in tree.git_dir.rglob("*"))
        root = os.fsencode(tree.source.root) + b"/"
        total += sum(os.lstat(root + path).st_size for path in tree.files)
        _check_no_links(root, tree.files)
    return total


def _check_no_links(root: bytes, files: Sequence[bytes]) -> None:
    """Raise OSError when a file is not in directories of the tree: tar would follow links."""
    for parent in {each for path in files for each in _parents(path)}:
        if not stat.S_ISDIR(os.lstat(root + parent).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), root + parent)


def _parents(path: bytes) -> Iterator[bytes]:
    while path := path.rpartition(b"/")[0]:
        yield path


def shown(name: str | bytes) -> str:
    """A name of the host's as it can be shown: bytes that are no UTF-8 as ``\\xff``."""
    return os.fsencode(name).decode(errors="backslashreplace")
