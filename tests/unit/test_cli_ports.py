"""`banger vm publish`, `unpublish`, `ports`, and `--publish`: what is asked, what is said."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from banger.base.model import PublishedPort, Vm, VmState
from banger.base.ports import GuestPort, GuestSocket, HostPort
from banger.cli.main import run
from cli_daemon import Daemon
from records import a_vm

Captured = pytest.CaptureFixture[str]


def publishing(*ports: PublishedPort, state: VmState = VmState.RUNNING) -> Vm:
    vm = a_vm("web", state=state)
    return msgspec.structs.replace(vm, spec=msgspec.structs.replace(vm.spec, published_ports=ports))


def port(host_port: int, guest_port: int = 80, host: str = "127.0.0.1") -> PublishedPort:
    return PublishedPort(host=host, host_port=host_port, guest_port=guest_port)


def answers(daemon: Daemon, method: str, value: object) -> None:
    daemon.answers[method] = lambda _: value


def asked(host: str, host_port: int, guest_port: int) -> dict[str, Any]:
    return {"host": host, "host_port": host_port, "guest_port": guest_port}


def test_publish_asks_for_the_port_and_prints_where_it_is(daemon: Daemon, capfd: Captured) -> None:
    answers(daemon, "vm.publish", publishing(port(9000), port(8080)))
    assert run(["vm", "publish", "web", "8080:80"]) == 0
    assert daemon.calls == [
        ("vm.publish", {"vm": "web", "port": asked("127.0.0.1", 8080, 80)}),
    ]
    assert capfd.readouterr() == ("127.0.0.1:8080\n", "")


def test_publish_prints_the_port_that_was_chosen(daemon: Daemon, capfd: Captured) -> None:
    answers(daemon, "vm.publish", publishing(port(4000), port(4001), port(4002, 81)))
    assert run(["vm", "publish", "web", "0:80"]) == 0
    assert capfd.readouterr().out == "127.0.0.1:4001\n"


def test_publish_says_when_a_port_is_not_open_yet_or_open_to_all(
    daemon: Daemon, capfd: Captured
) -> None:
    made = publishing(port(8080, host="0.0.0.0"), state=VmState.STOPPED)
    answers(daemon, "vm.publish", made)
    assert run(["vm", "publish", "web", "0.0.0.0:8080:80"]) == 0
    out, err = capfd.readouterr()
    assert out == "0.0.0.0:8080\n"
    assert "vm web is stopped: the port opens when it starts" in err
    assert "0.0.0.0:8080 is open to everybody who reaches this host" in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["vm", "publish", "web", "web"], "write it as PORT"),
        (["vm", "publish", "web", "53:53/udp"], "only TCP"),
        (["vm", "publish", "web", "a.example:80"], "give an IP address"),
        (["vm", "unpublish", "web", "8080:80"], "the host's port alone"),
        (["run", "-p", "99999", "--", "true"], "write it as PORT"),
        (["vm", "create", "--publish", "x:y:z"], "write it as PORT"),
    ],
)
def test_what_is_no_port_is_a_usage_error(
    daemon: Daemon, capfd: Captured, arguments: list[str], hint: str
) -> None:
    assert run(arguments) == 2
    assert hint in capfd.readouterr().err.replace("\n", " ")
    assert daemon.calls == []


@pytest.mark.parametrize(
    ("text", "host", "number"),
    [("8080", "", 8080), ("localhost:8080", "127.0.0.1", 8080), ("[::1]:80", "::1", 80)],
)
def test_unpublish_asks_for_the_hosts_port(
    daemon: Daemon, capfd: Captured, text: str, host: str, number: int
) -> None:
    answers(daemon, "vm.unpublish", publishing())
    assert run(["vm", "unpublish", "web", text]) == 0
    assert daemon.calls == [("vm.unpublish", {"vm": "web", "host": host, "host_port": number})]
    assert capfd.readouterr() == ("web\n", "")


@pytest.mark.parametrize(
    "arguments", [["vm", "publish", "web", "8080"], ["vm", "unpublish", "web", "8080"]]
)
def test_the_changed_record_is_there_as_json(
    daemon: Daemon, capfd: Captured, arguments: list[str]
) -> None:
    answers(daemon, f"vm.{arguments[1]}", publishing(port(8080, 8080)))
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["spec"]["published_ports"] == [
        asked("127.0.0.1", 8080, 8080)
    ]


@pytest.mark.parametrize("arguments", [["run", "-d"], ["vm", "create"]])
def test_a_new_machine_may_publish_ports_and_where_they_are_is_said(
    daemon: Daemon, capfd: Captured, arguments: list[str]
) -> None:
    made = publishing(port(8080), port(4001, 81, "0.0.0.0"))
    answers(daemon, "vm.run", {"vm": made})
    answers(daemon, "vm.create", made)
    options = ["-p", "8080:80", "--publish", "0.0.0.0:0:81"]
    assert run([*arguments, *options]) == 0
    ((_, params),) = daemon.calls
    assert params.get("create", params)["published_ports"] == [
        asked("127.0.0.1", 8080, 80),
        asked("0.0.0.0", 0, 81),
    ]
    out, err = capfd.readouterr()
    assert out == "web\n"
    assert "127.0.0.1:8080 leads to port 80 of vm web\n" in err
    assert "0.0.0.0:4001 leads to port 81 of vm web\n" in err
    assert err.count("open to everybody") == 1
    assert run([*arguments, "-q", *options]) == 0
    assert capfd.readouterr() == ("web\n", "")


LISTED = [
    GuestPort(
        vm_id="id-web",
        vm_name="web",
        guest_port=22,
        sockets=(
            GuestSocket(address="0.0.0.0", port=22, pid=1, command="sshd"),
            GuestSocket(address="::", port=22, pid=1, command="sshd"),
        ),
    ),
    GuestPort(
        vm_id="id-web",
        vm_name="web",
        guest_port=80,
        sockets=(GuestSocket(address="::", port=80, pid=0, command=""),),
        published=(
            HostPort(host="127.0.0.1", host_port=8080),
            HostPort(host="::1", host_port=81, problem="in use by x (pid 1)"),
        ),
    ),
    GuestPort(
        vm_id="id-web",
        vm_name="web",
        guest_port=81,
        published=(HostPort(host="127.0.0.1", host_port=8081),),
        problem="nothing listens on it in the guest",
    ),
    GuestPort(
        vm_id="id-web",
        vm_name="web",
        guest_port=5432,
        sockets=(GuestSocket(address="172.16.0.2", port=5432, pid=9, command="postgres"),),
        problem="it listens on 172.16.0.2 of the guest only",
    ),
    GuestPort(
        vm_id="id-web",
        vm_name="web",
        guest_port=9000,
        sockets=(GuestSocket(address="127.0.0.1", port=9000, pid=9, command="php"),),
    ),
]


def test_ports_says_how_to_reach_each(daemon: Daemon, capfd: Captured) -> None:
    answers(daemon, "vm.ports", LISTED)
    assert run(["vm", "ports", "web"]) == 0
    assert daemon.calls == [("vm.ports", {"vm": "web"})]
    heading, *rows = capfd.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "VM"
    assert [row.split(maxsplit=2)[1] for row in rows] == ["22", "80", "81", "5432", "9000"]
    assert "0.0.0.0, ::" in rows[0]
    assert "sshd " in rows[0]
    assert rows[0].endswith("not published: banger vm publish web 8022:22")
    assert rows[1].endswith("127.0.0.1:8080, [::1]:81 (in use by x (pid 1))")
    assert rows[2].endswith("127.0.0.1:8081: nothing listens on it in the guest")
    assert rows[3].endswith("not from outside: it listens on 172.16.0.2 of the guest only")
    assert rows[4].endswith("not published: banger vm publish web 9000")


def test_ports_of_all_as_json(daemon: Daemon, capfd: Captured) -> None:
    answers(daemon, "vm.ports", LISTED)
    assert run(["vm", "ports", "--json"]) == 0
    assert daemon.calls == [("vm.ports", {"vm": ""})]
    assert msgspec.json.decode(capfd.readouterr().out, type=list[GuestPort]) == LISTED


def test_a_port_that_is_open_by_itself_is_shown_with_the_name(
    daemon: Daemon, capfd: Captured
) -> None:
    opened = GuestPort(
        vm_id="id-web",
        vm_name="web",
        guest_port=8000,
        sockets=(GuestSocket(address="0.0.0.0", port=8000, pid=9, command="python3"),),
        automatic=HostPort(host="127.64.3.4", host_port=8000),
        published=(HostPort(host="127.0.0.1", host_port=80),),
    )
    taken = HostPort(host="127.64.3.4", host_port=8000, problem="in use by x (pid 1)")
    answers(
        daemon, "vm.ports", [opened, msgspec.structs.replace(opened, automatic=taken, published=())]
    )
    assert run(["vm", "ports", "web"]) == 0
    _, first, second = capfd.readouterr().out.splitlines()
    assert first.endswith("127.64.3.4:8000 (web.vm), 127.0.0.1:80")
    assert second.endswith("127.64.3.4:8000 (in use by x (pid 1))")
