"""Several VMs: at once, by prefix, in lists."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address

import pytest

import suite
from homes import Home
from product import IMAGE, Banger, finish

pytestmark = pytest.mark.guest


def test_ten_vms_at_once(home: Home) -> None:
    banger = home.banger
    names = [f"crowd-{number}" for number in range(10)]
    starts = [
        banger.start("vm", "run", "-q", "--image", IMAGE, "--memory", "256M", "--vcpu", "1",
                     "--name", name, "--", "sh", "-c", "hostname; cat /etc/machine-id")
        for name in names
    ]  # fmt: skip
    answers = [finish(start, timeout_s=240) for start in starts]
    assert [status for status, _, _ in answers] == [0] * 10, answers
    assert [out.split()[0].decode() for _, out, _ in answers] == names
    assert len({out.split()[1] for _, out, _ in answers}) == 10, "each has an identity of its own"
    assert [each["name"] for each in banger.json("vm", "list")] == names
    assert len(home.machines()) == 10
    execs = [banger.start("vm", "exec", name, "--", "hostname") for name in names]
    assert [finish(each)[1].decode().strip() for each in execs] == names
    assert banger.ok("vm", "delete", "--force", *names).split() == names
    assert banger.json("vm", "list") == []
    assert home.machines() == []


@pytest.fixture(scope="module")
def three(banger: Banger, image: str) -> Iterator[tuple[str, ...]]:
    """Three VMs, of which two share a prefix, and one has another's name as a prefix."""
    names = ("alpha", "alpha-two", "beta")
    for name in names:
        banger.ok("vm", "run", "-q", "-d", "--image", image, "--memory", "256M", "--name", name)
    yield names
    banger.ok("vm", "delete", "--force", *names)


@pytest.mark.usefixtures("three")
def test_a_vm_is_found_by_an_unambiguous_prefix_and_exact_wins(banger: Banger) -> None:
    show = {name: banger.json("vm", "show", name) for name in ("alpha", "alpha-two", "beta")}
    # Not "b" or "be": an id is hexadecimal, and may begin so.
    assert banger.json("vm", "show", "bet")["name"] == "beta"
    assert banger.json("vm", "show", "alpha-")["name"] == "alpha-two"
    assert show["alpha"]["name"] == "alpha"
    for name, vm in show.items():
        assert banger.json("vm", "show", vm["id"])["name"] == name
        assert banger.json("vm", "show", vm["id"][:10])["name"] == name
    said = banger.fails("vm", "show", "al", status=1)
    assert 'multiple VMs match "al"' in said
    assert "alpha, alpha-two" in said
    assert 'vm "gamma" not found' in banger.fails("vm", "show", "gamma", status=1)
    assert "vm id or name is required" in banger.fails("vm", "show", "", status=1)
    assert banger.ok("vm", "exec", "bet", "--", "hostname") == "beta\n"


@suite.about_user_networking
def test_lists_as_a_table_and_as_json(banger: Banger, three: tuple[str, ...]) -> None:
    assert [each["name"] for each in banger.json("ps")] == list(three)
    table = banger.ok("vm", "list").splitlines()
    assert table[0].split() == (
        ["NAME", "STATE", "IMAGE", "ADDRESS", "UP", "CPU", "MEMORY", "VCPU", "DISK"]
    )
    assert [line.split()[0] for line in table[1:]] == list(three)
    assert all(line.split()[1:3] == ["running", IMAGE] for line in table[1:])
    addresses = [line.split()[3] for line in table[1:]]
    assert addresses == [each["runtime"]["address"] for each in banger.json("ps")]
    assert all(ip_address(each).is_loopback for each in addresses)
    assert len(set(addresses)) == len(three), "each has one of its own"
    assert "\x1b" not in "".join(table)


def test_show_has_what_was_asked_for_and_nothing_of_the_process(
    banger: Banger, three: tuple[str, ...]
) -> None:
    vm = banger.json("vm", "show", three[0])
    assert vm["spec"]["memory_mib"] == 256
    assert vm["runtime"]["state"] == "running"
    assert "pid" not in str(vm)
    table = banger.ok("vm", "show", three[0])
    assert re.search(r"^memory_mib +256$", table, re.MULTILINE)


def test_the_database_holds_nothing_of_the_process(home: Home) -> None:
    home.banger.ok("vm", "run", "-q", "-d", "--image", IMAGE, "--name", "intent")
    (machine,) = home.machines()
    with closing(sqlite3.connect(home.state / "banger.db")) as database:
        dump = "\n".join(database.iterdump())
    assert "intent" in dump
    assert f":{machine.pid}," not in dump
    assert "boot_id" not in dump


@pytest.mark.usefixtures("three")
def test_a_running_vm_is_deleted_only_by_force(banger: Banger) -> None:
    said = banger.fails("vm", "delete", "beta", status=1)
    assert 'vm "beta" is running' in said
    assert "banger vm delete --force beta" in said
    assert banger.state("beta") == "running"


@pytest.mark.usefixtures("three")
def test_completion_offers_names_of_vms_and_images(banger: Banger) -> None:
    def complete(words: str) -> set[str]:
        caller = Banger({"_BANGER_COMPLETE": "bash_complete", "COMP_WORDS": words,
                         "COMP_CWORD": str(len(words.split(" ")) - 1)})  # fmt: skip
        return {line.partition(",")[2] for line in caller.ok().splitlines()}

    assert complete("banger vm show al") == {"alpha", "alpha-two"}
    assert IMAGE in complete("banger vm run --image deb")


def test_completion_is_silent_when_the_daemon_is_down(bare_home: Home) -> None:
    done = Banger({**bare_home.banger.environment, "_BANGER_COMPLETE": "bash_complete",
                   "COMP_WORDS": "banger vm show a", "COMP_CWORD": "3"}).run()  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"", b"")
    assert bare_home.processes() == []
