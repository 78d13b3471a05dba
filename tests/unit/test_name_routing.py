"""Names routed to the daemon's name server: where, and what is said when they are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from banger.base.errors import BangerError, PreconditionFailed
from banger.drivers.base import Level
from banger.hostops.ops import Done, Operation, RouteNames, UnrouteNames
from banger.services.name_routing import NameRouting


@dataclass
class Host:
    installed: bool = True
    error: BangerError | None = None
    problem: str = ""
    hint: str = ""
    asked: list[Operation] = field(default_factory=list)

    async def perform(self, operation: Operation) -> Done:
        operation.check()
        self.asked.append(operation)
        if self.error is not None:
            raise self.error
        return Done()


@dataclass
class Names:
    where: str = "127.0.0.1:5354"
    problem: str = ""

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def test_they_are_routed_where_banger_is_installed_and_no_longer_than_the_daemon() -> None:
    host = Host()
    routing = NameRouting(host, Names())
    await routing.open()
    assert routing.check().level is Level.OK
    assert "systemd-resolved asks there" in routing.check().detail
    await routing.close()
    await routing.close()
    assert host.asked == [RouteNames(server="127.0.0.1", port=5354), UnrouteNames()]


@pytest.mark.parametrize(
    ("host", "names"),
    [
        (Host(installed=False), Names()),
        (Host(), Names(where="")),
        (Host(), Names(problem="Address already in use")),
    ],
)
async def test_nobody_is_sent_where_nobody_answers(host: Host, names: Names) -> None:
    routing = NameRouting(host, names)
    await routing.open()
    await routing.close()
    # What an earlier daemon has routed leads to whoever has the port now.
    assert host.asked == ([UnrouteNames()] if host.installed else [])
    check = routing.check()
    assert check.level is (Level.WARN if names.problem else Level.OK)
    assert "asks there" not in check.detail


async def test_what_keeps_them_from_being_routed_is_told() -> None:
    host = Host(error=PreconditionFailed("systemd-resolved does not run", hint="install it"))
    routing = NameRouting(host, Names())
    await routing.open()
    check = routing.check()
    assert (check.level, "but systemd-resolved does not run" in check.detail) == (Level.WARN, True)
    assert check.hint == "install it"
    await routing.close()
    assert host.asked == [RouteNames(server="127.0.0.1", port=5354), UnrouteNames()]
