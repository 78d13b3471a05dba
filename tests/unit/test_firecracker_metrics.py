"""What Firecracker counts, in a file into which who has taken it over writes what he likes."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from banger.drivers.base import Traffic
from banger.drivers.hypervisor.firecracker_metrics import Meter


def line(count: int) -> bytes:
    """What a Firecracker adds that has counted so much of each since the line before."""
    counted = {
        "block": {"read_bytes": count, "write_bytes": count},
        "net": {"rx_bytes_count": count, "tx_bytes_count": count},
    }
    return msgspec.json.encode(counted) + b"\n"


def counted(count: int) -> Traffic:
    return Traffic(count, count, count, count)


NONSENSE = {
    "no JSON": b"{",
    "another shape": b"[]",
    "a count below zero": line(1).replace(b"1", b"-1"),
    "no UTF-8": b'{"block":"\xff\xfe"}',
    "deeper than anybody goes": b'{"another":' + b"[" * 100_000,
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_a_line_that_is_none_counts_nothing_and_is_moved_past(
    tmp_path: Path, nonsense: bytes
) -> None:
    file = tmp_path / "metrics"
    file.write_bytes(line(1) + nonsense + b"\n" + line(2))
    meter = Meter(file)
    assert meter.read() == counted(3)
    with file.open("ab") as more:
        more.write(line(4))
    assert meter.read() == counted(7)


def test_what_nobody_asks_for_takes_no_more_room_and_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    meter = Meter(file)
    each = line(1).rstrip() + b" " * 6000 + b"\n"
    most = lines = 0
    for _ in range(40):
        with file.open("ab") as more:
            more.write(each * 10)
        lines += 10
        meter.drain()
        most = max(most, file.stat().st_blocks * 512)
    assert file.stat().st_size > 2 * most, "it grows, and takes no more for that"
    assert meter.read() == counted(lines)


def test_what_is_little_is_left_for_who_asks(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    file.write_bytes(line(1) * 10)
    Meter(file).drain()
    assert file.read_bytes() == line(1) * 10


def test_two_looks_at_once_count_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics"
    file.write_bytes(line(1))
    meter = Meter(file)
    both = threading.Barrier(2, timeout=0.3)
    pread = os.pread

    def together(*given: int) -> bytes:
        data = pread(*given)
        with suppress(threading.BrokenBarrierError):  # as one look waits for the other
            both.wait()
        return data

    monkeypatch.setattr(os, "pread", together)
    with ThreadPoolExecutor(2) as looks:
        list(looks.map(lambda _: meter.read(), range(2)))
    assert meter.read() == counted(1)
