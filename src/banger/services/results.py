"""What commands in several forks came to: a folder for each run, until somebody deletes it.

``results.json`` is `Results`; beside it each fork has its log (``N.log``, what it printed) and,
where there was a repository, its patch (``N.patch``).
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec

from banger.base.errors import NotFound
from banger.base.files import write_atomically
from banger.base.log import get_logger
from banger.base.malformed import MALFORMED
from banger.base.model import ForkResult, ForkState, Results, now
from banger.base.paths import Paths, prepare_private_dir, safe_component
from banger.services.references import find

_FILE = "results.json"


class ResultsService:
    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    async def begin(self, name: str, repo_root: str, command: tuple[str, ...]) -> Results:
        """A folder for a run, called like its VM, or NAME-2 when there is one of that name."""
        return await asyncio.to_thread(self._begin, name, repo_root, command)

    def _begin(self, name: str, repo_root: str, command: tuple[str, ...]) -> Results:
        prepare_private_dir(self._paths.results_dir)
        number, chosen = 1, name
        while True:
            directory = self._paths.results_dir / safe_component(chosen)
            try:
                directory.mkdir(mode=0o700)
                break
            except FileExistsError:
                number += 1
                chosen = f"{name}-{number}"
        results = Results(
            name=chosen,
            directory=str(directory),
            repo_root=repo_root,
            command=command,
            created_at=now(),
        )
        _write(results)
        return results

    async def save(self, results: Results) -> None:
        await asyncio.to_thread(_write, results)

    async def all(self) -> list[Results]:
        """Of all runs, by name. A folder that is no run's is left out, and logged."""
        return await asyncio.to_thread(self._all)

    def _all(self) -> list[Results]:
        if not self._paths.results_dir.is_dir():
            return []
        found = []
        for directory in sorted(self._paths.results_dir.iterdir()):
            try:
                data = (directory / _FILE).read_bytes()
                found.append(msgspec.json.decode(data, type=Results))
            except (OSError, *MALFORMED) as error:
                get_logger().warning("no results", path=str(directory), error=str(error))
        return found

    async def resolve(self, reference: str) -> Results:
        """Those of a name, or of an unambiguous beginning of one."""
        found = [_Named(each) for each in await self.all()]
        return find(found, reference, noun="results", plural="results").results

    async def settle(self) -> None:
        """At start-up: what was under way in a daemon that is gone goes on no more."""
        for results in await self.all():
            if any(fork.state is ForkState.RUNNING for fork in results.forks):
                forks = (
                    msgspec.structs.replace(
                        fork, state=ForkState.FAILED, error="bangerd ended meanwhile"
                    )
                    if fork.state is ForkState.RUNNING
                    else fork
                    for fork in results.forks
                )
                await self.save(msgspec.structs.replace(results, forks=tuple(forks)))

    async def delete(self, results: Results) -> None:
        directory = self._paths.results_dir / safe_component(results.name)
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


class _Named:
    """Results as something with an id: their name."""

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    def id(self) -> str:
        return self.results.name


def log_of(results: Results, number: int) -> Path:
    return Path(results.directory) / f"{number}.log"


def patch_of(results: Results, number: int) -> Path:
    return Path(results.directory) / f"{number}.patch"


def fork_of(results: Results, number: int) -> ForkResult:
    """The fork of this number; NotFound for none."""
    for fork in results.forks:
        if fork.number == number:
            return fork
    raise NotFound(
        f'the results "{results.name}" have no fork {number}',
        hint=f"there are 0 to {len(results.forks) - 1}" if results.forks else "",
    )


def with_fork(results: Results, fork: ForkResult) -> Results:
    """The results with one fork's replaced."""
    forks = (fork if each.number == fork.number else each for each in results.forks)
    return msgspec.structs.replace(results, forks=tuple(forks))


def _write(results: Results) -> None:
    data = msgspec.json.format(msgspec.json.encode(results))
    write_atomically(Path(results.directory) / _FILE, data)
