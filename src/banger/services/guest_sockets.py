"""The listening sockets of a guest, as its agent tells of them: an answer that may be anything."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from banger.base.errors import BadRequest
from banger.base.malformed import MALFORMED
from banger.base.ports import GuestSocket
from banger.base.terminal import printable

#: A guest that does everything has some dozens, of a hundred bytes each.
SOCKETS_LIMIT_BYTES = 256 << 10
_SOCKETS_MAX = 1024


class _Listening(msgspec.Struct, frozen=True):
    """One socket of a guest's answer, which may be anything."""

    protocol: Literal["tcp"]
    address: Annotated[str, Meta(max_length=64)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    pid: Annotated[int, Meta(ge=0, lt=1 << 31)]
    command: Annotated[str, Meta(max_length=64)]

    def socket(self) -> GuestSocket:
        """Raises ValueError for an address that is none."""
        if "%" in self.address:  # a scope may be any text, and listening sockets show none
            raise ValueError(f"{self.address!r} is not a plain address")
        ip_address(self.address)
        return GuestSocket(
            address=self.address,
            port=self.port,
            pid=self.pid,
            command=printable(self.command),
        )


_decode = msgspec.json.Decoder(
    Annotated[tuple[_Listening, ...], Meta(max_length=_SOCKETS_MAX)]
).decode


def decode_sockets(answer: bytes) -> tuple[GuestSocket, ...]:
    """A guest's answer to SOCKETS, or a line of LISTENERS.

    Raises BadRequest when it has not that shape.
    """
    try:
        return tuple(each.socket() for each in _decode(answer))
    except (*MALFORMED, ValueError) as error:
        raise BadRequest(f"the guest agent answered a SOCKETS with nonsense: {error}") from None
