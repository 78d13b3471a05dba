"""The only place that starts processes.

Arguments are always a list, never a shell string. Standard input is ``/dev/null`` unless given.
Four ways, by who waits for the process:

- `run`: wait for it here, with a time limit; cancelling means TERM, a grace period, KILL, reap,
  for its whole process group.
- `stream`: the same, with what it prints as it comes.
- `spawn_detached`: a process that outlives this one (a hypervisor, the daemon itself).
- `popen`: a plain pipe for the synchronous CLI; `replace`: it becomes the other program.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, TypeAlias

from banger.base.errors import BangerError, ErrorCode, OperationTimeout, PreconditionFailed
from banger.base.tools import package_of

_GRACE_S = 3.0
_TAIL_BYTES = 2000
_READ_BYTES = 65536
_PIECE_BYTES = 1 << 20

#: For programs that a guest might take over: nothing of the user's, who may keep keys in his.
#: (They are started by their full path, and get the PATH of an empty environment.)
BARE_ENVIRONMENT: Mapping[str, str] = {"HOME": "/", "LC_ALL": "C.UTF-8"}

Argv = Sequence[str | Path]


@dataclass(frozen=True)
class Completed:
    """A finished process. ``returncode`` is negative when a signal ended it."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


class ProcessFailed(BangerError):
    """A tool ended with a status that means failure; the message has the end of its stderr."""

    code = ErrorCode.UNAVAILABLE

    def __init__(self, completed: Completed, *, hint: str = "") -> None:
        self.completed = completed
        how = (
            f"exited with status {completed.returncode}"
            if completed.returncode >= 0
            else f"was ended by signal {-completed.returncode}"
        )
        tail = completed.stderr[-_TAIL_BYTES:].decode(errors="replace").strip()
        name = _name(completed.argv)
        super().__init__(f"{name} {how}" + (f": {tail}" if tail else ""), hint=hint)


#: Programs that run another, whose command line they have after ``--``.
_RUNNERS = ("setpriv", "unshare")


def _name(argv: Sequence[str]) -> str:
    """The program that a command line is for, whatever runs it."""
    name = Path(argv[0]).name
    if name in _RUNNERS and "--" in argv:
        return _name(argv[argv.index("--") + 1 :])
    return name


def missing_tool(tool: str) -> PreconditionFailed:
    """The error for a tool that is not installed, naming the package that has it."""
    package = package_of(tool)
    return PreconditionFailed(
        f"{tool} is not installed",
        hint=f"install it with: apt-get install {package}" if package else "",
    )


def search_path(environment: Mapping[str, str]) -> str:
    """PATH, and after it where Debian keeps tools that an ordinary user's PATH leaves out."""
    return f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def which(tool: str) -> str | None:
    """The path of a tool that we would run by this name."""
    return shutil.which(tool, path=search_path(os.environ))


def _environment(given: Mapping[str, str] | None) -> dict[str, str]:
    """A child's environment: a tool finds the same tools as we do."""
    environment = dict(os.environ if given is None else given)
    return environment | {"PATH": search_path(environment)}


def _resolve(argv: Argv) -> list[str]:
    words = [os.fspath(word) for word in argv]
    found = which(words[0])
    if found is None:
        raise missing_tool(words[0])
    words[0] = found
    return words


async def run(
    argv: Argv,
    *,
    timeout_s: float,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
    on_stderr_line: Callable[[str], None] | None = None,
    umask: int = -1,
) -> Completed:
    """Run a tool to its end and return what it printed.

    Raises PreconditionFailed when it is not installed, ProcessFailed for a non-zero status
    (unless `check` is false), OperationTimeout after `timeout_s` seconds. On time-out or
    cancellation nothing of the process group is left. `on_stderr_line` sees each line of stderr
    as it comes (progress); the lines are still in the result. `umask` is ours unless given.
    """
    words = _resolve(argv)
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(env),
        cwd=cwd,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
        umask=umask,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr, _ = await asyncio.gather(
                _collect(process.stdout, None),
                _collect(process.stderr, on_stderr_line),
                _feed(process.stdin, stdin),
            )
            returncode = await process.wait()
    except TimeoutError:
        await _end_group(process)
        raise OperationTimeout(f"{_name(words)} did not finish within {timeout_s:g} s") from None
    except BaseException:
        await asyncio.shield(_end_group(process))
        raise
    completed = Completed(tuple(words), returncode, stdout, stderr)
    if check and returncode != 0:
        raise ProcessFailed(completed)
    return completed


async def stream(
    argv: Argv, *, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> AsyncGenerator[bytes, None]:
    """Run a tool and give what it prints as it comes, a piece at a time, for as long as it takes.

    Close the generator (`contextlib.aclosing`): then nothing of the process group is left, however
    far it was. Raises as `run` does, ProcessFailed after the last piece.
    """
    words = _resolve(argv)
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(env),
        start_new_session=True,
    )
    assert process.stdout is not None
    feeding = asyncio.create_task(_feed(process.stdin, stdin))
    complaining = asyncio.create_task(_collect(process.stderr, None))
    try:
        while piece := await process.stdout.read(_PIECE_BYTES):
            yield piece
        returncode, stderr = await process.wait(), await complaining
    finally:
        if process.returncode is None:
            await asyncio.shield(_end_group(process))
        for task in (feeding, complaining):
            task.cancel()
        await asyncio.gather(feeding, complaining, return_exceptions=True)
    if returncode != 0:
        raise ProcessFailed(Completed(tuple(words), returncode, b"", stderr))


async def _collect(
    stream: asyncio.StreamReader | None, on_line: Callable[[str], None] | None
) -> bytes:
    if stream is None:
        return b""
    whole = bytearray()
    line = bytearray()
    while chunk := await stream.read(_READ_BYTES):
        whole += chunk
        if on_line is not None:
            line += chunk
            *lines, rest = line.split(b"\n")
            for each in lines:
                on_line(each.decode(errors="replace"))
            line = bytearray(rest)
    return bytes(whole)


async def _feed(stream: asyncio.StreamWriter | None, data: bytes | None) -> None:
    if stream is None or data is None:
        return
    with suppress(BrokenPipeError, ConnectionResetError):  # the tool may stop reading early
        stream.write(data)
        await stream.drain()
    stream.close()


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """TERM, grace, KILL to the process group; then reap."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(TimeoutError):
        async with asyncio.timeout(_GRACE_S):
            await process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


#: A process that outlives this one, until it is given to `watch`.
Detached: TypeAlias = "subprocess.Popen[bytes]"


def spawn_detached(
    argv: Argv,
    *,
    log: Path,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path = Path("/"),
    program: str | None = None,
) -> Detached:
    """Start a process in a session of its own that survives this one.

    Its stdout and stderr are appended to `log`; files and sockets it makes are private
    (umask 077). Give it to `watch`, which reaps it while we live; after that init does.
    `program` is the path of what runs where the first argument is only what it is to be called.
    Raises PreconditionFailed when the tool is not installed.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "ab") as output:
        return subprocess.Popen(
            _resolve(argv) if program is None else argv,
            executable=program,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            umask=0o077,
        )


def watch(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Take over a detached child: reap it when it ends. The future gets its return code.

    Works for as long as the running loop does, by a pidfd and without a thread. The `Popen` is not
    to be used any more but for its pid.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    pidfd = os.pidfd_open(process.pid)
    # Popen believes that it is over: it would warn of a child still running, and might reap it.
    process.returncode = 0

    def reap() -> None:
        loop.remove_reader(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        if result is not None and not ended.done():
            exited = result.si_code == os.CLD_EXITED
            ended.set_result(result.si_status if exited else -result.si_status)

    loop.add_reader(pidfd, reap)
    return ended


def popen(
    argv: Argv,
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.PIPE,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """A child of the synchronous CLI; stderr is the CLI's own."""
    return subprocess.Popen(
        _resolve(argv), stdin=stdin, stdout=stdout, cwd=cwd, env=_environment(None)
    )


def replace(argv: Argv) -> NoReturn:
    """Become another program: its terminal, signals and status are then its own affair."""
    words = _resolve(argv)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and its heir would
        signal.signal(number, signal.SIG_DFL)
    os.execv(words[0], words)  # noqa: S606 - as everywhere here, without a shell


PIPE = subprocess.PIPE
