"""`banger vm stats` and the usage in `vm list`: the figures, what fits, and how watching ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
from datetime import datetime, timedelta
from typing import Any

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from banger.base.errors import Cancelled, NotFound
from banger.base.model import VmState, now
from banger.base.usage import (
    GuestDisk,
    GuestUsage,
    HostUsage,
    ListedVm,
    Sample,
    UsagePoint,
    VmStats,
)
from banger.cli import figures
from banger.cli import stats as stats_command
from banger.cli.dashboard import Dashboard
from banger.cli.main import run
from banger.cli.stats_columns import COLUMNS
from cli_daemon import Daemon
from records import a_vm

Captured = pytest.CaptureFixture[str]


def a_sample(at: datetime | None = None, **fields: Any) -> Sample:
    guest = GuestUsage(
        cpu_percent=62.5,
        vcpu_count=2,
        memory_used_bytes=300 << 20,
        memory_total_bytes=1 << 30,
        disks=(
            GuestDisk(mount="/", used_bytes=1 << 30, total_bytes=8 << 30),
            GuestDisk(mount="/root", used_bytes=10 << 20, total_bytes=4 << 30),
        ),
        rx_bytes=10,
        tx_bytes=20,
        rx_bytes_per_s=2048.0,
        tx_bytes_per_s=0.0,
        load=(0.5, 0.25, 0.125),
        processes=42,
        uptime_s=7200,
    )
    host = HostUsage(
        cpu_percent=125.0,
        memory_bytes=400 << 20,
        disk_bytes=3 << 20,
        disk_read_bytes_per_s=5 << 20,
    )
    values: dict[str, Any] = {"at": at or now(), "host": host, "guest": guest}
    return Sample(**values | fields)


def a_machine(name: str = "box", looks: int = 3, **fields: Any) -> VmStats:
    """Looked at every second until now, ever busier: the last look at 125 % of 200."""
    end = now()
    values: dict[str, Any] = {
        "id": f"id-{name}",
        "name": name,
        "state": VmState.RUNNING,
        "vcpu_count": 2,
        "memory_mib": 1024,
        "latest": a_sample(end),
        "history": tuple(
            UsagePoint(
                at=end - timedelta(seconds=looks - 1 - number),
                host_cpu_percent=125.0 * number / max(looks - 1, 1),
                host_memory_bytes=400 << 20,
                guest_cpu_percent=62.5,
                guest_memory_percent=99.0,
            )
            for number in range(looks)
        ),
    }
    return VmStats(**values | fields)


STOPPED = a_machine("off", state=VmState.STOPPED, latest=None, history=())
SILENT = a_machine("mute", latest=a_sample(guest=None))

HEADINGS = (
    "NAME CPU GUEST CPU MEMORY HOST MEM DISK / DISK /root HOST DISK READ WRITTEN NET IN NET OUT"
    " LOAD PROCS UP"
)
FIGURES = "box 125% 62.5% 300M/1.0G 400M 1.0G/8.0G 10M/4.0G 3.0M 5.0M/s - 2.0K/s 0B/s 0.50 42 2h"


def words(text: str) -> str:
    return " ".join(text.split())


# Figures


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0.0%"), (0.04, "0.0%"), (12.34, "12.3%"), (99.94, "99.9%"),
     (99.95, "100%"), (187.4, "187%")],
)  # fmt: skip
def test_shares_have_three_digits(value: float | None, shown: str) -> None:
    assert figures.percent(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0B"), (999, "999B"), (1000, "1.0K"), (1024, "1.0K"), (10_188, "9.9K"),
     (10_240, "10K"), (312 << 20, "312M"), (1000 << 20, "1.0G"), (5 << 40, "5.0T")],
)  # fmt: skip
def test_sizes_have_two_or_three_digits(value: float | None, shown: str) -> None:
    assert figures.size(value) == shown


@given(st.integers(0, (1 << 63) - 1))
def test_no_size_is_wider_than_its_column(value: int) -> None:
    assert len(figures.size(value)) <= 4


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=15),
    st.integers(0, 200),
)
def test_columns_fit_and_the_ones_of_low_rank_are_kept(
    columns: list[tuple[int, int]], available: int
) -> None:
    widths, ranks = [width for width, _ in columns], [rank for _, rank in columns]
    kept = figures.fitting(widths, ranks, available)
    assert kept == sorted(set(kept))
    assert kept
    if len(kept) > 1:
        assert sum(widths[at] for at in kept) + figures.GAP * (len(kept) - 1) <= available
    dropped = set(range(len(columns))) - set(kept)
    assert all(ranks[gone] >= max(ranks[at] for at in kept) for gone in dropped)


# Once


def test_what_machines_use_is_a_table(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.stats"] = lambda _: [a_machine(), SILENT, STOPPED]
    assert run(["vm", "stats"]) == 0
    out, err = capfd.readouterr()
    lines = [words(line) for line in out.splitlines()]
    assert lines == [
        HEADINGS,
        FIGURES,
        "mute 125% - - 400M - - 3.0M 5.0M/s - - - - - -",
        "off - - - - - - - - - - - - - stopped",
    ]
    assert err == ""
    assert daemon.calls == [("vm.stats", {"vm": ""})]


def test_one_machine_can_be_named(daemon: Daemon) -> None:
    daemon.answers["vm.stats"] = lambda _: [a_machine()]
    assert run(["vm", "stats", "box"]) == 0
    assert daemon.calls == [("vm.stats", {"vm": "box"})]


def test_json_is_all_that_is_known(daemon: Daemon, capfd: Captured) -> None:
    found = [a_machine(), STOPPED]
    daemon.answers["vm.stats"] = lambda _: found
    assert run(["vm", "stats", "--json"]) == 0
    assert msgspec.json.decode(capfd.readouterr().out, type=list[VmStats]) == found


def test_where_nothing_runs_there_are_headings_only(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.stats"] = lambda _: []
    assert run(["vm", "stats"]) == 0
    assert words(capfd.readouterr().out) == HEADINGS


@pytest.mark.parametrize("interval", ["0", "499ms", "61m", "2", "fast"])
def test_an_interval_that_cannot_be_is_a_wrong_call(
    daemon: Daemon, capfd: Captured, interval: str
) -> None:
    assert run(["vm", "stats", "--watch", "--interval", interval]) == 2
    assert interval in capfd.readouterr().err
    assert daemon.calls == []


# Watching, where there is no terminal


def watched(daemon: Daemon, *events: list[VmStats]) -> None:
    """The daemon tells these, and then that it stops."""
    daemon.events["vm.stats"] = list(events)

    def stops(_: dict[str, Any]) -> object:
        raise Cancelled("bangerd is stopping")

    daemon.answers["vm.stats"] = stops


def test_watching_writes_lines_below_one_line_of_headings(daemon: Daemon, capfd: Captured) -> None:
    watched(daemon, [a_machine(), SILENT], [a_machine()])
    assert run(["vm", "stats", "--watch"]) == 1
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert words(lines[0]) == f"TIME {HEADINGS}"
    assert [line.split()[1] for line in lines[1:]] == ["box", "mute", "box"]
    assert words(lines[3]).endswith(FIGURES)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", lines[1].split()[0])
    starts = {line.index("125%") for line in lines[1:]}
    assert starts == {lines[0].index("CPU")}, "the columns stand below each other"
    assert "bangerd is stopping" in err
    params = {"vm": "", "watch": True, "interval_s": 2.0}
    assert daemon.calls == [("vm.stats", params)]


def test_watching_as_json_is_a_line_a_machine(daemon: Daemon, capfd: Captured) -> None:
    watched(daemon, [a_machine(), STOPPED], [a_machine()])
    run(["vm", "stats", "box", "--watch", "--json", "--interval", "500ms"])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == ["box", "off", "box"]
    assert lines[0]["latest"]["host"]["cpu_percent"] == 125.0
    assert lines[1]["latest"] is None
    assert lines[0]["history"] == []
    assert daemon.calls == [("vm.stats", {"vm": "box", "watch": True, "interval_s": 0.5})]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_ctrl_c_is_how_watching_ends(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: Captured, more: list[str]
) -> None:
    watched(daemon, [a_machine()])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stats_command, "_print_json_lines", interrupted)
    monkeypatch.setattr(stats_command._Lines, "show", interrupted)
    assert run(["vm", "stats", "--watch", *more]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_reader_that_is_gone_is_not_the_daemon_being_gone(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    watched(daemon, [a_machine()])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stats_command, "_print_json_lines", full)
    assert run(["vm", "stats", "--watch", "--json"]) == 1
    assert capfd.readouterr().err == "error: No space left on device\n"


def test_a_machine_that_is_gone_ends_watching_with_the_reason(
    daemon: Daemon, capfd: Captured
) -> None:
    def gone(_: dict[str, Any]) -> object:
        raise NotFound('vm "box" not found')

    daemon.answers["vm.stats"] = gone
    assert run(["vm", "stats", "box", "--watch"]) == 1
    assert 'vm "box" not found' in capfd.readouterr().err


# The screen


def drawn(found: list[VmStats], width: int = 200, height: int = 24, **options: Any) -> list[str]:
    dashboard = Dashboard(1.0)
    dashboard.found = found
    file = options.pop("file", None) or io.StringIO()
    Console(file=file, width=width, height=height, **options).print(dashboard)
    file.seek(0)
    return str(file.read()).splitlines()


def test_the_screen_has_figures_with_graphs_of_their_history() -> None:
    title, headings, box, mute, off = drawn([a_machine(), SILENT, STOPPED])
    assert title.rstrip() == "3 machines, every 1 s; Ctrl-C ends"
    assert words(headings) == HEADINGS
    assert words(box) == words(FIGURES.replace("125%", "125% ▁▃▆").replace("1.0G ", "1.0G ███ ", 1))
    assert words(mute).startswith("mute 125% ▁▃▆ - - ")
    assert words(off) == "off - - - - - - - - - - - - - stopped"


def test_graphs_take_the_room_that_there_is() -> None:
    machine = a_machine(looks=120)

    def graphs(width: int) -> int:
        return sum(character in "▁▂▃▄▅▆▇█" for character in drawn([machine], width=width)[2])

    assert graphs(30) == 0
    assert graphs(31) == 8
    assert 8 < graphs(80) < graphs(160) < graphs(400) == 2 * 40


@given(st.integers(1, 250), st.integers(0, 3), st.booleans())
def test_the_screen_is_never_wider_than_the_terminal(
    width: int, count: int, ascii_only: bool
) -> None:
    found = [a_machine(f"box-{number}", looks=50) for number in range(count)]
    file: Any = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
    lines = drawn(found, width=width, file=file)
    assert all(len(line) <= width for line in lines)
    assert len(lines) == 2 + count


def test_machines_that_have_no_room_are_counted() -> None:
    lines = drawn([a_machine(f"box-{number}") for number in range(30)], height=10)
    assert len(lines) == 10
    assert lines[-1].rstrip() == "and 23 more"
    exact = drawn([a_machine(f"box-{number}") for number in range(7)], height=10)
    assert "more" not in exact[-1]


def test_a_first_screen_without_machines_says_so() -> None:
    assert drawn([])[0].startswith("0 machines")


def test_without_colour_the_screen_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"force_terminal": True, "color_system": "256"}
    assert "\x1b[32m" in "".join(drawn([a_machine()], **options))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in "".join(drawn([a_machine()], **options))


def test_a_stop_while_a_frame_is_drawn_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    dashboard = Dashboard(1.0)
    live = dashboard._live

    def update(*_: object, **__: object) -> None:
        order.append("draw")
        if len(order) == 1:
            dashboard.suspend()  # as the handler of a signal would
            dashboard.redraw()
        order.append("drawn")

    monkeypatch.setattr(live, "update", update)
    monkeypatch.setattr(live, "stop", lambda: order.append("screen given back"))
    monkeypatch.setattr(live, "start", lambda **_: order.append("screen taken"))
    monkeypatch.setattr(signal, "raise_signal", lambda number: order.append(number.name))
    dashboard.show([a_machine()])
    assert order == [
        "draw",
        "drawn",
        "screen given back",
        "SIGSTOP",
        "screen taken",
        "draw",
        "drawn",
    ]


# The list of machines


def test_the_list_has_what_was_seen_last(daemon: Daemon, capfd: Captured) -> None:
    seen = ListedVm(**msgspec.structs.asdict(a_vm("a", state=VmState.RUNNING)), usage=a_sample())
    silent = msgspec.structs.replace(seen, name="b", usage=a_sample(guest=None))
    unseen = msgspec.structs.replace(seen, name="c", usage=None)
    daemon.answers["vm.list"] = lambda _: [seen, silent, unseen]
    run(["vm", "list"])
    lines = [words(line) for line in capfd.readouterr().out.splitlines()]
    assert lines == [
        "NAME STATE IMAGE ADDRESS UP CPU MEMORY VCPU DISK",
        "a running debian-bookworm - 0s 125% 300M/1.0G 2 1.0G",
        "b running debian-bookworm - 0s 125% - 2 1.0G",
        "c running debian-bookworm - 0s - - 2 1.0G",
    ]
    run(["vm", "list", "--json"])
    listed = json.loads(capfd.readouterr().out)
    assert [each["usage"] is None for each in listed] == [False, False, True]
    assert listed[0]["usage"]["guest"]["processes"] == 42


def test_a_daemon_that_tells_no_usage_is_understood(daemon: Daemon, capfd: Captured) -> None:
    daemon.answers["vm.list"] = lambda _: [a_vm("box")]
    assert run(["vm", "list"]) == 0
    assert "box" in capfd.readouterr().out


def test_a_narrow_terminal_gets_the_columns_that_matter(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    daemon.answers["vm.list"] = lambda _: [a_vm("box")]
    daemon.answers["vm.stats"] = lambda _: [a_machine()]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    for arguments, headings in (
        (["vm", "list"], "NAME STATE CPU MEMORY"),
        (["vm", "stats"], "NAME CPU MEMORY"),
    ):
        run(arguments)
        assert words(click.unstyle(capfd.readouterr().out.splitlines()[0])) == headings


def test_columns_are_wide_enough_for_their_headings_and_ranked_one_by_one() -> None:
    assert all(column.width >= len(column.heading) for column in COLUMNS)
    ranks = [column.rank for column in COLUMNS]
    assert len(set(ranks)) == len(ranks)
    assert os.linesep not in "".join(column.heading for column in COLUMNS)
