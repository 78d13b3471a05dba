"""The installation's file is believed only where nobody but root can have written it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from banger.base.errors import NotFound, PreconditionFailed
from banger.base.install import Installation, load_installation
from helper_world import (
    OWNER,
    OWNER_UID,
    write_installation,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run the tests as root for the helper")


def test_the_installation_is_what_its_file_says(tmp_path: Path) -> None:
    path = write_installation(tmp_path / "install.toml")
    wanted = Installation(owner=OWNER, owner_uid=OWNER_UID, version="0.1.0")
    assert load_installation(path) == wanted
    path.write_text(path.read_text() + "later = true\n")
    assert load_installation(path) == wanted


def test_an_installation_that_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    path = write_installation(tmp_path / "install.toml")
    for mode in (0o664, 0o646, 0o666):
        path.chmod(mode)
        with pytest.raises(PreconditionFailed, match="others than root"):
            load_installation(path)
    path.chmod(0o644)
    os.chown(path, OWNER_UID, 0)
    with pytest.raises(PreconditionFailed, match="others than root"):
        load_installation(path)
    os.chown(path, 0, 0)
    tmp_path.chmod(0o777)
    with pytest.raises(PreconditionFailed, match="others than root"):
        load_installation(path)


def test_an_installation_is_no_link_no_pipe_and_of_a_size(tmp_path: Path) -> None:
    real = write_installation(tmp_path / "install.toml")
    with pytest.raises(NotFound, match="not installed"):
        load_installation(tmp_path / "none")
    link = tmp_path / "link"
    link.symlink_to(real)
    with pytest.raises(PreconditionFailed):
        load_installation(link)
    directory = tmp_path / "directory"
    directory.symlink_to(tmp_path)
    with pytest.raises(PreconditionFailed):
        load_installation(directory / "install.toml")
    os.mkfifo(tmp_path / "pipe", 0o644)
    with pytest.raises(PreconditionFailed, match="regular"):
        load_installation(tmp_path / "pipe")
    for text in ("x" * 70_000, "owner = 1", 'owner = "a"\nowner_uid = -1\nversion = ""', "\udcff"):
        real.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(PreconditionFailed):
            load_installation(real)
