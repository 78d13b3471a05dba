"""What a user calls a thing by: its id, its name, or an unambiguous beginning of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from banger.base.errors import Ambiguous, BadRequest, NotFound


class Identified(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=Identified)


def find(
    records: Sequence[R],
    reference: str,
    *,
    noun: str,
    plural: str,
    name: Callable[[R], str] | None = None,
) -> R:
    """The record that is meant: an exact id wins over an exact name, and that over beginnings.

    `name` is None for what has only an id. Raises BadRequest for an empty reference, NotFound, or
    Ambiguous with the candidates.
    """
    if not reference:
        raise BadRequest(f"{noun} id{' or name' if name else ''} is required")
    name_of = name or _id
    for of in (_id, name_of):
        for each in records:
            if reference == of(each):
                return each
    matches = [
        each
        for each in records
        if each.id.startswith(reference) or name_of(each).startswith(reference)
    ]
    if len(matches) > 1:
        names = ", ".join(
            name_of(each) if name_of(each).startswith(reference) else f"{name_of(each)} ({each.id})"
            for each in matches
        )
        raise Ambiguous(f'multiple {plural} match "{reference}"', hint=f"they are: {names}")
    if not matches:
        raise NotFound(f'{noun} "{reference}" not found', hint=f"see: banger {noun} list")
    return matches[0]


def _id(record: Identified) -> str:
    return record.id
