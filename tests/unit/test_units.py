"""Sizes and ages: what people write is read, what is read is written so that people can."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import BadRequest
from banger.base.units import SIZE_MAX_MIB, format_age, format_size, parse_size_mib


@given(st.integers(1, SIZE_MAX_MIB), st.sampled_from(["", "m", "M", "MiB", "mb", " M"]))
def test_a_number_of_mib_is_read_as_it_is(size_mib: int, unit: str) -> None:
    assert parse_size_mib(f" {size_mib}{unit} ") == size_mib


@pytest.mark.parametrize(
    ("text", "size_mib"),
    [
        ("8G", 8192),
        ("1g", 1024),
        ("1 TiB", 1 << 20),
        ("16T", 16 << 20),
        ("1024K", 1),
        ("2048kib", 2),
    ],
)
def test_units_are_powers_of_1024(text: str, size_mib: int) -> None:
    assert parse_size_mib(text) == size_mib


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "0",
            "0G",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1e3",
            "1023K",
            "17T",
            "1x",
            "1GG",
            "1G1",
            "1\n2",
        ),
        *("512B", "5ib", "٣G", "9" * 19, "9" * 5000, "1_000"),
    ],
)
def test_what_is_not_a_size_is_a_bad_request(text: str) -> None:
    with pytest.raises(BadRequest, match="is not a "):
        parse_size_mib(text)


@given(st.text())
def test_any_text_is_a_size_or_a_bad_request(text: str) -> None:
    try:
        size_mib = parse_size_mib(text)
    except BadRequest:
        return
    assert 1 <= size_mib <= SIZE_MAX_MIB
    assert re.search("[0-9]", text)


@given(st.integers(0, 1000 << 40))
def test_a_size_is_shown_within_one_percent_and_in_its_unit(size_bytes: int) -> None:
    text = format_size(size_bytes)
    number, unit = text.split(" ")
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * factor - size_bytes) <= 0.01 * size_bytes
    assert len(number) <= 4
    assert unit == "B" or float(number) >= 1


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536 << 20, "1.5 GiB"),
        (512 << 20, "512 MiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_sizes_are_short(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (7200, "2h"), (200000, "2d")],
)
def test_ages_have_one_unit_the_largest_that_fits(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
