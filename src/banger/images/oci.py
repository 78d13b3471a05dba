"""Images of the Open Container Initiative: what their references, manifests and configurations say.

All of it comes from registries, folders and archives that nobody vouches for: it is decoded by
type, and what an image may say here is bounded. (https://github.com/opencontainers/image-spec;
Docker's own types differ in their names alone.)
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec

from banger.base.errors import BadRequest, NotFound, PreconditionFailed
from banger.base.malformed import MALFORMED
from banger.base.model import ImageConfig

#: Transports of skopeo that banger takes, and whether what follows is a path.
_TRANSPORTS = {"docker": False, "oci": True, "oci-archive": True, "docker-archive": True}
_NAME = re.compile(r"(?!.*:/)[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")
_DIGEST = r"sha256:[0-9a-f]{64}"

#: What Go, and so OCI, calls the processors.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_LAYERS_MAX = 512
_ENVIRONMENT_BYTES = 64 << 10
_DOCUMENT_BYTES = 4 << 20

_LAYER_TYPE = re.compile(
    r"application/vnd\.(oci\.image\.layer\.v1\.tar|docker\.image\.rootfs\.diff\.tar)"
    r"(\+gzip|\.gzip|\+zstd|)"
)

T = TypeVar("T", bound=msgspec.Struct)
Digest = Annotated[str, msgspec.Meta(pattern=rf"\A{_DIGEST}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Reference:
    """Where an image is: ``transport`` as skopeo has them, and what follows it."""

    transport: str
    rest: str

    def __str__(self) -> str:
        return f"docker://{self.rest}" if self.is_remote else f"{self.transport}:{self.rest}"

    @property
    def name(self) -> str:
        """Of a remote one, without tag and digest."""
        name = self.rest.partition("@")[0]
        above, slash, last = name.rpartition("/")
        return above + slash + last.partition(":")[0]

    @property
    def is_remote(self) -> bool:
        return self.transport == "docker"

    @property
    def registry(self) -> str:
        """The host that it is from, as `skopeo login` wants it; empty for the default one."""
        host, slash, _ = self.rest.partition("/")
        return host if slash and (set(host) & set(".:") or host == "localhost") else ""

    def pinned(self, digest: str) -> Reference:
        """The same, whatever its tag names by then. Only what is remote has digests in names."""
        if not self.is_remote:
            return self
        return Reference(self.transport, f"{self.name}@{digest}")

    def suggested_name(self) -> str:
        """A name for it here: ``debian-12`` for ``registry/library/debian:12``."""
        if self.is_remote:
            last = self.rest.partition("@")[0].rpartition("/")[2]
            name, _, tag = last.partition(":")
        else:
            path, _, tag = self.rest.partition(":")
            name = path.rstrip("/").rpartition("/")[2]
            for ending in (".gz", ".tar", ".tgz", ".oci"):
                name = name.removesuffix(ending)
            tag = tag.rpartition("/")[2].replace(":", "-").partition("@")[0]
        if tag and tag != "latest":
            name = f"{name}-{tag}"
        return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-")[:64] or "image"


def parse_reference(text: str) -> Reference:
    """``debian:12``, ``docker://host/name@digest``, ``oci:DIR[:TAG]``, ``oci-archive:FILE[:TAG]``,
    ``docker-archive:FILE[:NAME]``. BadRequest for anything else."""
    transport, colon, rest = text.partition(":")
    if not colon or transport not in _TRANSPORTS or (transport == "docker" and rest[:2] != "//"):
        transport, rest = "docker", text
    elif transport == "docker":
        rest = rest[2:]
    if _TRANSPORTS[transport]:
        if not rest.startswith("/"):
            raise BadRequest(f'"{text}" needs an absolute path after {transport}:')
        if not rest.isprintable():
            raise BadRequest(f"{text!r} is no path that can be used")
    elif _NAME.fullmatch(rest) is None:
        raise BadRequest(
            f'"{text}" is not a reference of an image',
            hint="it looks like debian:12, registry.example/team/app@sha256:…, oci:DIR or"
            " docker-archive:FILE",
        )
    reference = Reference(transport, rest)
    if reference.is_remote and "@" in rest:
        # NAME:TAG@DIGEST, as people write it in Dockerfiles: the digest alone says which.
        return reference.pinned(rest.partition("@")[2])
    return reference


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: Digest
    size: Size


class Platform(msgspec.Struct, frozen=True, rename="camel"):
    architecture: str = ""
    os: str = ""


class Instance(msgspec.Struct, frozen=True, rename="camel"):
    """One entry of an index."""

    digest: Digest
    platform: Platform = Platform()


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """A manifest, or an index of several: then `manifests` says which there are."""

    config: Descriptor | None = None
    layers: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=_LAYERS_MAX)] = ()
    manifests: Annotated[tuple[Instance, ...], msgspec.Meta(max_length=_LAYERS_MAX)] = ()

    @property
    def size_bytes(self) -> int:
        """Of its layers, as they are stored."""
        return sum(layer.size for layer in self.layers)


class _Process(msgspec.Struct, frozen=True, rename="pascal"):
    env: tuple[str, ...] | None = None
    user: str | None = None
    working_dir: str | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[Digest, ...] = ()


class Configuration(msgspec.Struct, frozen=True):
    """What an image is made of, and how its program is to be run."""

    architecture: str = ""
    os: str = ""
    config: _Process | None = None
    rootfs: _RootFs = _RootFs()


def our_architecture() -> str:
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def decode_manifest(data: bytes, what: str) -> Manifest:
    """PreconditionFailed, naming `what` it is of, for what is no manifest of an image."""
    return _decode(data, Manifest, f"the manifest of {what}")


def decode_configuration(data: bytes, what: str) -> Configuration:
    return _decode(data, Configuration, f"the configuration of {what}")


def _decode(data: bytes, kind: type[T], what: str) -> T:
    if len(data) > _DOCUMENT_BYTES:
        raise PreconditionFailed(f"{what} has {len(data)} bytes, more than any image needs")
    try:
        return msgspec.json.decode(data, type=kind)
    except MALFORMED as error:
        raise PreconditionFailed(f"{what} cannot be used: {error}") from None


def choose_instance(instances: Sequence[Instance], what: str) -> str:
    """The digest of the manifest for this machine, of an index. NotFound if there is none."""
    ours = our_architecture()
    for instance in instances:
        if instance.platform.os == "linux" and instance.platform.architecture == ours:
            return instance.digest
    there = {f"{each.platform.os}/{each.platform.architecture}" for each in instances}
    known = ", ".join(sorted(there - {"/", "unknown/unknown"}))
    raise NotFound(
        f"{what} is not made for linux/{ours}", hint=f"it is for: {known}" if known else ""
    )


def check_manifest(manifest: Manifest, what: str) -> None:
    """Raise PreconditionFailed for layers that cannot be unpacked."""
    if manifest.config is None or not manifest.layers:
        raise PreconditionFailed(
            f"{what} has no layers: it is no image that can be run",
            hint="an image of an old format (schema 1) has to be pushed anew",
        )
    for layer in manifest.layers:
        if _LAYER_TYPE.fullmatch(layer.media_type) is None:
            raise PreconditionFailed(f"{what} has a layer of type {layer.media_type}")


def check_configuration(configuration: Configuration, manifest: Manifest, what: str) -> None:
    """Raise PreconditionFailed for an image that is not for this machine, or not whole."""
    ours = our_architecture()
    if (configuration.os or "linux", configuration.architecture) != ("linux", ours):
        made_for = f"{configuration.os}/{configuration.architecture or 'an unknown processor'}"
        raise PreconditionFailed(f"{what} is made for {made_for}, this machine is linux/{ours}")
    if len(configuration.rootfs.diff_ids) != len(manifest.layers):
        raise PreconditionFailed(
            f"{what} has {len(manifest.layers)} layers, and digests of"
            f" {len(configuration.rootfs.diff_ids)}"
        )


def image_config(configuration: Configuration, what: str) -> ImageConfig:
    """How its program is to be run. What cannot be meant (a variable without ``=``) is left out."""
    given = configuration.config or _Process()
    env = tuple(pair for pair in given.env or () if pair.find("=") > 0 and "\0" not in pair)
    words = (*(given.entrypoint or ()), *(given.cmd or ()))
    if sum(len(each.encode()) + 1 for each in (*env, *words)) > _ENVIRONMENT_BYTES:
        raise PreconditionFailed(
            f"{what} asks for more than {_ENVIRONMENT_BYTES >> 10} KiB of environment and words"
        )
    user, directory = given.user or "", given.working_dir or ""
    if any("\0" in each for each in (user, directory, *words)):
        raise PreconditionFailed(f"the configuration of {what} is damaged")
    return ImageConfig(
        env=env,
        user=user,
        working_dir=f"/{directory.lstrip('/')}" if directory else "",
        entrypoint=given.entrypoint or (),
        cmd=given.cmd or (),
    )
