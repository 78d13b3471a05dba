"""Archives and OCI layouts, made by hand: what tests give to banger as somebody else's image."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Of Debian's busybox-static: a whole system in one file.
BUSYBOX = Path("/bin/busybox")

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Member:
    """One member of a tar archive; `kind` is its type there."""

    name: str
    data: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    mtime: int = 1_000_000_000
    xattrs: dict[str, bytes] = field(default_factory=dict)


def directory(name: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Member:
    return Member(name, mode=mode, kind=tarfile.DIRTYPE, uid=uid, gid=gid)


def symlink(name: str, target: str) -> Member:
    return Member(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def hard_link(name: str, target: str) -> Member:
    return Member(name, kind=tarfile.LNKTYPE, link=target)


def tar(*members: Member) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as writer:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode, info.type = len(member.data), member.mode, member.kind
            info.linkname, info.mtime = member.link, member.mtime
            info.uid, info.gid = member.uid, member.gid
            info.devmajor, info.devminor = member.device
            info.pax_headers = {
                f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
                for name, value in member.xattrs.items()
            }
            writer.addfile(info, io.BytesIO(member.data))
    return archive.getvalue()


def everything() -> bytes:
    """A small system, with everything in it that a tar can hold."""
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    tools = ("sh", "cat", "ls", "id", "sync", "true", "stat")
    return tar(
        directory("./", 0o755),
        directory("bin"),
        Member("bin/busybox", BUSYBOX.read_bytes(), mode=0o755,
               xattrs={"security.capability": capability}),
        *(symlink(f"bin/{name}", "busybox") for name in tools),
        directory("etc"),
        Member("etc/passwd", b"root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n"),
        directory("home"),
        directory("home/ann", 0o700, 1000, 1000),
        Member("home/ann/setuid", b"x", mode=0o6711, uid=1000, gid=1000,
               xattrs={"user.binary": b"\xff\0="}),
        hard_link("home/ann/same", "home/ann/setuid"),
        Member("far", b"x", uid=200_000, gid=4_000_000_000),
        Member("pipe", kind=tarfile.FIFOTYPE, mode=0o620),
        directory("dev"),
        Member("dev/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666, gid=5),
        Member("dev/disk", kind=tarfile.BLKTYPE, device=(254, 70_000), mode=0o660),
        Member("caf\udce9 \"quoted\"", b"name"),
        directory("root", 0o750),
        Member("root/kept", b"at home", mtime=0),
    )  # fmt: skip


@dataclass
class Layout:
    """A folder in the OCI layout that grows by what is put into it."""

    folder: Path
    architecture: str = "amd64"

    def __post_init__(self) -> None:
        (self.folder / "blobs/sha256").mkdir(parents=True)
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._index([])

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Add a blob; its descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def image(
        self,
        layers: Sequence[bytes],
        config: dict[str, Any] | None = None,
        *,
        compress: bool = True,
        **differently: Any,
    ) -> dict[str, Any]:
        """Add an image of these archives; the descriptor of its manifest. `differently` replaces
        fields of its configuration."""
        described = [
            self.blob(gzip.compress(layer, 1, mtime=0), f"{_LAYER}+gzip")
            if compress
            else self.blob(layer, _LAYER)
            for layer in layers
        ]
        digests = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        configuration = {
            "architecture": self.architecture,
            "os": "linux",
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": digests},
            **differently,
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": self.blob(
                json.dumps(configuration).encode(), "application/vnd.oci.image.config.v1+json"
            ),
            "layers": described,
        }
        descriptor = self.blob(json.dumps(manifest).encode(), _MANIFEST)
        self._index([descriptor])
        return descriptor

    def many(self, images: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Make it an index of images that were added, each with its processor."""
        index = {
            "schemaVersion": 2,
            "mediaType": _INDEX,
            "manifests": [
                descriptor | {"platform": {"os": "linux", "architecture": architecture}}
                for architecture, descriptor in images
            ],
        }
        self._index([self.blob(json.dumps(index).encode(), _INDEX)])

    def _index(self, manifests: list[dict[str, Any]]) -> None:
        index = {"schemaVersion": 2, "manifests": manifests}
        (self.folder / "index.json").write_text(json.dumps(index))
