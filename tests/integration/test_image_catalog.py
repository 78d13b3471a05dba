"""Images as bundles of a catalog: written, found, fetched, booted."""

from __future__ import annotations

from pathlib import Path

import pytest

from ext4_trees import tree_of
from homes import Home
from product import IMAGE, Banger

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def catalog(banger: Banger, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of the session's image, and its bundle beside it."""
    directory = tmp_path_factory.mktemp("catalog")
    entry = banger.ok("image", "export", "-q", image, directory / "small.tar.zst")
    file = directory / "catalog.toml"
    file.write_text(f"version = 1\n\n{entry}")
    return file


@pytest.fixture
def with_catalog(home: Home, catalog: Path) -> Home:
    home.configure(f'catalog_url = "{catalog}"')
    home.banger.run("daemon", "stop")
    return home


def _images(home: Home) -> list[str]:
    return [each["name"] for each in home.banger.json("image", "list")]


def _left(home: Home) -> list[str]:
    known = {each["id"] for each in home.banger.json("image", "list")}
    return [each.name for each in (home.data / "images").iterdir() if each.name not in known]


def test_pulled_back_it_is_the_same(with_catalog: Home) -> None:
    banger = with_catalog.banger
    assert banger.ok("image", "pull", f"catalog:{IMAGE}", "--name", "back").startswith("back (")
    there, here = (banger.json("image", "show", name) for name in (IMAGE, "back"))
    assert [tree_of(Path(each["rootfs_path"])) for each in (there, here)] == [
        tree_of(Path(there["rootfs_path"]))
    ] * 2
    assert (here["packages"], here["init"]) == (there["packages"], there["init"])
    assert here["digest"].startswith("sha256:")
    for options in ((), ("--cold", "--disk-size", "20G")):
        words = ("vm", "run", "-q", "--rm", "--image", "back", *options, "--", "df", "-k", "/root")
        size_kib = int(banger.ok(*words).splitlines()[-1].split()[1])
        assert size_kib > (19 << 20 if options else 7 << 20)
    again = banger.run("image", "pull", IMAGE, "--name", "back")
    assert (again.returncode, b"is up to date" in again.stderr) == (0, True)


def test_what_the_catalog_does_not_have(with_catalog: Home, home: Home) -> None:
    said = with_catalog.banger.fails("image", "pull", "catalog:debian-bookwrm-minimal", status=1)
    assert 'there is no image "debian-bookwrm-minimal"' in said
    assert f"did you mean {IMAGE}?" in said


def test_without_a_catalog(home: Home) -> None:
    said = home.banger.fails("image", "pull", "catalog:any", status=1)
    assert "there is no catalog to pull from" in said
    assert "catalog_url" in said


def test_a_bundle_that_is_not_what_the_catalog_says(with_catalog: Home, catalog: Path) -> None:
    bundle = catalog.with_name("small.tar.zst")
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[:-100] + bytes(100))
    try:
        said = with_catalog.banger.fails(
            "image", "pull", f"catalog:{IMAGE}", "--name", "x", status=1
        )
        assert "sha256" in said or "digest" in said
        assert _images(with_catalog) == [IMAGE]
        assert _left(with_catalog) == []
    finally:
        bundle.write_bytes(whole)
    with_catalog.banger.ok("image", "pull", f"catalog:{IMAGE}", "--name", "x")


@pytest.mark.parametrize("stage", ["catalog", "download", "unpack", "finish"])
def test_the_daemon_is_killed_in_each_stage(with_catalog: Home, stage: str) -> None:
    banger = with_catalog.banger
    words = ("image", "pull", f"catalog:{IMAGE}", "--name", "x")
    faulty = Banger(banger.environment | {"BANGER_FAULT": f"SIGKILL@image.pull:{stage}"})
    assert faulty.run(*words).returncode != 0
    with_catalog.await_end_of_processes()
    assert _images(with_catalog) == [IMAGE]
    assert _left(with_catalog) == []
    banger.ok(*words)


@pytest.mark.parametrize("stage", ["pack", "finish"])
def test_the_daemon_is_killed_in_an_export(home: Home, tmp_path: Path, stage: str) -> None:
    target = tmp_path / "bundle"
    faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@image.export:{stage}"})
    assert faulty.run("image", "export", IMAGE, target).returncode != 0
    home.await_end_of_processes()
    assert list(tmp_path.iterdir()) == []
    assert _left(home) == []
    assert f'name = "{IMAGE}"' in home.banger.ok("image", "export", IMAGE, target)
