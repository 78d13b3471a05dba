"""The handshake by which Firecracker joins a Unix socket of the host's to a guest's vsock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.guest import vsock

PORT = 1023


class Firecracker:
    """Answers each connection with the next of `answers`; the last of them again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[bytes] = []
        self.said: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.said.append(await reader.readline())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer:
            writer.write(answer)
            await writer.drain()
            await reader.read()
        writer.close()


@pytest.fixture
async def firecracker(tmp_path: Path) -> AsyncIterator[Firecracker]:
    made = Firecracker(tmp_path / "vsock")
    async with await asyncio.start_unix_server(made.serve, made.path):
        yield made


async def test_what_follows_the_acceptance_is_left_to_who_asked(firecracker: Firecracker) -> None:
    firecracker.answers = [b"OK 1073741824\nhello"]
    connection = await vsock.connect(firecracker.path, PORT)
    with connection:
        received = await asyncio.get_running_loop().sock_recv(connection, 100)
    assert (firecracker.said, received) == ([b"CONNECT 1023\n"], b"hello")


async def test_a_guest_that_does_not_listen_yet_is_tried_again(firecracker: Firecracker) -> None:
    firecracker.answers = [b"", b"", b"OK 5\n"]
    (await vsock.connect(firecracker.path, PORT)).close()
    assert len(firecracker.said) == 3


@pytest.mark.parametrize("answer", [b"NO\n", b"OK\n", b"OK x\n", b"o" * 100])
async def test_what_is_no_acceptance_is_tried_again(
    firecracker: Firecracker, answer: bytes
) -> None:
    firecracker.answers = [answer, b"OK 5\n"]
    (await vsock.connect(firecracker.path, PORT)).close()
    assert len(firecracker.said) == 2


async def test_a_machine_that_is_gone_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await vsock.connect(tmp_path / "nobody", PORT)


@given(st.binary(max_size=40))
def test_only_a_number_is_accepted(answer: bytes) -> None:
    accepted = vsock.is_acceptance(answer)
    assert accepted == (answer[:3] == b"OK " and answer[-1:] == b"\n" and answer[3:-1].isdigit())


def test_an_acceptance_is_one() -> None:
    assert vsock.is_acceptance(b"OK 1073741824\n")


async def test_a_link_of_ours_is_followed_and_one_that_a_machine_has_made_is_not(
    firecracker: Firecracker,
) -> None:
    firecracker.answers = [b"OK 5\n"]
    ours, theirs = firecracker.path.with_name("ours"), firecracker.path.with_name("theirs")
    ours.symlink_to(firecracker.path)
    (await vsock.connect(ours, PORT)).close()
    ours.unlink()
    theirs.symlink_to(firecracker.path)
    ours.symlink_to(theirs)
    with pytest.raises(OSError, match="non-socket"):
        await vsock.connect(ours, PORT)
    assert len(firecracker.said) == 1
