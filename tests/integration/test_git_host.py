"""The host's half of workspaces, with real git: what is shipped, and what a patch may do.

A directory stands for the guest: the scripts that are run in it are those of guests. (With real
guests: test_workspace_guest.py.)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import repositories as repos
from banger.base.errors import BadRequest, BangerError, Conflict, NotFound, PreconditionFailed
from banger.base.model import WorkspaceMode
from banger.git import patch as patches
from banger.git.command import Limits
from banger.git.shipment import Shipment, Wish, pack, without_secret
from banger.git.source import inspect, resolve
from repositories import git, write

FULL = WorkspaceMode.FULL_COPY


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory


def run(work: Any) -> Any:
    return asyncio.run(work)


def deliver(root: Path, scratch: Path, wish: Wish | None = None) -> tuple[Path, Shipment]:
    """A shipment, unpacked as an agent does it; and what it was."""

    async def packed() -> Shipment:
        directory = scratch / "packed"
        directory.mkdir()
        return await pack(await inspect(root), wish or Wish(), directory)

    shipment = run(packed())
    guest = scratch / "guest"
    guest.mkdir()
    for tree in shipment.trees:
        place = guest / os.fsdecode(tree.prefix)
        for directory in tree.directories:
            (place / os.fsdecode(directory)).mkdir(parents=True, exist_ok=True)
        shutil.copytree(tree.git_dir, place / ".git")
        names = b"".join(name + b"\0" for name in tree.files)
        create = ["tar", "--create", "--format=gnu", "-C", tree.source.root, "--no-recursion",
                  "--null", "--verbatim-files-from", "--files-from=-"]  # fmt: skip
        archive = subprocess.run(create, input=names, capture_output=True, check=True).stdout
        subprocess.run(["tar", "--extract", "-C", place], input=archive, check=True)
        if tree.checks_out:
            script("checkout", place)
    return guest, shipment


def script(name: str, *arguments: str | Path) -> bytes:
    text = (resources.files("banger.git") / "guest" / f"{name}.sh").read_text()
    return subprocess.run(
        ["sh", "-c", text, name, *arguments], capture_output=True, check=True, env=repos.ENVIRONMENT
    ).stdout


def exported(guest: Path, shipment: Shipment, scratch: Path) -> Path:
    """The guest's patch, in a file; it has all."""
    patch = scratch / "patch"
    patch.write_bytes(script("export", guest, shipment.base_commit, "plain"))
    return patch


def applied(root: Path, patch: Path, scratch: Path) -> list[patches.Change]:
    async def work() -> list[patches.Change]:
        return await patches.apply(await inspect(root), patch, scratch)

    found: list[patches.Change] = run(work())
    return found


@pytest.mark.parametrize("kind", repos.KINDS, ids=lambda kind: kind.__name__)
def test_the_guest_has_the_working_tree_and_git_agrees(
    kind: Callable[[Path], Path], tmp_path: Path, scratch: Path
) -> None:
    root = kind(tmp_path / "host")
    before = git(root, "status", "--porcelain=v2", "--untracked-files=no", "-z")
    guest, shipment = deliver(root, scratch)
    tracked = set(git(root, "ls-files", "-z").split(b"\0"))
    there = {name: what for name, what in repos.tree(root).items() if name in tracked}
    assert repos.tree(guest) == there
    assert git(guest, "status", "--porcelain=v2", "--untracked-files=no", "-z") == before
    assert (
        git(guest, "status", "--porcelain", "--untracked-files=all", "--ignored").count(b"?") == 0
    )
    assert repos.head(guest) == repos.head(root)
    assert git(guest, "rev-list", "--count", "HEAD") == b"1\n"
    git(guest, "fsck", "--strict")
    assert exported(guest, shipment, scratch).read_bytes() == b""
    # Nothing was done to the repository that was looked at.
    assert git(root, "status", "--porcelain=v2", "--untracked-files=no", "-z") == before


@pytest.mark.parametrize("kind", repos.KINDS, ids=lambda kind: kind.__name__)
def test_what_the_guest_changes_comes_back(
    kind: Callable[[Path], Path], tmp_path: Path, scratch: Path
) -> None:
    root = kind(tmp_path / "host")
    write(root, "untracked-here", "stays\n")
    guest, shipment = deliver(root, scratch)
    write(guest, "README", "from the guest\n" * 3)
    write(guest, b"new \xff\nname", "new\n")
    before = (guest / ".git/index").read_bytes(), (guest / ".git/HEAD").read_bytes()
    objects = sorted((guest / ".git/objects").rglob("*"))
    patch = exported(guest, shipment, scratch)
    assert ((guest / ".git/index").read_bytes(), (guest / ".git/HEAD").read_bytes()) == before
    assert sorted((guest / ".git/objects").rglob("*")) == objects
    index = (git(root, "ls-files", "--stage", "-z"),)
    expected = repos.tree(root) | {
        b"README": ("f", b"from the guest\n" * 3),
        b"new \xff\nname": ("f", b"new\n"),
    }
    assert {change.path for change in applied(root, patch, scratch)} == {
        b"README", b"new \xff\nname"
    }  # fmt: skip
    assert repos.tree(root) == expected
    assert (git(root, "ls-files", "--stage", "-z"),) == index


def test_a_change_of_the_same_size_in_the_same_second_is_seen(
    tmp_path: Path, scratch: Path
) -> None:
    """Git itself sees it by its index being no younger than the file."""
    root = repos.plain(tmp_path / "host")
    write(root, "README", "seen by git\n")
    git(root, "add", "README")
    write(root, "README", "not seen it\n")
    time.sleep(1.1)  # a copy of the index is younger
    guest, shipment = deliver(root, scratch)
    assert shipment.base_commit != repos.head(root)
    assert git(guest, "show", f"{shipment.base_commit}:README") == b"not seen it\n"
    assert git(guest, "status", "--porcelain") == b"MM README\n"
    assert exported(guest, shipment, scratch).read_bytes() == b""


def test_what_is_known_by_its_inode_alone_is_seen_in_the_guest(
    tmp_path: Path, scratch: Path
) -> None:
    """Replaced by something of the same size in the same second, and then left alone."""
    root = repos.plain(tmp_path / "host")
    git(root, "status")
    (root / "link").unlink()
    (root / "link").symlink_to("run.sh")
    (root / "README").rename(root / "old")
    write(root, "README", "dear me\n")
    (root / "old").unlink()
    moment = (root / "run.sh").stat().st_mtime_ns
    for name in ("README", "link"):
        os.utime(root / name, ns=(moment, moment), follow_symlinks=False)
    time.sleep(4)  # longer than what is racy in the guest
    guest, shipment = deliver(root, scratch)
    assert git(guest, "status", "--porcelain") == b" M README\n M link\n"
    assert exported(guest, shipment, scratch).read_bytes() == b""


def test_submodules_go_with_a_full_copy_and_are_refused_otherwise(
    tmp_path: Path, scratch: Path
) -> None:
    root = repos.with_submodules(tmp_path)
    with pytest.raises(
        PreconditionFailed,
        match=r"not support git submodules in .*repo \(lib/middle, other\); use --mode full_copy",
    ):
        deliver(root, scratch)
    shutil.rmtree(scratch / "packed")
    guest, _ = deliver(root, scratch, Wish(FULL))
    assert repos.tree(guest) == repos.tree(root)
    for inner in (".", "lib/middle", "lib/middle/deep"):
        assert repos.head(guest / inner) == repos.head(root / inner)
        assert git(guest / inner, "status", "--short") == git(root / inner, "status", "--short")
    assert list((guest / "other").iterdir()) == []


def test_a_submodule_is_the_repositorys_own(tmp_path: Path, scratch: Path) -> None:
    private = repos.plain(tmp_path / "private")
    root = repos.with_submodules(tmp_path / "host")
    shutil.rmtree(root / "lib/middle/.git", ignore_errors=True)
    (root / "lib/middle/.git").unlink()
    write(root, "lib/middle/.git/HEAD", "ref: refs/heads/main\n")
    write(root, "lib/middle/.git/commondir", f"{private}/.git\n")
    with pytest.raises(PreconditionFailed, match="leads to a repository somewhere else"):
        deliver(root, scratch, Wish(FULL))


def test_a_rename_in_a_submodule_can_be_applied(tmp_path: Path, scratch: Path) -> None:
    root = repos.with_submodules(tmp_path / "host")
    guest, shipment = deliver(root, scratch, Wish(FULL))
    git(guest / "lib/middle", "mv", "old-name", "newer name")
    inner = [word for pair in shipment.submodules for word in pair]
    patch = scratch / "patch"
    patch.write_bytes(script("export", guest, shipment.base_commit, "patch", *inner))
    git(root, "apply", patch)
    assert repos.tree(root) == repos.tree(guest)


def test_a_full_copy_has_all_of_the_history_and_the_references(
    tmp_path: Path, scratch: Path
) -> None:
    root = repos.changed(tmp_path)
    git(root, "tag", "-a", "v1", "-m", "one")
    git(root, "branch", "other", "HEAD^")
    guest, _ = deliver(root, scratch, Wish(FULL))
    ours = git(root, "for-each-ref").splitlines()
    theirs = git(guest, "for-each-ref").splitlines()
    assert set(ours) < set(theirs)
    assert git(guest, "log", "--format=%H") == git(root, "log", "--format=%H")


def test_metadata_only_has_the_history_and_head_checked_out(tmp_path: Path, scratch: Path) -> None:
    root = repos.changed(tmp_path)
    guest, _ = deliver(root, scratch, Wish(WorkspaceMode.METADATA_ONLY))
    assert git(guest, "status", "--porcelain") == b""
    assert git(guest, "rev-list", "--count", "HEAD") == b"2\n"
    assert (guest / "README").read_text() == "read me\n"


def test_a_branch_begins_where_it_is_said(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path)
    first = git(root, "rev-parse", "HEAD^").decode().strip()
    guest, shipment = deliver(root, scratch, Wish(commit=first, branch="topic/x"))
    assert git(guest, "symbolic-ref", "HEAD") == b"refs/heads/topic/x\n"
    assert repos.head(guest) == first == shipment.base_commit
    assert sorted(repos.tree(guest)) == [b"README"]


def test_untracked_files_go_when_asked_for_and_ignored_ones_never(
    tmp_path: Path, scratch: Path
) -> None:
    root = repos.changed(tmp_path)
    guest, shipment = deliver(root, scratch, Wish(include_untracked=True))
    assert (guest / "untracked").read_text() == "nobody knows\n"
    assert not (guest / "ignored").exists()
    assert git(guest, "status", "--short", "untracked") == b"?? untracked\n"
    write(guest, "untracked", "the guest knows\n")
    applied(root, exported(guest, shipment, scratch), scratch)
    assert (root / "untracked").read_text() == "the guest knows\n"


def test_what_cannot_be_shipped_is_refused(tmp_path: Path) -> None:
    root = repos.plain(tmp_path / "host")

    def refused(path: Path, kind: type[BangerError], text: str) -> None:
        with pytest.raises(kind, match=text):
            run(inspect(path))

    refused(tmp_path / "nowhere", NotFound, "does not exist")
    refused(root / "README", NotFound, "is not a directory")
    refused(tmp_path, PreconditionFailed, "is not in a git repository")
    refused(root / ".git", PreconditionFailed, "is its .git")
    git(tmp_path, "init", "--quiet", "--bare", "bare")
    refused(tmp_path / "bare", PreconditionFailed, "is bare")
    git(tmp_path, "init", "--quiet", "unborn")
    refused(tmp_path / "unborn", PreconditionFailed, "has no commit yet")
    with_submodules = repos.with_submodules(tmp_path / "sub")
    refused(
        with_submodules / "lib/middle", PreconditionFailed, f"is a submodule of {with_submodules}"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    git(root, "config", "core.worktree", elsewhere)
    refused(root, PreconditionFailed, "names as its working tree|must be run in a work tree")
    git(root, "config", "--unset", "core.worktree")
    source = run(inspect(root / "src"))
    assert (source.root, source.inside) == (root, Path("src"))
    for ref in ("nowhere", "--help", ""):
        with pytest.raises(BadRequest, match="is no commit of"):
            run(resolve(source, ref))


def test_nothing_that_a_repository_names_is_run(tmp_path: Path, scratch: Path) -> None:
    root = repos.changed(tmp_path / "host")
    marker = tmp_path / "it-ran"
    ran = f"touch {marker}; false"
    write(root, ".gitattributes", "* filter=evil diff=evil merge=evil\n")
    for key in (
        "core.fsmonitor", "core.sshCommand", "core.pager", "core.editor", "core.askPass",
        "core.gitProxy", "core.alternateRefsCommand", "filter.evil.clean", "filter.evil.smudge",
        "filter.evil.process", "diff.external", "diff.evil.command", "diff.evil.textconv",
        "merge.evil.driver", "gpg.program", "credential.helper", "uploadpack.packObjectsHook",
        "sequence.editor", "interactive.diffFilter", "remote.origin.uploadpack",
    ):  # fmt: skip
        git(root, "config", key, ran)
    for command in ("add", "ls-files", "write-tree", "read-tree", "rev-parse", "apply", "config"):
        git(root, "config", f"alias.{command}", f"!{ran}")
    git(root, "config", "filter.evil.required", "true")
    git(root, "config", "remote.origin.url", f"ext::sh -c '{ran}'")
    git(root, "config", "remote.origin.promisor", "true")
    git(root, "config", "extensions.partialClone", "origin")
    hooks = root / ".git/hooks"
    hooks.mkdir(exist_ok=True)
    for name in (
        "post-index-change", "post-checkout", "pre-commit", "post-commit", "reference-transaction",
        "applypatch-msg", "pre-applypatch", "fsmonitor-watchman",
    ):  # fmt: skip
        (hooks / name).write_text(f"#!/bin/sh\n{ran}\n")
        (hooks / name).chmod(0o755)
    git(root, "config", "core.hooksPath", hooks)
    guest, shipment = deliver(root, scratch)
    assert not marker.exists()
    write(guest, "README", "from the guest\n")
    write(guest, "fresh", "from the guest\n")
    shutil.copytree(guest / ".git", scratch / "kept")
    patch = exported(guest, shipment, scratch)
    assert applied(root, patch, scratch)
    assert (root / "fresh").exists()
    assert not marker.exists()


def test_what_the_index_hides_is_looked_at(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    write(root, "settings", "theirs\n")
    write(root, "deleted", "x\n")
    repos.commit(root)
    git(root, "update-index", "--assume-unchanged", "settings", "deleted")
    git(root, "update-index", "--skip-worktree", "README")
    write(root, "settings", "mine\n")
    write(root, "README", "mine, too\n")
    (root / "deleted").unlink()
    guest, shipment = deliver(root, scratch)
    assert (guest / "settings").read_text() == "mine\n"
    assert (guest / "README").read_text() == "mine, too\n"
    assert not (guest / "deleted").exists()
    write(guest, "settings", "the guest's\n")
    applied(root, exported(guest, shipment, scratch), scratch)
    assert (root / "settings").read_text() == "the guest's\n"


@pytest.mark.parametrize(
    ("written", "where", "problem"),
    [
        (b"elsewhere-secret", b"elsewhere/secret", ""),
        (b"unsorted_--secret", b"elsewhere//secret", "outside of it"),
        (b"unsorted_-secret", b"elsewhere/secret", "not in order"),
        (b"..-private-secret", b"../private/secret", "outside of it"),
    ],
)
def test_an_index_does_not_lead_out_of_the_tree(
    written: bytes, where: bytes, problem: str, tmp_path: Path, scratch: Path
) -> None:
    """It may say that nobody needs to look at a file, whose path then leads through a link."""
    write(tmp_path, "private/secret", "secret\n")
    root = repos.plain(tmp_path / "host")
    blob = git(root, "hash-object", "-w", "--stdin", stdin=b"x").strip()
    git(root, "update-index", "-z", "--index-info", stdin=b"100644 %s\t%s\0" % (blob, written))
    git(root, "update-index", "--assume-unchanged", written)
    index = (root / ".git/index").read_bytes().replace(written, where)[:-20]
    (root / ".git/index").write_bytes(index + hashlib.sha1(index, usedforsecurity=False).digest())
    (root / "elsewhere").symlink_to(tmp_path / "private")
    if problem:
        with pytest.raises(PreconditionFailed, match=problem):
            deliver(root, scratch)
    else:
        guest, _ = deliver(root, scratch)
        assert not (guest / "elsewhere").exists()


def test_a_repository_is_the_directorys_own(tmp_path: Path) -> None:
    private = repos.plain(tmp_path / "private")
    write(tmp_path, "evil/.git", f"gitdir: {private}/.git\n")
    write(tmp_path, "linked/x", "x")
    (tmp_path / "linked/.git").symlink_to(private / ".git")
    git(private, "worktree", "add", "--quiet", tmp_path / "worktree")
    common = repos.plain(tmp_path / "common")
    write(common, ".git/commondir", f"{private}/.git\n")
    objects = repos.plain(tmp_path / "objects")
    (objects / ".git/refs").rename(objects / "elsewhere")
    (objects / ".git/refs").symlink_to(private / ".git/refs")
    heads = repos.plain(tmp_path / "heads")
    shutil.rmtree(heads / ".git/refs/heads")
    (heads / ".git/refs/heads").symlink_to(private / ".git/refs/heads")
    write(heads, ".git/objects/info/alternates", f"{private}/.git/objects\n")
    for root in ("evil", "linked", "common", "objects", "heads"):
        with pytest.raises(PreconditionFailed, match=r"repository somewhere else|not in a git rep"):
            run(inspect(tmp_path / root))
    assert run(inspect(tmp_path / "worktree")).branch == "worktree"


def test_what_is_only_staged_stays_here_with_metadata_only(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    write(root, ".env", "secret\n")
    git(root, "add", ".env")
    blob = git(root, "rev-parse", ":.env").decode().strip()
    guest, _ = deliver(root, scratch, Wish(WorkspaceMode.METADATA_ONLY))
    known = git(guest, "cat-file", "--batch-check", "--batch-all-objects").decode()
    assert blob not in known
    assert repos.head(root) in known


def test_files_that_a_patch_makes_are_the_users(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    guest, shipment = deliver(root, scratch)
    write(guest, "README", "changed\n")
    write(guest, "fresh/file", "new\n")
    patch = exported(guest, shipment, scratch)

    async def work() -> None:
        await patches.apply(await inspect(root), patch, scratch, umask=0o022)

    before = os.umask(0o077)  # the daemon's
    try:
        run(work())
    finally:
        os.umask(before)
    modes = [(root / name).stat().st_mode & 0o777 for name in ("README", "fresh", "fresh/file")]
    assert modes == [0o644, 0o755, 0o644]


@pytest.mark.parametrize(
    ("here", "there"),
    [("data/kept", "data"), ("data/deep/kept", "data"), ("env", "env/x"), ("env", "env/x/y")],
)
def test_a_patch_replaces_nothing_that_is_ignored(
    here: str, there: str, tmp_path: Path, scratch: Path
) -> None:
    root = repos.plain(tmp_path / "host")
    write(root, ".gitignore", "data/\nenv\n")
    repos.commit(root)
    write(root, here, "mine\n")
    patch = scratch / "patch"
    patch.write_text(NEW.format("innocent", "100644") + NEW.format(there, "100644"))
    with pytest.raises(Conflict, match=f"what git does not track here: {here}"):
        applied(root, patch, scratch)
    assert (root / here).read_text() == "mine\n"
    assert not (root / "innocent").exists()


def test_a_patch_that_unpacks_to_more_than_memory_is_refused(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_UNPACKED", Limits(memory_bytes=256 << 20))
    root = repos.plain(tmp_path / "host")
    guest, shipment = deliver(root, scratch)
    write(guest, "zeros", bytes(600 << 20))
    patch = exported(guest, shipment, scratch)
    assert patch.stat().st_size < 8 << 20
    with pytest.raises(BadRequest, match="is no patch"):
        applied(root, patch, scratch)


def test_repositories_within_the_guests_are_left_out(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    guest, shipment = deliver(root, scratch)
    write(guest, "README", "changed\n")
    write(guest, "new \n one", "new\n")
    repos.plain(guest / "whole")
    git(guest, "init", "--quiet", "unborn")
    write(guest, b"caf\xe9", "new\n")
    names = {b"README", b"new \n one", b"caf\xe9"}
    for what, left_out in (("plain", b"unborn\nwhole/repo\n"), ("patch", b"whole/repo\n")):
        text = (resources.files("banger.git") / "guest" / "export.sh").read_text()
        done = subprocess.run(
            ["sh", "-c", text, "export", guest, shipment.base_commit, what],
            capture_output=True, check=False, env=repos.ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 85, done.stderr
        assert done.stderr == b"left out, as repositories of their own:\n" + left_out
        patch = scratch / what
        patch.write_bytes(done.stdout)
        assert {change.path for change in applied(root, patch, scratch)} == names
        for name in names - {b"README"}:
            (root / os.fsdecode(name)).unlink()
        write(root, "README", "read me\n")
        shutil.rmtree(guest / "unborn", ignore_errors=True)


def test_a_place_that_was_half_taken_is_given_back(tmp_path: Path) -> None:
    target, staging = tmp_path / "repo", tmp_path / ".repo.banger"
    write(staging.with_name(".repo.banger.old"), "kept", "mine\n")
    write(staging, "half", "sent\n")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        script("begin", target, staging, "")
    assert refused.value.returncode == 80
    assert repos.tree(target) == {b"kept": ("f", b"mine\n")}
    script("begin", target, staging, "yes")
    write(staging, "new", "new\n")
    script("place", target, staging, "")
    assert repos.tree(target) == {b"new": ("f", b"new\n")}


def test_a_remote_goes_without_its_password(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    git(root, "remote", "add", "origin", "https://me:secret@example.invalid/x.git")
    git(root, "config", "user.name", 'An "odd" \\ name')
    git(root, "config", "http.extraHeader", "secret")
    guest, _ = deliver(root, scratch)
    assert git(guest, "remote", "get-url", "origin") == b"https://example.invalid/x.git\n"
    assert git(guest, "config", "--local", "user.name") == b'An "odd" \\ name\n'
    assert b"secret" not in (guest / ".git/config").read_bytes()
    assert without_secret("git@example.invalid:x.git") == "git@example.invalid:x.git"
    assert without_secret("http://[bad@x") == "http://[bad@x"


# What a guest's patch may not do.

NEW = "diff --git a/{0} b/{0}\nnew file mode {1}\n--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+evil\n"


@pytest.mark.parametrize(
    "text",
    [
        NEW.format("../outside", "100644"),
        NEW.format("a/../../outside", "100644"),
        NEW.format("/tmp/outside", "100644"),
        NEW.format(".git/hooks/post-checkout", "100755"),
        NEW.format(".GIT/config", "100644"),
        NEW.format("src/.git/config", "100644"),
        NEW.format("to-src/through-a-link", "100644"),
        NEW.format("untracked-link/outside", "100644"),
        NEW.format("fresh", "120000").replace("evil\n", "/tmp\n\\ No newline at end of file\n")
        + NEW.format("fresh/outside", "100644"),
        NEW.format("README/below-a-file", "100644"),
        NEW.format("README", "100644"),
        NEW.format("untracked", "100644"),
        NEW.format("ignored", "100644"),
        NEW.format("nested", "160000").replace("evil", "Subproject commit " + "1" * 40),
        "diff --git a/README b/README\n--- a/README\n+++ b/README\n@@ -1 +1 @@\n-other\n+evil\n",
    ],
)
def test_a_hostile_patch_changes_nothing(text: str, tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    write(root, "untracked", "mine\n")
    write(root, "ignored", "mine\n")
    (root / "untracked-link").symlink_to(tmp_path)
    patch = scratch / "patch"
    patch.write_text(NEW.format("innocent", "100644") + text)
    before = _moments(tmp_path)
    with pytest.raises(BangerError) as refused:
        applied(root, patch, scratch)
    assert isinstance(refused.value, (BadRequest, Conflict)), refused.value
    assert _moments(tmp_path) == before


def _moments(base: Path) -> dict[Path, int]:
    """When each file and directory below `base` was changed last, but for objects, whose time git
    sets when it would have written them again, and where we work."""
    return {
        path: path.lstat().st_mtime_ns
        for path in sorted(base.rglob("*"))
        if "objects" not in path.parts and path.name != "scratch"
    }


def test_what_is_no_patch_is_refused(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    patch = scratch / "patch"
    patch.write_text("no patch at all\n")
    with pytest.raises(BadRequest, match="is no patch"):
        applied(root, patch, scratch)
    patch.write_text("")
    assert applied(root, patch, scratch) == []


def test_a_patch_does_not_touch_what_was_changed_here(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    guest, shipment = deliver(root, scratch)
    write(guest, "README", "from the guest\n")
    write(guest, "fresh", "from the guest\n")
    patch = exported(guest, shipment, scratch)
    write(root, "README", "mine\n")
    with pytest.raises(Conflict, match="README"):
        applied(root, patch, scratch)
    assert not (root / "fresh").exists()
    write(root, "README", "read me\n")
    write(root, "fresh", "mine\n")
    with pytest.raises(Conflict, match="fresh"):
        applied(root, patch, scratch)
    assert (root / "README").read_text() == "read me\n"


def test_a_patch_is_merged_with_what_was_committed_here(tmp_path: Path, scratch: Path) -> None:
    root = repos.plain(tmp_path / "host")
    lines = [f"line {number}\n" for number in range(30)]
    write(root, "long", "".join(lines))
    repos.commit(root)
    guest, shipment = deliver(root, scratch)
    write(guest, "long", "".join([*lines[:29], "the guest's last\n"]))
    patch = exported(guest, shipment, scratch)
    write(root, "long", "".join(["our first\n", *lines[1:]]))
    repos.commit(root)
    applied(root, patch, scratch)
    assert (root / "long").read_text() == "".join(
        ["our first\n", *lines[1:29], "the guest's last\n"]
    )
    git(root, "checkout", "--quiet", "--", ".")
    write(root, "long", "".join([*lines[:29], "our last\n"]))
    repos.commit(root)
    with pytest.raises(Conflict, match="have both changed long"):
        applied(root, patch, scratch)
    assert git(root, "status", "--porcelain") == b""


def edit(root: Path, chance: random.Random) -> None:
    """One change of some sort to a tree, or to what git knows of it."""
    files = sorted(repos.tree(root))
    name = chance.choice(files) if files else b"first"
    path = root / os.fsdecode(name)
    fresh = root / chance.choice([f"n{chance.randrange(9)}", f"d/n{chance.randrange(9)}", "e f/x"])
    what = chance.randrange(9) if files else 0
    if what == 0 and not os.path.lexists(fresh) and not fresh.parent.is_file():
        write(root, str(fresh.relative_to(root)), chance.randbytes(chance.randrange(200)))
    elif what == 1:
        path.unlink()
        write(root, name, b"line\n" * chance.randrange(9))
    elif what == 2:
        path.unlink()
    elif what == 3:
        path.rename(root / f"moved{chance.randrange(9)}")
    elif what == 4 and not path.is_symlink():
        path.chmod(chance.choice([0o644, 0o755]))
    elif what == 5:
        path.unlink()
        path.symlink_to(chance.choice(["README", "/etc", "..", "nowhere"]))
    elif what == 6:
        git(root, "add", "--all")
    elif what == 7:
        repos.commit(root)
    elif what == 8 and not path.is_symlink():
        with path.open("ab") as file:
            file.write(b"more\n")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**9), is_dirty=st.booleans())
def test_whatever_the_guest_does_the_host_gets_exactly_that(
    seed: int, is_dirty: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("round")
    chance = random.Random(seed)
    root = (repos.changed if is_dirty else repos.plain)(base / "host")
    write(root, "mine/untracked", "stays\n")
    scratch = base / "scratch"
    scratch.mkdir()
    guest, shipment = deliver(root, scratch)
    untracked = {
        name: what for name, what in repos.tree(root).items() if name not in repos.tree(guest)
    }
    for _ in range(chance.randrange(1, 12)):
        edit(guest, chance)
    applied(root, exported(guest, shipment, scratch), scratch)
    ignored = git(guest, "ls-files", "-z", "--others", "--ignored", "--exclude-standard")
    expected = {
        name: what for name, what in repos.tree(guest).items() if name not in ignored.split(b"\0")
    }
    assert repos.tree(root) == untracked | expected
    shutil.rmtree(base)
