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
