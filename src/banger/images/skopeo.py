"""skopeo: what speaks with registries, with the user's own credentials and trust.

It verifies every blob against its digest before the blob has its name in the cache, and leaves
those alone that are there; so a pull that was broken off goes on with the layer it was at.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from banger.base import proc
from banger.base.errors import (
    BangerError,
    NotFound,
    OperationTimeout,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from banger.images.oci import Descriptor, Manifest, Reference, decode_manifest, our_architecture
from banger.images.userns import mortal

_COPY_TIMEOUT_S = 24 * 3600
#: How long a registry may send nothing.
_STALL_S = 30.0
_POLL_S = 0.2
_RETRIES = 2

#: Called with how many bytes are there.
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Blobs:
    """A directory of blobs by digest, which pulls share: ``sha256/HEX``."""

    directory: Path

    def path(self, digest: str) -> Path:
        """`digest` is ``sha256:HEX``, checked where it was decoded."""
        algorithm, _, value = digest.partition(":")
        return self.directory / algorithm / value

    def read(self, descriptor: Descriptor) -> bytes:
        """A small one, verified. PreconditionFailed when it is not what its name says."""
        path = self.path(descriptor.digest)
        data = path.read_bytes()
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != descriptor.digest:
            path.unlink()
            raise PreconditionFailed(f"{path} is damaged", hint="try again: it is fetched anew")
        return data


class _Index(msgspec.Struct):
    manifests: tuple[Descriptor, ...]


async def raw_manifest(
    reference: Reference, scratch: Path, *, insecure: bool, advance: Advance
) -> bytes:
    """The manifest or index that a reference names, as it is stored.

    Of an archive it takes a while: skopeo may unpack it first, into `scratch`. See `fetch`.
    """
    options = () if not insecure else ("--tls-verify=false",)
    argv = ["inspect", "--raw", *options, str(reference)]
    timeout_s = _STALL_S if reference.is_remote else _COPY_TIMEOUT_S
    asking = asyncio.create_task(_run(argv, reference, scratch, timeout_s))
    return await _watched(asking, lambda: _size(scratch), advance)


async def fetch(
    reference: Reference,
    announced: Manifest,
    blobs: Blobs,
    scratch: Path,
    *,
    insecure: bool,
    advance: Advance,
) -> Manifest:
    """Bring what `reference` names into `blobs`; its manifest (of the instance for this machine).

    `scratch` is an empty directory on the same file system, for the caller to remove. `advance`
    may raise: that ends it. Raises PermissionDenied, NotFound, Unavailable or PreconditionFailed,
    saying what to do. Cancelled, it leaves no process, and of the blobs those that are whole.
    """
    layout = scratch / "layout"
    argv = [
        *("copy", "--quiet", "--retry-times", str(_RETRIES)),
        *("--override-os", "linux", "--override-arch", our_architecture()),
        *(("--src-tls-verify=false",) if insecure else ()),
        *("--dest-oci-accept-uncompressed-layers", "--dest-shared-blob-dir", str(blobs.directory)),
        *(str(reference), f"oci:{layout}:image"),
    ]
    # Others pull into the same directory: of that, what this manifest names and was not there.
    coming = [blobs.path(layer.digest) for layer in announced.layers]
    coming = [path for path in coming if not path.exists()]

    def there() -> int:
        return _size(scratch) + sum(map(_size_of, coming))

    copying = asyncio.create_task(_run(argv, reference, scratch, _COPY_TIMEOUT_S))
    stall_s = _STALL_S if reference.is_remote else math.inf
    await _watched(copying, there, advance, stall_s)
    index = msgspec.json.decode((layout / "index.json").read_bytes(), type=_Index)
    return decode_manifest(await asyncio.to_thread(blobs.read, index.manifests[0]), str(reference))


async def _watched(
    running: asyncio.Task[bytes],
    measure: Callable[[], int],
    advance: Advance,
    stall_s: float = math.inf,
) -> bytes:
    """What a skopeo prints, whose progress is told; Unavailable when nothing comes for so long."""
    loop = asyncio.get_running_loop()
    before, changed_at = -1, loop.time()
    try:
        while not running.done():
            there = await asyncio.to_thread(measure)
            if there != before:
                before, changed_at = there, loop.time()
                advance(there)
            if loop.time() - changed_at > stall_s:
                raise Unavailable(
                    f"the registry has sent nothing for {stall_s:g} s",
                    hint="try again: the layers that are whole are kept",
                )
            await asyncio.wait({running}, timeout=_POLL_S)
        return await running
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, BangerError):
            await running


def _size(directory: Path) -> int:
    total = 0
    for above, _, files in os.walk(directory):
        total += sum(_size_of(Path(above, name)) for name in files)
    return total


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _policies() -> tuple[str, str]:
    return (
        "/etc/containers/policy.json",
        os.path.expanduser("~/.config/containers/policy.json"),  # noqa: PTH111 - blocks no loop
    )


async def _run(argv: Sequence[str], reference: Reference, scratch: Path, timeout_s: float) -> bytes:
    # Where there is no policy for signatures at all skopeo refuses to work.
    policy = () if any(map(os.path.exists, _policies())) else ("--insecure-policy",)
    skopeo = ["skopeo", "--tmpdir", str(scratch), *policy]
    try:
        done = await proc.run(mortal([*skopeo, *argv]), timeout_s=timeout_s)
    except OperationTimeout as error:
        raise Unavailable(
            f"cannot pull {reference}: it did not come within {timeout_s:g} s",
            hint="check the network, and the name of the registry",
        ) from error
    except proc.ProcessFailed as error:
        raise failure(error.completed.stderr.decode(errors="replace"), reference) from error
    return done.stdout


_SIGNS: Sequence[tuple[str, type[BangerError], str, str]] = (
    (r"server gave HTTP response to HTTPS client", Unavailable, "it does not speak TLS",
     "if it is meant to be so: --insecure"),
    (r"x509|certificate", Unavailable, "its certificate is not one this machine trusts",
     "put its authority's certificate into /etc/containers/certs.d/HOST:PORT/ca.crt"),
    (r"unauthorized|authentication required|denied|\b40[13]\b", PermissionDenied,
     "it wants to know who you are, or there is no such image",
     "log in: skopeo login {registry}"),
    (r"manifest unknown|name unknown|not found|no such file|does not exist|NAME_UNKNOWN", NotFound,
     "there is no such image", "look at the name and the tag"),
    (r"no image found in (manifest list|image index)", NotFound,
     "it is not made for this machine's processor", ""),
    (r"no space left", PreconditionFailed, "the disk is full",
     "free some space: banger image cache prune; or point XDG_CACHE_HOME at a larger disk"),
    (r"[Dd]igest|does not match|unexpected EOF|EOF|corrupt|invalid", Unavailable,
     "what was sent is not what was announced", "try again; layers that are whole are kept"),
    (r"no such host|connection refused|timeout|timed out|unreachable|reset|dial tcp|\b50\d\b",
     Unavailable, "it cannot be reached", "check the network, and the name of the registry"),
)  # fmt: skip


def failure(stderr: str, reference: Reference) -> BangerError:
    """The error for a failed skopeo, with the end of what it said."""
    said = re.findall(r'level=fatal msg="((?:[^"\\]|\\.)*)"', stderr)
    tail = (said or stderr.strip().splitlines() or ["no reason given"])[-1][:600]
    tail = tail.replace('\\"', '"')
    # Names may have any of these words in them.
    named = rf"\S*{re.escape(reference.name)}\S*" if "/" in reference.name else r"\Z"
    about = re.sub(named, "", tail)
    if not reference.is_remote and "permission denied" in about:
        return PreconditionFailed(f"cannot pull {reference}: it may not be read ({tail})")
    for pattern, kind, what, hint in _SIGNS:
        if re.search(pattern, about):
            registry = reference.registry or "the registry's name"
            return kind(
                f"cannot pull {reference}: {what} ({tail})", hint=hint.format(registry=registry)
            )
    return Unavailable(f"cannot pull {reference}: {tail}")
