"""Small graphs in a line of text: values over time, the newest on the right."""

from __future__ import annotations

from collections.abc import Sequence

#: From nothing to all, in eighths; what is known is never blank.
BLOCKS = "▁▂▃▄▅▆▇█"
#: For terminals that have ASCII only.
ASCII_BLOCKS = "_.-:=+*#"


def sparkline(
    values: Sequence[float | None], *, top: float, width: int, blocks: str = BLOCKS
) -> str:
    """The last `width` values as blocks from 0 to `top`, in exactly `width` characters.

    None is a blank. What is beyond either end is drawn as that end.
    """
    shown = [_block(value, top, blocks) for value in values[-width:]] if width > 0 else []
    return "".join(shown).rjust(width)


def _block(value: float | None, top: float, blocks: str) -> str:
    if value is None:
        return " "
    share = min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
    return blocks[min(int(share * len(blocks)), len(blocks) - 1)]


def columns(
    points: Sequence[tuple[float, float | None]], *, end_s: float, step_s: float, count: int
) -> list[float | None]:
    """Values at uneven moments as one for each of `count` steps of time, the last up to `end_s`.

    Points are (seconds, value), the oldest first. What a point tells is of the time since the one
    before: a step has the mean of the points in it, or else what the next one tells. Before the
    first point nothing is known.
    """
    steps: list[list[float | None]] = [[] for _ in range(count)]
    first = count
    following: float | None = None
    for moment, value in points:
        at = count - 1 - int(max(end_s - moment, 0) // step_s)
        first = min(first, max(at, 0))
        if at >= 0:
            steps[at].append(value)
    shown: list[float | None] = [None] * count
    for at in range(count - 1, first - 1, -1):
        if steps[at]:
            known = [value for value in steps[at] if value is not None]
            shown[at] = sum(known) / len(known) if known else None
            following = steps[at][0]
        else:
            shown[at] = following
    return shown
