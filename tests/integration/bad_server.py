"""A web server on loopback that serves one file, and does what servers do wrong, when it is told.

What it is to do with each request is a `Deed`; without one it serves the file as a good server
does, with ranges. `requests` are the headers of those that came.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

#: Answers one request: writes to it what it likes.
Deed = Callable[["Handler"], None]


@dataclass(frozen=True)
class Asked:
    path: str
    headers: Message


class Handler(BaseHTTPRequestHandler):
    server: BadServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(Asked(self.path, self.headers))
        deed = self.server.deeds.pop(0) if self.server.deeds else serve
        self.close_connection = True
        deed(self)

    def begin(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Not on the terminal of the tests."""


class BadServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        #: Other files, by path.
        self.files: dict[str, bytes] = {}
        self.deeds: list[Deed] = []
        self.requests: list[Asked] = []
        #: Set at the end: for deeds that wait.
        self.over = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content, usedforsecurity=False).hexdigest()}"'

    @property
    def ranges(self) -> list[str | None]:
        return [asked.headers["range"] for asked in self.requests]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is what several tests are about."""


def serve(handler: Handler) -> None:
    """As a good server does."""
    server, headers = handler.server, handler.headers
    if handler.path != "/file":
        found = server.files.get(handler.path)
        handler.begin(404 if found is None else 200, Content_Length=len(found or b""))
        handler.wfile.write(found or b"")
        return
    content, start = server.content, 0
    if headers["range"] and headers["if-range"] in (None, server.etag):
        start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        handler.begin(
            206,
            ETag=server.etag,
            Content_Length=len(content) - start,
            Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}",
        )
    else:
        handler.begin(200, ETag=server.etag, Content_Length=len(content))
    handler.wfile.write(content[start:])


def cut_off(after: int) -> Deed:
    """Says that all will come, sends so many bytes, and hangs up."""

    def deed(handler: Handler) -> None:
        content = handler.server.content
        handler.begin(200, ETag=handler.server.etag, Content_Length=len(content))
        handler.wfile.write(content[:after])

    return deed


def stall(after: int) -> Deed:
    """The same, but does not hang up."""

    def deed(handler: Handler) -> None:
        cut_off(after)(handler)
        handler.wfile.flush()
        handler.server.over.wait()

    return deed


def say(status: int, **headers: object) -> Deed:
    return lambda handler: handler.begin(status, Content_Length=0, **headers)


def send(content: bytes, **headers: object) -> Deed:
    """Something else, without a length."""

    def deed(handler: Handler) -> None:
        handler.begin(200, **headers)
        handler.wfile.write(content)

    return deed


def hang_up(handler: Handler) -> None:
    """Without a word."""
