"""The real agent, without a machine: started here over a socket pair, spoken to by AgentChannel."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import platform
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from banger.base.errors import BadRequest, BangerError, NotFound, PermissionDenied, Unavailable
from banger.guest.binary import agent_binary
from banger.guest.channel import (
    AgentChannel,
    AgentStream,
    Data,
    Eof,
    Exit,
    ExitKind,
    Stderr,
    call,
)
from banger.guest.frames import HEADER, HELLO_MAGIC, FrameType, encode
from banger.guest.requests import (
    Connect,
    Exec,
    FileStat,
    Listeners,
    Pack,
    PackFlag,
    Ping,
    Read,
    Request,
    Setup,
    Shutdown,
    Sockets,
    Stat,
    Stats,
    Unpack,
    Write,
)
from static_busybox import static_busybox

_ROOT = Path(__file__).parents[2]
_SOURCES = _ROOT / "src/banger/guest/agent"
_FUZZ = _ROOT / "tests/fuzz"
_TIMEOUT_S = 30.0
#: What the harness replaces or does not need: processes, sockets, and everything of a machine.
_NOT_FUZZED = {
    "host",
    "main",
    "exec",
    "account",
    "init",
    "connect",
    "setup",
    "services",
    "network",
    "power",
}


@pytest.fixture(scope="session")
def agent() -> Path:
    """Compiled from the sources as they are, by the build hook, which knows if it must."""
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(_ROOT / "build/zig-cache"))
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache}
    subprocess.run([sys.executable, _ROOT / "hatch_build.py"], check=True, env=environment)
    return agent_binary(platform.machine())


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class HostAgent:
    """The agent's process, behind a socket such as a hypervisor listens on.

    Threads move the bytes, so that a test may also speak on the agent's connection before a
    channel does, as a daemon that died has.
    """

    def __init__(self, argv: Sequence[str | Path], directory: Path) -> None:
        self.path = directory / "agent.sock"
        self.socket, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [*argv, "--serve-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._relay)
        self._thread.start()

    def _relay(self) -> None:
        with contextlib.suppress(OSError):  # ended before a client came
            client, _ = self._listener.accept()
            with client:
                back = threading.Thread(target=pump, args=(self.socket, client))
                back.start()
                pump(client, self.socket)
                back.join()

    async def channel(self) -> AgentChannel:
        return await AgentChannel.connect(self.path, timeout_s=_TIMEOUT_S)

    def end(self) -> int:
        """Close the agent's connection; its exit status. Idempotent."""
        for each in (self._listener, self.socket):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join(_TIMEOUT_S)
        self._listener.close()
        self.socket.close()
        return self.process.wait(timeout=_TIMEOUT_S)


@pytest.fixture
def host_agent(agent: Path, tmp_path: Path) -> Iterator[HostAgent]:
    host = HostAgent([agent], tmp_path)
    yield host
    host.end()


@pytest.fixture
async def channel(host_agent: HostAgent) -> AsyncIterator[AgentChannel]:
    made = await host_agent.channel()
    yield made
    await made.close()


async def shell(channel: AgentChannel, script: str, stdin: bytes = b"") -> Exit:
    return (await shell_result(channel, script, stdin))[1]


async def shell_result(
    channel: AgentChannel, script: str, stdin: bytes = b""
) -> tuple[bytes, Exit]:
    request = Exec(["/bin/sh", "-c", script])
    result = await call(channel, request, stdin=stdin, timeout_s=_TIMEOUT_S, limit_bytes=64 << 20)
    return result.stdout + result.stderr, result.exit


async def until_exit(stream: AgentStream) -> tuple[bytes, Exit]:
    output = b""
    while True:
        event = await asyncio.wait_for(stream.receive(), _TIMEOUT_S)
        if isinstance(event, Exit):
            return output, event
        if isinstance(event, Data | Stderr):
            output += event.data


async def test_it_says_who_it_is(channel: AgentChannel) -> None:
    assert channel.info.kernel == platform.release()
    assert (await call(channel, Ping(), timeout_s=_TIMEOUT_S)).exit.status == 0


@pytest.mark.parametrize(
    ("arguments", "kind", "value"),
    [
        (["/bin/sh", "-c", "exit 7"], ExitKind.EXITED, 7),
        (["sh", "-c", "kill -9 $$"], ExitKind.KILLED, 9),
        (["no-such-program"], ExitKind.EXITED, 127),
        (["/no/such/program"], ExitKind.EXITED, 127),
        (["/etc/passwd"], ExitKind.EXITED, 126),
        (["/"], ExitKind.EXITED, 126),
    ],
)
async def test_a_program_ends_as_a_shell_would_say(
    channel: AgentChannel, arguments: Sequence[str], kind: ExitKind, value: int
) -> None:
    result = await call(channel, Exec(arguments), timeout_s=_TIMEOUT_S)
    assert (result.exit.kind, result.exit.value) == (kind, value)
    if value in (126, 127):
        assert arguments[0].encode() in result.stderr


async def test_a_program_has_the_environment_of_a_login(channel: AgentChannel) -> None:
    request = Exec(["env"], {"HOME": "/elsewhere", "EXTRA": "a=b"}, directory="/")
    result = await call(channel, request, timeout_s=_TIMEOUT_S)
    environment = dict(line.split("=", 1) for line in result.stdout.decode().splitlines())
    assert environment["HOME"] == "/elsewhere"
    assert environment["EXTRA"] == "a=b"
    assert {"PATH", "USER", "LOGNAME", "SHELL"} <= environment.keys()
    assert environment["LANG"] == "C.UTF-8"
    assert "TERM" not in environment


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Exec(["true"], directory="/no/such"), NotFound),
        (Exec(["true"], user="no-such-user"), NotFound),
        (Exec([]), BadRequest),
        (Exec(["true"], login=True), BadRequest),
        (Exec(["true"], pty=True, detached=True), BadRequest),
        (Read("/no/such"), NotFound),
        (Read("relative"), BadRequest),
        (Stat("/no/such"), NotFound),
        (Connect(1), Unavailable),
        (Setup(hostname="taken"), PermissionDenied),
        (Shutdown(), PermissionDenied),
    ],
)
async def test_what_cannot_be_done_is_said(
    channel: AgentChannel, request_: Request, error: type[BangerError]
) -> None:
    with pytest.raises(error):
        await call(channel, request_, timeout_s=_TIMEOUT_S)
    assert (await shell(channel, "exit 0")).status == 0


async def test_bytes_come_back_from_cat_as_they_went(channel: AgentChannel) -> None:
    data = random.Random(1).randbytes(12 << 20)
    output, exit_ = await shell_result(channel, "cat", data)
    assert exit_.status == 0
    assert hashlib.sha256(output).digest() == hashlib.sha256(data).digest()


async def test_a_stream_nobody_reads_stalls_nobody_else(channel: AgentChannel) -> None:
    async with await channel.open(Exec(["cat", "/dev/zero"])) as stalled:
        output, _ = await shell_result(channel, "cat", bytes(2 << 20))
        assert len(output) == 2 << 20
        assert isinstance(await stalled.receive(), Data)


async def test_a_program_that_reads_nothing_stalls_nobody_else(channel: AgentChannel) -> None:
    async with await channel.open(Exec(["sleep", "100"])) as stalled:
        sending = asyncio.create_task(stalled.send(bytes(4 << 20)))
        assert (await shell(channel, "cat", bytes(1 << 20))).status == 0
        assert not sending.done()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_fifty_at_once(channel: AgentChannel) -> None:
    data = random.Random(2).randbytes(200_000)
    results = await asyncio.gather(
        *(shell_result(channel, f"echo {i}; cat; exit {i}", data) for i in range(50))
    )
    for i, (output, exit_) in enumerate(results):
        assert output == f"{i}\n".encode() + data
        assert exit_.status == i


async def test_a_closed_stdin_does_not_stop_the_sender(channel: AgentChannel) -> None:
    output, exit_ = await shell_result(channel, "exec <&-; sleep 0.1; echo done", bytes(4 << 20))
    assert (output, exit_.status) == (b"done\n", 0)


async def test_what_is_left_behind_does_not_hold_the_end(channel: AgentChannel) -> None:
    output, exit_ = await shell_result(
        channel, "sleep 100 & echo $!; (sleep 0.05; echo late) & exit 3"
    )
    left_behind, late = output.split()
    os.kill(int(left_behind), signal.SIGKILL)
    assert late == b"late"
    assert exit_.status == 3


async def test_an_endless_writer_left_behind_does_not_hold_the_end(channel: AgentChannel) -> None:
    output, exit_ = await shell_result(channel, "while :; do echo y; sleep 0.01; done & exit 4")
    assert exit_.status == 4
    assert output.startswith(b"y\n")


async def test_a_signal_reaches_the_group(channel: AgentChannel) -> None:
    async with await channel.open(Exec(["sh", "-c", "echo up; sleep 100; echo no"])) as stream:
        assert await stream.receive() == Data(b"up\n")
        await stream.signal(signal.SIGTERM)
        _, exit_ = await until_exit(stream)
    assert (exit_.kind, exit_.value, exit_.status) == (ExitKind.KILLED, 15, 143)


async def test_a_reset_hangs_up_the_group(channel: AgentChannel, tmp_path: Path) -> None:
    note = tmp_path / "note"
    os.mkfifo(note)
    reading = asyncio.create_task(asyncio.to_thread(note.read_text))
    # The shell would tell of the hung-up `sleep` on a stderr that is gone, and die of that.
    script = f"exec 3> {note}; trap '' PIPE; trap 'echo hangup >&3; exit' HUP; echo up; "
    stream = await channel.open(Exec(["sh", "-c", script + "while :; do sleep 0.05; done"]))
    assert await stream.receive() == Data(b"up\n")
    await stream.reset()
    assert await asyncio.wait_for(reading, _TIMEOUT_S) == "hangup\n"


async def test_a_reset_hangs_up_a_group_whose_leader_has_ended(
    channel: AgentChannel, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    os.mkfifo(note)
    reading = asyncio.create_task(asyncio.to_thread(note.read_text))
    # Nobody receives what fills the window and a part of the pipe: the stream stays open.
    full = "exec head -c 400000 /dev/zero"
    waiting = "trap '' PIPE; trap 'echo hangup >&3; exit' HUP; while :; do sleep 0.05; done"
    stream = await channel.open(Exec(["sh", "-c", f"exec 3> {note}; ({waiting}) & {full}"]))
    await asyncio.sleep(0.5)  # nothing tells from here that the leader is gone
    await stream.reset()
    assert await asyncio.wait_for(reading, _TIMEOUT_S) == "hangup\n"


async def test_a_pty_is_a_terminal_of_its_own(channel: AgentChannel) -> None:
    script = "tty; stty size; echo $TERM; read line; echo got-$line; trap : WINCH; "
    script += "echo ready; read again; stty size; exit 5"
    request = Exec(["sh", "-c", script], pty=True, rows=33, columns=99)
    async with await channel.open(request) as stream:
        await stream.send(b"hello\n")
        output = b""
        while b"ready" not in output:
            event = await asyncio.wait_for(stream.receive(), _TIMEOUT_S)
            assert isinstance(event, Data)
            output += event.data
        await stream.resize(40, 120)
        await stream.send(b"\n")
        rest, exit_ = await until_exit(stream)
    assert b"/dev/pts/" in output
    assert b"33 99\r\nxterm-256color" in output
    assert b"got-hello" in output
    assert b"40 120" in rest
    assert exit_.status == 5


async def test_ctrl_c_and_the_end_of_input_work_on_a_pty(channel: AgentChannel) -> None:
    async with await channel.open(Exec(["sleep", "100"], pty=True)) as stream:
        await asyncio.sleep(0.1)
        await stream.send(b"\x03")
        _, exit_ = await until_exit(stream)
    assert exit_.status == 130
    async with await channel.open(Exec(["cat"], pty=True)) as stream:
        await stream.send_eof()
        _, exit_ = await until_exit(stream)
    assert exit_.status == 0


async def test_the_end_of_input_comes_after_half_a_line_on_a_pty(channel: AgentChannel) -> None:
    script = "stty eof ^E; echo ready; cat"
    async with await channel.open(Exec(["sh", "-c", script], pty=True)) as stream:
        assert await stream.receive() == Data(b"ready\r\n")
        await stream.send(b"half a line")
        await stream.send_eof()
        output, exit_ = await until_exit(stream)
    assert (output.count(b"half a line"), exit_.status) == (2, 0)


async def test_a_terminal_that_was_given_up_but_is_held_does_not_hold_the_end(
    channel: AgentChannel,
) -> None:
    leave = "import fcntl, os, sys, termios, time; sys.stdout.write('x'); sys.stdout.flush(); "
    leave += "fcntl.ioctl(0, termios.TIOCNOTTY); pid = os.fork(); "
    leave += "print(pid, flush=True) if pid else time.sleep(100)"
    # TIOCNOTTY hangs the group up.
    argv = ["sh", "-c", 'trap "" HUP CONT; exec "$0" -c "$1"', sys.executable, leave]
    async with await channel.open(Exec(argv, pty=True)) as stream:
        output, exit_ = await until_exit(stream)
    os.kill(int(output.strip(b"x\r\n")), signal.SIGKILL)
    assert exit_.status == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can run a program as somebody else")
@pytest.mark.parametrize("pty", [False, True])
async def test_another_users_program_can_open_its_streams_by_path(
    channel: AgentChannel, pty: bool
) -> None:
    script = "echo out > /dev/stdout && echo err > /dev/stderr && : < /dev/stdin"
    request = Exec(["sh", "-c", script], user="65534", pty=pty)
    async with await channel.open(request) as stream:
        output, exit_ = await until_exit(stream)
    assert sorted(output.split()) == [b"err", b"out"], output
    assert exit_.status == 0


async def test_a_login_shell_knows_that_it_is_one(channel: AgentChannel) -> None:
    async with await channel.open(Exec(login=True)) as stream:
        await stream.send(b"echo $0; exit 6\n")
        output, exit_ = await until_exit(stream)
    assert output.strip().splitlines()[-1].startswith(b"-")
    assert exit_.status == 6


async def test_a_detached_program_outlives_its_client(
    channel: AgentChannel, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    os.mkfifo(note)
    request = Exec(["sh", "-c", f"read word < {note}; echo $word > {note}2"], detached=True)
    result = await call(channel, request, timeout_s=_TIMEOUT_S)
    assert result.exit.status == 0
    os.mkfifo(f"{note}2")
    await channel.close()
    await asyncio.to_thread(note.write_text, "alive\n")
    assert (await asyncio.to_thread(Path(f"{note}2").read_text)) == "alive\n"


async def test_a_detached_program_that_cannot_start_says_so(channel: AgentChannel) -> None:
    result = await call(channel, Exec(["no-such"], detached=True), timeout_s=_TIMEOUT_S)
    assert (result.exit.status, "no-such" in result.exit.message) == (127, True)


# In a root of its own, with one static program and nothing else.

_PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:\n"
_GROUP = "root:x:0:\napps:x:1001:\nstaff:x:50:other,app\nwheel:x:60:other\n"


@pytest.fixture
def bare_root(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("root alone can give an agent a root of its own")
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(static_busybox(), root / "bin/busybox")
    return root


@pytest.fixture
async def bare(agent: Path, bare_root: Path, tmp_path: Path) -> AsyncIterator[AgentChannel]:
    """An agent in that root."""
    shutil.copy(agent, bare_root / "agent")
    host = HostAgent(["chroot", bare_root, "/agent"], tmp_path)
    made = await host.channel()
    yield made
    await made.close()
    host.end()


async def ids(channel: AgentChannel, user: str | None) -> tuple[int, int, set[int]]:
    """uid, gid and groups of a program that is run as `user`."""
    found = []
    for which in ("-u", "-g", "-G"):
        request = Exec(["busybox", "id", which], user=user)
        result = await call(channel, request, timeout_s=_TIMEOUT_S)
        found.append([int(word) for word in result.stdout.split()])
    (uid,), (gid,), groups = found
    return uid, gid, set(groups)


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups"),
    [
        (None, 0, 0, {0}),
        ("root", 0, 0, {0}),
        ("app", 1000, 1001, {1001, 50}),
        ("app:", 1000, 1001, {1001, 50}),
        ("1000", 1000, 1001, {1001, 50}),
        ("app:wheel", 1000, 60, {60}),
        ("app:60", 1000, 60, {60}),
        ("1000:4321", 1000, 4321, {4321}),
        ("4321", 4321, 0, {0}),
        ("4321:wheel", 4321, 60, {60}),
        (":staff", 0, 50, {50}),
    ],
)
async def test_a_user_and_a_group_are_names_or_numbers(
    bare: AgentChannel, bare_root: Path, user: str | None, uid: int, gid: int, groups: set[int]
) -> None:
    (bare_root / "etc").mkdir()
    (bare_root / "etc/passwd").write_text(_PASSWD)
    (bare_root / "etc/group").write_text(_GROUP)
    assert await ids(bare, user) == (uid, gid, groups)


@pytest.mark.parametrize(
    ("user", "uid", "gid"), [(None, 0, 0), ("root", 0, 0), ("7", 7, 0), ("7:8", 7, 8)]
)
async def test_numbers_need_no_passwd(
    bare: AgentChannel, user: str | None, uid: int, gid: int
) -> None:
    assert await ids(bare, user) == (uid, gid, {gid})


@pytest.mark.parametrize("shell", ["/usr/sbin/nologin", "/bin/false", "false"])
async def test_a_user_whom_nobody_logs_in_as_has_a_shell_when_that_is_wanted(
    bare: AgentChannel, bare_root: Path, shell: str
) -> None:
    (bare_root / "etc").mkdir()
    (bare_root / "etc/passwd").write_text(f"app:x:1000:1001::/:{shell}\n")
    (bare_root / "bin/sh").symlink_to("busybox")
    request = Exec(user="app", login=True)
    script = b"busybox id -u; echo $SHELL"
    assert (await call(bare, request, stdin=script, timeout_s=_TIMEOUT_S)).exit.status == 127
    for wanted in (replace(request, any_login=True), replace(request, user="0", any_login=True)):
        done = await call(bare, wanted, stdin=script, timeout_s=_TIMEOUT_S)
        uid = b"0" if wanted.user == "0" else b"1000"
        assert done.stdout == uid + b"\n/bin/sh\n"


@pytest.mark.parametrize("harm", [os.mkfifo, os.mkdir], ids=["FIFO", "directory"])
async def test_lists_of_users_that_are_no_files_are_not_opened(
    bare: AgentChannel, bare_root: Path, harm: Callable[[Path], None]
) -> None:
    """Who opens a FIFO waits for ever."""
    (bare_root / "etc").mkdir()
    for name in ("passwd", "group"):
        harm(bare_root / "real")
        (bare_root / "real").rename(bare_root / f"real-{name}")
        (bare_root / "etc" / name).symlink_to(f"/real-{name}")
    for user in (None, "root", "0", "7", "7:8"):
        request = Exec(["busybox", "true"], user=user)
        assert (await call(bare, request, timeout_s=_TIMEOUT_S)).exit.status == 0
    for user, name in (("app", "passwd"), ("7:wheel", "group")):
        with pytest.raises(BadRequest, match=f"/etc/{name} is not a file"):
            await call(bare, Exec(["busybox", "true"], user=user), timeout_s=_TIMEOUT_S)


@pytest.mark.parametrize(
    ("user", "error"),
    [
        ("eve", NotFound),
        ("root:none", NotFound),
        ("4294967295", BadRequest),
        ("1:4294967295", BadRequest),
        ("99999999999999999999999", BadRequest),
    ],
)
async def test_a_user_or_group_that_is_none_is_refused(
    bare: AgentChannel, user: str, error: type[BangerError]
) -> None:
    with pytest.raises(error):
        await call(bare, Exec(["busybox", "true"], user=user), timeout_s=_TIMEOUT_S)


async def test_a_working_directory_is_made_only_when_that_is_asked_for(
    bare: AgentChannel, bare_root: Path
) -> None:
    request = Exec(["busybox", "pwd"], directory="/made/for it", user="7:8")
    with pytest.raises(NotFound):
        await call(bare, request, timeout_s=_TIMEOUT_S)
    assert not (bare_root / "made").exists()
    for _ in range(2):
        made = replace(request, make_directory=True)
        assert (await call(bare, made, timeout_s=_TIMEOUT_S)).stdout == b"/made/for it\n"
    info = (bare_root / "made/for it").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, 0, 0o755)


async def test_programs_are_searched_in_the_requests_path(bare: AgentChannel) -> None:
    for path, status in (("/opt:/bin", 0), ("/opt", 127)):
        request = Exec(["busybox", "true"], {"PATH": path})
        assert (await call(bare, request, timeout_s=_TIMEOUT_S)).exit.status == status


async def test_what_a_program_lacks_is_said(bare: AgentChannel, bare_root: Path) -> None:
    script = bare_root / "bin/script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    for request, said in (
        (Exec(["script"]), b"script: the interpreter or loader that it needs is not in the guest"),
        (Exec(["/bin/script"]), b"/bin/script: the interpreter or loader that it needs is not"),
        (Exec(login=True), b"/bin/sh: there is no such shell in the guest"),
        (Exec(["sh"]), b"sh: command not found"),
    ):
        result = await call(bare, request, timeout_s=_TIMEOUT_S)
        assert result.exit.status == 127
        assert result.stderr.startswith(said)


async def test_files_are_written_whole_or_not_at_all(channel: AgentChannel, tmp_path: Path) -> None:
    path = tmp_path / "made/on the way/file"
    data = random.Random(3).randbytes(3 << 20)
    await call(channel, Write(str(path), mode=0o640), stdin=data, timeout_s=_TIMEOUT_S)
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    await call(channel, Write(str(path)), stdin=b"new", timeout_s=_TIMEOUT_S)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o640)
    stream = await channel.open(Write(str(path)))
    await stream.send(b"half")
    await stream.reset()
    await call(channel, Ping(), timeout_s=_TIMEOUT_S)
    assert path.read_bytes() == b"new"
    answer = await call(channel, Read(str(path)), timeout_s=_TIMEOUT_S)
    assert answer.stdout == b"new"
    shape = await call(channel, Stat(str(path)), timeout_s=_TIMEOUT_S)
    assert FileStat.decode(shape.stdout) == FileStat("f", 0o640, 3)


async def test_a_file_that_is_not_finished_is_removed(
    channel: AgentChannel, tmp_path: Path
) -> None:
    stream = await channel.open(Write(str(tmp_path / "file")))
    await stream.send(b"half")
    while not list(tmp_path.glob(".banger-*")):
        await asyncio.sleep(0.01)
    await stream.reset()
    for _ in range(500):
        if not list(tmp_path.glob(".banger-*")):
            break
        await asyncio.sleep(0.01)
    # Of the directory there is the agent's socket as well.
    assert [path.name for path in tmp_path.iterdir()] == ["agent.sock"]


async def test_what_a_link_leads_to_is_written(channel: AgentChannel, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    await call(channel, Write(str(tmp_path / "link")), stdin=b"new", timeout_s=_TIMEOUT_S)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600


async def test_a_device_is_not_replaced_by_a_file(channel: AgentChannel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadRequest, match="not a regular file"):
        await call(channel, Write(str(tmp_path / "fifo")), stdin=b"x", timeout_s=_TIMEOUT_S)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


async def test_stats_and_sockets_are_json(channel: AgentChannel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = await call(channel, Sockets(), timeout_s=_TIMEOUT_S)
        assert f'"port":{listener.getsockname()[1]},"pid":{os.getpid()}' in result.stdout.decode()
    stats = await call(channel, Stats(), timeout_s=_TIMEOUT_S)
    assert f'"count":{os.cpu_count()}}}' in stats.stdout.decode()


async def test_listeners_are_told_of_when_they_change_and_at_once_when_asked(
    channel: AgentChannel,
) -> None:
    async with await channel.open(Listeners()) as stream:

        async def line() -> str:
            heard = b""
            while not heard.endswith(b"\n"):
                event = await asyncio.wait_for(stream.receive(), _TIMEOUT_S)
                assert isinstance(event, Data)
                heard += event.data
            return heard.decode()

        first = await line()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            mine = f'{{"protocol":"tcp","address":"127.0.0.1","port":{port},"pid":0,"command":""}}'
            assert mine not in first
            await stream.send(b"?")
            while mine not in await line():
                pass  # others on this machine listen, too
        while mine in await line():
            pass
        await stream.send_eof()
        while isinstance(event := await asyncio.wait_for(stream.receive(), _TIMEOUT_S), Data):
            pass
        assert event == Exit(ExitKind.EXITED, 0, "")


async def test_a_connection_is_relayed_with_its_half_closes(channel: AgentChannel) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with await channel.open(Connect(port)) as stream:
        await stream.send(b"hello")
        await stream.send_eof()
        got = [await asyncio.wait_for(stream.receive(), _TIMEOUT_S) for _ in range(3)]
    assert got == [Data(b"HELLO"), Eof(), Exit(ExitKind.EXITED, 0, "")]
    server.close()
    await server.wait_closed()


def make_tree(top: Path) -> None:
    deep = top / ("d" * 255) / ("e" * 200)
    deep.mkdir(parents=True)
    (deep / "far").write_text("far")
    (top / "new\nline").write_text("n")
    (top / os.fsdecode(b"\xff\xfe")).write_bytes(b"\0")
    (top / "empty").touch()
    (top / "script").write_text("#!/bin/sh\n")
    (top / "script").chmod(0o4755)
    (top / "hard").hardlink_to(top / "script")
    (top / "soft").symlink_to("no/such/target" * 20)
    (top / "closed").mkdir(mode=0o500)
    os.mkfifo(top / "fifo", 0o600)
    with (top / "sparse").open("wb") as file:
        for piece in range(30):
            file.seek(piece << 16)
            file.write(b"piece")
        file.truncate(64 << 20)
    os.utime(top / "empty", (1, 1_000_000_000))
    os.utime(top / "closed", (1, 1_000_000_001))


def describe(top: Path) -> dict[bytes, object]:
    found: dict[bytes, object] = {}
    for path in [top, *top.rglob("*")]:
        info = path.lstat()
        content: object = None
        if stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            content = path.readlink()
        links = info.st_nlink if stat.S_ISREG(info.st_mode) else 0
        key = os.fsencode(path.relative_to(top))
        found[key] = (info.st_mode, info.st_uid, int(info.st_mtime), links, content)
    return found


#: Capabilities of a file, as the kernel keeps them (linux/capability.h): version 2, cap_net_raw.
_CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
#: An access control list (linux/posix_acl_xattr.h): version 2; of each tag, permissions and id.
_ACL = struct.pack(
    "<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 4, 1000, 4, 4, 2**32 - 1, 16, 4, 2**32 - 1,
    32, 4, 2**32 - 1,
)  # fmt: skip


def set_attributes(top: Path) -> dict[bytes, dict[str, bytes]]:
    """Give what `make_tree` made extended attributes; what they are, by path."""
    given: dict[bytes, dict[str, bytes]] = {
        b".": {"user.top": b"top"},
        b"closed": {"user.bytes": bytes(range(256)), "system.posix_acl_default": _ACL},
        b"empty": {"user.none": b"", "user.of 999": b"x" * 955, "system.posix_acl_access": _ACL},
        b"sparse": {"user.sparse": b"\n12 path=elsewhere\n"},
        b"script": {"security.capability": _CAPABILITY} if os.geteuid() == 0 else {},
    }
    for path, attributes in given.items():
        for name, value in attributes.items():
            os.setxattr(top / os.fsdecode(path), name, value)
    given[b"hard"] = given[b"script"]
    return {path: attributes for path, attributes in given.items() if attributes}


def attributes_of(top: Path) -> dict[bytes, dict[str, bytes]]:
    found = {}
    for path in [top, *top.rglob("*")]:
        names = os.listxattr(path, follow_symlinks=False)
        if names:
            key = os.fsencode(path.relative_to(top))
            found[key] = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    return found


async def test_extended_attributes_go_out_as_they_are_when_they_are_asked_for(
    channel: AgentChannel, tmp_path: Path
) -> None:
    make_tree(tmp_path / "tree")
    given = set_attributes(tmp_path / "tree")
    for flags, expected in ((PackFlag.XATTRS, given), (None, {})):
        request = Pack(str(tmp_path / "tree"), name=".", flags=flags)
        packed = await call(channel, request, timeout_s=_TIMEOUT_S, limit_bytes=4 << 20)
        assert packed.exit.status == 0
        (tmp_path / "packed.tar").write_bytes(packed.stdout)
        target = tmp_path / f"out-{flags}"
        target.mkdir()
        attributes = ["--xattrs", "--xattrs-include=*"]
        unpack: list[str | Path] = ["tar", *attributes, "-C", target, "-xpf"]
        subprocess.run([*unpack, tmp_path / "packed.tar"], check=True)
        assert attributes_of(target) == expected
        if not flags:  # an ACL is in the mode of its file, too
            continue
        assert describe(target) == describe(tmp_path / "tree")
        # Ours reads past what it has no use for.
        ours = tmp_path / "ours"
        await call(channel, Unpack(str(ours)), stdin=packed.stdout, timeout_s=_TIMEOUT_S)
        assert describe(ours).keys() == describe(tmp_path / "tree").keys()


async def test_flags_that_are_unknown_are_refused(channel: AgentChannel, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="unknown flags"):
        await call(channel, Pack(str(tmp_path), flags=PackFlag(4)), timeout_s=_TIMEOUT_S)


async def test_what_is_mounted_in_a_tree_is_left_out_when_that_is_asked_for(
    agent: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below/hidden").touch()
    (tree / "below").chmod(0o2710)
    (tree / "file").write_text("below")
    (tree / "other").write_text("other")
    # The mounts are the agent's alone.
    wrapped = tmp_path / "wrapped"
    become = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    wrapped.write_text(
        f"#!/bin/sh\nmount -t tmpfs -o mode=700 none {tree}/below && touch {tree}/below/over &&\n"
        f'mount --bind {tree}/below/over {tree}/file && exec {agent} "$@"\n'
    )
    wrapped.chmod(0o755)
    host = HostAgent(["unshare", *become, "--mount", "--", wrapped], tmp_path)
    try:
        channel = await host.channel()
        for flags in (PackFlag.ONE_FILE_SYSTEM, None):
            packed = await call(channel, Pack(str(tree), flags=flags), timeout_s=_TIMEOUT_S)
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
                modes = {member.name: member.mode for member in archive}
            if flags:
                assert modes == {"tree": 0o755, "tree/below": 0o2710, "tree/other": 0o644}
                assert b"tree/file" in packed.stderr
            else:
                assert modes.keys() > {"tree/below/over", "tree/file"}
        await channel.close()
    finally:
        host.end()


async def test_a_tree_goes_out_and_in_unchanged(channel: AgentChannel, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    packed = await call(
        channel,
        Pack(str(tmp_path / "tree"), name="sent"),
        timeout_s=_TIMEOUT_S,
        limit_bytes=4 << 20,
    )
    (tmp_path / "packed.tar").write_bytes(packed.stdout)
    with tarfile.open(tmp_path / "packed.tar") as archive:
        assert {member.name.split("/")[0] for member in archive} == {"sent"}
    target = tmp_path / "target"
    await call(channel, Unpack(str(target), name="came"), stdin=packed.stdout, timeout_s=_TIMEOUT_S)
    assert describe(target / "came") == describe(tmp_path / "tree")
    assert (target / "came/sparse").stat().st_blocks * 512 < 4 << 20
    # The same again, over what is there.
    await call(channel, Unpack(str(target), name="came"), stdin=packed.stdout, timeout_s=_TIMEOUT_S)
    assert describe(target / "came") == describe(tmp_path / "tree")


@pytest.mark.parametrize("layout", ["gnu", "pax"])
async def test_tars_of_the_system_are_read_and_ours_are_read_by_it(
    channel: AgentChannel, tmp_path: Path, layout: str
) -> None:
    make_tree(tmp_path / "tree")
    sparse = "--exclude=sparse" if layout == "pax" else "-S"
    tar: list[str | Path] = ["tar", f"--format={layout}", sparse, "-C", tmp_path]
    subprocess.run([*tar, "-cf", tmp_path / "a.tar", "tree"], check=True)
    if layout == "pax":
        (tmp_path / "tree/sparse").unlink()
        os.utime(tmp_path / "tree", (tmp_path / "tree").stat()[7:9])
    data = (tmp_path / "a.tar").read_bytes()
    await call(channel, Unpack(str(tmp_path / "in")), stdin=data, timeout_s=_TIMEOUT_S)
    expected = describe(tmp_path / "tree")
    actual = describe(tmp_path / "in/tree")
    assert actual.keys() == expected.keys()
    assert {k: v for k, v in actual.items() if k != b"."} == {
        k: v for k, v in expected.items() if k != b"."
    }
    packed = await call(
        channel, Pack(str(tmp_path / "in/tree")), timeout_s=_TIMEOUT_S, limit_bytes=4 << 20
    )
    (tmp_path / "b.tar").write_bytes(packed.stdout)
    (tmp_path / "out").mkdir()
    unpack: list[str | Path] = ["tar", "-C", tmp_path / "out", "-xpf", tmp_path / "b.tar"]
    subprocess.run(unpack, check=True)
    assert describe(tmp_path / "out/tree") == actual


@pytest.mark.parametrize(
    "archive", ["tar-escapes.tar", "tar-pax-sparse.tar", "frames-open.bin"], ids=str
)
async def test_an_archive_that_is_not_right_is_refused(
    channel: AgentChannel, tmp_path: Path, archive: str
) -> None:
    data = (_FUZZ / "corpus" / archive).read_bytes()
    target = tmp_path / "jail/target"
    with pytest.raises(BangerError):
        await call(channel, Unpack(str(target)), stdin=data, timeout_s=_TIMEOUT_S)
    assert [path.name for path in (tmp_path / "jail").iterdir()] == ["target"]


async def test_nothing_is_written_through_a_link_below_the_directory(
    channel: AgentChannel, tmp_path: Path
) -> None:
    (tmp_path / "in/tree").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "in/tree/sub").symlink_to(tmp_path / "outside")
    (tmp_path / "src/tree/sub").mkdir(parents=True)
    (tmp_path / "src/tree/sub/file").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "src/tree/sub/file", "tree/sub/file")
    data = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(NotFound, match="a link or a file"):
        await call(channel, Unpack(str(tmp_path / "in")), stdin=data, timeout_s=_TIMEOUT_S)
    assert not list((tmp_path / "outside").iterdir())


def make_tar(*members: tuple[str, bytes, int, str | bytes]) -> bytes:
    """Members are (name, type, mode, content or link target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, mode, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, mode
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                archive.addfile(member)
    return out.getvalue()


async def test_a_file_takes_the_place_of_an_empty_directory(
    channel: AgentChannel, tmp_path: Path
) -> None:
    (tmp_path / "in/old").mkdir(parents=True)
    data = make_tar(
        ("old", tarfile.REGTYPE, 0o644, b"file"),
        ("both", tarfile.DIRTYPE, 0o700, ""),
        ("both", tarfile.SYMTYPE, 0o777, "old"),
    )
    await call(channel, Unpack(str(tmp_path / "in")), stdin=data, timeout_s=_TIMEOUT_S)
    assert (tmp_path / "in/old").read_text() == "file"
    assert (tmp_path / "in/both").readlink() == Path("old")


async def test_the_last_word_on_a_directory_holds(channel: AgentChannel, tmp_path: Path) -> None:
    data = make_tar(
        ("top", tarfile.DIRTYPE, 0o700, ""),
        ("top/sub", tarfile.DIRTYPE, 0o500, ""),
        ("top/", tarfile.DIRTYPE, 0o755, ""),
        ("top/fifo", tarfile.FIFOTYPE, 0o666, ""),
    )
    await call(channel, Unpack(str(tmp_path / "in")), stdin=data, timeout_s=_TIMEOUT_S)
    modes = [stat.S_IMODE((tmp_path / "in/top" / n).stat().st_mode) for n in (".", "sub", "fifo")]
    assert modes == [0o755, 0o500, 0o666]


async def test_a_hard_link_has_no_data_whatever_size_it_claims(
    channel: AgentChannel, tmp_path: Path
) -> None:
    data = bytearray(
        make_tar(
            ("a", tarfile.REGTYPE, 0o644, b"data"),
            ("b", tarfile.LNKTYPE, 0o644, "a"),
            ("c", tarfile.REGTYPE, 0o644, b"more"),
        )
    )
    header = tarfile.TarInfo("b")
    header.type, header.linkname, header.size = tarfile.LNKTYPE, "a", 4
    data[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
    await call(channel, Unpack(str(tmp_path / "in")), stdin=bytes(data), timeout_s=_TIMEOUT_S)
    assert {path.name: path.read_text() for path in (tmp_path / "in").iterdir()} == {
        "a": "data",
        "b": "data",
        "c": "more",
    }


@pytest.mark.parametrize("names", [("./a", "./b"), ("./",)])
async def test_one_new_name_is_for_one_top_alone(
    channel: AgentChannel, tmp_path: Path, names: Sequence[str]
) -> None:
    data = make_tar(*((name, tarfile.DIRTYPE, 0o700, "") for name in names))
    with pytest.raises(BadRequest, match="top"):
        await call(channel, Unpack(str(tmp_path), name="n"), stdin=data, timeout_s=_TIMEOUT_S)


async def test_the_agent_comes_back_from_a_daemon_that_died_in_a_frame(
    host_agent: HostAgent, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    begun = encode(FrameType.HELLO, 0, HELLO_MAGIC + bytes(16))
    begun += encode(FrameType.OPEN, 1, Exec(["cat"]).encode())
    cut = encode(FrameType.OPEN, 2, Exec(["touch", f"{note}-with-a-long-name"]).encode())[:-4]
    host_agent.socket.sendall(begun + cut)
    channel = await host_agent.channel()
    assert (await shell(channel, "exit 0")).status == 0
    assert not list(tmp_path.glob("note*"))
    await channel.close()


async def test_bad_frames_end_the_session_but_not_the_agent(host_agent: HostAgent) -> None:
    hello = encode(FrameType.HELLO, 0, HELLO_MAGIC + bytes(16))
    for bad in (HEADER.pack(99, 1, 0), HEADER.pack(FrameType.DATA, 1, 2**32 - 1), b"\xff" * 5000):
        host_agent.socket.sendall(hello + bad)
    channel = await host_agent.channel()
    assert (await shell(channel, "exit 0")).status == 0
    await channel.close()


def test_a_daemon_past_its_credit_loses_its_session(host_agent: HostAgent) -> None:
    frames = encode(FrameType.HELLO, 0, HELLO_MAGIC + b"1" * 16)
    frames += encode(FrameType.OPEN, 1, Exec(["sleep", "100"]).encode())
    frames += encode(FrameType.DATA, 1, b"x" * 65536) * 10
    frames += encode(FrameType.OPEN, 2, Ping().encode())  # ignored: the session is over
    frames += encode(FrameType.HELLO, 0, HELLO_MAGIC + b"2" * 16)
    frames += encode(FrameType.OPEN, 3, Ping().encode())
    host_agent.socket.sendall(frames)
    got = b""
    while encode(FrameType.EXIT, 3, bytes(5)) not in got:
        got += host_agent.socket.recv(65536)
    assert b"2" * 16 in got
    assert encode(FrameType.EXIT, 2, bytes(5)) not in got


async def test_streams_past_the_limit_are_refused_one_by_one(host_agent: HostAgent) -> None:
    frames = encode(FrameType.HELLO, 0, HELLO_MAGIC + bytes(16))
    for stream in range(1, 258):
        frames += encode(FrameType.OPEN, stream, Exec(["sleep", "100"]).encode())
    host_agent.socket.sendall(frames)

    def answer() -> bytes:
        got = b""
        while b"too many streams" not in got:
            got += host_agent.socket.recv(65536)
        return got

    refused = encode(FrameType.EXIT, 257, b"\x02")[:5]
    assert refused in await asyncio.wait_for(asyncio.to_thread(answer), _TIMEOUT_S)


async def test_it_ends_with_its_connection(host_agent: HostAgent) -> None:
    assert host_agent.end() == 0


@pytest.fixture(scope="session")
def fuzz_harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("AddressSanitizer needs gcc: apt-get install gcc libc6-dev")
    harness = tmp_path_factory.mktemp("fuzz") / "agent_fuzz"
    sources = [path for path in _SOURCES.glob("*.c") if path.stem not in _NOT_FUZZED]
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    argv: list[str | Path] = [
        compiler,
        *flags,
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{_SOURCES}",
        "-o",
        harness,
    ]
    subprocess.run([*argv, _FUZZ / "agent_fuzz.c", *sources], check=True)
    return harness


@pytest.mark.parametrize(("mode", "rounds"), [("frames", 4000), ("tar", 400)])
@pytest.mark.parametrize("seed", [1, 2])
def test_fuzzing_under_sanitizers_finds_nothing(
    fuzz_harness: Path, tmp_path: Path, mode: str, rounds: int, seed: int
) -> None:
    corpus = sorted((_FUZZ / "corpus").glob(f"{mode}-*"))
    assert corpus
    environment = {**os.environ, "ASAN_OPTIONS": "exitcode=99"}
    argv: list[str | Path] = [fuzz_harness, mode, str(seed), str(rounds), *corpus]
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
