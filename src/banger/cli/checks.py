"""Checks as `banger doctor` and `banger vm health` show them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from banger.cli.render import print_table


class CheckLine(msgspec.Struct):
    """One check, as the daemon answers it: ok, warn or fail, and what to do about it."""

    name: str
    level: str
    detail: str
    hint: str = ""


def print_checks(checks: Sequence[CheckLine]) -> None:
    rows = [(check.name, check.level, _told(check)) for check in checks]
    print_table(("CHECK", "STATE", "DETAIL"), rows)


def _told(check: CheckLine) -> str:
    hint = check.hint if check.level != "ok" else ""
    return f"{check.detail}; {hint}" if hint else check.detail
