"""GET by http and https: what is asked of a server, and what its answers and failures mean.

httpx takes long to import, and most daemons never fetch: it is imported where it is used.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from banger.base.errors import BadRequest, BangerError, NotFound, PreconditionFailed, Unavailable
from banger.base.units import format_size
from banger.base.url import check_redirect, is_loopback, shown

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 20.0
#: Without a byte.
_STALL_S = 30.0
_REDIRECTS_MAX = 10
#: What may go another way soon: time-outs, too many requests, a server or proxy in trouble.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Small:
    """A small file, and where it was in the end."""

    url: str
    content: bytes


class Again(Exception):
    """It may work another time: `error` if it does not."""

    def __init__(self, error: BangerError, pause_s: float = 0) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause_s = pause_s


async def fetch_small(url: str, limit_bytes: int, check_url: Callable[[str], object]) -> Small:
    """The content of a small file of the web; `check_url` sees every address on the way to it.

    Raises NotFound, Unavailable, or PreconditionFailed when it is larger than `limit_bytes`.
    """
    import httpx

    check_url(url)
    chunks = bytearray()
    try:
        async with (
            asyncio.timeout(_CONNECT_S + _STALL_S),
            client_for(url) as client,
            get(client, url, {}, check_url) as response,
        ):
            if response.status_code != 200:
                raise refusal(response)
            async for piece in response.aiter_raw():
                chunks += piece
                if len(chunks) > limit_bytes:
                    raise PreconditionFailed(
                        f"{shown(url)} is larger than {format_size(limit_bytes)}"
                    )
            return Small(str(response.url), bytes(chunks))
    except TimeoutError:
        raise Unavailable(f"{shown(url)} does not come: it takes too long") from None
    except Again as again:
        raise again.error from None
    except httpx.HTTPError as error:
        raise unreachable(url, error) from None


@asynccontextmanager
async def get(
    client: httpx.AsyncClient, url: str, headers: dict[str, str], check_url: Callable[[str], object]
) -> AsyncIterator[httpx.Response]:
    """The response to a GET, after redirects, each of which `check_url` has to accept."""
    import httpx

    for _ in range(_REDIRECTS_MAX):
        try:
            request = client.build_request("GET", url, headers=headers)
        except httpx.InvalidURL as error:
            raise BadRequest(f"{shown(url)} is not a URL: {error}") from None
        response = await client.send(request, stream=True)
        try:
            if not response.has_redirect_location:
                yield response
                return
            target = _target(response)
            check_redirect(url, target)
            check_url(target)
            url = target
        finally:
            await response.aclose()
    raise Unavailable(f"{shown(url)}: the server redirects for ever")


def _target(response: httpx.Response) -> str:
    try:
        return urljoin(str(response.url), response.headers["location"])
    except ValueError as error:
        url = shown(str(response.url))
        raise Unavailable(f"{url}: the server redirects to what is no URL: {error}") from None


def client_for(url: str) -> httpx.AsyncClient:
    """A client for what is at `url`, for the caller to close."""
    import httpx

    return httpx.AsyncClient(
        # The certificates that the system trusts: people add their own there.
        verify=ssl.create_default_context(),
        timeout=httpx.Timeout(_STALL_S, connect=_CONNECT_S),
        # By the user's proxies, which cannot reach our loopback, and have no business there.
        trust_env=not is_loopback(url),
        # As it lies there: ranges and digests are of that, and nothing is unpacked on the way.
        headers={"Accept-Encoding": "identity", "User-Agent": "banger"},
    )


def refusal(response: httpx.Response) -> BangerError | Again:
    """What to raise for a response that is not what was asked for."""
    status, url = response.status_code, shown(str(response.url))
    text = f"{url}: the server says {status} {response.reason_phrase}".rstrip()
    if status in _PASSING:
        return Again(Unavailable(text, hint="try again later"), _retry_after(response))
    if status in (404, 410):
        return NotFound(text, hint="is the catalog out of date?")
    return Unavailable(text)


def _retry_after(response: httpx.Response) -> float:
    """Seconds, by RFC 9110, 10.2.3; 0 without or with nonsense."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value[:6])
    with suppress(ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    """What users are told of a request that got no response, or not all of it."""
    import httpx

    if isinstance(error, httpx.ReadTimeout):
        return Unavailable(f"{shown(url)}: nothing has come for {_STALL_S:g} s")
    return Unavailable(
        f"cannot fetch {shown(url)}: {str(error) or type(error).__name__}", hint="check the network"
    )
