"""A repository into a machine and its changes out, beside a plain clone and tar over the same
channel.

The repository has some thousand files of source, which are compressible as source is, and changes
in the working tree. Its floor into the guest is ``git clone --depth 1`` and `banger vm cp`, which
brings the clone without the changes; its floor out of it is all of the tree by ``tar``, of which an
export sends what changed.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

from bench.home import BANGER, Home
from bench.measure import Figure, compare, timed

_ROUNDS = 5
_FILES = 4000
_LINES = 300
_CHANGED = 100
_VM = "workspaces"


def measure(home: Home) -> list[Figure]:
    home.image()
    root = home.directory / "repository"
    _make(root)
    home.banger("vm", "create", "-q", "--image", home.image()[0].name, "--name", _VM)
    prepare = ("vm", "workspace", "prepare", "-q", "--replace", _VM, str(root))
    home.banger(*prepare)
    change = f"cd /root/repo && for i in $(seq {_CHANGED}); do echo changed >>src/$i.c; done"
    try:
        into = compare(
            "repository into a machine",
            lambda: timed(lambda: home.banger(*prepare)),
            floor_name="git clone --depth 1, vm cp",
            floor=lambda: _clone_and_copy(home, root),
            rounds=_ROUNDS,
        )
        home.banger("vm", "exec", _VM, "--", "sh", "-c", change)
        out = compare(
            "its changes out of it",
            lambda: timed(lambda: home.banger("vm", "workspace", "export", _VM)),
            floor_name="vm exec, tar of all",
            floor=lambda: timed(_tar_out),
            rounds=_ROUNDS,
        )
    finally:
        home.banger("vm", "delete", "--force", _VM)
    return [into, out]


def _make(root: Path) -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 9))) for _ in range(2000)]
    (root / "src").mkdir(parents=True)
    for number in range(_FILES):
        lines = (" ".join(chance.choices(words, k=8)) for _ in range(_LINES))
        (root / f"src/{number}.c").write_text("\n".join(lines) + "\n")
    git = ("git", "-C", str(root), "-c", "user.name=b", "-c", "user.email=b@example.invalid")
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "all"), ("gc", "-q")):
        subprocess.run([*git, *arguments], check=True)
    for number in range(_CHANGED):
        (root / f"src/{number}.c").write_text("changed\n")


def _clone_and_copy(home: Home, root: Path) -> float:
    clone = home.directory / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    home.banger("vm", "exec", _VM, "--", "rm", "-rf", "/root/clone")

    def work() -> None:
        clone_it = ("git", "clone", "-q", "--depth", "1", root.as_uri(), str(clone))
        subprocess.run(clone_it, check=True)
        home.banger("vm", "cp", str(clone), f"{_VM}:/root/")

    return timed(work)


def _tar_out() -> None:
    argv = (str(BANGER), "vm", "exec", _VM, "-w", "/root/repo", "--", "tar", "--create", ".")
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
