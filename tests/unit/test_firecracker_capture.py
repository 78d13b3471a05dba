"""A Firecracker's machine that is copied: what is left of that when it fails, and of the machine.

Firecracker's end of the conversation is the stand-in's, with no machine behind it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from banger.base.errors import Unavailable
from banger.drivers.base import Capture, MachineStatus
from banger.drivers.hypervisor import firecracker, firecracker_api
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.hypervisor.firecracker_place import Direct, Place
from banger.drivers.hypervisor.firecracker_requests import SetState, SnapshotCreate
from banger.drivers.hypervisor.kvm import KvmProbe
from stand_in_firecracker import serve_client
from test_jails import Prisons

FULL = "Cannot write the memory: No space left on device (os error 28)"


class Peer:
    """Who is asked: makes the files, and takes as long as it is told to."""

    def __init__(self, directory: Path) -> None:
        #: Names are relative to it.
        self.directory = directory
        self.paused = False
        self.asked: list[str] = []
        #: Why nothing is written to the end.
        self.fault = ""
        #: What is written is, once this is set.
        self.written = asyncio.Event()
        self.written.set()
        self._clients: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = serve_client(self.answer, self._turn, reader, writer)
        self._clients.add(asyncio.create_task(serving))

    async def close(self) -> None:
        for each in self._clients:
            each.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, object | None]:
        self.asked.append(f"{method} {path}")
        if method == "GET":
            state = "Paused" if self.paused else "Running"
            return 200, {"id": "a", "state": state, "vmm_version": "1.16.1"}
        told = msgspec.json.decode(body)
        if path == "/vm":
            self.paused = told["state"] == "Paused"
            return 204, None
        return await self._write(told)

    async def _write(self, told: dict[str, Any]) -> tuple[int, object | None]:
        for name in (told["snapshot_path"], told["mem_file_path"]):
            made = self.directory / name
            if not (made.is_symlink() or made.is_dir()):
                made.write_bytes(b"x" * 8192)
        await self.written.wait()
        return (400, {"fault_message": self.fault}) if self.fault else (204, None)


class Scene:
    """A machine in a jail, or not, whose Firecracker is a `Peer`."""

    def __init__(self, directory: Path, *, jailed: bool) -> None:
        self.directory = directory
        prisons = Prisons(directory)
        self.socket, self.out = prisons.socket, prisons.out
        self.out.mkdir()
        self.listens_at = self.socket
        if jailed:
            self.listens_at = self.out / "api.sock"
            self.socket.symlink_to(self.listens_at)
        self.peer = Peer(directory)
        (directory / "out").symlink_to(self.out)  # by which name it knows the directory
        (self.out / "metrics").touch()

        async def probe() -> KvmProbe:
            return KvmProbe(True, "not asked")

        place: Place = prisons.place if jailed else Direct("firecracker")
        self.hypervisor = FirecrackerHypervisor(place, probe)
        self.copies = directory / "copies"
        self.copies.mkdir()
        self.capture = Capture(self.copies / "memory", self.copies / "machine-state", {})

    async def captured(self) -> None:
        await self.hypervisor.capture(self.socket, 1, self.capture, lambda _: None)

    def left(self) -> list[str]:
        return sorted(each.name for each in self.out.iterdir() if not each.is_socket())


@pytest.fixture(params=[True, False], ids=["jailed", "direct"])
async def scene(
    request: pytest.FixtureRequest, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    monkeypatch.setattr(firecracker, "_FALLOCATE", "not-installed")  # no file has to be sparse
    scene = Scene(short_path, jailed=request.param)
    server = await asyncio.start_unix_server(scene.peer.client, scene.listens_at)
    yield scene
    await scene.peer.close()
    server.close()
    await server.wait_closed()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nobody waits for an answer for long."""
    for request in (SetState, SnapshotCreate):
        monkeypatch.setattr(request, "timeout_s", 0.1)
    monkeypatch.setattr(firecracker_api, "ANSWER_TIMEOUT_S", 0.1)
    return monkeypatch


async def test_a_copy_is_where_it_is_to_be_and_the_machine_runs(scene: Scene) -> None:
    await scene.captured()
    assert {each.name for each in scene.copies.iterdir()} == {"memory", "machine-state"}
    assert scene.left() == ["metrics"]
    assert not scene.peer.paused
    assert await scene.hypervisor.status(scene.socket) is MachineStatus.RUNNING


async def test_a_copy_that_found_no_room_takes_none(scene: Scene) -> None:
    scene.peer.fault = FULL
    with pytest.raises(Unavailable, match="the disk is full"):
        await scene.captured()
    assert scene.left() == ["metrics"]
    assert not scene.peer.paused


async def test_what_went_wrong_first_is_told_and_the_machine_is_let_run_on_later(
    scene: Scene, impatient: pytest.MonkeyPatch
) -> None:
    scene.peer.written.clear()
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(Unavailable, match=r"PUT /snapshot/create within 0\.1 s"),
    ):
        await scene.captured()
    assert [each["event"] for each in logs] == ["machine stays paused"]
    assert scene.left() == ["metrics"], "it is written on, but takes no room once that is done"
    with pytest.raises(Unavailable, match="GET /"):
        await scene.hypervisor.status(scene.socket)
    impatient.undo()
    scene.peer.written.set()
    assert await scene.hypervisor.status(scene.socket) is MachineStatus.PAUSED
    await scene.hypervisor.resume(scene.socket)
    assert await scene.hypervisor.status(scene.socket) is MachineStatus.RUNNING


async def test_a_cancellation_waits_until_it_is_written_and_leaves_nothing_paused(
    scene: Scene,
) -> None:
    scene.peer.written.clear()
    capturing = asyncio.create_task(scene.captured())
    async with asyncio.timeout(20):
        while "PUT /snapshot/create" not in scene.peer.asked:
            await asyncio.sleep(0.001)
    capturing.cancel()
    await asyncio.sleep(0.01)
    assert not capturing.done()
    scene.peer.written.set()
    with suppress(asyncio.CancelledError):
        await capturing
    assert not scene.peer.paused
    assert scene.left() == ["metrics"]


@pytest.mark.parametrize("scene", [True], indirect=True, ids=["jailed"])
async def test_what_a_daemon_that_died_has_left_in_a_jail_goes_and_nothing_else(
    scene: Scene,
) -> None:
    paths = (scene.directory / "vm" / "memory", scene.directory / "vm" / "machine-state")
    secret = scene.directory / "secret"
    secret.write_text("secret")
    (scene.out / "memory").write_bytes(b"half")
    (scene.out / "machine-state").symlink_to(secret)
    for _ in range(2):
        await scene.hypervisor.discard(scene.socket, paths)
        assert scene.left() == ["metrics"]
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("scene", [True], indirect=True, ids=["jailed"])
async def test_what_no_firecracker_makes_is_neither_entered_nor_followed(scene: Scene) -> None:
    """Whoever is in the jail could fill a directory for as long as somebody empties it."""
    secret = scene.directory / "secret"
    secret.write_text("secret")
    (scene.out / "memory").mkdir()
    (scene.out / "memory" / "more").touch()
    (scene.out / "machine-state").symlink_to(secret)
    scene.peer.fault = FULL
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(Unavailable, match="the disk is full"),
    ):
        await scene.captured()
    assert scene.left() == ["memory", "metrics"]
    assert os.listdir(scene.out / "memory") == ["more"]  # noqa: PTH208 - names
    assert [each["event"] for each in logs] == ["a jail's file stays"]
    assert secret.read_text() == "secret"
