"""What Firecracker counts, in a file into which who has taken it over writes what he likes."""

from __future__ import annotations

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
