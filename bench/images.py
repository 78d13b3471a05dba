"""A 1 GB image made ready to boot, beside the usual tools doing the same; what it takes of memory
and disk meanwhile; a build beside bare mmdebstrap; and what the 2nd to the 20th VM of one image
take of the disk, beside copies of the image.

The image is Debian as banger builds it and as much again in files that no compression makes
smaller, in two layers. Its floor: skopeo copy, umoci unpack, mke2fs -d.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Self

from banger.base.model import Image
from bench.home import Home
from bench.measure import Figure, Target, timed

_ROUNDS = 2
_TARGET = Target(times=1.2)
_LARGE_FILES, _LARGE_BYTES = 60, 6 << 20
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_NAME = "bench-pulled"
_SAMPLE_S = 0.05
_SIBLINGS = 20
_EXT4 = ("mke2fs", "-q", "-F", "-t", "ext4", "-E", "assume_storage_prezeroed=1")


class Peak:
    """The most memory that this process's descendants and the daemon's have held at once, and the
    most disk that was taken, while it is entered: bytes."""

    def __init__(self, home: Home) -> None:
        status = json.loads(home.banger("daemon", "status", "--json"))
        self._roots = {os.getpid(), int(status["pid"])}
        self._directory = home.directory
        self._own = {pid: _resident(pid) for pid in self._roots}
        self._ended = threading.Event()
        self.memory_bytes = self.disk_bytes = 0

    def __enter__(self) -> Self:
        self._free = shutil.disk_usage(self._directory).free
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            taken = self._free - shutil.disk_usage(self._directory).free
            self.disk_bytes = max(self.disk_bytes, taken)
            self.memory_bytes = max(self.memory_bytes, self._memory())

    def _memory(self) -> int:
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                except OSError:
                    continue
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        family = set(self._roots)
        while grown := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= grown
        return sum(max(0, _resident(pid) - self._own.get(pid, 0)) for pid in family)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def measure(home: Home) -> list[Figure]:
    if shutil.which("umoci") is None:
        raise FileNotFoundError("umoci is not installed: apt-get install umoci")
    image, _ = home.image()
    layout = home.directory / "layout"
    _make_layout(layout, Path(image.rootfs_path))
    return [_pull(home, layout), _build(home), _siblings(home, image)]


def _pull(home: Home, layout: Path) -> Figure:
    def ours() -> None:
        home.banger("image", "pull", "-q", f"oci:{layout}", "--name", _NAME)

    def ours_anew() -> None:
        home.banger("image", "delete", _NAME)
        home.banger("image", "cache", "prune")

    def theirs() -> None:
        copy = home.directory / "copy"
        bundle = home.directory / "bundle"
        _run("skopeo", "copy", "-q", f"oci:{layout}", f"oci:{copy}:x")
        _run("umoci", "unpack", "--image", f"{copy}:x", bundle)
        file = home.directory / "theirs.ext4"
        _run(*_EXT4, "-d", bundle / "rootfs", file, "8G")
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def theirs_anew() -> None:
        for name in ("copy", "bundle"):
            shutil.rmtree(home.directory / name)
        (home.directory / "theirs.ext4").unlink()

    samples: list[float] = []
    floors: list[float] = []
    peaks: list[Peak] = []
    for _ in range(_ROUNDS):
        for work, anew, into in ((theirs, theirs_anew, floors), (ours, ours_anew, samples)):
            with Peak(home) as peak:
                into.append(timed(work))
            peaks.append(peak)
            anew()
    memory, disk = (
        [max(getattr(each, what) for each in peaks[side::2]) >> 20 for side in (1, 0)]
        for what in ("memory_bytes", "disk_bytes")
    )
    return Figure(
        f"pull, {memory[0]}/{memory[1]} MiB RAM, {disk[0]}/{disk[1]} disk",
        "skopeo copy, umoci unpack, mke2fs",
        tuple(samples),
        tuple(floors),
        _TARGET,
    )


def _build(home: Home) -> Figure:
    """The small Debian image; the kernel is there."""
    from banger.images.build import RECIPES

    name = "debian-bookworm-minimal"
    packages = ",".join(RECIPES[name].packages)
    tree, file = home.directory / "tree", home.directory / "tree.ext4"

    def bare() -> None:
        _run("mmdebstrap", "-q", "--mode=root", "--variant=minbase", f"--include={packages}",
             "bookworm", tree)  # fmt: skip
        _run(*_EXT4, "-d", tree, file, "8G")
        subprocess.run(["sync", "-f", file], check=True)

    samples: list[float] = []
    floors: list[float] = []
    for _ in range(_ROUNDS):
        floors.append(timed(bare))
        shutil.rmtree(tree)
        file.unlink()
        samples.append(timed(lambda: home.banger("image", "build", "-q", name)))
        home.banger("image", "delete", name)
    return Figure(
        f"image build {name}", "mmdebstrap, mke2fs", tuple(samples), tuple(floors), _TARGET
    )


def _siblings(home: Home, image: Image) -> Figure:
    """Made, started, and a command run in each; none is deleted before all are measured."""
    names = [f"bench-sibling-{number}" for number in range(_SIBLINGS)]
    samples: list[float] = []
    taken: list[int] = []
    for name in names:
        free = _free_bytes(home)
        create = ("vm", "create", "-q", "--image", image.name, "--memory", "512M", "--name", name)
        samples.append(timed(partial(home.banger, *create)))
        home.banger("vm", "exec", name, "--", "true")
        taken.append(free - _free_bytes(home))
    told = json.loads(home.banger("image", "show", image.name, "--json"))["vms"]
    told_mib = sum(each["disk_bytes"] for each in told if each["vm_name"] != names[0]) / (1 << 20)
    home.banger("vm", "delete", "--force", *names)
    copy = home.directory / "copy.ext4"
    floors = []
    for _ in range(_ROUNDS):
        floors.append(timed(partial(_run, "cp", "--sparse=always", image.rootfs_path, copy)))
        copy_mib = copy.stat().st_blocks * 512 >> 20
        copy.unlink()
    further = _SIBLINGS - 1
    taken_mib = sum(taken[1:]) / (1 << 20)
    return Figure(
        f"create, {told_mib / further:.1f} MiB told, {taken_mib / further:.1f} taken",
        f"cp of the image, {copy_mib} MiB",
        tuple(samples[1:]),
        tuple(floors),
    )


def _free_bytes(home: Home) -> int:
    os.sync()
    return shutil.disk_usage(home.directory).free


def _run(*argv: str | Path) -> None:
    subprocess.run([*map(str, argv)], check=True, stdout=subprocess.DEVNULL)


def _make_layout(layout: Path, rootfs: Path) -> None:
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    layers, diff_ids = [], []
    makers: tuple[Callable[[], bytes], ...] = (lambda: _debian(rootfs), _large_files)
    for make in makers:
        archive = make()
        diff_ids.append(f"sha256:{hashlib.sha256(archive).hexdigest()}")
        layers.append(blob(gzip.compress(archive, 6, mtime=0), _LAYER))
    config = {"architecture": "amd64", "os": "linux", "config": {},
              "rootfs": {"type": "layers", "diff_ids": diff_ids}}  # fmt: skip
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": manifest_type, "layers": layers,
                "config": blob(json.dumps(config).encode(),
                               "application/vnd.oci.image.config.v1+json")}  # fmt: skip
    described = blob(json.dumps(manifest).encode(), manifest_type)
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))


def _debian(rootfs: Path) -> bytes:
    script = 'mount -o ro,loop,noload "$1" /mnt && exec tar -C /mnt --numeric-owner -cf - .'
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", str(rootfs)]
    return subprocess.run(argv, check=True, capture_output=True).stdout


def _large_files() -> bytes:
    chance = random.Random(0)
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as writer:
        for number in range(_LARGE_FILES):
            member = tarfile.TarInfo(f"opt/large/{number}")
            member.size = _LARGE_BYTES
            writer.addfile(member, BytesIO(chance.randbytes(_LARGE_BYTES)))
    return archive.getvalue()
