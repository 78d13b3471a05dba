"""Small graphs: exactly as wide as asked for, and true to the values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli.graph import ASCII_BLOCKS, BLOCKS, columns, sparkline

VALUES = st.lists(st.none() | st.floats(-10, 1000))


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 3, "   "),
        ([0], 3, "  ▁"),
        ([0, 50, 100], 3, "▁▅█"),
        ([0, 50, 100], 2, "▅█"),
        ([100, None, 0], 4, " █ ▁"),
        ([12.4, 12.5, 99.9], 3, "▁▂█"),
        ([-5, 1e300], 2, "▁█"),
        ([1, 2], 0, ""),
    ],
)
def test_values_are_blocks_from_nothing_to_all(
    values: list[float | None], width: int, drawn: str
) -> None:
    assert sparkline(values, top=100, width=width) == drawn


def test_without_a_top_all_that_is_known_is_nothing() -> None:
    assert sparkline([1, None], top=0, width=2) == "▁ "


def test_terminals_without_blocks_get_ascii() -> None:
    assert sparkline([0, 100], top=100, width=2, blocks=ASCII_BLOCKS) == "_#"
    assert len(ASCII_BLOCKS) == len(BLOCKS)
    assert ASCII_BLOCKS.isascii()


@given(VALUES, st.floats(0, 1000), st.integers(0, 50))
def test_a_graph_is_as_wide_as_asked_for(
    values: list[float | None], top: float, width: int
) -> None:
    drawn = sparkline(values, top=top, width=width)
    assert len(drawn) == width
    assert set(drawn) <= set(BLOCKS + " ")


def test_a_step_has_the_mean_of_what_was_seen_in_it() -> None:
    points = [(0.5, 10.0), (1.2, 20.0), (1.6, 40.0), (2.9, 50.0)]
    assert columns(points, end_s=2.9, step_s=1, count=3) == [10.0, 30.0, 50.0]


def test_a_point_tells_of_the_time_since_the_one_before() -> None:
    points = [(0.0, 10.0), (10.0, 20.0), (11.0, 30.0)]
    shown = columns(points, end_s=11, step_s=2, count=7)
    assert shown == [None, 10.0, 20.0, 20.0, 20.0, 20.0, 25.0]


def test_what_is_not_known_stays_so_and_reaches_back_as_far() -> None:
    points = [(0.0, 10.0), (4.0, None), (5.0, 30.0)]
    assert columns(points, end_s=5, step_s=1, count=6) == [10.0, None, None, None, None, 30.0]


def test_before_the_first_point_nothing_is_known() -> None:
    assert columns([(9.0, 1.0)], end_s=9, step_s=1, count=3) == [None, None, 1.0]
    assert columns([], end_s=9, step_s=1, count=2) == [None, None]


def test_points_left_of_the_graph_still_bound_what_is_shown() -> None:
    assert columns([(0.0, 1.0), (100.0, 7.0)], end_s=100, step_s=1, count=2) == [7.0, 7.0]


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.none() | st.floats(0, 100)), max_size=50),
    st.floats(0.5, 3600),
    st.integers(0, 50),
)
def test_a_column_is_within_what_was_seen(
    points: list[tuple[float, float | None]], step_s: float, count: int
) -> None:
    points.sort(key=lambda point: point[0])
    end_s = points[-1][0] if points else 0.0
    shown = columns(points, end_s=end_s, step_s=step_s, count=count)
    assert len(shown) == count
    known = [value for _, value in points if value is not None]
    for value in shown:
        assert value is None or min(known) - 1e-6 <= value <= max(known) + 1e-6
    if points and count and points[-1][1] is not None:
        assert shown[-1] is not None
