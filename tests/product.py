"""The command `banger` as tests run it: as a process, with real guests behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE = "debian-bookworm-minimal"

#: Far above what anything takes here: under emulation, on two busy cores.
TIMEOUT_S = 240


@dataclass(frozen=True)
class Banger:
    """The command `banger`, run with some environment."""

    environment: dict[str, str] = field(default_factory=dict)

    def argv(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "banger.cli.main", *map(str, words)]

    def run(
        self, *words: str | Path, stdin: bytes = b"", timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, whatever its status."""
        return subprocess.run(
            self.argv(*words),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env=os.environ | self.environment,
            check=False,
        )

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
