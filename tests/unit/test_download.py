"""What a server can say, and a cancellation meet, at the worst moment of a download.

(From real servers: tests/integration/test_download_server.py.)
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import httpx
import pytest

from banger.base.errors import PreconditionFailed, Unavailable
from banger.images import download, web
from banger.images.download import Download, fetched
from banger.images.web import fetch_small

CONTENT = bytes(range(256)) * (3 << 12)
WHAT = Download(
    "https://example.org/file", hashlib.sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT)
)
PIECE = 1 << 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_FIRST_PAUSE_S", 0)
    monkeypatch.setattr(download, "_PAUSE_MAX_S", 0.01)
    monkeypatch.setattr(download, "_LOCK_POLL_S", 0.01)


def quiet(stage: str, detail: str, percent: float) -> None:
    pass


class Server:
    """Answers with what `answer` makes of a request; `requests` are those that came."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer: Callable[[httpx.Request], httpx.Response] = lambda _: httpx.Response(
            200, content=pieces()
        )

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answer(request)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(
        web,
        "client_for",
        lambda url: httpx.AsyncClient(transport=httpx.MockTransport(made.handle)),
    )
    return made


async def content(directory: Path) -> bytes:
    async with fetched(WHAT, directory, quiet) as file:
        return file.read_bytes()


async def pieces(content: bytes = CONTENT) -> AsyncIterator[bytes]:
    for start in range(0, len(content), PIECE):
        yield content[start : start + PIECE]


class _SlowDisk:
    """A file whose first write waits for `go`, after it has `begun`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.begun, self.go = threading.Event(), threading.Event()
        self.seek = file.seek

    def write(self, data: bytes) -> int:
        self.begun.set()
        assert self.go.wait(10)
        return self._file.write(data)


async def test_what_is_being_written_when_it_is_cancelled_is_written_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, disks = download._opened, list[_SlowDisk]()

    @contextmanager
    def slowly(part: Path, mode: str) -> Iterator[BinaryIO]:
        with opened(part, mode) as file:
            disks.append(_SlowDisk(file))
            yield cast("BinaryIO", disks[-1])

    monkeypatch.setattr(download, "_opened", slowly)
    task = asyncio.ensure_future(content(tmp_path))
    while not disks:
        await asyncio.sleep(0)
    assert await asyncio.to_thread(disks[0].begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()  # nobody else may have the file meanwhile
    disks[0].go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    (part,) = tmp_path.glob("*.part")
    assert part.read_bytes() == CONTENT[:PIECE]


async def test_a_cancellation_while_it_is_locked_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"

    async def hold() -> None:
        async with download._locked(lock, quiet):
            await asyncio.sleep(0)

    for steps in range(6):
        task = asyncio.ensure_future(hold())
        for _ in range(steps):
            await asyncio.sleep(0)
        # A thread would have its answer by now, and the loop not yet heard it.
        threading.Event().wait(0.02)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        async with asyncio.timeout(1):
            await hold()


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
async def test_a_validator_that_cannot_be_sent_is_not_kept(
    tmp_path: Path, server: Server, header: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if len(server.requests) == 1:  # cut off
            headers = {header.encode(): '"caf\u00e9"'.encode()}
            return httpx.Response(200, headers=headers, content=pieces(CONTENT[:PIECE]))
        assert request.headers["range"] == f"bytes={PIECE}-"
        assert "if-range" not in request.headers
        given = {"Content-Range": f"bytes {PIECE}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        return httpx.Response(206, headers=given, content=pieces(CONTENT[PIECE:]))

    server.answer = answer
    assert await content(tmp_path) == CONTENT
    assert len(server.requests) == 2


async def test_a_validator_of_an_older_version_that_cannot_be_sent_is_ignored(
    tmp_path: Path, server: Server
) -> None:
    (tmp_path / f"{WHAT.sha256}.part").write_bytes(CONTENT[:PIECE])
    sidecar = tmp_path / f"{WHAT.sha256}.json"
    sidecar.write_text(f'{{"url": "{WHAT.url}", "validator": "\\"caf\u00e9\\""}}')
    given = {"Content-Range": f"bytes {PIECE}-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.answer = lambda _: httpx.Response(206, headers=given, content=pieces(CONTENT[PIECE:]))
    assert await content(tmp_path) == CONTENT
    assert len(server.requests) == 1
    assert "if-range" not in server.requests[0].headers


@pytest.mark.parametrize("location", ["http://[", "https://[::1", "//[x"])
async def test_a_redirect_to_what_is_no_url_is_an_error_of_the_server(
    tmp_path: Path, server: Server, location: str
) -> None:
    server.answer = lambda _: httpx.Response(302, headers={"Location": location})
    with pytest.raises(Unavailable):
        await content(tmp_path)
    with pytest.raises(Unavailable):
        await fetch_small("https://example.org/catalog.toml", 1000, lambda url: None)


@pytest.mark.parametrize("location", ["http://[", "//[x"])
def test_where_a_redirect_leads_is_read_or_refused(location: str) -> None:
    request = httpx.Request("GET", "https://example.org/")
    response = httpx.Response(302, headers={"Location": location}, request=request)
    with pytest.raises(Unavailable, match="no URL"):
        web._target(response)


@pytest.mark.parametrize(
    "value",
    [
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +99999999999999",
        "Mon, 01 Jan 0000 00:00:00 GMT",
        "soon",
        "-1",
    ],
)
async def test_a_server_that_says_nonsense_about_when_is_tried_as_usual(
    tmp_path: Path, server: Server, value: str
) -> None:
    server.answer = lambda _: httpx.Response(503, headers={"Retry-After": value})
    with pytest.raises(Unavailable, match="503"):
        await content(tmp_path)
    assert len(server.requests) > 2


async def test_some_room_is_left_to_the_machines_that_run(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = len(CONTENT) + (256 << 20)
    for free, comes in ((room - 1, False), (room, True)):
        monkeypatch.setattr(
            "shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free})
        )
        if comes:
            assert await content(tmp_path) == CONTENT
        else:
            with pytest.raises(PreconditionFailed, match="free in"):
                await content(tmp_path)
