"""Downloads from a real server, which fails, stalls, lies and changes its mind."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bad_server import BadServer, Deed, Handler, cut_off, hang_up, say, send, serve, stall
from banger.base.errors import (
    BangerError,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from banger.images import download, web
from banger.images.catalog import load_catalog
from banger.images.download import Download, fetched

CONTENT = random.Random(1).randbytes(5_000_000)
HALF = 2_500_000


@pytest.fixture
def server() -> Iterator[BadServer]:
    with BadServer(CONTENT) as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_STALL_S", 0.5)
    monkeypatch.setattr(download, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(download, "_LOCK_POLL_S", 0.05)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Place:
    """A directory of downloads. `said` is the progress of all of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: list[tuple[str, str, float]] = []

    @asynccontextmanager
    async def fetched(self, url: str, content: bytes = CONTENT) -> AsyncIterator[Path]:
        what = Download(url, hashlib.sha256(content).hexdigest(), len(content))
        async with fetched(what, self.directory, lambda *step: self.said.append(step)) as path:
            yield path

    async def content(self, url: str) -> bytes:
        async with self.fetched(url) as path:
            return path.read_bytes()

    async def unused(self, url: str) -> Path:
        """Where it lies when whoever wanted it has failed."""
        with suppress(ZeroDivisionError):
            async with self.fetched(url) as path:
                raise ZeroDivisionError
        return path

    async def failure(self, url: str) -> BangerError:
        with pytest.raises(BangerError) as caught:
            await self.content(url)
        return caught.value

    @property
    def files(self) -> dict[str, int]:
        return {
            path.name.replace(hashlib.sha256(CONTENT).hexdigest(), "X"): path.stat().st_size
            for path in self.directory.iterdir()
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "cache/downloads")


async def test_what_is_fetched_is_there_until_it_was_used(server: BadServer, place: Place) -> None:
    async with place.fetched(server.url) as path:
        assert path.read_bytes() == CONTENT
    assert place.files == {}
    assert place.directory.stat().st_mode & 0o777 == 0o700
    stages = [(stage, percent) for stage, _, percent in place.said]
    assert ("download", 100) in stages
    assert stages[-1] == ("verify", 100)


async def test_what_could_not_be_used_is_not_fetched_again(server: BadServer, place: Place) -> None:
    await place.unused(server.url)
    assert place.files == {"X": len(CONTENT)}
    assert await place.content(server.url) == CONTENT
    assert len(server.requests) == 1


async def test_what_was_damaged_meanwhile_is(server: BadServer, place: Place) -> None:
    (await place.unused(server.url)).write_bytes(bytes(len(CONTENT)))
    assert await place.content(server.url) == CONTENT
    assert server.ranges == [None, None]


@pytest.mark.parametrize(
    "harm", [cut_off(HALF), stall(HALF), say(503), say(429, Retry_After="0"), hang_up],
    ids=["cut off", "stalled", "busy", "too many", "hung up"],
)  # fmt: skip
async def test_a_server_in_trouble_is_tried_again(
    server: BadServer, place: Place, harm: Deed
) -> None:
    server.deeds = [harm]
    assert await place.content(server.url) == CONTENT
    assert any("trying again" in detail for _, detail, _ in place.said)


async def test_a_download_goes_on_where_it_broke_off(server: BadServer, place: Place) -> None:
    server.deeds = [cut_off(HALF)]
    assert await place.content(server.url) == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert server.requests[1].headers["if-range"] == server.etag


async def interrupted(server: BadServer, place: Place) -> None:
    """A download that was cancelled half-way."""
    server.deeds = [stall(HALF)]
    task = asyncio.create_task(place.content(server.url))
    while not place.said:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_download_that_was_cancelled_goes_on_the_next_time(
    server: BadServer, place: Place
) -> None:
    await interrupted(server, place)
    assert place.files.keys() == {"X.part", "X.json"}
    assert place.files["X.part"] == HALF
    assert await place.content(server.url) == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert place.files == {}


async def test_a_part_from_one_address_is_gone_on_with_at_another(
    server: BadServer, place: Place
) -> None:
    await interrupted(server, place)
    with BadServer(CONTENT) as mirror:
        assert await place.content(mirror.url) == CONTENT
        assert mirror.ranges == [f"bytes={HALF}-"]
        assert mirror.requests[0].headers["if-range"] is None


async def test_a_server_that_ignores_ranges_sends_all_of_it_again(
    server: BadServer, place: Place
) -> None:
    server.deeds = [cut_off(HALF), cut_off(len(CONTENT))]
    assert await place.content(server.url) == CONTENT
    assert len(server.requests) == 2


async def test_a_file_that_has_changed_meanwhile_is_begun_anew(
    server: BadServer, place: Place
) -> None:
    old = random.Random(2).randbytes(len(CONTENT))
    server.content = old
    await interrupted(server, place)
    server.content = CONTENT
    assert await place.content(server.url) == CONTENT


async def test_a_part_of_another_file_is_found_out_and_begun_anew(
    server: BadServer, place: Place
) -> None:
    """Without an ETag there is nothing but the digest to tell."""
    place.directory.mkdir(parents=True)
    digest = hashlib.sha256(CONTENT).hexdigest()
    (place.directory / f"{digest}.part").write_bytes(b"another" * 100)
    assert await place.content(server.url) == CONTENT
    assert server.ranges == ["bytes=700-", None]


def other_range(handler: Handler) -> None:
    handler.begin(206, Content_Length=3, Content_Range=f"bytes 0-2/{len(CONTENT)}")
    handler.wfile.write(b"abc")


@pytest.mark.parametrize("harm", [other_range, say(416)], ids=["another range", "refused"])
async def test_a_server_that_cannot_go_on_is_asked_for_all(
    server: BadServer, place: Place, harm: Deed
) -> None:
    server.deeds = [cut_off(HALF), harm]
    assert await place.content(server.url) == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (cut_off(HALF), "peer closed connection"),
        (send(CONTENT[:HALF], Connection="close"), "ended after 2.38 MiB of 4.77 MiB"),
    ],
    ids=["of known length", "of unknown length"],
)
async def test_one_that_always_fails_half_way_is_given_up(
    server: BadServer, place: Place, harm: Deed, problem: str
) -> None:
    server.deeds = [harm] * 20
    error = await place.failure(server.url)
    assert isinstance(error, Unavailable)
    assert problem in error.message
    assert len(server.requests) <= 7
    assert "X.part" in place.files


async def test_one_that_gets_a_little_further_each_time_is_not(
    server: BadServer, place: Place
) -> None:
    server.deeds = [cut_off(500_000 * step) for step in range(1, 10)]
    assert await place.content(server.url) == CONTENT
    assert len(server.requests) == 10


async def test_one_that_stalls_for_ever_is_given_up(server: BadServer, place: Place) -> None:
    server.deeds = [stall(0)] * 20
    error = await place.failure(server.url)
    assert isinstance(error, Unavailable)
    assert "nothing has come for 0.5 s" in error.message


async def test_other_bytes_are_refused_and_not_kept(server: BadServer, place: Place) -> None:
    server.content = bytes(len(CONTENT))
    error = await place.failure(server.url)
    assert isinstance(error, PreconditionFailed)
    assert "it is not what it should be" in error.message
    assert hashlib.sha256(CONTENT).hexdigest() in error.message
    assert error.hint
    assert len(server.requests) == 1
    assert place.files == {}


@pytest.mark.parametrize("size", [len(CONTENT) + 1, 3])
async def test_a_file_of_another_length_is_refused_before_it_comes(
    server: BadServer, place: Place, size: int
) -> None:
    server.content = bytes(size)
    error = await place.failure(server.url)
    assert f"it has {size} bytes, and should have {len(CONTENT)}" in error.message
    assert place.files == {}


async def test_one_that_sends_without_end_is_stopped(server: BadServer, place: Place) -> None:
    server.deeds = [send(CONTENT + CONTENT)]
    error = await place.failure(server.url)
    assert "it is longer than the 5000000 bytes" in error.message
    assert place.files == {}


async def test_what_is_packed_on_the_way_is_not_unpacked(server: BadServer, place: Place) -> None:
    import gzip

    server.deeds = [send(gzip.compress(CONTENT), Content_Encoding="gzip")]
    error = await place.failure(server.url)
    assert isinstance(error, PreconditionFailed)
    assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(("status", "kind"), [(404, NotFound), (410, NotFound), (403, Unavailable)])
async def test_what_the_server_does_not_give_is_not_asked_for_again(
    server: BadServer, place: Place, status: int, kind: type[BangerError]
) -> None:
    server.deeds = [say(status)]
    error = await place.failure(server.url + "?secret=1")
    assert isinstance(error, kind)
    assert f"/file: the server says {status}" in error.message
    assert "secret" not in error.message
    assert len(server.requests) == 1


async def test_redirects_are_followed(server: BadServer, place: Place) -> None:
    server.deeds = [say(302, Location="/there"), say(307, Location=server.url)]
    assert await place.content(server.url) == CONTENT
    assert [asked.path for asked in server.requests] == ["/file", "/there", "/file"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
async def test_redirects_lead_to_the_web_only(server: BadServer, place: Place, target: str) -> None:
    server.deeds = [say(302, Location=target)]
    assert isinstance(await place.failure(server.url), PermissionDenied)


async def test_loopback_is_reached_without_the_users_proxy(
    server: BadServer, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BadServer(b"of the proxy") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert await place.content(server.url) == CONTENT
        assert proxy.requests == []
        elsewhere = "http://elsewhere.invalid/file"
        await place.failure(elsewhere)
        assert [asked.path for asked in proxy.requests] == [elsewhere]


async def test_redirects_end(server: BadServer, place: Place) -> None:
    server.deeds = [say(302, Location="/file")] * 50
    assert "redirects for ever" in (await place.failure(server.url)).message
    assert len(server.requests) <= 10


async def test_a_server_that_is_not_there(server: BadServer, place: Place) -> None:
    error = await place.failure("http://127.0.0.1:9/file")
    assert isinstance(error, Unavailable)
    assert error.message.startswith("cannot fetch http://127.0.0.1:9/file: ")


async def test_a_file_of_this_machine_is_copied(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "a bundle"
    file.write_bytes(CONTENT)
    assert await place.content(file.as_uri()) == CONTENT
    assert place.files == {}
    file.write_bytes(bytes(len(CONTENT)))
    assert "it is not what it should be" in (await place.failure(file.as_uri())).message
    file.write_bytes(b"short")
    assert "it has 5 bytes" in (await place.failure(file.as_uri())).message
    file.unlink()
    assert isinstance(await place.failure(file.as_uri()), NotFound)
    os.mkfifo(file)
    assert "not a regular file" in (await place.failure(file.as_uri())).message
    assert place.files == {}


async def test_a_file_is_fetched_once_at_a_time(server: BadServer, place: Place) -> None:
    """By whoever shares the directory: locks of other processes count as those of ours."""
    other = Place(place.directory)
    async with place.fetched(server.url):
        waiting = asyncio.create_task(other.content(server.url))
        while not other.said:
            await asyncio.sleep(0.01)
        assert other.said[0][:2] == ("download", "another banger is fetching it")
        assert len(server.requests) == 1
    assert await asyncio.wait_for(waiting, 10) == CONTENT
    assert place.files == {}


async def test_who_waits_for_another_can_be_cancelled(server: BadServer, place: Place) -> None:
    place.directory.mkdir(parents=True)
    lock = place.directory / f"{hashlib.sha256(CONTENT).hexdigest()}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = asyncio.create_task(place.content(server.url))
        while not place.said:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert lock.exists()
    assert await place.content(server.url) == CONTENT


async def test_a_lock_whose_file_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had it before removes it, maybe after we have opened it."""
    lock = tmp_path / "lock"
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        lock.unlink()
        lock.touch()  # and the next one has made its own
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert download._try_lock(lock) is None
    descriptor = download._try_lock(lock)
    assert descriptor is not None
    assert download._try_lock(lock) is None
    os.close(descriptor)


async def test_a_link_in_the_directory_leads_nowhere(
    server: BadServer, place: Place, tmp_path: Path
) -> None:
    place.directory.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    part = place.directory / f"{hashlib.sha256(CONTENT).hexdigest()}.part"
    part.symlink_to(precious)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        await place.content(server.url)
    assert precious.read_text() == "precious"


async def test_too_little_room_is_said_before_anything_comes(
    server: BadServer, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = await place.failure(server.url)
    assert "needs 261 MiB free" in error.message
    assert "XDG_CACHE_HOME" in error.hint


# --- catalogs ---


def a_catalog(server: BadServer) -> bytes:
    return (
        'version = 1\n[[kernels]]\nname = "a"\nurl = "file"\narchitecture = "x86_64"\n'
        f'sha256 = "{hashlib.sha256(CONTENT).hexdigest()}"\nsize_bytes = {len(CONTENT)}\n'
    ).encode()


async def test_a_catalog_of_the_web(server: BadServer, place: Place) -> None:
    server.files["/catalog"] = a_catalog(server)
    at = server.url.replace("/file", "/catalog")
    entry = (await load_catalog(at)).kernel("a", "x86_64")
    assert entry.url == server.url
    assert await place.content(entry.url) == CONTENT


async def test_a_catalog_counts_from_where_it_was_in_the_end(server: BadServer) -> None:
    server.deeds = [say(302, Location="/deep/catalog"), serve]
    server.files["/deep/catalog"] = a_catalog(server)
    entry = (await load_catalog(server.url)).kernel("a", "x86_64")
    assert entry.url == server.url.replace("/file", "/deep/file")


@pytest.mark.parametrize(
    ("deed", "kind", "problem"),
    [
        (say(404), NotFound, "the server says 404"),
        (say(500), Unavailable, "the server says 500"),
        (hang_up, Unavailable, "cannot fetch"),
        (stall(0), Unavailable, "nothing has come"),
        (send(bytes(5 << 20)), PreconditionFailed, "is larger than 4 MiB"),
        (send(b"<html>"), PreconditionFailed, "is not valid TOML"),
        (say(302, Location="http://example.org/c"), PermissionDenied, "anybody on the way"),
    ],
    ids=["missing", "broken", "hung up", "stalled", "large", "no catalog", "elsewhere"],
)
async def test_a_catalog_that_does_not_come_as_it_should(
    server: BadServer, deed: Deed, kind: type[BangerError], problem: str
) -> None:
    server.deeds = [deed]
    with pytest.raises(kind) as caught:
        await load_catalog(server.url)
    assert problem in caught.value.message
