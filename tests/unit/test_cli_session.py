"""The terminal's half of a session: bytes, signals and ends, with a daemon's half in a thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from banger.base.errors import Unavailable
from banger.base.model import ErrorInfo
from banger.cli.session import join_session, run_session
from banger.cli.transfer import _Said, receive_stream, send_stream
from banger.rpc.client import Session
from banger.rpc.protocol import CREDIT_BYTES, NUMBER, Exit, FrameType, encode_json, frame
from cli_daemon import read_frame

Half = Callable[[socket.socket], object]


def exit_frame(exit_: Exit) -> bytes:
    return frame(FrameType.EXIT, encode_json(exit_))


@contextlib.contextmanager
def against(half: Half, early: bytes = b"") -> Iterator[tuple[Session, Future[object]]]:
    """A session whose other end is `half`, in a thread; `early` came with the result line."""
    ours, theirs = socket.socketpair()

    def work() -> object:
        with theirs:
            return half(theirs)

    with ThreadPoolExecutor(1) as pool, ours:
        future = pool.submit(work)
        yield Session(ours, bytearray(early)), future


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The writing end of a pipe that is our standard input."""
    readable, writable = os.pipe()
    with os.fdopen(readable) as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield writable
        with contextlib.suppress(OSError):
            os.close(writable)


def taken(payload: bytes) -> bytes:
    """The frame that gives a client the credit back for what was taken."""
    return frame(FrameType.WINDOW, NUMBER.pack(len(payload)))


def collect(connection: socket.socket, exit_: Exit) -> bytes:
    """All of the client's input; then `exit_`."""
    data = b""
    while received := read_frame(connection):
        kind, payload = received
        data += payload
        if kind is FrameType.EOF:
            break
        connection.sendall(taken(payload))
    connection.sendall(exit_frame(exit_))
    return data


def spend(connection: socket.socket, number: signal.Signals) -> tuple[int, list[int]]:
    """Take input and give no credit; once it is spent, send ourselves a signal: (bytes, signals)
    received."""
    count, signals = 0, list[int]()
    while not signals and (received := read_frame(connection)):
        kind, payload = received
        if kind is FrameType.DATA:
            count += len(payload)
            if count == CREDIT_BYTES:
                os.kill(os.getpid(), number)
        else:
            signals.append(NUMBER.unpack(payload)[0])
    connection.sendall(exit_frame(Exit(signal=number)))
    return count, signals


def test_input_goes_out_output_comes_in_and_each_stays_binary(
    stdin: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    everything = bytes(range(256))

    def half(connection: socket.socket) -> bytes:
        connection.sendall(frame(FrameType.DATA, everything) + frame(FrameType.STDERR, b"\xff"))
        return collect(connection, Exit(exit_code=7))

    os.write(stdin, everything)
    os.close(stdin)
    with against(half) as (session, done):
        assert run_session(session, terminal=False, stdin=True) == 7
        assert done.result(10) == everything
    assert capfdbinary.readouterr() == (everything, b"\xff")


def test_each_direction_of_a_connection_ends_on_its_own(
    stdin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads our output learns that it is over while what he writes still goes."""
    readable, writable = os.pipe()

    def reader() -> bytes:
        with os.fdopen(readable, "rb") as file:
            said = file.read()
        os.write(stdin, b"late")
        os.close(stdin)
        return said

    def half(connection: socket.socket) -> bytes:
        connection.sendall(frame(FrameType.DATA, b"early") + frame(FrameType.EOF))
        return collect(connection, Exit())

    with os.fdopen(writable, "wb") as out, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(sys, "stdout", out)
        reading = pool.submit(reader)
        with against(half) as (session, done):
            assert join_session(session) == 0
            assert done.result(10) == b"late"
        assert reading.result(10) == b"early"


def test_two_full_pipes_do_not_wait_for_each_other(
    stdin: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """As `cat` of much data: it reads no more while nobody takes its output."""
    total = 8 << 20
    chunk = bytes(200_000)

    def half(connection: socket.socket) -> int:
        echoed = 0
        while received := read_frame(connection):
            kind, payload = received
            if kind is FrameType.EOF:
                break
            connection.sendall(frame(FrameType.DATA, payload) + taken(payload))
            echoed += len(payload)
        connection.sendall(exit_frame(Exit(exit_code=0)))
        return echoed

    def feed() -> None:
        left = total
        while left:
            left -= os.write(stdin, chunk[: min(left, len(chunk))])
        os.close(stdin)

    feeder = threading.Thread(target=feed)
    with against(half) as (session, done):
        feeder.start()
        assert run_session(session, terminal=False, stdin=True) == 0
        assert done.result(10) == total
    feeder.join(10)
    assert len(capfdbinary.readouterr().out) == total


def test_a_daemon_that_floods_while_it_reads_nothing_does_not_stop_us(
    stdin: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Our input cannot go out, its output must come in all the same."""

    def half(connection: socket.socket) -> None:
        for _ in range(100):
            connection.sendall(frame(FrameType.DATA, bytes(100_000)))
        connection.sendall(exit_frame(Exit(exit_code=0)))

    stopped = threading.Event()

    def feed() -> None:
        with contextlib.suppress(OSError):
            while not stopped.is_set():
                os.write(stdin, bytes(50_000))

    os.set_blocking(stdin, False)
    feeder = threading.Thread(target=feed)
    with against(half) as (session, _):
        os.set_blocking(stdin, True)
        feeder.start()
        assert run_session(session, terminal=False, stdin=True) == 0
    stopped.set()
    sys.stdin.close()  # the feeder gets EPIPE
    feeder.join(10)
    assert not feeder.is_alive()
    assert len(capfdbinary.readouterr().out) == 10_000_000


def test_input_that_nobody_takes_is_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.truncate(64 << 20)
        monkeypatch.setattr(sys, "stdin", file)
        waiting = threading.Event()

        def half(connection: socket.socket) -> None:
            waiting.wait(0.1)  # for nothing: that it reads on cannot be awaited
            connection.sendall(exit_frame(Exit(exit_code=0)))

        with against(half) as (session, _):
            assert run_session(session, terminal=False, stdin=True) == 0
        assert 0 < file.tell() < 4 << 20


def test_no_more_input_is_sent_than_there_is_credit_for_and_a_signal_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`yes | banger vm exec NAME -- sleep 1000`, and Ctrl-C."""
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.truncate(4 << 20)
        monkeypatch.setattr(sys, "stdin", file)
        with against(lambda connection: spend(connection, signal.SIGINT)) as (session, done):
            assert run_session(session, terminal=False, stdin=True) == 130
            assert done.result(10) == (CREDIT_BYTES, [signal.SIGINT])


def test_a_command_that_ends_while_input_is_left_has_its_own_status(stdin: int) -> None:
    """`yes | banger vm exec NAME -- true`: the daemon closes with our input unread."""

    def half(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(exit_frame(Exit(exit_code=3)))

    os.write(stdin, bytes(60_000))
    with against(half) as (session, _):
        assert run_session(session, terminal=False, stdin=True) == 3


def test_without_input_the_command_is_told_so_at_once(stdin: int) -> None:
    os.write(stdin, b"not for it")
    with against(lambda connection: collect(connection, Exit(exit_code=0))) as (session, done):
        assert run_session(session, terminal=False, stdin=False) == 0
        assert done.result(10) == b""


def test_input_from_a_file_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        half: Half = lambda connection: collect(connection, Exit(exit_code=0))  # noqa: E731
        with against(half) as (session, done):
            assert run_session(session, terminal=False, stdin=True) == 0
            assert done.result(10) == content


def test_an_exit_that_came_with_the_result_line_is_seen(stdin: int) -> None:
    early = frame(FrameType.DATA, b"") + exit_frame(Exit(exit_code=5))
    with against(lambda connection: None, early) as (session, _):
        assert run_session(session, terminal=False, stdin=True) == 5


@pytest.mark.parametrize(
    ("exit_", "status"),
    [
        (Exit(signal=9), 137),
        (Exit(exit_code=126), 126),
        (Exit(error=ErrorInfo(code="unavailable", message="the agent is lost")), 125),
    ],
)
def test_ends_have_the_statuses_of_a_shell(
    stdin: int, capfd: pytest.CaptureFixture[str], exit_: Exit, status: int
) -> None:
    with against(lambda connection: connection.sendall(exit_frame(exit_))) as (session, _):
        assert run_session(session, terminal=False, stdin=True) == status
    assert ("the agent is lost" in capfd.readouterr().err) == (status == 125)


def test_a_daemon_that_goes_without_a_word_is_unavailable(stdin: int) -> None:
    with (
        against(lambda connection: connection.sendall(b"\1\0")) as (session, _),
        pytest.raises(Unavailable, match="connection to bangerd was lost"),
    ):
        run_session(session, terminal=False, stdin=True)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the session takes signals: before that they would be this process' own."""
    event = threading.Event()
    real = signal.set_wakeup_fd

    def set_wakeup_fd(descriptor: int, *, warn_on_full_buffer: bool = True) -> int:
        before = real(descriptor, warn_on_full_buffer=warn_on_full_buffer)
        event.set()
        return before

    monkeypatch.setattr(signal, "set_wakeup_fd", set_wakeup_fd)
    return event


def signals_of(connection: socket.socket, wanted: int) -> list[int]:
    seen: list[int] = []
    while len(seen) < wanted and (received := read_frame(connection)):
        if received[0] is FrameType.SIGNAL:
            seen.append(NUMBER.unpack(received[1])[0])
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_first_signal_is_the_commands(
    stdin: int, listening: threading.Event, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def half(connection: socket.socket) -> list[int]:
        assert listening.wait(10)
        os.kill(os.getpid(), number)
        seen = signals_of(connection, 1)
        connection.sendall(exit_frame(Exit(signal=number)))
        return seen

    with against(half) as (session, done):
        assert run_session(session, terminal=False, stdin=True) == 128 + number
        assert done.result(10) == [number]
    assert signal.getsignal(number) == before


def test_a_second_interrupt_abandons_the_command(
    stdin: int, listening: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    def half(connection: socket.socket) -> list[int]:
        assert listening.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        seen = signals_of(connection, 1)
        os.kill(os.getpid(), signal.SIGINT)
        return seen + signals_of(connection, 1)

    with against(half) as (session, done):
        assert run_session(session, terminal=False, stdin=True) == 130
        session._socket.close()
        assert done.result(10) == [signal.SIGINT]
    assert "abandoned" in capfd.readouterr().err
    assert signal.set_wakeup_fd(-1) == -1


def test_on_a_terminal_ctrl_c_is_a_byte_and_the_terminal_is_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "r+b", buffering=0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(slave)
        raw = threading.Event()

        def half(connection: socket.socket) -> bytes:
            os.write(master, b"a\x03\r\xff")
            data = b""
            while len(data) < 4 and (received := read_frame(connection)):
                data += received[1]
            if not termios.tcgetattr(slave)[3] & termios.ICANON:
                raw.set()
            connection.sendall(exit_frame(Exit(exit_code=0)))
            return data

        waiting = threading.Event()

        def when_raw(connection: socket.socket) -> bytes:
            while termios.tcgetattr(slave)[3] & termios.ICANON:
                waiting.wait(0.005)
            return half(connection)

        with against(when_raw) as (session, done):
            assert run_session(session, terminal=True, stdin=True) == 0
            assert done.result(10) == b"a\x03\r\xff"
        assert raw.is_set()
        assert termios.tcgetattr(slave) == before
    os.close(master)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_session_that_is_ended_leaves_the_terminal_as_it_was(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "r+b", buffering=0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(slave)

        def half(connection: socket.socket) -> None:
            while termios.tcgetattr(slave)[3] & termios.ICANON:
                waiting.wait(0.005)
            os.kill(os.getpid(), number)
            assert read_frame(connection) is None

        waiting = threading.Event()
        with against(half) as (session, done):
            assert run_session(session, terminal=True, stdin=True) == 128 + number
            session._socket.close()
            done.result(10)
        assert termios.tcgetattr(slave) == before
        assert signal.getsignal(number) == signal.SIG_DFL
    os.close(master)


# Streams of vm cp


def test_a_stream_is_sent_whole_then_its_end_then_the_exit_is_awaited(tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    (tmp_path / "file").write_bytes(content)
    with (
        (tmp_path / "file").open("rb") as file,
        against(lambda connection: collect(connection, Exit(exit_code=0))) as (session, done),
    ):
        assert send_stream(session, file, title="x") == Exit(exit_code=0)
        assert done.result(10) == content


def test_a_stream_is_not_sent_beyond_its_credit(tmp_path: Path) -> None:
    def half(connection: socket.socket) -> int:
        count = 0
        while count < CREDIT_BYTES and (received := read_frame(connection)):
            count += len(received[1])
        connection.sendall(exit_frame(Exit(exit_code=1)))
        while received := read_frame(connection):
            count += len(received[1])
        return count

    (tmp_path / "file").write_bytes(bytes(2_000_000))
    with (tmp_path / "file").open("rb") as file, against(half) as (session, done):
        assert send_stream(session, file, title="x") == Exit(exit_code=1)
        session._socket.close()
        assert done.result(10) == CREDIT_BYTES


def test_a_receiver_that_gives_up_early_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = Exit(error=ErrorInfo(code="conflict", message="no space"))

    def half(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(frame(FrameType.STDERR, b"said\n") + exit_frame(failed))

    (tmp_path / "file").write_bytes(bytes(5_000_000))
    with (tmp_path / "file").open("rb") as file, against(half) as (session, _):
        assert send_stream(session, file, title="x") == failed
    assert capfd.readouterr().err == "said\n"


def test_a_refusal_that_came_with_the_result_line_is_seen(tmp_path: Path) -> None:
    failed = Exit(error=ErrorInfo(code="not_found", message="no directory"))
    readable, writable = os.pipe()  # a tar that has said nothing yet
    with os.fdopen(readable, "rb") as file:
        with against(lambda connection: None, exit_frame(failed)) as (session, _):
            assert send_stream(session, file, title="x") == failed
        os.close(writable)


def test_what_is_received_is_written_and_the_exit_returned(tmp_path: Path) -> None:
    content = os.urandom(700_000)

    def half(connection: socket.socket) -> None:
        for at in range(0, len(content), 100_000):
            connection.sendall(frame(FrameType.DATA, content[at : at + 100_000]))
        connection.sendall(exit_frame(Exit(exit_code=0)))

    with (tmp_path / "file").open("wb") as file, against(half) as (session, _):
        assert receive_stream(session, file, title="x") == Exit(exit_code=0)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("send", [True, False])
def test_what_a_guest_says_of_a_copy_cannot_command_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], send: bool
) -> None:
    def half(connection: socket.socket) -> None:
        for part in (b"one\x1b]0;ti", b"tle\x07\ncaf\xc3", b"\xa9\n", b"\xff", b"\x9b31mend"):
            connection.sendall(frame(FrameType.STDERR, part))
        connection.sendall(exit_frame(Exit(exit_code=0)))

    with (tmp_path / "file").open("w+b") as file, against(half) as (session, _):
        transfer = send_stream if send else receive_stream
        assert transfer(session, file, title="x") == Exit(exit_code=0)
    assert capfd.readouterr().err == "one?]0;title?\ncafé\n\ufffd\ufffd31mend\n"


def test_a_guest_that_never_ends_its_line_does_not_fill_our_memory(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = _Said()
    for _ in range(10):
        said.add(b"x" * 10_000)
        assert len(capfd.readouterr().err) == 10_001


def test_a_stream_that_breaks_off_is_an_error_and_not_an_end(tmp_path: Path) -> None:
    def half(connection: socket.socket) -> None:
        connection.sendall(frame(FrameType.DATA, b"some"))

    with (
        (tmp_path / "file").open("wb") as file,
        against(half) as (session, _),
        pytest.raises(Unavailable, match="lost"),
    ):
        receive_stream(session, file, title="x")
