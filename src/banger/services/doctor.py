"""`banger doctor`: every check a start makes, which drivers are in use and why."""

from __future__ import annotations

import sys
from dataclasses import replace

from banger.base import proc
from banger.base.errors import BangerError
from banger.base.paths import Paths
from banger.drivers.base import Check, Level
from banger.git.command import version
from banger.images.preflight import requirements
from banger.services.name_routing import NameRouting
from banger.services.preflight import check_free_disk
from banger.services.vm_start import Drivers

#: Only `image pull`, and only `vm ssh` and `ssh-config`, need them.
_OPTIONAL = ("skopeo", "ssh")


class Doctor:
    def __init__(
        self, paths: Paths, drivers: Drivers, choices: list[Check], routing: NameRouting
    ) -> None:
        self._paths = paths
        self._drivers = drivers
        self._choices = choices
        self._routing = routing

    async def run(self) -> list[Check]:
        """All checks, in the order they are shown: the choices first, then what they need."""
        drivers = self._drivers
        python = ".".join(str(part) for part in sys.version_info[:3])
        return [
            Check("python", Level.OK, python),
            *self._choices,
            *await drivers.hypervisor.checks(),
            *await drivers.storage.checks(),
            *await self._network_checks(),
            self._routing.check(),
            *await self._image_checks(),
            await _git_check(),
            *(_optional(tool) for tool in _OPTIONAL),
            check_free_disk(self._paths.vms_dir),
            check_free_disk(self._paths.images_dir, needed_bytes=2 << 30),
        ]

    async def _network_checks(self) -> list[Check]:
        """Of a network that VMs have when asked, what is missing is no failure."""
        networks, found = self._drivers.networks, []
        for mode, network in networks.by_mode.items():
            for check in await network.checks():
                optional = mode is not networks.default and check.level is Level.FAIL
                found.append(replace(check, level=Level.WARN) if optional else check)
        return found

    async def _image_checks(self) -> list[Check]:
        return [
            Check(each.name, Level.FAIL if each.problem else Level.OK, each.problem, each.hint)
            for each in await requirements()
        ]


def _optional(tool: str) -> Check:
    if (found := proc.which(tool)) is not None:
        return Check(tool, Level.OK, found)
    error = proc.missing_tool(tool)
    return Check(tool, Level.WARN, error.message, error.hint)


async def _git_check() -> Check:
    """Only repositories need it: machines do without."""
    try:
        return Check("git", Level.OK, await version())
    except BangerError as error:
        return Check("git", Level.WARN, error.message, error.hint)
