"""This checkout's tests on a guest as the host: what runs them there, and what images they take.

They are held to banger as it is installed on the host.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from guest_host import GUESTS_PYTHON, GuestHost
from product import DEFAULT_IMAGE, IMAGE, SLOWNESS_VARIABLE, Banger

_TESTS = Path(__file__).parents[1]
#: What the tests import, and banger does not.
_PACKAGES = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "jsonschema", "PyYAML")
_PLACE = "/root/suite"
#: How many times longer all takes on such a host, where it is emulated.
_SLOWNESS = 4
_IMAGES = "/srv/images"


def run_words(part: str, chosen: str = "") -> list[str]:
    """The command that runs tests of a file or folder of ours; `chosen` as pytest's -k has it."""
    return [
        *("env", f"{SLOWNESS_VARIABLE}={_SLOWNESS}"),
        *("/opt/banger/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("-c", f"{_PLACE}/pyproject.toml", f"{_PLACE}/tests/{part}", "--images", _IMAGES),
        *(("-k", chosen) if chosen else ()),
    ]


def put_tests(host: GuestHost, scratch: Path) -> None:
    """Have `host` ready to run them, with the small image. `scratch` is an empty directory."""
    _put_packages(host, scratch)
    ignored = shutil.ignore_patterns("__pycache__", "corpus")
    shutil.copytree(_TESTS, scratch / "tests", ignore=ignored)
    host.put(scratch / "tests", f"{_PLACE}/tests")
    host.put(_TESTS.parent / "pyproject.toml", f"{_PLACE}/pyproject.toml")
    # These are there.
    host.root(f"mkdir {_IMAGES}; ln /srv/vmlinux {_IMAGES}/vmlinux")
    host.root(f"ln /srv/rootfs.ext4 {_IMAGES}/{IMAGE}.ext4")


def put_default_image(host: GuestHost, scratch: Path) -> None:
    """Have them find the default image, too. It is mostly holes, which an archive has not."""
    rootfs = _default_rootfs(host.banger)
    archive = scratch / "image.tar"
    name = f"--transform=s/.*/{DEFAULT_IMAGE}.ext4/"
    subprocess.run(
        ["tar", "-C", rootfs.parent, "-cSf", archive, name, rootfs.name], check=True, timeout=300
    )
    host.put(archive, f"{_IMAGES}/image.tar")
    archive.unlink()
    host.root(f"cd {_IMAGES}; tar -xSf image.tar; rm image.tar", timeout_s=600)


def _put_packages(host: GuestHost, scratch: Path) -> None:
    packages = scratch / "packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
    as_here = [f"{name}=={version(name)}" for name in _PACKAGES]
    download: list[str | Path] = [*pip, "download", *GUESTS_PYTHON, "-d", packages, *as_here]
    subprocess.run(download, check=True, timeout=300)
    host.root(f"mkdir {_PLACE}")
    host.put(packages, f"{_PLACE}/packages")
    install = "/opt/banger/bin/pip --disable-pip-version-check install --quiet --no-index"
    host.root(f"{install} --find-links {_PLACE}/packages {' '.join(_PACKAGES)}", timeout_s=600)


def _default_rootfs(banger: Banger) -> Path:
    if DEFAULT_IMAGE not in {each["name"] for each in banger.json("image", "list")}:
        done = banger.run("image", "build", "-q", DEFAULT_IMAGE, timeout_s=800)
        assert done.returncode == 0, done.stderr.decode()
    return Path(banger.json("image", "show", DEFAULT_IMAGE)["rootfs_path"])
