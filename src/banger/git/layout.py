"""The files of a repository that we make ourselves, which takes git several processes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from banger.git.source import regular_file

Setting = tuple[str, str]

#: A value that needs no quotes.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+*-]+")


def make_git_dir(git_dir: Path, settings: Iterable[Setting], object_format: str) -> None:
    """An empty repository at `git_dir`, which is made, with this configuration; HEAD is missing."""
    for name in ("objects/pack", "objects/info", "refs/heads", "refs/tags", "info"):
        (git_dir / name).mkdir(parents=True)
    version = 0 if object_format == "sha1" else 1
    core = [("core.repositoryformatversion", str(version)), ("core.bare", "false")]
    if version:
        core.append(("extensions.objectformat", object_format))
    (git_dir / "config").write_bytes(os.fsencode(config_text([*core, *settings])))


def config_text(settings: Iterable[Setting]) -> str:
    """A configuration file of keys and values; an empty value sets nothing."""
    sections: dict[str, list[str]] = {}
    for key, value in settings:
        if not value:
            continue
        section, _, name = key.rpartition(".")
        section, dot, subsection = section.partition(".")
        heading = f"[{section} {_quoted(subsection)}]" if dot else f"[{section}]"
        written = value if _PLAIN.fullmatch(value) else _quoted(value)
        sections.setdefault(heading, [heading]).append(f"\t{name} = {written}")
    return "".join(f"{line}\n" for lines in sections.values() for line in lines)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def copy_if_regular(source: Path, target: Path) -> None:
    """Copy a file that is there and is no link: nothing outside a repository is read.

    With its time: files that changed after an index was written are compared by content.
    """
    if regular_file(source):
        shutil.copy2(source, target)
