"""What a repository asks for, by the files of those who install tools."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from banger.base.errors import BadRequest
from banger.git.tooling import steps


def asked(root: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(step.file, tuple(step.argv)) for step in steps(root)]


def test_a_repository_that_asks_for_nothing(tmp_path: Path) -> None:
    (tmp_path / ".devcontainer.json").write_text('{"image": "x", "postCreateCommand": ""}')
    assert asked(tmp_path) == []


def test_tools_are_installed_before_the_container_is_set_up(tmp_path: Path) -> None:
    for name in (".tool-versions", ".mise.toml"):
        (tmp_path / name).touch()
    directory = tmp_path / ".devcontainer"
    directory.mkdir()
    (directory / "devcontainer.json").write_text(
        """// Comments are allowed
        {
            "image": "https://example.invalid/x", /* so is
            this */ "note": "// and \\" this stays",
            "postCreateCommand": {"a": "make // all", "b": ["npm", "ci"], "c": 3, "d": []},
        }"""
    )
    file = ".devcontainer/devcontainer.json"
    assert asked(tmp_path) == [
        (".mise.toml", ("mise", "install", "--yes")),
        (file, ("sh", "-c", "make // all")),
        (file, ("npm", "ci")),
    ]


def test_what_editors_write(tmp_path: Path) -> None:
    file = tmp_path / ".devcontainer.json"
    file.write_text('\ufeff{"features": {}, // "remoteUser": "root"\n}', encoding="utf-8")
    assert asked(tmp_path) == []
    file.write_text("")
    assert asked(tmp_path) == []
    file.write_text('{"a": [1, /* one */], "postCreateCommand": "make",\n// end\n}')
    assert asked(tmp_path) == [(".devcontainer.json", ("sh", "-c", "make"))]


@pytest.mark.parametrize("text", ['"' + '\\"' * 60_000, "/*" * 60_000, '"' + "a" * 60_000 + "\\"])
def test_what_is_never_closed_is_not_looked_for_for_ever(tmp_path: Path, text: str) -> None:
    (tmp_path / ".devcontainer.json").write_text(text)
    began = time.process_time()
    assert [step.title for step in steps(tmp_path, strict=False)] == [""]
    assert time.process_time() - began < 2  # it took a minute


def test_a_file_that_is_none_and_one_from_elsewhere(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "devcontainer.json").write_text('{"postCreateCommand": "make"}')
    (root / ".devcontainer").symlink_to(elsewhere)
    (root / ".tool-versions").symlink_to("/etc/passwd")
    assert asked(root) == []
    (root / ".devcontainer.json").write_text("{")
    with pytest.raises(BadRequest, match=r"\.devcontainer\.json cannot be read"):
        steps(root)
    assert [step.file for step in steps(root, strict=False)] == [".devcontainer.json"]
    for text in ("[]", '{"a":' + "[" * 50_000):
        (root / ".devcontainer.json").write_text(text)
        with pytest.raises(BadRequest, match="cannot be read"):
            steps(root)
