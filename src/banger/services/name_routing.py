"""`NAME.vm` for all programs of this host: systemd-resolved asks the daemon's name server.

Only where banger is installed on the host: it is a setting of the host's, not of a user's. What was
set goes with the daemon, or else with `banger system uninstall`.
"""

from __future__ import annotations

from banger.base.errors import BangerError
from banger.base.log import get_logger
from banger.drivers.base import Check, Level, NameServer
from banger.hostops.ops import HostOps, RouteNames, UnrouteNames


class NameRouting:
    """As long as the daemon lives."""

    def __init__(self, host: HostOps, names: NameServer) -> None:
        self._host = host
        self._names = names
        self._routed = False
        self._problem: BangerError | None = None

    async def open(self) -> None:
        """Have names routed to the name server, if it is open, and else to nobody: whoever has its
        port would answer for all of this host. Raises nothing."""
        if not self._host.installed:
            return
        if not self._names.where or self._names.problem:
            await self._unroute()
            return
        server, _, port = self._names.where.rpartition(":")
        try:
            await self._host.perform(RouteNames(server=server, port=int(port)))
        except BangerError as error:
            self._problem = error
            get_logger().warning("names not routed", error=error.message)
            await self._unroute()
            return
        self._routed = True

    async def close(self) -> None:
        """Idempotent."""
        if self._routed:
            self._routed = False
            await self._unroute()

    async def _unroute(self) -> None:
        try:
            await self._host.perform(UnrouteNames())
        except BangerError as error:
            get_logger().warning("names stay routed", error=error.message)

    def check(self) -> Check:
        """How names stand. Machines do without: only `NAME.vm` is not found then."""
        names = self._names
        if not names.where:
            return Check("names", Level.OK, "no name server (dns_address is off)")
        if names.problem:
            return Check(
                "names",
                Level.WARN,
                f"NAME.vm is not answered: {names.where}: {names.problem}",
                "end what has that port, or set dns_address to another one; then: banger daemon"
                " restart",
            )
        answered = f"NAME.vm is answered at {names.where}"
        if self._routed:
            return Check("names", Level.OK, f"{answered}, and systemd-resolved asks there")
        if self._problem is not None:
            detail = f"{answered}, but {self._problem.message}"
            return Check("names", Level.WARN, detail, self._problem.hint)
        return Check("names", Level.OK, answered)
