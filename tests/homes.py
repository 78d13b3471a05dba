"""Homes of their own for tests that stop, kill or misuse the daemon, with the session's image."""

from __future__ import annotations

import os
import re
import select
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import leftovers
import suite
from banger.base import jail
from product import IMAGE, Banger

_ENDS_S = 20


@dataclass(frozen=True)
class Home:
    """A HOME with its own daemon. `banger` is the command in it."""

    directory: Path

    @property
    def banger(self) -> Banger:
        home = self.directory
        return Banger(
            {
                "HOME": str(home),
                "XDG_CONFIG_HOME": str(home / "config"),
                "XDG_CACHE_HOME": str(home / "cache"),
                "XDG_DATA_HOME": str(home / "data"),
                "XDG_STATE_HOME": str(home / "state"),
                "XDG_RUNTIME_DIR": str(home / "run"),
            }
        )

    @property
    def state(self) -> Path:
        return self.directory / "state/banger"

    @property
    def data(self) -> Path:
        return self.directory / "data/banger"

    @property
    def runtime(self) -> Path:
        return self.directory / "run/banger"

    @property
    def socket(self) -> Path:
        return self.runtime / "bangerd.sock"

    @property
    def log(self) -> str:
        return (self.state / "bangerd.log").read_text()

    def configure(self, text: str) -> Path:
        """Write config.toml; its path. What `text` does not set is as the session's drivers want
        it, and no machine waits that a test does not know of."""
        file = self.directory / "config/banger/config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        defaults = {"standby_limit": "0", **suite.settings(self.directory)}
        lines = [
            f"{key} = {value}\n"
            for key, value in defaults.items()
            if not re.search(rf"^{key} *=", text, re.MULTILINE)
        ]
        file.write_text(f"{''.join(lines)}{text}\n")
        return file

    def daemon_pid(self) -> int:
        return int(self.banger.json("daemon", "status")["pid"])

    def kill_daemon(self, number: int) -> None:
        """Send the daemon a signal and wait until it has ended."""
        pid = self.daemon_pid()
        descriptor = os.pidfd_open(pid)
        try:
            os.kill(pid, number)
            assert select.select([descriptor], [], [], _ENDS_S)[0], "the daemon does not end"
        finally:
            os.close(descriptor)

    def stopped_daemon(self) -> int:
        """The pid of the daemon while it is stopped (SIGSTOP), else 0."""
        for process in self.processes():
            if "banger.daemon.main" in process.command:
                with suppress(OSError):
                    # proc(5): the state comes after the name, which is in brackets.
                    stat = Path(f"/proc/{process.pid}/stat").read_text()
                    if stat.rpartition(")")[2].split()[0] == "T":
                        return process.pid
        return 0

    def machines(self) -> list[leftovers.Process]:
        """The hypervisors of this home. (What is below a stand-in for one is not.)"""
        found = [
            each
            for each in self.processes()
            if (
                "qemu-system" in each.command.partition(" ")[0] and " -name banger-" in each.command
            )
            or each.command.partition(" ")[0].rpartition("/")[2] == "firecracker"
        ]
        return [*found, *self._jailed()]

    def _jailed(self) -> Iterator[leftovers.Process]:
        """Those in jails, which name nothing that is outside: each has a file for its machine."""
        ids = {each.name for each in (self.state / "jails").glob("*")}
        for each in leftovers.processes_naming("/firecracker") if ids else ():
            if jail.jailed_vm(each.pid, os.geteuid()) in ids:
                yield each

    def processes(self) -> list[leftovers.Process]:
        return leftovers.processes_of(self.directory)

    def await_end_of_processes(self) -> None:
        """All processes of this home end by themselves; an error names those that do not."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                try:
                    assert select.select([descriptor], [], [], _ENDS_S)[0], f"left: {process}"
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Delete the VMs, stop the daemon; nothing may be left running."""
        names = [each["name"] for each in self.banger.json("vm", "list")]
        if names:
            self.banger.ok("vm", "delete", "--force", *names)
        self.banger.ok("daemon", "stop")
        self.await_end_of_processes()
        assert list((self.runtime / "vms").glob("*")) == []
        assert list((self.state / "vms").glob("*")) == []


@contextmanager
def little_room(directory: Path, size: str) -> Iterator[None]:
    """Have a new `directory` on a file system of its own, of `size` as mount(8) takes it."""
    if os.geteuid() != 0:
        pytest.skip("run the tests as root, which can mount a small file system")
    directory.mkdir(mode=0o700)
    options = f"size={size},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def new_home(directory: Path) -> Home:
    """An empty home at `directory`, which is made; keep it short, for sockets go below it."""
    (directory / "run").mkdir(parents=True, mode=0o700)
    home = Home(directory)
    home.configure("")
    return home


def copy_artifacts(source: Path, home: Home, image: str = IMAGE) -> None:
    """Give `home` a copy of an image of the home at `source`, and of its kernel, records included.
    Whatever else other tests have left there stays there."""
    suite.prepare(home.runtime)
    home.state.mkdir(parents=True, mode=0o700)
    with (
        sqlite3.connect(source / "state/banger/banger.db") as old,
        sqlite3.connect(home.state / "banger.db") as new,
    ):
        old.backup(new)
        for table in ("vms", "templates", "snapshots"):
            new.execute(f"DELETE FROM {table}")
        new.execute("DELETE FROM images WHERE name != ?", (image,))
        new.execute("DELETE FROM kernels WHERE id NOT IN (SELECT kernel_id FROM images)")
        for table in ("images", "kernels"):
            (home.data / table).mkdir(parents=True, mode=0o700)
            for (name,) in new.execute(f"SELECT id FROM {table}"):
                there = source / "data/banger" / table / name
                copy = ["cp", "-a", "--sparse=always", there, home.data / table]
                subprocess.run(copy, check=True)
        # One that is registered where it lies (`--images`) is this home's alone, too: tests do harm
        # to theirs.
        where = "json_extract(record, '$.registered') != ''"
        found = f"SELECT id, json_extract(record, '$.rootfs_path') FROM images WHERE {where}"
        for name, rootfs in new.execute(found).fetchall():
            own = home.data / "images" / name / "rootfs.ext4"
            subprocess.run(["cp", "-a", "--sparse=always", rootfs, own], check=True)
            new.execute(
                "UPDATE images SET record ="
                " json_set(record, '$.rootfs_path', ?, '$.registered', '') WHERE id = ?",
                (str(own), name),
            )
        for table in ("images", "kernels"):
            new.execute(
                f"UPDATE {table} SET record = replace(record, ?, ?)",
                (str(source / "data"), str(home.directory / "data")),
            )
    old.close()
    new.close()
