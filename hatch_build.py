"""The build hook: compiles the guest agent for every architecture that the wheel ships.

It runs for a wheel and for an editable install, never for an sdist, which carries the sources.
The compiler is Zig's C compiler from PyPI, so a build needs no system compiler and no headers.
The results go to ``src/banger/guest/bin``; a stamp in ``build/`` says from what they were made,
so a second build compiles nothing. The wheel is ``py3-none-any`` on purpose: the agents are data
for guests of either architecture, and the host's side is Python alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ARCHITECTURES = ("x86_64", "aarch64")
FLAGS = ("-static", "-Os", "-Wall", "-Wextra", "-Werror", "-s")


class AgentBuildError(Exception):
    """The guest agent cannot be built; the message has what the compiler said."""


class AgentBuildHook(BuildHookInterface[Any]):
    """Hatchling finds it by its base class."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        if self.target_name == "wheel":
            build_agents(Path(self.root))


def build_agents(root: Path) -> None:
    """Compile the agents that are not up to date; raise AgentBuildError when one does not compile.

    Safe beside another build of the same tree: each result is written beside its place and
    renamed, and equal sources give equal bytes.
    """
    source_dir = root / "src/banger/guest/agent"
    sources = sorted(source_dir.glob("*.c"))
    if not sources:
        raise AgentBuildError(f"no C sources of the guest agent in {source_dir}")
    inputs = _digest(sources + sorted(source_dir.glob("*.h")))
    stale = [agent for agent in ARCHITECTURES if not _is_fresh(root, agent, inputs)]
    if not stale:
        return
    with _environment() as environment:
        # Together: the first compilation builds a C library for each target, 35 s each.
        started = [_start(root, architecture, sources, environment) for architecture in stale]
        failures = [failure for each in started if (failure := _finish(*each, inputs))]
    if failures:
        raise AgentBuildError("\n\n".join(failures))


def _binary(root: Path, architecture: str) -> Path:
    return root / "src/banger/guest/bin" / f"banger-agent-{architecture}"


def _stamp(root: Path, architecture: str) -> Path:
    return root / "build" / f"banger-agent-{architecture}.stamp"


def _digest(files: list[Path]) -> str:
    """A digest of all that shapes a binary: names and contents, flags, the compiler's version."""
    whole = hashlib.sha256(repr((FLAGS, installed_version("ziglang"))).encode())
    for file in files:
        whole.update(f"\0{file.name}\0{_sha256(file)}".encode())
    return whole.hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_fresh(root: Path, architecture: str, inputs: str) -> bool:
    """Whether the stamp names these inputs and the very binary that is there."""
    try:
        stamp = _stamp(root, architecture).read_text()
        return stamp == f"{inputs} {_sha256(_binary(root, architecture))}\n"
    except FileNotFoundError:
        return False


@contextmanager
def _environment() -> Iterator[Mapping[str, str]]:
    """Our environment with a place for what Zig builds first (C libraries, 77 MB).

    That is ZIG_GLOBAL_CACHE_DIR when it is set, as `scripts/setup` does. Else it is a directory
    for this build: Zig's own choice fails when there is no HOME to write to, and a cache that
    stays would only grow, as pip puts the compiler into a new directory for each isolated build
    and Zig's cache entries hold for one directory.
    """
    kept = os.environ.get("ZIG_GLOBAL_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="banger-zig-") as temporary:
        cache = kept or temporary
        yield {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}


def _start(
    root: Path, architecture: str, sources: list[Path], environment: Mapping[str, str]
) -> tuple[Path, str, Path, subprocess.Popen[str]]:
    # Not in bin/: what an interrupted build leaves there would be shipped by the next one.
    unfinished = _stamp(root, architecture).with_suffix(f".{os.getpid()}")
    unfinished.parent.mkdir(exist_ok=True)
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl")
    process = subprocess.Popen(
        [*compiler, *FLAGS, "-o", unfinished, *sources],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    return root, architecture, unfinished, process


def _finish(
    root: Path, architecture: str, unfinished: Path, process: subprocess.Popen[str], inputs: str
) -> str:
    """Put a finished binary in its place; the text of the failure, or nothing."""
    output, _ = process.communicate()
    if process.returncode != 0:
        unfinished.unlink(missing_ok=True)
        return (
            f"the guest agent does not compile for {architecture} "
            f"(status {process.returncode}):\n{output.strip()}"
        )
    made = _sha256(unfinished)
    target = _binary(root, architecture)
    target.parent.mkdir(exist_ok=True)
    unfinished.chmod(0o755)
    unfinished.replace(target)
    # A stamp that does not fit its binary, however that came about, only costs a compilation.
    _stamp(root, architecture).write_text(f"{inputs} {made}\n")
    return ""


if __name__ == "__main__":
    try:
        build_agents(Path(__file__).resolve().parent)
    except AgentBuildError as error:
        sys.exit(f"error: {error}")
