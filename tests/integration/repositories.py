"""Git repositories of many kinds, made by git itself, and what tests ask of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

#: Neither the user's configuration nor the time has a say in what is made.
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.invalid",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.invalid",
}

#: Names that have been somebody's undoing.
HARD_NAMES = (
    b"two words",
    b'it\'s "quoted"',
    b"-dash",
    b"--help",
    b"new\nline",
    b"tab\there",
    b"back\\slash",
    b"caf\xe9",
    "schön".encode(),
    b"$(touch x)",
    b"*",
    b":(top)magic",
    b"..dots",
    b"a/b c/\xff\xfe",
)


def git(where: Path, *arguments: str | bytes | Path, stdin: bytes | None = None) -> bytes:
    """What git prints; it must succeed."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=where,
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def write(root: Path, name: bytes | str, content: bytes | str) -> None:
    path = root / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def commit(root: Path, message: str = "change") -> str:
    """Commit all there is; the commit."""
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "-m", message)
    return head(root)


def head(root: Path) -> str:
    return git(root, "rev-parse", "HEAD").decode().strip()


def new(root: Path) -> Path:
    """A repository with some files of every sort, in two commits."""
    root.mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch=main")
    write(root, "README", "read me\n")
    commit(root, "first")
    write(root, "src/main.c", "int main() { return 0; }\n" * 50)
    write(root, "run.sh", "#!/bin/sh\necho run\n")
    (root / "run.sh").chmod(0o755)
    write(root, "binary", bytes(range(256)) * 40)
    write(root, "empty", "")
    (root / "link").symlink_to("README")
    (root / "dangling").symlink_to("nowhere")
    (root / "to-src").symlink_to("src")
    write(root, ".gitignore", "ignored\n*.o\n")
    write(root, "gone", "soon\n")
    write(root, "old-name", "renamed\n" * 20)
    commit(root, "second")
    return root


def dirty(root: Path) -> None:
    """All that a working tree can be besides clean."""
    write(root, "README", "changed\n")
    (root / "gone").unlink()
    (root / "run.sh").chmod(0o644)
    (root / "link").unlink()
    (root / "link").symlink_to("run.sh")
    git(root, "mv", "old-name", "new-name")
    write(root, "staged", "staged\n")
    git(root, "add", "staged")
    write(root, "staged", "staged, then changed\n")
    write(root, "untracked", "nobody knows\n")
    write(root, "ignored", "nobody wants\n")
    write(root, "binary", b"\0\1\2" * 1000)


def tree(root: Path) -> dict[bytes, tuple[str, bytes]]:
    """Every file below `root` but ``.git``: its kind, with x for executable, and its content."""
    found = {}
    for path in root.rglob("*"):
        if ".git" in path.parts[len(root.parts) :] or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink():
            what = ("l", os.fsencode(path.readlink()))
        else:
            what = ("x" if path.stat().st_mode & 0o100 else "f", path.read_bytes())
        found[os.fsencode(path.relative_to(root))] = what
    return found


# The kinds: each makes a repository in a directory of its own and names it.


def plain(base: Path) -> Path:
    return new(base / "repo")


def changed(base: Path) -> Path:
    root = new(base / "repo")
    dirty(root)
    return root


def hard_names(base: Path) -> Path:
    root = new(base / 'it\'s a\n"repo" \\ $x')
    for name in HARD_NAMES:
        write(root, name, name + b"\n")
    commit(root)
    write(root, HARD_NAMES[4], "changed\n")
    return root


def line_ends(base: Path) -> Path:
    root = new(base / "repo")
    write(root, ".gitattributes", "*.txt text eol=crlf\n*.auto text=auto\n*.bin -text\n")
    for name in ("a.txt", "b.auto", "c.bin", "d"):
        write(root, name, "one\r\ntwo\r\n")
    commit(root)
    write(root, "a.txt", "one\r\nthree\r\n")
    return root


def case_only(base: Path) -> Path:
    root = new(base / "repo")
    write(root, "Case", "upper\n")
    commit(root)
    git(root, "mv", "Case", "case")
    return root


def shallow(base: Path) -> Path:
    origin = new(base / "origin")
    git(base, "clone", "--quiet", "--depth=1", origin.as_uri(), "repo")
    return base / "repo"


def sparse(base: Path) -> Path:
    root = new(base / "repo")
    for name in ("in/a", "in/b", "out/c"):
        write(root, name, name)
    commit(root)
    git(root, "sparse-checkout", "set", "in")
    write(root, "in/a", "changed\n")
    return root


def worktree(base: Path) -> Path:
    root = new(base / "main")
    git(root, "worktree", "add", "--quiet", "-b", "other", base / "repo")
    write(base / "repo", "README", "changed in the worktree\n")
    return base / "repo"


def detached(base: Path) -> Path:
    root = new(base / "repo")
    git(root, "checkout", "--quiet", "--detach", "HEAD")
    return root


def split_index(base: Path) -> Path:
    root = new(base / "repo")
    git(root, "update-index", "--split-index", "--untracked-cache")
    write(root, "more", "more\n")
    git(root, "add", "more")
    return root


def sha256(base: Path) -> Path:
    root = base / "repo"
    root.mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch=main", "--object-format=sha256")
    write(root, "README", "read me\n")
    commit(root)
    write(root, "README", "changed\n")
    return root


def lfs(base: Path) -> Path:
    """Pointers in the commits and content in the working tree, by a filter that is not ours."""
    root = new(base / "repo")
    git(root, "config", "filter.lfs.clean", "printf 'pointer\\n'; cat >/dev/null")
    git(root, "config", "filter.lfs.smudge", "cat >/dev/null; printf 'the large content\\n'")
    write(root, ".gitattributes", "*.large filter=lfs -text\n")
    write(root, "a.large", "the large content\n")
    commit(root)
    git(root, "config", "--remove-section", "filter.lfs")
    return root


KINDS: tuple[Callable[[Path], Path], ...] = (
    plain,
    changed,
    hard_names,
    line_ends,
    case_only,
    shallow,
    sparse,
    worktree,
    detached,
    split_index,
    sha256,
    lfs,
)


def with_submodules(base: Path) -> Path:
    """A submodule with one of its own, one with changes, and one that was never fetched."""
    allow = ("-c", "protocol.file.allow=always")
    inner, middle, other = (new(base / name) for name in ("inner", "middle", "other"))
    git(middle, *allow, "submodule", "add", "--quiet", inner, "deep")
    commit(middle)
    origin = new(base / "origin")
    git(origin, *allow, "submodule", "add", "--quiet", middle, "lib/middle")
    git(origin, *allow, "submodule", "add", "--quiet", other, "other")
    commit(origin)
    git(base, *allow, "clone", "--quiet", origin, "repo")
    git(
        base / "repo",
        *allow,
        "submodule",
        "update",
        "--quiet",
        "--init",
        "--recursive",
        "lib/middle",
    )
    write(base / "repo/lib/middle", "README", "changed in the submodule\n")
    return base / "repo"
