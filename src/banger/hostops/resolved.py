"""Names in ``vm.`` by way of systemd-resolved, which asks for them where its links say.

What is told of a link goes with it: of a dummy that is there for nothing else. It is not for the
whole host: resolved asks its global servers for all other names, too.
"""

from __future__ import annotations

from pathlib import Path

from banger.base import proc
from banger.base.errors import PreconditionFailed

RESOLVECTL = "resolvectl"
#: There while resolved runs (systemd-resolved.service(8)).
_RUNS = Path("/run/systemd/resolve/stub-resolv.conf")
_TIMEOUT_S = 20.0


def check_runs() -> None:
    """Raise PreconditionFailed where resolved does not run."""
    if not _RUNS.exists():
        raise PreconditionFailed(
            "systemd-resolved does not run",
            hint="install it, or have another resolver ask the daemon for names in vm.",
        )


async def route(link: str, server: str, port: int) -> None:
    """Have it ask `server` for names in ``vm.``, and for no others. Idempotent."""
    for words in (
        ("dns", link, f"{server}:{port}"),
        ("domain", link, "~vm"),
        ("default-route", link, "false"),
    ):
        await _resolvectl(*words)


async def _resolvectl(*words: str) -> None:
    await proc.run([RESOLVECTL, *words], timeout_s=_TIMEOUT_S, env=proc.BARE_ENVIRONMENT)
