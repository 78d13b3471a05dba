"""The command `banger` as tests run it: as a process, with real guests behind it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

IMAGE = "debian-bookworm-minimal"
#: A development machine, with git, sshd and systemd.
DEFAULT_IMAGE = "debian-bookworm"

#: Set where all takes so many times longer than here: on a host that is emulated itself.
SLOWNESS_VARIABLE = "BANGER_TEST_SLOWNESS"
SLOWNESS = float(os.environ.get(SLOWNESS_VARIABLE, "1"))
#: Far above what anything takes here: under emulation, on two busy cores.
TIMEOUT_S = 240
#: For one look at a machine where something took longer than it may, and how much of it is shown.
_LOOK_S = 30
_SHOWN_CHARS = 1500


class DidNotEnd(AssertionError):
    """A command took longer than it may; says how the machines were then."""


@dataclass(frozen=True)
class Banger:
    """The command `banger`, run with some environment."""

    environment: dict[str, str] = field(default_factory=dict)

    def argv(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "banger.cli.entry", *map(str, words)]

    def run(
        self, *words: str | Path, stdin: bytes = b"", timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, whatever its status. Raises DidNotEnd when that takes too long."""
        try:
            return self._run(words, stdin, timeout_s)
        except subprocess.TimeoutExpired as late:
            said = (late.stdout, late.stderr)
            raise DidNotEnd(
                f"{words} did not end within {timeout_s:g} s: {said}\n{self._health()}"
            ) from late

    def _run(
        self, words: Iterable[str | Path], stdin: bytes, timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(*words),
            input=stdin,
            capture_output=True,
            timeout=timeout_s * SLOWNESS,
            env=os.environ | self.environment,
            check=False,
        )

    def _health(self) -> str:
        """How the machines that run are, and the ends of their consoles: why one hangs is known
        only while it does."""
        try:
            machines = json.loads(self._run(("vm", "list", "--json"), b"", _LOOK_S).stdout)
            names = [each["name"] for each in machines if each["runtime"]["state"] == "running"]
            looks = [(*look, name) for name in names for look in (("vm", "health"), ("vm", "logs"))]
            said = {look: self._run(look, b"", _LOOK_S).stdout.decode() for look in looks}
        except (subprocess.TimeoutExpired, ValueError) as error:
            return f"how its machines are cannot be told: {error}"
        return "\n".join(f"{look}: {text[-_SHOWN_CHARS:]}" for look, text in said.items())

    def ok(self, *words: str | Path, stdin: bytes = b"") -> str:
        """Its output; its status must be 0."""
        done = self.run(*words, stdin=stdin)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout.decode()

    def fails(self, *words: str | Path, status: int, stdin: bytes = b"") -> str:
        """What it says on stderr; its status must be `status`."""
        done = self.run(*words, stdin=stdin)
        assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
        return done.stderr.decode()

    def json(self, *words: str | Path) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def guest(self, vm: str, script: str, stdin: bytes = b"") -> str:
        """The output of a shell script in a guest, which must succeed."""
        return self.ok("vm", "exec", vm, "--", "sh", "-c", script, stdin=stdin)

    def state(self, vm: str) -> str:
        """The state of a VM; empty when there is none of exactly this name."""
        states = {each["name"]: each["runtime"]["state"] for each in self.json("vm", "list")}
        return str(states.get(vm, ""))

    def start(
        self, *words: str | Path, stdin: int = subprocess.DEVNULL, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start it with its output in pipes; the caller waits for its end."""
        return subprocess.Popen(
            self.argv(*words),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | self.environment,
            **options,
        )


def read_until(stream: IO[bytes] | int, needle: bytes, timeout_s: float = 60) -> bytes:
    """What comes from a pipe or terminal up to and past `needle`; fails after `timeout_s`."""
    descriptor = stream if isinstance(stream, int) else stream.fileno()
    deadline = time.monotonic() + timeout_s * SLOWNESS
    seen = b""
    while needle not in seen:
        ready = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]
        assert ready, f"{needle!r} did not come within {timeout_s} s, but {seen[-2000:]!r}"
        # A terminal whose other side is closed is at its end by EIO.
        with suppress(OSError):
            if chunk := os.read(descriptor, 65536):
                seen += chunk
                continue
        raise AssertionError(f"the end came before {needle!r}: {seen[-2000:]!r}")
    return seen


def until(holds: Callable[[], T], what: str, timeout_s: float = 60) -> T:
    """Ask again and again for what no event tells of; what `holds` gave in the end."""
    deadline = time.monotonic() + timeout_s * SLOWNESS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
    return found


def finish(process: subprocess.Popen[bytes], timeout_s: float = 60) -> tuple[int, bytes, bytes]:
    """(status, stdout, stderr) of a process that is about to end; killed if it does not."""
    try:
        out, err = process.communicate(timeout=timeout_s * SLOWNESS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"did not end in {timeout_s} s: {out!r} {err!r}") from None
    return process.returncode, out, err
