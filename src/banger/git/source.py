"""What a repository of the host is, before anything of it goes anywhere."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from banger.base.errors import BadRequest, NotFound, PreconditionFailed
from banger.base.proc import ProcessFailed
from banger.git.command import ask

GITLINK = 0o160000


@dataclass(frozen=True)
class Source:
    """A repository with a working tree, at a commit."""

    root: Path
    git_dir: Path
    #: Where its objects and references are: another than `git_dir` for a linked worktree.
    common_dir: Path
    head_commit: str
    #: Empty when HEAD is detached.
    branch: str
    #: ``sha1`` or ``sha256``.
    object_format: str
    #: Its configuration and the user's: the values of each key, the last one counts.
    config: Mapping[str, Sequence[str]] = field(repr=False)
    #: Where the path that was asked for lies within `root`; ``.`` for `root` itself.
    inside: Path = Path()

    @property
    def name(self) -> str:
        return self.root.name or "root"

    def setting(self, key: str) -> str:
        """The value of a key (its section and variable in lower case); empty without one."""
        values = self.config.get(key, ())
        return values[-1] if values else ""

    def is_set(self, key: str) -> bool:
        """Whether a boolean key is true."""
        return self.setting(key).lower() in ("true", "yes", "on", "1")

    @property
    def is_sparse(self) -> bool:
        return self.is_set("core.sparsecheckout")


async def inspect(path: Path, *, submodule: bool = False) -> Source:
    """The repository that `path` is in; a `submodule` is only looked at for what is around it.

    Raises NotFound for a path that is not there; PreconditionFailed for one that is in no
    repository, in a bare one, in one without a commit, in a ``.git`` directory, or in a submodule.
    """
    _check_directory(path)
    root = await _root(path)
    parent = "" if submodule else await _line(root, "--show-superproject-working-tree")
    if parent:
        raise PreconditionFailed(
            f"{root} is a submodule of {parent}",
            hint=f"name that repository: {parent}, with --mode full_copy",
        )
    git_dir = Path(await _line(root, "--absolute-git-dir"))
    common_dir = await asyncio.to_thread(_resolved, root, await _line(root, "--git-common-dir"))
    await asyncio.to_thread(_check_own, root, git_dir, common_dir, submodule=submodule)
    head = await ask(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
    if head.returncode != 0:
        raise PreconditionFailed(f"{root} has no commit yet", hint="commit something first")
    branch = await ask(root, "symbolic-ref", "--quiet", "HEAD", check=False)
    return Source(
        root=root,
        git_dir=git_dir,
        common_dir=common_dir,
        head_commit=_text(head.stdout),
        branch=_text(branch.stdout).removeprefix("refs/heads/"),
        object_format=await _line(root, "--show-object-format"),
        config=await _config(root),
        inside=_within(path, root) or Path(),
    )


async def resolve(source: Source, ref: str) -> str:
    """The commit that `ref` names in the repository. BadRequest for none."""
    found = await ask(
        source.root,
        *("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"),
        check=False,
    )
    if found.returncode != 0:
        raise BadRequest(
            f'"{ref}" is no commit of {source.root}', hint="see: git branch --all, git log"
        )
    return _text(found.stdout)


async def check_branch_name(source: Source, name: str) -> None:
    """Raise BadRequest for what cannot be a branch's name."""
    checked = await ask(source.root, "check-ref-format", "--branch", name, check=False)
    if checked.returncode != 0 or _text(checked.stdout) != name:
        raise BadRequest(f'"{name}" cannot be the name of a branch')


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise NotFound(f"{path} {what}", hint="name the directory of a git repository")


def _resolved(root: Path, path: str) -> Path:
    return (root / path).resolve()


def _check_own(root: Path, git_dir: Path, common_dir: Path, *, submodule: bool) -> None:
    """Raise PreconditionFailed for a repository that is not the directory's own: whoever wrote a
    ``.git`` may have it, or parts of it, lead to anybody's. A linked worktree is named by its
    repository, too; where that of a submodule lies is for the caller to look at."""
    own = root / ".git"
    if submodule:
        is_own = common_dir == git_dir.resolve()
    elif own.is_dir() and not own.is_symlink():
        is_own = common_dir == own
    else:
        linked = git_dir.resolve().parent == common_dir / "worktrees" and regular_file(own)
        named = os.fsdecode((git_dir / "gitdir").read_bytes().strip()) if linked else ""
        is_own = linked and os.path.normpath(git_dir / named) == str(own)
    if not is_own or _has_links(common_dir):
        raise PreconditionFailed(
            f"{own} leads to a repository somewhere else: {git_dir}",
            hint="name a clone, or a worktree that its repository knows: git worktree repair",
        )


def _has_links(common_dir: Path) -> bool:
    """Whether objects or references of a repository are elsewhere by a link. (Alternates only have
    objects, of which none goes that no reference leads to.)"""
    parts = [common_dir / name for name in ("HEAD", "packed-refs", "objects", "refs")]
    objects = common_dir / "objects"
    if any(part.is_symlink() for part in (*parts, *objects.glob("*"))):
        return True
    return any(
        Path(directory, name).is_symlink()
        for directory, folders, files in os.walk(common_dir / "refs")
        for name in (*folders, *files)
    )


def _within(path: Path, root: Path) -> Path | None:
    """Where `path` lies in `root`; None when it does not."""
    resolved = path.resolve()
    return resolved.relative_to(root) if resolved.is_relative_to(root) else None


async def _root(path: Path) -> Path:
    bare = await ask(path, "rev-parse", "--is-bare-repository", check=False)
    if bare.returncode != 0:
        raise _no_repository(path, bare.stderr.decode(errors="replace"))
    if await _line(path, "--is-inside-git-dir") == "true":
        where = "is bare: it has no working tree" if _text(bare.stdout) == "true" else "is its .git"
        raise PreconditionFailed(
            f"{path} {where}", hint="name the directory that its files are in: git clone or cd"
        )
    if _text(bare.stdout) == "true":
        raise PreconditionFailed(
            f"{path} is bare: it has no working tree", hint="clone it, and name the clone"
        )
    root = Path(await _line(path, "--show-toplevel"))
    # core.worktree can name any directory: only what is around the path was asked for.
    if _within(path, root) is None:
        raise PreconditionFailed(
            f"{path} is not in {root}, which its repository names as its working tree",
            hint="unset core.worktree in its configuration, or name that directory",
        )
    return root


def _no_repository(path: Path, said: str) -> PreconditionFailed:
    if "dubious ownership" in said:
        return PreconditionFailed(
            f"git does not trust {path}: it belongs to somebody else",
            hint=f"git config --global --add safe.directory {path}",
        )
    if "not a git repository" in said:
        return PreconditionFailed(
            f"{path} is not in a git repository",
            hint="git init it and commit, or copy it as it is: banger vm cp",
        )
    return PreconditionFailed(f"git cannot read {path}: {said.strip()}")


async def _line(directory: Path, question: str) -> str:
    return _text((await ask(directory, "rev-parse", question)).stdout)


def _text(output: bytes) -> str:
    """One answer: paths may have any byte in them, a line's end too."""
    return os.fsdecode(output.removesuffix(b"\n"))


async def _config(root: Path) -> dict[str, list[str]]:
    try:
        listed = await ask(root, "config", "--null", "--list")
    except ProcessFailed as error:
        raise PreconditionFailed(f"git cannot read the configuration of {root}: {error}") from error
    values: dict[str, list[str]] = {}
    for entry in os.fsdecode(listed.stdout).split("\0"):
        key, newline, value = entry.partition("\n")
        if key:
            # A key without a value is true.
            values.setdefault(key, []).append(value if newline else "true")
    return values


def regular_file(path: Path) -> bool:
    """Whether there is a file, and not a link to one: nothing outside a repository is read."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
