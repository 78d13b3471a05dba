"""Catalogs: a file of the user's choice that says which images and kernels there are to pull.

TOML or JSON::

    version = 1

    [[kernels]]
    name = "debian"
    url = "debian.tar.zst"          # relative to the catalog
    sha256 = "…"                    # of the bundle, 64 hex digits
    size_bytes = 81234567
    description = "Debian's cloud kernel"
    architecture = "x86_64"

``[[images]]`` have the same fields, and may name the ``kernel`` that boots them. A bundle may come
by any way, since its digest is here; the catalog itself only by one that nobody else can write to.
"""

from __future__ import annotations

import asyncio
import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec
from msgspec import Meta

from banger.base.errors import BadRequest, BangerError, NotFound, PreconditionFailed
from banger.base.files import open_regular
from banger.base.model import check_artifact_name
from banger.base.units import format_size
from banger.base.url import check_authentic, check_web_url, file_path, shown
from banger.images.download import Download
from banger.images.web import fetch_small

CATALOG_MAX_BYTES = 4 << 20
_VERSION = 1
_BUNDLE_MAX_BYTES = 1 << 40
_NAMES_SHOWN = 12
_DOTS_MAX = 200


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An image or a kernel that can be pulled; ``url`` is absolute once it is loaded."""

    name: str
    url: str
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size_bytes: Annotated[int, Meta(gt=0, le=_BUNDLE_MAX_BYTES)]
    description: str = ""
    architecture: str

    @property
    def download(self) -> Download:
        return Download(self.url, self.sha256, self.size_bytes)


class ImageEntry(Entry, frozen=True, kw_only=True):
    #: The name of the kernel that boots it; empty: the usual one.
    kernel: str = ""


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Catalog:
    """``location`` is where it was found, for messages."""

    location: str
    images: tuple[ImageEntry, ...]
    kernels: tuple[Entry, ...]

    def image(self, name: str, architecture: str) -> ImageEntry:
        """The image of this name for this kind of machine. Raises NotFound with what is there."""
        return self._find("image", self.images, name, architecture)

    def kernel(self, name: str, architecture: str) -> Entry:
        """As `image`."""
        return self._find("kernel", self.kernels, name, architecture)

    def _find(self, kind: str, entries: Sequence[E], name: str, architecture: str) -> E:
        named = [each for each in entries if each.name == name]
        for entry in named:
            if entry.architecture == architecture:
                return entry
        if named:
            others = ", ".join(each.architecture for each in named)
            raise NotFound(f'the {kind} "{name}" in {self.location} is for {others} only')
        usable = [each.name for each in entries if each.architecture == architecture]
        if near := difflib.get_close_matches(name, usable, n=3):
            hint = f"did you mean {' or '.join(near)}?"
        elif usable:
            more = ", …" if len(usable) > _NAMES_SHOWN else ""
            hint = f"it has: {', '.join(sorted(usable)[:_NAMES_SHOWN])}{more}"
        else:
            hint = f"it has no {kind}s for {architecture}"
        raise NotFound(f'there is no {kind} "{name}" in {self.location}', hint=hint)


async def load_catalog(location: str) -> Catalog:
    """The catalog at `location` (`url.check_catalog_location`).

    Raises PreconditionFailed when there is none configured, NotFound and Unavailable when it does
    not come, PreconditionFailed, with the entry and the field, when it is not as it should be.
    """
    if not location:
        raise PreconditionFailed(
            "there is no catalog to pull from",
            hint='name one in config.toml: catalog_url = "https://…/catalog.toml"',
        )
    if location.startswith(("/", "~/", "file:")):
        path = file_path(location) if location.startswith("file:") else location
        return await asyncio.to_thread(_load_file, Path(path))
    found = await fetch_small(location, CATALOG_MAX_BYTES, check_authentic)
    return await asyncio.to_thread(parse_catalog, found.content, found.url)


def _load_file(path: Path) -> Catalog:
    path = path.expanduser()
    with open_regular(path) as file:
        content = file.read(CATALOG_MAX_BYTES + 1)
    if len(content) > CATALOG_MAX_BYTES:
        raise PreconditionFailed(f"{path} is larger than {format_size(CATALOG_MAX_BYTES)}")
    return parse_catalog(content, path.absolute().as_uri())


def parse_catalog(content: bytes, base: str) -> Catalog:
    """The catalog with this content, found at the URL `base`. Raises PreconditionFailed."""
    shown_base = shown(base)
    try:
        raw = _decode(content, urlsplit(base).path)
        if raw.get("version") != _VERSION:
            raise BadRequest(f"its version is {raw.get('version')!r}; this banger knows {_VERSION}")
        return Catalog(
            location=shown_base,
            images=_entries(raw, "images", ImageEntry, base),
            kernels=_entries(raw, "kernels", Entry, base),
        )
    except BangerError as error:
        raise PreconditionFailed(
            f"the catalog {shown_base} cannot be used: {error.message}", hint=error.hint
        ) from None


def _decode(content: bytes, path: str) -> dict[str, Any]:
    if path.endswith(".json"):
        as_json = True
    else:
        as_json = not path.endswith(".toml") and content.lstrip()[:1] == b"{"
    try:
        if as_json:
            return msgspec.json.decode(content, type=dict[str, Any])
        text = content.decode()
        # The time that tomllib takes for a key grows with the square of its dots.
        if any(line.count(".") > _DOTS_MAX for line in text.split("\n")):
            raise BadRequest(f"a line in it has more than {_DOTS_MAX} dots")
        return tomllib.loads(text)
    except (msgspec.DecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"it is not valid {'JSON' if as_json else 'TOML'}: {error}") from None
    except RecursionError:
        raise BadRequest("it is nested too deeply") from None


def _entries(raw: dict[str, Any], key: str, kind: type[E], base: str) -> tuple[E, ...]:
    listed = raw.get(key, [])
    if not isinstance(listed, list):
        raise BadRequest(f"{key} is not a list")
    found: dict[tuple[str, str], E] = {}
    for number, each in enumerate(listed, start=1):
        entry = _entry(each, key, number, kind, base)
        if found.setdefault((entry.name, entry.architecture), entry) is not entry:
            raise BadRequest(f'{key}: there are two "{entry.name}" for {entry.architecture}')
    return tuple(found.values())


def _entry(raw: object, key: str, number: int, kind: type[E], base: str) -> E:
    name = raw.get("name") if isinstance(raw, dict) else None
    what = f'{key}, "{name}"' if isinstance(name, str) else f"{key}, number {number}"
    try:
        entry = msgspec.convert(raw, kind)
        check_artifact_name(entry.name)
        url = _absolute(entry.url, base)
    except msgspec.ValidationError as error:
        # "Expected `str`, got `int` - at `$.url`"
        text, _, place = str(error).partition(" - at `$")
        field = place.strip("`.")
        raise BadRequest(f"{what}: {field}: {text}" if field else f"{what}: {text}") from None
    except BangerError as error:
        raise BadRequest(f"{what}: {error.message}", hint=error.hint) from None
    return msgspec.structs.replace(entry, url=url)


def _absolute(url: str, base: str) -> str:
    """Where a bundle lies. A catalog of the web does not name files of this machine."""
    try:
        absolute = urljoin(base, url)
    except ValueError as error:
        raise BadRequest(f"url: {error}") from None
    if absolute.startswith("file:") and base.startswith("file:"):
        file_path(absolute)
    else:
        check_web_url(absolute)
    return absolute
