"""`docs/privileges.md` has each privileged operation, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from banger.base import reach
from banger.hostops import ops, wire

PAGE = Path(__file__).parents[2] / "docs" / "privileges.md"
_ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def _rows() -> dict[str, list[str]]:
    return {name: cells.split("|") for name, cells in _ROW.findall(PAGE.read_text())}


def test_every_operation_has_its_row_and_every_row_its_operation() -> None:
    assert set(_rows()) == wire.TAGS


@pytest.mark.parametrize("tag", sorted(wire.TAGS))
def test_a_row_says_what_is_taken_checked_changed_and_how_it_is_undone(tag: str) -> None:
    assert [bool(cell.strip()) for cell in _rows()[tag]] == [True] * 4


def test_every_operation_of_the_module_is_in_the_set() -> None:
    kinds = {
        kind
        for kind in vars(ops).values()
        if isinstance(kind, type)
        and issubclass(kind, ops.Operation)
        and kind not in (ops.Operation, ops.WithFiles)
    }
    assert kinds == set(get_args(ops.AnyOperation))
    assert all(issubclass(kind, msgspec.Struct) for kind in kinds)


def test_limits_are_those_of_the_code() -> None:
    text = PAGE.read_text()
    for number in (ops.GUESTS_MAX, reach.ALLOWED_MAX, ops.ALLOWED_TOTAL_MAX, ops.RESOLVED_MAX):
        assert str(number) in text
    assert ops.BRIDGE_MAC in text
