"""The one exception tree. What a user reads is made here, and nothing else reaches a client.

::

    BangerError                 .code  .message  .hint  .op_id
    ├── BadVersion              the peer speaks another protocol version
    ├── UnknownMethod           no such RPC
    ├── BadRequest              malformed input: a name, a size, a line of JSON
    ├── NotFound                the thing named does not exist
    ├── Ambiguous               a prefix names several things
    ├── Conflict                it exists already, or is in use
    ├── NotRunning              the VM is not running
    ├── PreconditionFailed      something the work needs is missing or not as required
    ├── OperationTimeout        a bounded wait ended
    ├── Cancelled               somebody asked for it to stop
    ├── Unavailable             the other side (daemon, guest, tool) cannot be reached
    ├── PermissionDenied        not yours
    └── Internal                a bug: the log has the traceback
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """The codes of an error reply on the wire; the set is closed."""

    BAD_VERSION = "bad_version"
    UNKNOWN_METHOD = "unknown_method"
    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    CONFLICT = "conflict"
    NOT_RUNNING = "not_running"
    PRECONDITION_FAILED = "precondition_failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"
    PERMISSION_DENIED = "permission_denied"
    INTERNAL = "internal"


class BangerError(Exception):
    """A failure that a user can read: what failed, on what, and what to do about it.

    ``message`` says what failed and on what; ``hint`` says what to do. ``op_id`` is filled in by
    whoever sends or receives the error over RPC.
    """

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(self, message: str, *, hint: str = "", op_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.op_id = op_id


class BadVersion(BangerError):
    code = ErrorCode.BAD_VERSION


class UnknownMethod(BangerError):
    code = ErrorCode.UNKNOWN_METHOD


class BadRequest(BangerError):
    code = ErrorCode.BAD_REQUEST


class NotFound(BangerError):
    code = ErrorCode.NOT_FOUND


class Ambiguous(BangerError):
    code = ErrorCode.AMBIGUOUS


class Conflict(BangerError):
    code = ErrorCode.CONFLICT


class NotRunning(BangerError):
    code = ErrorCode.NOT_RUNNING


class PreconditionFailed(BangerError):
    code = ErrorCode.PRECONDITION_FAILED


class OperationTimeout(BangerError):
    code = ErrorCode.TIMEOUT


class Cancelled(BangerError):
    code = ErrorCode.CANCELLED


class Unavailable(BangerError):
    code = ErrorCode.UNAVAILABLE


class PermissionDenied(BangerError):
    code = ErrorCode.PERMISSION_DENIED


class Internal(BangerError):
    code = ErrorCode.INTERNAL


_BY_CODE: dict[str, type[BangerError]] = {
    cls.code.value: cls
    for cls in (
        BadVersion,
        UnknownMethod,
        BadRequest,
        NotFound,
        Ambiguous,
        Conflict,
        NotRunning,
        PreconditionFailed,
        OperationTimeout,
        Cancelled,
        Unavailable,
        PermissionDenied,
        Internal,
    )
}


def from_wire(code: str, message: str, hint: str = "", op_id: str = "") -> BangerError:
    """The exception for an error reply; a code this version does not know becomes Internal."""
    return _BY_CODE.get(code, Internal)(message, hint=hint, op_id=op_id)


def from_unexpected(error: Exception) -> BangerError:
    """What a user is told of an exception that nobody expected; its traceback is for the log.

    The operating system's errors say what they are about: a full disk is not a bug of ours.
    """
    if isinstance(error, OSError) and error.strerror:
        subject = f"{error.filename}: " if error.filename else ""
        return Unavailable(f"{subject}{error.strerror}", hint="see: banger daemon logs")
    return Internal(f"internal error: {type(error).__name__}", hint="see: banger daemon logs")
