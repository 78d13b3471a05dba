"""Scenes for cells: made when first needed, thrown away when something went wrong in them."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import firecrackers
import leftovers
from homes import Home, copy_artifacts, new_home
from matrix import DEFAULT, Drivers
from scene import Scene

#: A start wants 512 MiB free, a fork besides what raw disks are copied to; and memory in a file has
#: room for all of it, being on a tmpfs.
_STATE_DISK_MIB = 2600
#: The artifacts that are there, 350 MiB, and what a build wants free, 1 GiB.
_ARTIFACTS_DISK_MIB = 1600


class Scenes:
    def __init__(self, seed: Home, directory: Path) -> None:
        """`seed` has the image; new homes are made below `directory`, which is short."""
        self._seed = seed
        self._directory = directory
        self._numbers = itertools.count()
        #: By drivers, and `small`.
        self._kept: dict[tuple[Drivers, bool], Scene] = {}

    @contextmanager
    def scene(self, drivers: Drivers, *, without_image: bool, small: bool) -> Iterator[Scene]:
        """A scene: one where the image is missing is new, any other is kept while no block fails.

        `small`: there is little room for what is made in it.
        """
        if without_image:
            with self._disposed(self._without_image(drivers, small=small)) as scene:
                yield scene
            return
        key = (drivers, small)
        if key not in self._kept:
            self._kept[key] = self._with_image(drivers, small=small)
        scene = self._kept[key]
        try:
            yield scene
        except BaseException:
            del self._kept[key]
            self._throw_away(scene)
            raise

    @contextmanager
    def _disposed(self, scene: Scene) -> Iterator[Scene]:
        try:
            yield scene
            scene.home.close()
        finally:
            self._throw_away(scene)

    def close(self) -> None:
        for scene in self._kept.values():
            try:
                scene.home.close()
            finally:
                self._throw_away(scene)

    def _with_image(self, drivers: Drivers, *, small: bool) -> Scene:
        home = self._new_home(drivers)
        disk = _small_disk(home, home.state.parent, _STATE_DISK_MIB) if small else None
        copy_artifacts(self._seed.directory, home)
        return Scene(home, drivers, disk)

    def _without_image(self, drivers: Drivers, *, small: bool) -> Scene:
        """The bystander's image and kernel have other names: nobody else finds them."""
        home = self._new_home(drivers)
        disk = _small_disk(home, home.data.parent, _ARTIFACTS_DISK_MIB) if small else None
        copy_artifacts(self._seed.directory, home)
        scene = Scene(home, drivers, disk)
        home.banger.ok("daemon", "stop")
        with closing(sqlite3.connect(home.state / "banger.db")) as database, database:
            for table in ("images", "kernels"):
                database.execute(
                    f"UPDATE {table} "
                    "SET name = 'other', record = json_set(record, '$.name', 'other')"
                )
        return scene

    def _new_home(self, drivers: Drivers) -> Home:
        home = new_home(self._directory / f"f{next(self._numbers)}")
        if drivers.hypervisor == "firecracker":
            firecrackers.use_stand_in(home)
        elif drivers is not DEFAULT:
            home.configure(f'storage = "{drivers.storage}"\n')
        return home

    def _throw_away(self, scene: Scene) -> None:
        directory = scene.home.directory
        for process in scene.home.processes():
            leftovers.end(process, directory)
        for mount in reversed(list(_mount_points(directory))):
            subprocess.run(["umount", mount], check=True)
        shutil.rmtree(directory)


def _small_disk(home: Home, at: Path, size_mib: int) -> Path:
    """Have `at` on a file system of its own; where that is mounted, for a filler beside it."""
    disk = home.directory / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", disk], check=True)
    for directory in (disk / "content", at):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", disk / "content", at], check=True)
    return disk


def _mount_points(directory: Path) -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point = line.split()[1]
        if point.startswith(f"{directory}/"):
            yield point
