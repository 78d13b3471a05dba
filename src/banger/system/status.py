"""What is installed on this system, and how it does."""

from __future__ import annotations

import msgspec

from banger import __version__
from banger.system.install import helper_answers, installed
from banger.system.systemd import UnitState, unit_state
from banger.system.units import UNITS


class SystemStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`banger system status --json`."""

    installed: bool
    #: Of the command that asks.
    banger: str
    #: Of what is installed; empty when nothing is.
    version: str = ""
    owner: str = ""
    owner_uid: int = -1
    python: str = ""
    units: tuple[UnitState, ...] = ()
    #: None: only the owner and root may ask.
    helper_answers: bool | None = None

    @property
    def well(self) -> bool:
        return (
            self.installed
            and all(unit.runs for unit in self.units)
            and (self.helper_answers is not False)
        )


async def system_status() -> SystemStatus:
    """Raises PreconditionFailed when what is installed is not to be believed."""
    found = installed()
    if found is None:
        return SystemStatus(installed=False, banger=__version__)
    return SystemStatus(
        installed=True,
        banger=__version__,
        version=found.version,
        owner=found.owner,
        owner_uid=found.owner_uid,
        python=found.python,
        units=tuple([await unit_state(name) for name in UNITS]),
        helper_answers=helper_answers(),
    )
