"""What a repository says of the tools that it wants, in the files of those who install them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from banger.base.errors import BadRequest
from banger.base.malformed import MALFORMED
from banger.git.source import regular_file

_LIMIT_BYTES = 64 << 10
_DEVCONTAINERS = (".devcontainer/devcontainer.json", ".devcontainer.json")
#: Of JSON with comments: a string, which stays, and a comment; then a comma before the end of a
#: list. What is not closed matches to the end, or looking for its end again and again takes hours.
_STRING = r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_COMMA = re.compile(_STRING + r"|,(?=\s*[\]}])", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One command that prepares a working tree, and the file that asks for it."""

    file: str
    title: str
    argv: Sequence[str]


def steps(root: Path, *, strict: bool = True) -> list[Step]:
    """What the files at `root` ask for, in the order in which it is done.

    Raises BadRequest for a devcontainer's file that cannot be read; unless `strict` that is a step
    without a command.
    """
    found = []
    for name in (".mise.toml", "mise.toml", ".tool-versions"):
        if regular_file(root / name):
            found.append(Step(name, "mise install", ("mise", "install", "--yes")))
            break
    for name in _DEVCONTAINERS:
        if regular_file(root / name) and (root / name).resolve().is_relative_to(root.resolve()):
            try:
                found += _post_create(root / name, name)
            except BadRequest:
                if strict:
                    raise
                found.append(Step(name, "", ()))
            break
    return found


def _post_create(path: Path, name: str) -> Iterator[Step]:
    """The ``postCreateCommand`` of a devcontainer.json: a line for a shell, a list of arguments, or
    several of either by name (https://containers.dev/implementors/json_reference)."""
    with path.open("rb") as file:
        text = file.read(_LIMIT_BYTES).decode("utf-8-sig", errors="replace")
    plain = _COMMA.sub(_kept, _COMMENT.sub(_kept, text))
    try:
        told = msgspec.json.decode(plain or "{}", type=dict[str, Any])
    except MALFORMED as error:
        raise BadRequest(f"{name} cannot be read: {error}") from error
    wanted = told.get("postCreateCommand")
    for command in wanted.values() if isinstance(wanted, dict) else [wanted]:
        if isinstance(command, str) and command.strip():
            yield Step(name, command, ("sh", "-c", command))
        elif isinstance(command, list) and command and all(isinstance(w, str) for w in command):
            yield Step(name, " ".join(command), tuple(command))


def _kept(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith('"') else " "
