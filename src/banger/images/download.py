"""Files from the web or from this machine, by their sha256: fetched once, resumed, verified.

What has not come whole stays in the directory of downloads as ``DIGEST.part`` and is gone on with
next time, by whichever daemon that shares the directory. Nothing is believed of a server but that
what it sends may be what was asked for: the size and the digest say so.

httpx takes long to import, and most daemons never fetch: it is imported where it is used.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from banger.base.cancellation import in_thread, to_its_end
from banger.base.errors import NotFound, PreconditionFailed, Unavailable
from banger.base.files import open_regular, write_atomically
from banger.base.units import format_size
from banger.base.url import check_web_url, file_path, shown
from banger.images import web
from banger.images.progress import UNKNOWN, Progress, Steps

if TYPE_CHECKING:
    import httpx

#: How often in a row without getting further; pauses are doubled from the first.
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.5
_PAUSE_MAX_S = 30.0
_LOCK_POLL_S = 0.5
_PIECE = 1 << 20
#: What is left of the disk for machines that run meanwhile.
_KEEP_FREE_BYTES = 256 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True)
class Download:
    """What is wanted: ``url`` is http, https or file, ``sha256`` 64 hex digits in lower case."""

    url: str
    sha256: str
    size_bytes: int


class _Other(Exception):
    """What is there is of no use: to be begun from the first byte."""


class _Part(msgspec.Struct, frozen=True):
    """What is known of a part: by which validator (RFC 9110, 13.1.5) its server knows the file."""

    url: str
    validator: str


@asynccontextmanager
async def fetched(what: Download, directory: Path, progress: Progress) -> AsyncIterator[Path]:
    """The file `what`, whole and verified, for as long as the block lasts; stages ``download``,
    ``verify``.

    It is gone when the block has ended well, and stays for the next try when not. One at a time
    has a digest: another daemon that shares `directory` waits. Raises NotFound when the server
    says that there is none, Unavailable when it cannot be reached or does not send it,
    PreconditionFailed for another content or too little room.
    """
    await asyncio.to_thread(partial(directory.mkdir, mode=0o700, parents=True, exist_ok=True))
    async with _locked(directory / f"{what.sha256}.lock", progress):
        whole = directory / what.sha256
        if not await _is_verified(whole, what, progress):
            whole.unlink(missing_ok=True)  # damaged since it came
            fetch = _copy if what.url.startswith("file:") else _download
            await fetch(what, directory, progress)
        yield whole
        whole.unlink(missing_ok=True)


# --- one at a time ---


@asynccontextmanager
async def _locked(path: Path, progress: Progress) -> AsyncIterator[None]:
    """The lock file `path`, ours; it goes with the lock."""
    # Not in a thread: a cancellation could lose what it has locked, and it does not block.
    while (descriptor := _try_lock(path)) is None:
        progress("download", "another banger is fetching it", UNKNOWN)
        # No event tells of an flock, and a thread that waits for one cannot be cancelled.
        await asyncio.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        await asyncio.shield(asyncio.to_thread(_unlock, path, descriptor))


def _try_lock(path: Path) -> int | None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it before may have removed the file between our open and our lock.
        if path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    os.close(descriptor)
    return None


def _unlock(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


# --- from this machine ---


async def _copy(what: Download, directory: Path, progress: Progress) -> None:
    part = directory / f"{what.sha256}.part"
    try:
        await in_thread(partial(_copy_file, what, part, Steps("download", progress)))
        try:
            await _settle(what, part, progress)
        except _Other as other:
            raise _of_no_use(what, other) from None
    finally:
        part.unlink(missing_ok=True)


def _copy_file(what: Download, part: Path, steps: Steps, check: Callable[[], None]) -> None:
    path = Path(file_path(what.url))
    with open_regular(path) as source, _opened(part, "wb") as target:
        size = os.fstat(source.fileno()).st_size
        if size != what.size_bytes:
            raise _wrong_size(what, size)
        _ensure_room(part.parent, size)
        done = 0
        while (piece := source.read(_PIECE)) and done <= size:
            check()
            done += target.write(piece)
            steps.say(done, size)


# --- from the web ---


async def _download(what: Download, directory: Path, progress: Progress) -> None:
    """Have the whole file in `directory`, in as many tries as get further."""
    import httpx

    check_web_url(what.url)
    part = directory / f"{what.sha256}.part"
    furthest, failures, anew = _size_of(part), 0, False
    async with web.client_for(what.url) as client:
        while True:
            resumed = _size_of(part) > 0
            try:
                if _size_of(part) < what.size_bytes:
                    await _go_on(client, what, part, progress)
                await _settle(what, part, progress)
                return
            except _Other as other:
                _forget(part)
                if anew or not resumed:
                    raise _of_no_use(what, other) from None
                anew, furthest = True, 0
                continue
            except web.Again as again:
                error, pause_s = again.error, again.pause_s
            except httpx.HTTPError as reason:
                error, pause_s = web.unreachable(what.url, reason), 0.0
                if "CERTIFICATE_VERIFY_FAILED" in str(reason):
                    raise error from None
            failures = 0 if _size_of(part) > furthest else failures + 1
            furthest = max(furthest, _size_of(part))
            if failures >= _ATTEMPTS:
                raise error
            progress("download", f"{error.message}; trying again", UNKNOWN)
            usual_s = _FIRST_PAUSE_S * 2 ** max(0, failures - 1)
            await asyncio.sleep(min(max(pause_s, usual_s), _PAUSE_MAX_S))


async def _go_on(client: httpx.AsyncClient, what: Download, part: Path, progress: Progress) -> None:
    """Fetch what is missing of `part`, or all when the server does not go on with it."""
    have, known = _size_of(part), _known(part)
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known is not None and known.url == what.url:
            headers["If-Range"] = known.validator
    async with web.get(client, what.url, headers, check_web_url) as response:
        if response.status_code == 206 and have:
            _check_range(response, what, have)
        elif response.status_code == 200:
            length = response.headers.get("content-length", "")
            if length.isdecimal() and int(length) != what.size_bytes:
                raise _wrong_size(what, int(length))
            have = 0
        elif response.status_code == 416 and have:
            raise _Other("the server has not so much of it")
        else:
            raise web.refusal(response)
        if not have:
            _note_validator(part, what.url, response)
        _ensure_room(part.parent, what.size_bytes - have)
        await _receive(response, what, part, have, progress)


async def _receive(
    response: httpx.Response, what: Download, part: Path, have: int, progress: Progress
) -> None:
    steps = Steps("download", progress)
    done, buffer = have, bytearray()
    with _opened(part, "r+b" if have else "wb") as file:
        file.seek(have)
        try:
            async for piece in response.aiter_raw():
                done += len(piece)
                if done > what.size_bytes:
                    raise _Other(f"it is longer than the {what.size_bytes} bytes it should have")
                buffer += piece
                if len(buffer) >= _PIECE:
                    # Taken out first: a cancellation does not keep the thread from writing it.
                    full, buffer = bytes(buffer), bytearray()
                    await to_its_end(asyncio.to_thread(file.write, full))
                    steps.say(done, what.size_bytes)
        finally:
            if done <= what.size_bytes:
                file.write(buffer)
    if done < what.size_bytes:
        raise web.Again(
            Unavailable(
                f"{shown(what.url)} ended after {format_size(done)} of"
                f" {format_size(what.size_bytes)}"
            )
        )
    steps.say(done, what.size_bytes)


def _check_range(response: httpx.Response, what: Download, have: int) -> None:
    given = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if given is None or int(given[1]) != have or int(given[3]) != what.size_bytes:
        raise _Other("the server sends another part of it, or of another file")


# --- what has come ---


async def _is_verified(path: Path, what: Download, progress: Progress) -> bool:
    try:
        return await in_thread(partial(_verify, path, what, Steps("verify", progress)))
    except NotFound:
        return False


async def _settle(what: Download, part: Path, progress: Progress) -> None:
    """Make a part that is complete the file, if it is what was wanted."""
    if not await in_thread(partial(_verify, part, what, Steps("verify", progress))):
        raise _Other(f"it is not what it should be (its sha256 is not {what.sha256})")
    await asyncio.to_thread(part.replace, part.with_name(what.sha256))
    await asyncio.to_thread(partial(_sidecar(part).unlink, missing_ok=True))


def _verify(path: Path, what: Download, steps: Steps, check: Callable[[], None]) -> bool:
    digest, done = hashlib.sha256(), 0
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            check()
            digest.update(piece)
            done += len(piece)
            steps.say(done, what.size_bytes)
    return done == what.size_bytes and digest.hexdigest() == what.sha256


def _sidecar(part: Path) -> Path:
    return part.with_suffix(".json")


def _known(part: Path) -> _Part | None:
    try:
        known = msgspec.json.decode(_sidecar(part).read_bytes(), type=_Part)
    except (OSError, msgspec.DecodeError):
        return None
    return known if _can_be_sent(known.validator) else None


def _note_validator(part: Path, url: str, response: httpx.Response) -> None:
    """A weak ETag does not say that bytes are the same, and may not be in If-Range."""
    etag = response.headers.get("etag", "")
    validator = etag if etag.startswith('"') else response.headers.get("last-modified", "")
    _sidecar(part).unlink(missing_ok=True)
    if _can_be_sent(validator):
        write_atomically(_sidecar(part), msgspec.json.encode(_Part(url, validator)), durable=False)


def _can_be_sent(validator: str) -> bool:
    """httpx reads headers of any bytes, and sends ASCII alone."""
    return validator != "" and validator.isascii() and validator.isprintable()


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)


@contextmanager
def _opened(part: Path, mode: str) -> Iterator[BinaryIO]:
    """Whoever else can write to the directory shall not lead us elsewhere by a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(part, flags | (os.O_TRUNC if mode == "wb" else 0), 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        yield file


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _ensure_room(directory: Path, need_bytes: int) -> None:
    need_bytes += _KEEP_FREE_BYTES
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise PreconditionFailed(
            f"needs {format_size(need_bytes)} free in {directory}, there is {format_size(free)}",
            hint="free some space there, or point XDG_CACHE_HOME at a larger disk",
        )


def _of_no_use(what: Download, why: Exception) -> PreconditionFailed:
    return PreconditionFailed(
        f"{shown(what.url)} cannot be used: {why}",
        hint="the catalog is out of date, or somebody has changed the file",
    )


def _wrong_size(what: Download, size: int) -> PreconditionFailed:
    return _of_no_use(what, _Other(f"it has {size} bytes, and should have {what.size_bytes}"))
