"""References, manifests and configurations of images, as people and registries write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from banger.base.errors import (
    BadRequest,
    BangerError,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from banger.base.model import ImageConfig
from banger.images import oci, skopeo
from banger.images.oci import Reference, parse_reference

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "reference", "name"),
    [
        ("debian:12", "docker://debian:12", "debian-12"),
        ("debian", "docker://debian", "debian"),
        ("debian:latest", "docker://debian:latest", "debian"),
        ("docker://host:5000/a/b:1.0", "docker://host:5000/a/b:1.0", "b-1.0"),
        ("host:5000/team/app", "docker://host:5000/team/app", "app"),
        (f"team/app@sha256:{HEX}", f"docker://team/app@sha256:{HEX}", "app"),
        (f"team/app:1.2@sha256:{HEX}", f"docker://team/app@sha256:{HEX}", "app"),
        ("team/App_1:V2", "docker://team/App_1:V2", "app_1-v2"),
        ("oci:/tmp/My Layout", "oci:/tmp/My Layout", "my-layout"),
        ("oci:/tmp/layout:tag", "oci:/tmp/layout:tag", "layout-tag"),
        ("oci-archive:/x/app.tar", "oci-archive:/x/app.tar", "app"),
        ("docker-archive:/x/app.tar.gz:team/app:1", "docker-archive:/x/app.tar.gz:team/app:1",
         "app-app-1"),
    ],
)  # fmt: skip
def test_references_and_the_names_they_suggest(text: str, reference: str, name: str) -> None:
    parsed = parse_reference(text)
    assert str(parsed) == reference
    assert parsed.suggested_name() == name


@pytest.mark.parametrize(
    "text",
    ["", "-debian", "dir:/x", "docker://", "a b", "debian;ls", "oci:relative", "oci:",
     "dir:/tmp/x", "docker-daemon:x y", "debian\n", "oci:/a\nb", "x" * 600],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "pinned", "registry"),
    [
        ("debian:12", f"docker://debian@sha256:{HEX}", ""),
        ("host:5000/a/b:1", f"docker://host:5000/a/b@sha256:{HEX}", "host:5000"),
        ("host:5000/a/b", f"docker://host:5000/a/b@sha256:{HEX}", "host:5000"),
        ("localhost/a@sha256:" + "b" * 64, f"docker://localhost/a@sha256:{HEX}", "localhost"),
        ("library/debian", f"docker://library/debian@sha256:{HEX}", ""),
    ],
)
def test_what_a_tag_means_is_settled_once(text: str, pinned: str, registry: str) -> None:
    reference = parse_reference(text)
    assert str(reference.pinned(f"sha256:{HEX}")) == pinned
    assert reference.registry == registry


def test_what_has_no_digests_in_its_names_stays_as_it_is() -> None:
    reference = Reference("oci", "/tmp/layout")
    assert reference.pinned(f"sha256:{HEX}") == reference


def _manifest(**fields: Any) -> bytes:
    blob = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": f"sha256:{HEX}", "size": 5}  # fmt: skip
    return json.dumps({"config": blob, "layers": [blob], **fields}).encode()


def test_a_manifest_that_can_be_used() -> None:
    manifest = oci.decode_manifest(_manifest(), "x")
    oci.check_manifest(manifest, "x")
    assert manifest.size_bytes == 5


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 100_000,
        _manifest(layers=[{"mediaType": "x", "digest": "sha256:../../etc/passwd", "size": 1}]),
        _manifest(layers=[{"mediaType": "x", "digest": f"md5:{HEX}", "size": 1}]),
        _manifest(layers=[{"mediaType": "x", "digest": f"sha256:{HEX}", "size": -1}]),
        _manifest(layers="many"),
        _manifest(padding="x" * (5 << 20)),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used(data: bytes) -> None:
    with pytest.raises(PreconditionFailed, match=r"the manifest of x"):
        oci.decode_manifest(data, "x")


@pytest.mark.parametrize(
    "media_type",
    ["application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
     "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "text/html"],
)  # fmt: skip
def test_layers_that_cannot_be_unpacked(media_type: str) -> None:
    layer = {"mediaType": media_type, "digest": f"sha256:{HEX}", "size": 5}
    with pytest.raises(PreconditionFailed, match=r"x has a layer of type"):
        oci.check_manifest(oci.decode_manifest(_manifest(layers=[layer]), "x"), "x")


def test_the_instance_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    index = oci.decode_manifest(
        json.dumps(
            {
                "manifests": [
                    {"digest": f"sha256:{letter * 64}",
                     "platform": {"os": system, "architecture": processor}}
                    for letter, system, processor in (
                        ("a", "linux", "amd64"), ("b", "windows", "arm64"),
                        ("c", "linux", "arm64"), ("d", "unknown", "unknown"))
                ]
            }
        ).encode(),
        "x",
    )  # fmt: skip
    assert oci.choose_instance(index.manifests, "x") == f"sha256:{'c' * 64}"
    with pytest.raises(NotFound, match="x is not made for linux/arm64") as missing:
        oci.choose_instance(index.manifests[:2], "x")
    assert missing.value.hint == "it is for: linux/amd64, windows/arm64"


def _configuration(**config: Any) -> oci.Configuration:
    data = {"architecture": "amd64", "os": "linux", "config": config or None, "rootfs": {}}
    return oci.decode_configuration(json.dumps(data).encode(), "x")


def test_an_image_may_say_nothing_of_its_program() -> None:
    assert oci.image_config(_configuration(), "x") == ImageConfig()
    assert oci.image_config(_configuration(Env=None, Cmd=None, User=None), "x") == ImageConfig()


def test_what_cannot_be_meant_is_left_out_and_a_directory_is_absolute() -> None:
    told = oci.image_config(
        _configuration(Env=["A=b=c", "A", "=x", "B=\0", "E="], WorkingDir="work"), "x"
    )
    assert told == ImageConfig(env=("A=b=c", "E="), working_dir="/work")


@pytest.mark.parametrize(
    "config", [{"User": "a\0b"}, {"Cmd": ["\0"]}, {"Env": ["A=" + "x" * 65536]}]
)
def test_what_no_program_can_be_run_with(config: dict[str, Any]) -> None:
    with pytest.raises(PreconditionFailed):
        oci.image_config(_configuration(**config), "x")


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [
        ("pinging registry h:1: http: server gave HTTP response to HTTPS client", Unavailable,
         "--insecure"),
        ("pinging registry h:1: x509: certificate signed by unknown authority", Unavailable,
         "certs.d"),
        ("reading manifest 1 in h:1/a: unauthorized: authentication required", PermissionDenied,
         "skopeo login h:5000"),
        ("reading manifest 1 in h/a: manifest unknown: manifest unknown", NotFound, "the tag"),
        ("dial tcp: lookup h: no such host", Unavailable, "network"),
        ("received unexpected HTTP status: 503 Service Unavailable", Unavailable, "network"),
        ("writing blob: write /x: no space left on device", PreconditionFailed, "cache prune"),
        ("writing blob: Digest did not match, expected sha256:40155", Unavailable, "try again"),
    ],
)  # fmt: skip
def test_what_skopeo_says_becomes_what_to_do(said: str, kind: type[BangerError], hint: str) -> None:
    stderr = f'time="2026-01-01T00:00:00Z" level=fatal msg="{said}"\n'
    error = skopeo.failure(stderr, parse_reference("h:5000/a/b:1"))
    assert type(error) is kind
    assert error.message.startswith("cannot pull docker://h:5000/a/b:1: ")
    assert hint in error.hint


def test_an_archive_that_may_not_be_read_is_no_matter_of_logging_in() -> None:
    said = 'level=fatal msg="open /x/a.tar: permission denied"\n'
    error = skopeo.failure(said, parse_reference("oci-archive:/x/a.tar"))
    assert type(error) is PreconditionFailed
    assert "it may not be read" in error.message
    assert error.hint == ""


def test_what_is_not_known_is_told_as_it_was_said() -> None:
    error = skopeo.failure("something new\n", parse_reference("a"))
    assert error.message == "cannot pull docker://a: something new"
