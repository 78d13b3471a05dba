"""systemctl: what banger asks of systemd."""

from __future__ import annotations

from pathlib import Path

import msgspec

from banger.base import proc
from banger.base.errors import PreconditionFailed, Unavailable

#: A start waits for the daemon, a stop for what it takes back.
_TIMEOUT_S = 300.0

#: sd_booted(3): there while systemd runs the system.
_BOOTED = Path("/run/systemd/system")


class UnitState(msgspec.Struct, frozen=True, kw_only=True):
    """A unit as systemd sees it; `active` and `enabled` are systemd's words."""

    name: str
    active: str
    enabled: str
    #: 0 when it does not run.
    pid: int
    restarts: int
    #: What it said of itself: banger's daemon its version.
    status: str
    control_group: str

    @property
    def runs(self) -> bool:
        return self.active == "active"

    @property
    def starts(self) -> bool:
        """Whether it runs, or systemd is about to start it (again)."""
        return self.active in ("active", "activating", "reloading")


_PROPERTIES = {
    "active": "ActiveState",
    "enabled": "UnitFileState",
    "pid": "MainPID",
    "restarts": "NRestarts",
    "status": "StatusText",
    "control_group": "ControlGroup",
}


def check_booted() -> None:
    """Raise PreconditionFailed where systemd does not run the system."""
    if not _BOOTED.is_dir():
        raise PreconditionFailed(
            "systemd does not run this system, and banger is installed as units of systemd's",
            hint="banger works without being installed: the first command starts its daemon",
        )


async def systemctl(*words: str) -> str:
    """Run it; what it prints. Raises Unavailable, with what it said and where more is said."""
    try:
        done = await proc.run(
            ["systemctl", "--no-ask-password", "--no-pager", *words], timeout_s=_TIMEOUT_S
        )
    except proc.ProcessFailed as error:
        units = " ".join(f"-u {word}" for word in words if word.endswith(".service"))
        raise Unavailable(error.message, hint=f"see: journalctl -e {units}") from error
    return done.stdout.decode(errors="replace")


async def unit_state(name: str) -> UnitState:
    """How a unit is; one that is not there is ``inactive``, and ``enabled`` is empty."""
    return parse_state(name, await systemctl("show", f"-p{','.join(_PROPERTIES.values())}", name))


def parse_state(name: str, shown: str) -> UnitState:
    """The state in what ``systemctl show`` prints: a property a line."""
    properties = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    words = {field: properties.get(key, "") for field, key in _PROPERTIES.items()}
    for number in ("pid", "restarts"):
        words[number] = words[number] or "0"
    return msgspec.convert({"name": name, **words}, UnitState, strict=False)
