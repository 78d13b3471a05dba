"""JSON-lines logging with the op_id on every record, and the log of an operation's stages.

`configure` is called once by the daemon. The CLI does not import this module.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TextIO, cast

import structlog

from banger.base.model import Image, Vm
from banger.base.opid import current_op_id

Attributes = Mapping[str, object]

#: For tests of recovery: ``SIGKILL@vm.create:boot`` has the process kill itself when that operation
#: enters that stage; with SIGSTOP it stops there until somebody continues it. Once.
FAULT_VARIABLE = "BANGER_FAULT"
_FAULT_SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


def _add_op_id(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    if op_id := current_op_id.get():
        event.setdefault("op_id", op_id)
    return event


class _LibraryHandler(logging.Handler):
    """What libraries log (asyncio, qemu.qmp), among our own records."""

    def emit(self, record: logging.LogRecord) -> None:
        # Without an exception none is passed: structlog would render the None.
        trace = {"exc_info": record.exc_info} if record.exc_info else {}
        get_logger().log(record.levelno, record.getMessage(), logger=record.name, **trace)


_library_handler = _LibraryHandler(logging.WARNING)


def configure(file: TextIO, level: str) -> None:
    """Send records of `level` and above to `file` as JSON, one a line.

    So are those of libraries, from warnings upwards. May be called again.
    """
    logging.getLogger().addHandler(_library_handler)
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            _add_op_id,
            # Without the values of variables: environments of users' commands are among them.
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file),
        cache_logger_on_first_use=False,
    )


def get_logger() -> Any:
    """structlog's lazy logger; typed Any by structlog itself."""
    return structlog.get_logger()


class _LogFile(io.FileIO):
    """A record that cannot be written is lost: a full disk must not stop what it tells of."""

    _torn = False

    def write(self, data: Any) -> int:
        line = (b"\n" if self._torn else b"") + bytes(data)
        with suppress(OSError):  # then not a byte of it was written
            self._torn = super().write(line) != len(line)
        return len(data)


def open_log(path: Path) -> TextIO:
    """The log file, for appending, readable by its owner only. Writing to it never fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    # Each record is one write(2): nothing is kept back that could fail later.
    return io.TextIOWrapper(
        cast("BinaryIO", _LogFile(descriptor, "w")),
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )


class OperationLog:
    """The records of one operation: started, its stages, then completed or failed.

    A context manager. ``quiet`` operations (reads) log at debug. Every stage is also a fault
    point: see FAULT_VARIABLE.
    """

    def __init__(self, operation: str, *, quiet: bool = False, **attributes: object) -> None:
        self.operation = operation
        self._log = get_logger().bind(operation=operation, **attributes)
        self._level = logging.DEBUG if quiet else logging.INFO
        self._started = self._stage_began = time.monotonic()

    def describe(self, **attributes: object) -> None:
        """Add attributes that became known: the VM's id, the image's name."""
        self._log = self._log.bind(**attributes)

    def stage(self, stage: str, detail: str = "") -> None:
        """The operation enters `stage`."""
        now = time.monotonic()
        self._log.log(
            self._level,
            "operation stage",
            stage=stage,
            since_start_ms=_ms(now - self._started),
            since_last_stage_ms=_ms(now - self._stage_began),
            **({"detail": detail} if detail else {}),
        )
        self._stage_began = now
        _strike(f"{self.operation}:{stage}")

    def note(self, text: str) -> None:
        """The operation goes another way than usual, and why."""
        self._log.warning("operation note", note=text)

    def __enter__(self) -> Self:
        self._log.log(self._level, "operation started")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        duration_ms = _ms(time.monotonic() - self._started)
        if error is None:
            self._log.log(self._level, "operation completed", duration_ms=duration_ms)
        else:
            reason = str(error) or type(error).__name__
            self._log.warning("operation failed", duration_ms=duration_ms, error=reason)


def _strike(point: str) -> None:
    """The fault that is wanted at this point, if one is: see FAULT_VARIABLE."""
    for number in _FAULT_SIGNALS:
        if os.environ.get(FAULT_VARIABLE) == f"{number.name}@{point}":
            del os.environ[FAULT_VARIABLE]
            os.kill(os.getpid(), number)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def vm_attributes(vm: Vm) -> dict[str, Any]:
    """How a VM is named in the log: ids and what is set of its addresses; nothing transient."""
    optional = {
        "guest_ip": vm.runtime.guest_ip,
        "api_socket": vm.runtime.api_socket,
        "log_path": vm.runtime.log_path,
    }
    named = {"vm_id": vm.id, "vm_name": vm.name, "image_id": vm.image_id}
    return named | {key: value for key, value in optional.items() if value}


def image_attributes(image: Image) -> dict[str, Any]:
    """How an image is named in the log."""
    optional = {
        "artifact_dir": image.artifact_dir,
        "rootfs_path": image.rootfs_path,
        "work_seed_path": image.work_seed_path,
    }
    named = {"image_id": image.id, "image_name": image.name}
    return named | {key: value for key, value in optional.items() if value}
