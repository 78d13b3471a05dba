"""A conversation with one machine's Firecracker: HTTP on its Unix socket.

httpx takes long to import: it is imported where it is used.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.base.errors import Unavailable
from banger.base.files import socket_name
from banger.base.jail import is_vm_id
from banger.base.malformed import MALFORMED
from banger.drivers.hypervisor.firecracker_faults import error_of
from banger.drivers.hypervisor.firecracker_requests import ANSWER_TIMEOUT_S, InstanceInfo, Request

if TYPE_CHECKING:
    import httpx

_CONNECT_TIMEOUT_S = 5.0

#: What it answers is short: none of this is as long.
_ANSWER_MAX_BYTES = 1 << 20


class _Fault(msgspec.Struct, frozen=True):
    fault_message: str


class FirecrackerClient:
    """One conversation with one machine's Firecracker. Make one with `conversation`."""

    def __init__(self, http: httpx.AsyncClient, socket: Path) -> None:
        self._http = http
        self._socket = socket

    async def tell(self, request: Request) -> None:
        """Returns when it is done. Raises what `error_of` makes of a refusal, Unavailable when
        there is no answer in time or none that can be understood."""
        body = msgspec.json.encode(request)
        await self._send(request.method, request.path, request.timeout_s, body)

    async def instance(self) -> InstanceInfo:
        """What it says of itself and its machine. Raises as `tell`."""
        answer = await self._send("GET", "/", ANSWER_TIMEOUT_S)
        try:
            return msgspec.json.decode(answer, type=InstanceInfo)
        except MALFORMED as error:
            raise self._nonsense() from error

    async def _send(
        self, method: str, path: str, timeout_s: float, body: bytes | None = None
    ) -> bytes:
        import httpx

        what = f"{method} {path}"
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream(method, path, content=body) as response,
            ):
                answer = bytearray()
                # As it comes: a Content-Encoding could have a few bytes become gigabytes.
                async for piece in response.aiter_raw():
                    answer += piece
                    if len(answer) > _ANSWER_MAX_BYTES:
                        raise self._nonsense()
        except TimeoutError as error:
            raise Unavailable(
                f"Firecracker does not answer {what} within {timeout_s:g} s: it hangs, or is still"
                " writing a snapshot",
            ) from error
        except (httpx.HTTPError, OSError) as error:
            why = str(error) or type(error).__name__
            raise Unavailable(f"Firecracker does not answer at {self._socket}: {why}") from error
        if response.is_success:
            return bytes(answer)
        try:
            fault = msgspec.json.decode(bytes(answer), type=_Fault).fault_message
        except MALFORMED:
            fault = f"status {response.status_code}"
        raise error_of(what, fault, _vm_of(self._socket))

    def _nonsense(self) -> Unavailable:
        return Unavailable(f"what answers at {self._socket} is not Firecracker")


def _vm_of(socket: Path) -> str:
    """The id of the VM with this socket, which is in a directory of that name; where it is in
    another, what stands for a name."""
    name = socket.parent.name
    return name if is_vm_id(name) else "NAME"


@cache
def _no_tls() -> ssl.SSLContext:
    """For httpx, which for each client that is given none reads all certificates of authorities
    (20 ms in which the daemon does nothing else), though on a Unix socket there is no TLS."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@asynccontextmanager
async def conversation(socket: Path) -> AsyncIterator[FirecrackerClient]:
    """One connection, for as long as the context is open, made with the first request.

    Raises Unavailable where no socket is.
    """
    import httpx

    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)  # `_send` has the one of each request
    # Its HTTP server knows the headers that follow, and of what to accept JSON alone.
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    with ExitStack() as held:
        try:
            name = held.enter_context(socket_name(socket))
        except OSError as error:
            raise Unavailable(f"Firecracker does not answer at {socket}: {error}") from error
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=name, verify=_no_tls()),
            base_url="http://localhost",
            headers=headers,
            timeout=timeout,
            trust_env=False,  # a proxy of the user's is none of its business
        ) as http:
            yield FirecrackerClient(http, socket)
