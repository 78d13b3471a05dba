"""What a Firecracker answers, which a guest may have taken over: any bytes at all."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from banger.base.errors import Unavailable
from banger.drivers.hypervisor.firecracker_api import FirecrackerClient, conversation
from banger.drivers.hypervisor.firecracker_faults import FirecrackerRefused
from banger.drivers.hypervisor.firecracker_requests import SetState, VmState


@asynccontextmanager
async def answered(directory: Path, answer: bytes) -> AsyncIterator[FirecrackerClient]:
    """A conversation in which the first request is answered with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    socket = directory / "control.sock"
    server = await asyncio.start_unix_server(serve, socket)
    async with server, conversation(socket) as client:
        yield client


def response(status: str, body: bytes, *headers: str) -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""))
    return head.encode() + body


NONSENSE = {
    "no JSON": b"{",
    "another shape": b"[]",
    "no UTF-8": b'{"id":"\xff","state":"Running","vmm_version":"1","fault_message":"\xff"}',
    "deeper than anybody goes": b'{"another":' + b"[" * 100_000,
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
async def test_what_is_no_answer_is_said_to_be_none(short_path: Path, body: bytes) -> None:
    async with answered(short_path, response("200 OK", body)) as client:
        with pytest.raises(Unavailable, match="is not Firecracker"):
            await client.instance()


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
async def test_a_refusal_without_a_reason_has_its_status(short_path: Path, body: bytes) -> None:
    async with answered(short_path, response("400 Bad Request", body)) as client:
        with pytest.raises(FirecrackerRefused, match="status 400"):
            await client.tell(SetState(state=VmState.PAUSED))


async def test_an_answer_is_not_unpacked(short_path: Path) -> None:
    """It could become more than there is memory before anybody counts it."""
    said = b'{"id":"a","state":"Running","vmm_version":"1.16.1"}'
    packed = response("200 OK", gzip.compress(said), "Content-Encoding: gzip")
    async with answered(short_path, packed) as client:
        with pytest.raises(Unavailable, match="is not Firecracker"):
            await client.instance()


async def test_no_certificates_are_read_for_a_socket_of_ours(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    monkeypatch.setattr(
        ssl.SSLContext, "load_verify_locations", lambda _, *given, **__: read.append(given)
    )
    said = response("200 OK", b'{"id":"a","state":"Running","vmm_version":"1.16.1"}')
    async with answered(short_path, said) as client:
        await client.instance()
    assert read == []
