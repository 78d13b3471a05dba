"""What a guest answers to STATS, decoded strictly: it may be anything.

The agent's side is ``agent/stats.c``. Every number has bounds that no machine passes, so that what
is computed from them cannot overflow, take long, or fill a screen.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from banger.base.errors import BadRequest
from banger.base.malformed import MALFORMED

#: More than a real answer (two mounts, a few hundred bytes) ever has.
ANSWER_LIMIT_BYTES = 16 << 10

_Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
#: Ticks and bytes: counters since boot.
_Counter = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Kib = Annotated[int, Meta(ge=0, lt=1 << 53)]
_Load = Annotated[float, Meta(ge=0, le=1e9)]


class Cpu(msgspec.Struct, frozen=True):
    """Since boot, over all vCPUs; idle and waiting for disks is not busy."""

    busy_ticks: _Counter
    total_ticks: _Counter
    count: Annotated[int, Meta(ge=1, le=4096)]


class Memory(msgspec.Struct, frozen=True):
    total_kib: _Kib
    available_kib: _Kib


class Disk(msgspec.Struct, frozen=True):
    mount: Annotated[str, Meta(min_length=1, max_length=64)]
    total_kib: _Kib
    free_kib: _Kib


class Network(msgspec.Struct, frozen=True):
    """Since boot, without the loopback."""

    rx_bytes: _Counter
    tx_bytes: _Counter


class GuestStats(msgspec.Struct, frozen=True):
    """The whole answer. Fields that are not named here are ignored."""

    uptime_s: Annotated[float, Meta(ge=0, le=1e12)]
    cpu: Cpu
    memory: Memory
    disks: Annotated[tuple[Disk, ...], Meta(max_length=16)]
    network: Network
    processes: _Count
    load: tuple[_Load, _Load, _Load]

    @classmethod
    def decode(cls, answer: bytes) -> GuestStats:
        """Raises BadRequest when a guest's answer has not this shape."""
        try:
            return _decode(answer)
        except MALFORMED as error:
            raise BadRequest(f"the guest agent answered a STATS with nonsense: {error}") from None


_decode = msgspec.json.Decoder(GuestStats).decode
