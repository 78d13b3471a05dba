"""Repositories into real guests, and what was made of them out again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import repositories as repos
from homes import Home
from product import IMAGE, Banger, finish, read_until, until
from repositories import git, write
from test_git_host import NEW, edit

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

#: It has git.
_DEFAULT = "debian-bookworm"
_REPO = "/root/repo"


@pytest.fixture(scope="module")
def box(banger: Banger, default_image: str) -> Iterator[str]:
    """A VM with git, in which each test puts its own repository."""
    done = banger.run("vm", "run", "-d", "--name", "with-git", timeout_s=800)
    assert done.returncode == 0, done.stderr
    yield "with-git"
    banger.ok("vm", "delete", "--force", "with-git")


def prepare(banger: Banger, vm: str, root: Path, *options: str) -> None:
    banger.ok("vm", "workspace", "prepare", "-q", "--replace", vm, root, *options)


def copied_out(banger: Banger, vm: str, to: Path) -> Path:
    """The guest's copy, on the host."""
    to.mkdir(exist_ok=True)
    banger.ok("vm", "cp", f"{vm}:{_REPO}", to / "copy")
    return to / "copy"


@pytest.mark.parametrize("kind", repos.KINDS, ids=lambda kind: kind.__name__)
def test_a_round_trip(
    banger: Banger, box: str, kind: Callable[[Path], Path], tmp_path: Path
) -> None:
    root = kind(tmp_path / "host")
    write(root, "untracked-here", "stays\n")
    prepare(banger, box, root)
    status = ("status", "--porcelain=v2", "--untracked-files=no")
    in_guest = banger.ok("vm", "exec", box, "-w", _REPO, "--", "git", *status)
    assert in_guest.encode() == git(root, *status)
    tracked = set(git(root, "ls-files", "-z").split(b"\0"))
    there = {name: what for name, what in repos.tree(root).items() if name in tracked}
    assert repos.tree(copied_out(banger, box, tmp_path)) == there
    banger.guest(box, f"cd {_REPO} && git fsck --strict && echo guest >>README && echo new >'n w'")
    before = repos.tree(root)
    banger.ok("vm", "workspace", "export", "-q", box, "--apply", "--to", root)
    readme = before[b"README"][1] + b"guest\n"
    assert repos.tree(root) == before | {b"README": ("f", readme), b"n w": ("f", b"new\n")}


def test_an_export_changes_nothing_in_the_guest(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.changed(tmp_path / "host")
    prepare(banger, box, root)
    banger.guest(
        box,
        f"cd {_REPO} && git config user.name g && git config user.email g@example.invalid"
        " && echo 1 >>README && git commit -qam guest && echo 2 >>README && git add README"
        " && echo 3 >new && echo 4 >ignored && rm binary",
    )
    state = (
        # Git sets the time of objects that it would have written: nothing else.
        f"cd {_REPO} && find . -path ./.git/objects -prune -o -print0 | sort -z"
        " | xargs -0 stat -c '%n %s %f %y' | sha256sum"
        " && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum && ls /tmp"
    )
    before = banger.guest(box, state)
    patch = banger.run("vm", "workspace", "export", box).stdout
    names = banger.ok("vm", "workspace", "export", box, "--name-only").split()
    banger.ok("vm", "workspace", "export", box, "--bundle", "-o", tmp_path / "bundle")
    since_head = banger.json("vm", "workspace", "export", box, "--since-head", "--stat")
    assert banger.guest(box, state) == before
    assert names == ["README", "binary", "new"]
    assert b"GIT binary patch" in patch
    prepare(banger, box, root)
    bundle = ("vm", "workspace", "export", box, "--bundle")
    assert "no commits were made in the guest" in banger.fails(*bundle, status=1)
    # The guest's commit has the changes that the host's working tree came with, too.
    assert [each["path"] for each in since_head] == ["README", "binary", "new"]
    git(root, "fetch", "--quiet", tmp_path / "bundle", "refs/heads/main:from-guest")
    assert git(root, "log", "-1", "--format=%s", "from-guest") == b"guest\n"


def test_whatever_a_guest_does_comes_back(banger: Banger, box: str, tmp_path: Path) -> None:
    for seed in range(6):
        base = tmp_path / f"round{seed}"
        chance = random.Random(seed)
        root = (repos.changed if seed % 2 else repos.plain)(base / "host")
        write(root, "mine/untracked", "stays\n")
        prepare(banger, box, root)
        copy = copied_out(banger, box, base)
        mine = {
            name: what for name, what in repos.tree(root).items() if name not in repos.tree(copy)
        }
        for _ in range(12):
            edit(copy, chance)
        banger.guest(box, f"rm -rf {_REPO}")
        banger.ok("vm", "cp", copy, f"{box}:{_REPO}")
        banger.ok("vm", "workspace", "export", "-q", box, "--apply")
        ignored = git(copy, "ls-files", "-z", "--others", "--ignored", "--exclude-standard")
        expected = {
            name: what
            for name, what in repos.tree(copy).items()
            if name not in ignored.split(b"\0")
        }
        assert repos.tree(root) == mine | expected, seed


def test_one_command_on_a_repository(banger: Banger, box: str, tmp_path: Path) -> None:
    """(`box`: the image is there.)"""
    root = repos.changed(tmp_path / "host")
    patch = tmp_path / "out.diff"
    script = "pwd; git branch --show-current; echo guest >>main.c; exit 7"
    done = banger.run(
        *("vm", "run", "-q", "--rm", "--name", "once", root / "src", "--export", patch),
        *("--branch", "topic", "--", "sh", "-c", script),
    )
    assert (done.returncode, done.stdout) == (7, b"/root/repo/src\ntopic\n"), done.stderr
    assert banger.state("once") == ""
    git(root, "apply", patch)
    assert (root / "src/main.c").read_text().endswith("guest\n")


def test_the_patch_is_saved_when_the_command_is_abandoned(
    banger: Banger, box: str, tmp_path: Path
) -> None:
    root = repos.plain(tmp_path / "host")
    patch = tmp_path / "out.diff"
    script = "echo guest >>README; echo changed; trap '' INT; exec sleep 1000"
    running = banger.start(
        *("vm", "run", "-q", "--rm", "--name", "left", root, "--export", patch),
        *("--", "sh", "-c", script),
    )
    assert running.stdout is not None
    read_until(running.stdout, b"changed")
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    assert finish(running)[0] == 130
    until(lambda: banger.state("left") == "", "it is deleted")
    git(root, "apply", "--check", patch)


def test_a_vm_is_kept_when_its_patch_cannot_be_saved(
    banger: Banger, box: str, tmp_path: Path
) -> None:
    root = repos.plain(tmp_path / "host")
    where = ("vm", "run", root, "--export", tmp_path / "to/patch", "--", "true")
    assert "is not a directory" in banger.fails(*where, status=125)
    (tmp_path / "to").mkdir()
    told = banger.fails(
        *("vm", "run", "-q", "--rm", "--name", "kept", root, "--export", tmp_path / "to/patch"),
        *("--", "sh", "-c", "echo guest >>README; mv /usr/bin/git /usr/bin/tig"),
        status=125,
    )
    assert "the changes were not saved to" in told
    assert "the VM is kept" in told
    banger.guest("kept", "mv /usr/bin/tig /usr/bin/git")
    assert "+guest" in banger.ok("vm", "workspace", "export", "kept")
    banger.ok("vm", "delete", "--force", "kept")


def test_a_vm_is_kept_with_what_a_patch_cannot_have(
    banger: Banger, box: str, tmp_path: Path
) -> None:
    root = repos.plain(tmp_path / "host")
    nested = "git init -q within && cd within && git -c user.name=g -c user.email=g@example.invalid"
    told = banger.fails(
        *("vm", "run", "-q", "--rm", "--name", "kept", str(root)),
        *("--export", str(tmp_path / "patch"), "--"),
        *("sh", "-c", f"echo guest >>README; {nested} commit -q --allow-empty -m one"),
        status=125,
    )
    assert "not all changes were saved" in told
    assert "left out, as repositories of their own:\nwithin" in told
    assert "+guest" in (tmp_path / "patch").read_text()
    assert banger.state("kept") == "running"
    done = banger.run("vm", "workspace", "export", "-q", "kept", "--apply")
    assert done.returncode == 0, done.stderr
    assert (root / "README").read_text() == "read me\nguest\n"
    banger.ok("vm", "delete", "--force", "kept")


def test_submodules_go_with_a_full_copy(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.with_submodules(tmp_path)
    told = banger.fails("vm", "workspace", "prepare", "--replace", box, root, status=1)
    assert "does not support git submodules" in told
    prepare(banger, box, root, "--mode", "full_copy")
    assert repos.tree(copied_out(banger, box, tmp_path)) == repos.tree(root)
    inner = banger.guest(box, f"cd {_REPO}/lib/middle/deep && git log --format=%H")
    assert inner.encode() == git(root / "lib/middle/deep", "log", "--format=%H")
    assert banger.ok("vm", "workspace", "export", box) == ""
    banger.guest(
        box,
        f"cd {_REPO}/lib/middle && echo deep >>deep/README && echo new >new"
        " && git config user.name g && git config user.email g@example.invalid"
        " && git commit -qam inner && echo o >>../../run.sh",
    )
    before = repos.tree(root)
    told = banger.fails("vm", "workspace", "export", box, "--apply", status=1)
    assert "the patch changes files of submodules: lib/middle/new, lib/middle/deep/README" in told
    assert repos.tree(root) == before
    patch = tmp_path / "patch"
    banger.ok("vm", "workspace", "export", box, "-o", patch)
    git(root, "apply", patch)
    assert repos.tree(root) == repos.tree(copied_out(banger, box, tmp_path / "after"))


def test_modes_branches_and_permissions(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.changed(tmp_path / "host")
    prepare(banger, box, root, "--mode", "metadata_only", "--branch", "t", "--from", "HEAD^")
    told = banger.guest(
        box, f"cd {_REPO} && git status -sb --porcelain && git rev-parse HEAD && ls"
    )
    assert told.encode() == b"## t\n" + git(root, "rev-parse", "HEAD^") + b"README\n"
    clash = (
        "vm",
        "workspace",
        "prepare",
        "--replace",
        box,
        root,
        "--branch",
        "t",
        "--from",
        "HEAD^",
    )
    assert "has changes that are not of HEAD^" in banger.fails(*clash, status=1)
    plain = repos.plain(tmp_path / "plain")
    prepare(banger, box, plain, "--branch", "t", "--from", "HEAD^")
    identity = "git config user.name g && git config user.email g@example.invalid"
    banger.guest(box, f"cd {_REPO} && {identity} && echo g >g && git add g && git commit -qm guest")
    banger.ok("vm", "workspace", "export", box, "--bundle", "-o", tmp_path / "bundle")
    git(plain, "fetch", "--quiet", tmp_path / "bundle", "refs/heads/t:t")
    assert git(plain, "log", "-1", "--format=%s", "t") == b"guest\n"
    prepare(banger, box, root, "--read-only")
    mode = banger.guest(box, f"stat -c %A {_REPO} {_REPO}/README {_REPO}/src")
    assert mode == "dr-xr-xr-x\n-r--r--r--\ndr-xr-xr-x\n"


def test_what_is_said_of_a_workspace(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.changed(tmp_path / "host")
    prepare(banger, box, root)
    workspace = banger.json("vm", "show", box)["workspace"]
    assert workspace["repo_root"] == workspace["source_path"] == str(root)
    assert (workspace["guest_path"], workspace["mode"]) == (_REPO, "shallow_overlay")
    assert workspace["head_commit"] == repos.head(root) != workspace["base_commit"]
    assert (workspace["current_branch"], workspace["branch_name"]) == ("main", "main")
    fork = banger.ok("vm", "fork", "-q", box).strip()
    banger.guest(fork, f"echo fork >>{_REPO}/README")
    assert banger.ok("vm", "workspace", "export", fork, "--name-only") == "README\n"
    assert banger.ok("vm", "workspace", "export", box, "--name-only") == ""
    banger.ok("vm", "delete", "--force", fork)


def test_a_dry_run_lists_what_would_go(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.changed(tmp_path / "host")
    listed = banger.ok("vm", "run", root, "--include-untracked", "--dry-run").splitlines()
    assert {"README", "untracked", "staged", "new-name"} <= set(listed)
    assert not {"gone", "ignored", "old-name"} & set(listed)
    plan = banger.json("vm", "workspace", "prepare", box, root, "--dry-run")
    assert plan["size_bytes"] > 10_000
    assert "untracked" not in [file["path"] for file in plan["files"]]


def test_what_is_in_the_way_stays(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.plain(tmp_path / "host")
    banger.guest(box, "mkdir -p /srv/taken /srv/empty; echo mine >/srv/taken/file")
    put = ("vm", "workspace", "prepare", box, root, "--guest-path")
    assert "something is there already" in banger.fails(*put, "/srv/taken", status=1)
    assert banger.guest(box, "ls -A /srv/taken") == "file\n"
    assert banger.ok(*put, "/srv/empty") == "/srv/empty\n"
    for path in ("relative", "/", "/srv/../etc", "/a\nb", ""):
        if path:
            assert "cannot be the place" in banger.fails(*put, path, status=1)
    banger.guest(box, "rm -rf /srv/taken /srv/empty")


def _large(base: Path) -> Path:
    """A repository that takes seconds to go."""
    root = repos.plain(base)
    write(root, "large", random.Random(0).randbytes(200 << 20))
    repos.commit(root)
    return root


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _large(tmp_path_factory.mktemp("large"))


def _sending(banger: Banger, box: str, root: Path) -> subprocess.Popen[bytes]:
    """A transfer that is under way."""
    running = banger.start("vm", "workspace", "prepare", "--replace", box, root)
    assert running.stderr is not None
    read_until(running.stderr, b"send")
    return running


def test_a_transfer_that_is_cancelled_leaves_the_path_as_it_was(
    banger: Banger, box: str, large: Path, tmp_path: Path
) -> None:
    prepare(banger, box, repos.plain(tmp_path / "host"))
    running = _sending(banger, box, large)
    running.send_signal(signal.SIGINT)
    status, _, said = finish(running)
    assert status == 130, said
    assert "large" not in banger.guest(box, f"ls -A {_REPO}")
    assert ".repo" not in banger.guest(box, "ls -A /root")
    assert list((Path(os.environ["HOME"]) / "state/banger/scratch").iterdir()) == []


def test_a_large_file_comes_and_goes(banger: Banger, box: str, large: Path, tmp_path: Path) -> None:
    prepare(banger, box, large)
    banger.guest(box, f"cd {_REPO} && sha256sum large >sum && cp large other")
    banger.ok("vm", "workspace", "export", "-q", box, "--apply")
    assert (large / "other").read_bytes() == (large / "large").read_bytes()
    (large / "other").unlink()
    (large / "sum").unlink()


def test_a_transfer_keeps_nobody_waiting_but_other_transfers(
    banger: Banger, box: str, large: Path, tmp_path: Path
) -> None:
    first = _sending(banger, box, large)
    second = banger.start(
        *("vm", "workspace", "prepare", "--replace", box, str(repos.plain(tmp_path / "host")))
    )
    began = time.monotonic()
    banger.ok("vm", "touch", box)
    banger.ok("vm", "set", box, "--name", "with-git")
    assert time.monotonic() - began < 6
    exported = banger.ok("vm", "workspace", "export", box, "--name-only")
    assert (finish(first)[0], finish(second)[0]) == (0, 0)
    assert exported == ""  # of a repository that was on its way
    assert "large" not in banger.guest(box, f"ls {_REPO}")


def test_many_files_come_and_go(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.plain(tmp_path / "host")
    for number in range(20_000):
        write(root, f"d{number % 200}/{number}", f"{number}\n")
    repos.commit(root)
    prepare(banger, box, root)
    count = banger.guest(box, f"cd {_REPO} && git status --porcelain && find d* -type f | wc -l")
    assert count == "20000\n"
    banger.guest(box, f"cd {_REPO} && rm -r d7 && echo changed >d8/8")
    banger.ok("vm", "workspace", "export", "-q", box, "--apply")
    status = git(root, "status", "--porcelain").splitlines()
    assert sorted({line[:2] for line in status}) == [b" D", b" M"]
    assert len(status) == 101


def test_a_daemon_that_dies_leaves_nothing_of_a_transfer(
    home: Home, large: Path, tmp_path: Path
) -> None:
    banger = home.banger
    banger.ok("vm", "run", "-q", "-d", "--image", IMAGE, "--name", "box")
    prepare(banger, "box", repos.plain(tmp_path / "host"))
    running = _sending(banger, "box", large)
    home.kill_daemon(signal.SIGKILL)
    finish(running)
    assert "large" not in banger.guest("box", f"ls -A {_REPO}")
    assert list((home.state / "scratch").glob("*")) == []
    prepare(banger, "box", large)
    assert "large" in banger.guest("box", f"ls -A {_REPO}")
    assert banger.guest("box", "ls -d /root/.repo* 2>/dev/null || true") == ""


def test_a_vm_that_is_stopped_ends_its_transfer(banger: Banger, large: Path) -> None:
    banger.ok("vm", "create", "-q", "--image", _DEFAULT, "--name", "ending")
    running = _sending(banger, "ending", large)
    banger.ok("vm", "stop", "-q", "ending")
    status, _, said = finish(running)
    assert status == 1, said
    assert b"error:" in said
    told = banger.fails("vm", "workspace", "prepare", "ending", large, status=1)
    assert "is stopped" in told
    banger.ok("vm", "delete", "ending")


def test_a_guest_without_git_is_given_a_repository_all_the_same(
    banger: Banger, vm: str, tmp_path: Path
) -> None:
    root = repos.changed(tmp_path / "host")
    assert "was given no repository" in banger.fails("vm", "workspace", "export", vm, status=1)
    banger.ok("vm", "workspace", "prepare", "-q", vm, root)
    assert banger.guest(vm, f"cat {_REPO}/README") == "changed\n"
    assert "the guest has no git" in banger.fails(
        "vm", "workspace", "export", vm, "--stat", status=1
    )
    banger.guest(vm, f"rm -r {_REPO}")


def test_a_guest_that_lies_changes_nothing(banger: Banger, box: str, tmp_path: Path) -> None:
    """Its git is not git: it says whatever it likes."""
    root = repos.plain(tmp_path / "host")
    prepare(banger, box, root)
    before = repos.tree(root)
    banger.guest(
        box,
        "cat >/usr/local/bin/git && chmod +x /usr/local/bin/git",
        stdin=b"""#!/bin/sh
case "$1 $2 $3" in "diff-tree -r -p") . /tmp/evil ;; *) exec /usr/bin/git "$@" ;; esac
""",
    )

    def told(script: str) -> str:
        banger.guest(box, "cat >/tmp/evil", stdin=script.encode())
        return banger.fails("vm", "workspace", "export", "-q", box, "--apply", status=1)

    try:
        outside = NEW.format("../evil", "100644").replace("\n", "\\n")
        assert "which is not in the working tree" in told(f"printf '{outside}'")
        assert "is longer than 1 GiB: refused" in told("exec yes endless")
        assert "\x1b" not in told("printf '\\033]0;evil\\007'")
        assert "the guest failed (status 3" in told("echo '\033]0;evil\007' >&2; exit 3")
    finally:
        banger.guest(box, "rm -f /usr/local/bin/git /tmp/evil")
    assert repos.tree(root) == before
    assert not (tmp_path / "host/evil").exists()


def test_a_repository_with_a_name_that_is_no_text(banger: Banger, box: str, tmp_path: Path) -> None:
    root = repos.plain(tmp_path / os.fsdecode(b"n\xff\n me"))
    banger.ok("vm", "workspace", "prepare", "-q", "--replace", box, root)
    assert "\\xff" in banger.json("vm", "show", box)["workspace"]["repo_root"]


def test_a_repository_gets_its_tools_when_somebody_says_so(
    banger: Banger, box: str, tmp_path: Path
) -> None:
    root = repos.plain(tmp_path / "host")
    write(
        root, ".devcontainer/devcontainer.json", '{"postCreateCommand": "pwd; echo $0 >made"} // x'
    )
    repos.commit(root)
    put = ("vm", "workspace", "prepare", "--replace", box, root)
    told = banger.run(*put).stderr.decode()
    assert "has .devcontainer/devcontainer.json: --bootstrap installs" in told
    assert "made" not in banger.guest(box, f"ls {_REPO}")
    banger.ok(*put, "--bootstrap")
    assert banger.guest(box, f"cat {_REPO}/made") == "sh\n"
    log = banger.guest(box, "cat /var/log/banger-bootstrap.log")
    assert log.splitlines()[1:] == [_REPO]
    assert banger.ok("vm", "workspace", "export", box, "--name-only") == "made\n"
    write(root, ".tool-versions", "python 3.12\n")
    repos.commit(root)
    told = banger.fails(*put, "--bootstrap", status=1)
    assert "the bootstrap of .tool-versions failed: mise install (status 127)" in told
    assert "not found" in told
    assert "its log is in the guest, while there is one: /var/log/banger-bootstrap.log" in told
    run = ("vm", "run", "-q", "--rm", "--name", "no-tools", root, "--bootstrap", "--", "true")
    assert "the bootstrap of .tool-versions failed" in banger.fails(*run, status=125)
    assert banger.state("no-tools") == ""


def test_usage(banger: Banger, tmp_path: Path) -> None:
    root = repos.plain(tmp_path / "host")
    for words in (
        ("vm", "run", root, "--from", "HEAD"),
        ("vm", "run", "--branch", "x", "--", "true"),
        ("vm", "run", "--export", "x", "--", "true"),
        ("vm", "run", root, "-d", "--export", "x", "--", "true"),
        ("vm", "workspace", "export", "x", "--stat", "--apply"),
        ("vm", "workspace", "export", "x", "--json"),
        ("vm", "workspace", "prepare", "x", tmp_path / "nowhere"),
    ):
        banger.fails(*words, status=2)
    told = banger.fails("vm", "run", "--image", IMAGE, tmp_path, "--", "true", status=125)
    assert "is not in a git repository" in told
    assert "is no commit of" in banger.fails(
        *("vm", "run", root, "--branch", "x", "--from", "nowhere", "--", "true"), status=125
    )
    assert "cannot be the name of a branch" in banger.fails(
        *("vm", "run", root, "--branch", "a..b", "--", "true"), status=125
    )
