"""The operation id: one RPC and everything it causes carries it, in a context variable."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

_OP_ID = re.compile(r"op-[0-9a-f]{12}")

current_op_id: ContextVar[str] = ContextVar("banger_op_id", default="")


def new_op_id() -> str:
    """``op-`` and 12 hex digits."""
    return f"op-{secrets.token_hex(6)}"


def is_op_id(text: object) -> bool:
    """Whether a value from outside has the shape of an op_id."""
    return isinstance(text, str) and _OP_ID.fullmatch(text) is not None
