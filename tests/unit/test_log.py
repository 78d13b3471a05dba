"""The daemon's log: one JSON record a line, with the op_id, and the story of each operation."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from banger.base.errors import Conflict
from banger.base.log import (
    FAULT_VARIABLE,
    OperationLog,
    configure,
    get_logger,
    image_attributes,
    open_log,
    vm_attributes,
)
from banger.base.opid import current_op_id
from records import a_vm, an_image

Records = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def log_file() -> Iterator[io.StringIO]:
    """Where the log goes in this test; as before afterwards."""
    before = structlog.get_config()
    token = current_op_id.set("")
    handlers = list(logging.getLogger().handlers)
    yield io.StringIO()
    logging.getLogger().handlers[:] = handlers
    current_op_id.reset(token)
    structlog.configure(**before)


@pytest.fixture
def records(log_file: io.StringIO) -> Records:
    configure(log_file, "debug")
    return lambda: [json.loads(line) for line in log_file.getvalue().splitlines()]


def test_a_record_is_one_line_of_json_whatever_is_in_it(
    log_file: io.StringIO, records: Records
) -> None:
    get_logger().info("it\nhappened", path="a\nb", odd="\udcff", vm=Path("/x"))
    assert log_file.getvalue().count("\n") == 1
    (record,) = records()
    assert record["message"] == "it\nhappened"
    assert record["path"] == "a\nb"
    assert record["level"] == "info"
    assert record["time"].endswith("Z")


def test_every_record_of_an_operation_carries_its_op_id(records: Records) -> None:
    current_op_id.set("op-0123456789ab")
    with OperationLog("vm.stop") as log:
        log.stage("cleanup")
        get_logger().warning("by the way")
    assert {record["op_id"] for record in records()} == {"op-0123456789ab"}
    assert len(records()) == 4


async def test_concurrent_operations_keep_their_op_ids_apart(records: Records) -> None:
    async def operation(op_id: str) -> None:
        current_op_id.set(op_id)
        with OperationLog(op_id) as log:
            for _ in range(3):
                await asyncio.sleep(0)
                log.stage("s")

    ids = ["op-aaaaaaaaaaaa", "op-bbbbbbbbbbbb"]
    await asyncio.gather(*map(operation, ids))
    found = records()
    assert len(found) == 10
    assert all(record["op_id"] == record["operation"] for record in found)


def test_the_story_of_an_operation_has_its_times_and_attributes(records: Records) -> None:
    with OperationLog("vm.create", target="box") as log:
        log.stage("disks")
        log.describe(vm_id="7")
        log.stage("boot", detail="x")
    started, disks, boot, completed = records()
    assert [record["message"] for record in records()] == [
        "operation started",
        "operation stage",
        "operation stage",
        "operation completed",
    ]
    assert all(record["operation"] == "vm.create" for record in records())
    assert all(record["target"] == "box" for record in records())
    assert "vm_id" not in disks
    assert boot["vm_id"] == completed["vm_id"] == "7"
    assert boot["stage"] == "boot"
    assert boot["detail"] == "x"
    assert 0 <= boot["since_last_stage_ms"] <= boot["since_start_ms"] <= completed["duration_ms"]
    assert "duration_ms" not in started


def test_a_failed_operation_says_why_and_lets_the_error_through(records: Records) -> None:
    with pytest.raises(Conflict), OperationLog("vm.delete", quiet=True):
        raise Conflict("it runs")
    failed = records()[-1]
    assert failed["message"] == "operation failed"
    assert failed["level"] == "warning"
    assert failed["error"] == "it runs"
    assert failed["duration_ms"] >= 0


def test_an_error_without_words_is_named(records: Records) -> None:
    with pytest.raises(asyncio.CancelledError), OperationLog("x"):
        raise asyncio.CancelledError
    assert records()[-1]["error"] == "CancelledError"


def test_quiet_operations_are_seen_at_debug_only(log_file: io.StringIO) -> None:
    configure(log_file, "info")
    with OperationLog("vm.list", quiet=True) as log:
        log.stage("s")
    assert log_file.getvalue() == ""
    with OperationLog("vm.stop"):
        pass
    assert log_file.getvalue()


@pytest.mark.parametrize(
    ("level", "seen"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_a_level_hides_what_is_below_it(log_file: io.StringIO, level: str, seen: list[str]) -> None:
    configure(log_file, level)
    logger = get_logger()
    logger.debug("x")
    logger.info("x")
    logger.warning("x")
    logger.error("x")
    assert [json.loads(line)["level"] for line in log_file.getvalue().splitlines()] == seen


def test_a_traceback_goes_into_the_record(records: Records) -> None:
    try:
        raise ValueError("deep")
    except ValueError:
        get_logger().exception("request failed")
    (record,) = records()
    assert record["exception"][0]["exc_type"] == "ValueError"
    assert record["exception"][0]["exc_value"] == "deep"


def test_a_traceback_has_no_values_of_variables(log_file: io.StringIO, records: Records) -> None:
    """Environments of commands pass through the daemon: a log is not the place for them."""
    secret = "TOKEN=hunter2"
    try:
        raise ValueError("deep")
    except ValueError:
        get_logger().exception("request failed")
    assert secret not in log_file.getvalue()


def test_what_libraries_warn_of_is_a_record_like_ours_and_said_once(
    log_file: io.StringIO, records: Records
) -> None:
    configure(log_file, "info")  # again, as the daemon does when it has read its configuration
    current_op_id.set("op-0123456789ab")
    library = logging.getLogger("qemu.qmp.protocol")
    library.warning("lost %d\nlines", 2)
    library.info("not worth telling")
    try:
        raise ValueError("deep")
    except ValueError:
        library.exception("broke")
    warning, error = records()
    assert warning["message"] == "lost 2\nlines"
    assert warning["level"] == "warning"
    assert warning["logger"] == "qemu.qmp.protocol"
    assert warning["op_id"] == "op-0123456789ab"
    assert "exception" not in warning
    assert error["exception"][0]["exc_value"] == "deep"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_is_a_place_to_be_killed_or_stopped_at(
    records: Records, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setenv(FAULT_VARIABLE, f"{number.name}@vm.create:boot")
    with OperationLog("vm.create") as log:
        log.stage("disks")
        with OperationLog("vm.restart") as other:
            other.stage("boot")
        assert not sent
        log.stage("boot")
        assert sent == [(os.getpid(), number)]
        assert records()[-1]["stage"] == "boot", "the log tells where it struck"
        log.stage("boot")
    assert len(sent) == 1, "what is continued goes on"


def test_the_log_file_is_private_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        with open_log(path) as file:
            file.write("x\n")
    assert path.read_text() == "x\nx\n"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("log_file")
def test_a_full_disk_loses_records_and_stops_nothing() -> None:
    with open_log(Path("/dev/full")) as file:
        configure(file, "info")
        get_logger().info("lost")


def test_a_record_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(path) as file:
        file.write("{}\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
        try:
            file.write("cut short\n")
            file.write("lost\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        file.write("{}\n")
    assert path.read_text() == "{}\ncu\n{}\n"


def test_a_vm_is_named_by_its_ids_and_what_is_set_of_its_addresses() -> None:
    bare = a_vm("box")
    assert vm_attributes(bare) == {
        "vm_id": bare.id,
        "vm_name": "box",
        "image_id": bare.image_id,
    }
    full = a_vm("box", guest_ip="172.16.0.2", api_socket="/a", log_path="/l", last_error="no")
    assert vm_attributes(full) == vm_attributes(bare) | {
        "guest_ip": "172.16.0.2",
        "api_socket": "/a",
        "log_path": "/l",
    }


def test_an_image_is_named_by_its_ids_and_what_is_set_of_its_files() -> None:
    image = an_image("debian", artifact_dir="/d", rootfs_path="/d/r", work_seed_path="")
    assert image_attributes(image) == {
        "image_id": image.id,
        "image_name": "debian",
        "artifact_dir": "/d",
        "rootfs_path": "/d/r",
    }
