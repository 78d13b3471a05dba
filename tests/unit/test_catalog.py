"""Catalogs: what they may say, where they may lie, and errors that name the entry and the field."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.errors import BadRequest, BangerError, NotFound, PermissionDenied
from banger.base.errors import PreconditionFailed as Refused
from banger.base.url import check_catalog_location, check_redirect, shown
from banger.images.catalog import CATALOG_MAX_BYTES, Catalog, load_catalog, parse_catalog

BASE = "https://example.org/dir/catalog"
ENTRY = {
    "name": "debian",
    "url": "debian.tar.zst",
    "sha256": "ab" * 32,
    "size_bytes": 7,
    "architecture": "x86_64",
}


def parsed(*kernels: dict[str, Any], base: str = BASE, **fields: object) -> Catalog:
    raw = {"version": 1, "kernels": kernels, **fields}
    return parse_catalog(json.dumps(raw).encode(), base)


def toml() -> bytes:
    lines = [f"{key} = {json.dumps(value)}" for key, value in ENTRY.items()]
    return "\n".join(["version = 1", "[[kernels]]", *lines]).encode()


@pytest.mark.parametrize("base", [BASE, f"{BASE}.toml"])
def test_toml_and_json_say_the_same(base: str) -> None:
    found = parse_catalog(toml(), base).kernel("debian", "x86_64")
    assert found == parsed(ENTRY).kernel("debian", "x86_64")
    assert found.download.url == "https://example.org/dir/debian.tar.zst"
    assert (found.download.sha256, found.download.size_bytes) == ("ab" * 32, 7)


def test_the_suffix_says_what_a_catalog_is_written_in() -> None:
    with pytest.raises(Refused, match="is not valid JSON"):
        parse_catalog(toml(), f"{BASE}.json")
    with pytest.raises(Refused, match="is not valid TOML"):
        parse_catalog(b"{}", f"{BASE}.toml")


def test_an_image_may_name_its_kernel() -> None:
    image = ENTRY | {"kernel": "other", "description": "An image"}
    found = parsed(images=[image, ENTRY | {"name": "plain"}])
    assert found.image("debian", "x86_64").kernel == "other"
    assert found.image("plain", "x86_64").kernel == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"size_bytes": "7"}, 'kernels, "debian": size_bytes: Expected `int`, got `str`'),
        ({"size_bytes": 0}, 'kernels, "debian": size_bytes: Expected `int` >= 1'),
        ({"sha256": "AB" * 32}, 'kernels, "debian": sha256: '),
        ({"sha256": "ab" * 32 + "\n"}, 'kernels, "debian": sha256: '),
        ({"url": 3}, 'kernels, "debian": url: Expected `str`, got `int`'),
        ({"url": "file:///etc/passwd"}, 'kernels, "debian": "file:///etc/passwd" is not a URL of'),
        ({"url": "http://[x/"}, 'kernels, "debian": url: Invalid IPv6 URL'),
        ({"url": "ftp://example.org/x"}, 'kernels, "debian": "ftp://example.org/x" is not a URL'),
        ({"url": "http://example.org:99999/"}, "is not a URL: Port out of range"),
        ({"name": "../x"}, 'kernels, "../x": "../x" is not a valid image or kernel name'),
        ({"name": 5}, "kernels, number 1: name: Expected `str`, got `int`"),
    ],
)
def test_an_entry_that_is_wrong_is_named_with_its_field(
    change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(Refused) as caught:
        parsed(ENTRY | change)
    assert caught.value.message.startswith(f"the catalog {BASE} cannot be used: ")
    assert problem in caught.value.message


@pytest.mark.parametrize("field", ENTRY)
def test_what_is_needed_and_missing_is_named(field: str) -> None:
    with pytest.raises(Refused, match=f"missing required field `{field}`"):
        parsed({key: value for key, value in ENTRY.items() if key != field})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "its version is None; this banger knows 1"),
        (b"version = 2", "its version is 2"),
        (b"version = 1\nkernels = 3", "kernels is not a list"),
        (b"version = 1\nimages = [3]", "images, number 1: Expected `object`, got `int`"),
        (b"[]", "is not valid"),
        (b"{", "is not valid JSON"),
        (b'{"a":' * 20_000, "nested too deeply"),
        (b"a = " + b"[" * 20_000, "nested too deeply"),
        (b"a" + b".a" * 201 + b" = 1", "a line in it has more than 200 dots"),
        (b'a."\xe2\x80\xa8"' * 201 + b" = 1", "a line in it has more than 200 dots"),
        (b"a" + b".a" * 200 + b" = 1", "its version is None"),
        (b"\xff\xfe", "is not valid TOML"),
        (toml() + b"\n" + toml()[12:], 'there are two "debian" for x86_64'),
    ],
)
def test_what_is_no_catalog_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_catalog(content, BASE)
    assert problem in caught.value.message


@given(st.binary(max_size=200))
def test_any_content_is_a_catalog_or_refused(content: bytes) -> None:
    with suppress(Refused):
        parse_catalog(content, BASE)


def test_what_is_not_there_says_what_could_be_meant() -> None:
    catalog = parsed(ENTRY, ENTRY | {"name": "arm", "architecture": "aarch64"})
    with pytest.raises(NotFound) as near:
        catalog.kernel("debain", "x86_64")
    assert near.value.hint == "did you mean debian?"
    with pytest.raises(NotFound) as far:
        catalog.kernel("zzz", "x86_64")
    assert far.value.hint == "it has: debian"
    with pytest.raises(NotFound, match=f'the kernel "arm" in {BASE} is for aarch64 only'):
        catalog.kernel("arm", "x86_64")
    with pytest.raises(NotFound) as none:
        catalog.image("debian", "x86_64")
    assert none.value.hint == "it has no images for x86_64"


async def test_a_catalog_that_is_a_file_names_files_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a b" / "catalog.toml"
    file.parent.mkdir()
    file.write_bytes(toml())
    for location in (str(file), file.as_uri()):
        catalog = await load_catalog(location)
        found = catalog.kernel("debian", "x86_64").url
        assert found == (file.parent / "debian.tar.zst").as_uri()


async def test_a_catalog_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.json").write_text('{"version": 1}')
    assert (await load_catalog("~/c.json")).kernels == ()


async def test_a_catalog_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    with pytest.raises(Refused) as none:
        await load_catalog("")
    assert "catalog_url" in none.value.hint
    with pytest.raises(NotFound, match="is not there"):
        await load_catalog(str(tmp_path / "none"))
    with pytest.raises(Refused, match="is not a regular file"):
        await load_catalog("/dev/zero")
    (tmp_path / "large").write_bytes(bytes(CATALOG_MAX_BYTES + 1))
    with pytest.raises(Refused, match="is larger than 4 MiB"):
        await load_catalog(str(tmp_path / "large"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "/srv/catalog.toml", "~/catalog.json", "file:///srv/c", "file://localhost/srv/c"),
        *("https://example.org/c", "http://127.0.0.1:8000/c", "http://localhost/c"),
        "http://[::1]:80/c",
    ],
)
def test_a_catalog_may_lie_there(text: str) -> None:
    assert check_catalog_location(text) == text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("catalog.toml", BadRequest),
        ("./catalog.toml", BadRequest),
        ("ftp://example.org/c", BadRequest),
        ("https://", BadRequest),
        ("https://example.org:x/c", BadRequest),
        ("file://example.org/c", BadRequest),
        ("file:///a%00b", BadRequest),
        ("http://example.org/c", PermissionDenied),
        ("http://127.0.0.1.example.org/c", PermissionDenied),
        ("http://10.0.0.1/c", PermissionDenied),
    ],
)
def test_a_catalog_may_not_lie_there(text: str, kind: type[BangerError]) -> None:
    with pytest.raises(kind) as caught:
        check_catalog_location(text)
    if kind is PermissionDenied:
        assert "anybody on the way" in caught.value.message
        assert "https" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("https://a/", "https://b/", True),
        ("http://a/", "http://b/", True),
        ("http://a/", "https://b/", True),
        ("https://a/", "http://a/", False),
        ("https://a/", "file:///etc/passwd", False),
        ("http://a/", "ftp://a/", False),
    ],
)
def test_redirects_lead_to_the_web_and_never_out_of_https(
    source: str, target: str, allowed: bool
) -> None:
    if allowed:
        check_redirect(source, target)
    else:
        with pytest.raises(PermissionDenied):
            check_redirect(source, target)


def test_what_may_be_secret_in_a_url_is_not_shown() -> None:
    assert shown("https://me:pass@example.org:8/x?token=1#y") == "https://example.org:8/x"
    with pytest.raises(PermissionDenied) as caught:
        check_catalog_location("http://me:pass@example.org/x?token=1")
    assert "pass" not in caught.value.message
    assert "token" not in caught.value.message
