"""200 random lifecycle calls of eight clients at once over six machines, with real guests.

Rounds of eight calls that run at once, while now and then a machine is killed, a call is cancelled,
or the daemon is killed. After each round every call was answered, the records agree with the
processes and the files there are, running guests answer, and no acknowledged change is lost
(`ledger`). The same over fakes, with far more calls: tests/unit/test_lifecycle_machine.py.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from random import Random
from typing import Any

import pytest

import leftovers
from banger.base.errors import BangerError, ErrorCode
from banger.base.model import Operation, Vm, VmState
from banger.base.paths import Paths
from banger.rpc.client import Client
from banger.services.health import VmHealth
from homes import Home
from ledger import Entry, Ledger, Outcome
from product import IMAGE

pytestmark = pytest.mark.guest

NAMES = ("ash", "birch", "cedar", "elm", "fir", "gum")
_CLIENTS = 8
_ROUNDS = 25
#: Draws the same calls again; when they meet is the machine's choice.
_SEED = "BANGER_TEST_SEED"

_WEIGHTS = {
    "create": 4,
    "create stopped": 1,
    "start": 7,
    "restart": 4,
    "stop": 5,
    "kill": 3,
    "delete": 1,
    "delete --force": 2,
    "set": 5,
    "rename": 4,
    "touch": 4,
    "wait": 3,
    "list": 2,
    "cancel": 2,
    "machine killed": 1,
}
_REFUSALS = {
    ErrorCode.NOT_FOUND,
    ErrorCode.CONFLICT,
    ErrorCode.UNAVAILABLE,
    ErrorCode.PRECONDITION_FAILED,
    ErrorCode.TIMEOUT,
}
#: The daemon is killed in one round of so many.
_DAEMON_KILLED_EVERY = 6
#: Calls of a round begin within this time.
_SPREAD_S = 1.5
_WAIT_S = 2.0
#: A round that takes longer hangs: its calls wait for each other.
_ROUND_S = 120.0
_SETTLES_S = 20.0


class Play:
    def __init__(self, home: Home, random: Random) -> None:
        self._home = home
        self._random = random
        self._paths = Paths(
            config_dir=home.directory / "config/banger",
            data_dir=home.data,
            state_dir=home.state,
            runtime_dir=home.runtime,
            cache_dir=home.directory / "cache/banger",
        )
        self._ledger = Ledger()
        #: Of the ledger and the outcomes.
        self._lock = threading.Lock()
        self._sizes = itertools.count(1)
        self.outcomes: Counter[str] = Counter()

    def people(self) -> None:
        """All six are there to begin with."""
        self._home.banger.ok("daemon", "start")
        for name in NAMES:
            self._change("create stopped", name, name, next(self._sizes))
        self._ledger.check(self._settled())

    def round(self, number: int) -> None:
        home, random = self._home, self._random
        home.banger.ok("daemon", "start")
        verbs = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=_CLIENTS)
        seeds = [random.randrange(1 << 32) for _ in verbs]
        with ThreadPoolExecutor(_CLIENTS + 1) as threads:
            calls = [
                threads.submit(self._client, verb, Random(seed))
                for verb, seed in zip(verbs, seeds, strict=True)
            ]
            if number % _DAEMON_KILLED_EVERY == _DAEMON_KILLED_EVERY - 1:
                after_s = random.uniform(0, 2 * _SPREAD_S)
                calls.append(threads.submit(self._kill_daemon, home.daemon_pid(), after_s))
            late = wait(calls, timeout=_ROUND_S).not_done
            if late:
                home.kill_daemon(signal.SIGKILL)  # or the threads would never end
            assert not late, f"{verbs}: {len(late)} do not end"
        for call in calls:
            call.result()
        vms = self._settled()
        self._ledger.check(vms)
        self._check_reachable(vms)

    # Clients.

    def _client(self, verb: str, random: Random) -> None:
        name, other = random.choice(NAMES), random.choice(NAMES)
        size = next(self._sizes)
        time.sleep(random.uniform(0, _SPREAD_S))
        if verb == "machine killed":
            self._kill_a_machine(random)
        elif verb == "cancel":
            self._cancel_something(random)
        elif verb == "list":
            listed = self._call("vm.list", {}, list[Vm])
            assert len({vm.name for vm in listed or ()}) == len(listed or ())
        else:
            self._change(verb, name, other, size)

    def _change(self, verb: str, name: str, other: str, size: int) -> None:
        method, params, changes = _request(verb, name, other, size)
        with self._lock:
            entry = self._ledger.begin(verb, **changes)
        try:
            with Client.connect(self._paths, start=False) as client:
                vm = client.call(method, params, Vm)
        except BangerError as error:
            self._failed(entry, error)
        else:
            self._ended(entry, Outcome.DONE, [vm])

    def _failed(self, entry: Entry, error: BangerError) -> None:
        cut_off = error.code is ErrorCode.CANCELLED or "connection to bangerd" in error.message
        shrinks = "cannot shrink" in error.message
        assert cut_off or shrinks or error.code in _REFUSALS, (entry, error.code, error.message)
        self._ended(entry, Outcome.CUT_OFF if cut_off else Outcome.REFUSED)

    def _ended(self, entry: Entry, outcome: Outcome, vms: list[Vm] | None = None) -> None:
        with self._lock:
            self._ledger.end(entry, outcome, vms or [])
            self.outcomes[outcome] += 1

    def _call(self, method: str, params: object, result: Any) -> Any:
        """What is answered; None when there is no daemon any more."""
        try:
            with Client.connect(self._paths, start=False) as client:
                return client.call(method, params, result)
        except BangerError as error:
            if error.code is not ErrorCode.UNAVAILABLE:
                raise
            return None

    def _cancel_something(self, random: Random) -> None:
        operations = self._call("operations.list", {}, list[Operation]) or []
        running = [each for each in operations if not each.done]
        if running:
            self._call("vm.create.cancel", {"id": random.choice(running).id}, Operation)

    # What happens besides.

    def _kill_a_machine(self, random: Random) -> None:
        machines = self._home.machines()
        if machines:
            with self._lock:
                self._ledger.mishap()
            with suppress(ProcessLookupError):
                os.kill(random.choice(machines).pid, signal.SIGKILL)

    def _kill_daemon(self, pid: int, after_s: float) -> None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        with self._lock:
            self._ledger.mishap()

    # What must hold.

    def _settled(self) -> list[Vm]:
        """The records, once they agree with what there is."""
        self._home.banger.ok("daemon", "start")
        deadline = time.monotonic() + _SETTLES_S
        while True:
            vms: list[Vm] = self._call("vm.list", {}, list[Vm])
            wrong = list(self._wrong(vms))
            if not wrong:
                return vms
            assert time.monotonic() < deadline, "; ".join(wrong)
            time.sleep(0.1)

    def _wrong(self, vms: list[Vm]) -> Iterator[str]:
        """What is held, what the records do not say, and what no record accounts for."""
        running = {vm.id for vm in vms if vm.runtime.state is VmState.RUNNING}
        known = {vm.id for vm in vms}
        for vm in vms:
            if vm.runtime.state not in (VmState.RUNNING, VmState.STOPPED, VmState.ERROR):
                yield f"{vm.name} is {vm.runtime.state}"
            if (self._home.state / "vms" / vm.id / "handles.json").exists() != (vm.id in running):
                yield f"handles of {vm.name}, which is {vm.runtime.state}"
        for operation in self._call("operations.list", {}, list[Operation]):
            if not operation.done:
                yield f"{operation.kind} goes on"
        yield from self._wrong_processes(known, running)
        files, sockets = (
            {entry.name for entry in (parent / "vms").glob("*")}
            for parent in (self._home.state, self._home.runtime)
        )
        # A deletion that was cut off may have taken the directory, not the record.
        if not running <= files <= known:
            yield f"directories {files}, running {running}, known {known}"
        if sockets != running:
            yield f"sockets of {sockets}, running {running}"

    def _wrong_processes(self, known: set[str], running: set[str]) -> Iterator[str]:
        machines = Counter(_vm_id(each) for each in self._home.machines())
        if machines != dict.fromkeys(running, 1):
            yield f"machines {dict(machines)}, running {running}"
        daemon = self._home.daemon_pid()
        for process in self._home.processes():
            if process.pid != daemon and not any(each in process.command for each in running):
                yield str(process)
        # The filter of a network names nothing but its VM.
        for vm_id in known - running:
            yield from map(str, leftovers.processes_naming(vm_id))

    def _check_reachable(self, vms: list[Vm]) -> None:
        """The lock of each can be had, and running guests answer."""
        for vm in vms:
            assert self._call("vm.set", {"vm": vm.id, "change": {"name": vm.name}}, Vm) == vm
            if vm.runtime.state is VmState.RUNNING:
                found = self._call("vm.health", {"vm": vm.id}, VmHealth)
                assert found.healthy, found

    def finish(self) -> None:
        """All can be deleted, and then nothing is left."""
        names = [vm.name for vm in self._call("vm.list", {}, list[Vm])]
        if names:
            self._home.banger.ok("vm", "delete", "--force", *names)
        assert self._settled() == []


def _vm_id(machine: leftovers.Process) -> str:
    return re.split(r" -name banger-| --id ", machine.command, maxsplit=1)[-1][:12]


def _request(
    verb: str, name: str, other: str, size: int
) -> tuple[str, dict[str, object], dict[str, object]]:
    """The method, its parameters, and what it is to change, which no other call asks for."""
    match verb:
        case "create" | "create stopped":
            shape: dict[str, object] = {"name": name, "memory_mib": 256 + size, "vcpu_count": 1}
            rest = {"image": IMAGE, "start": verb == "create"}
            return "vm.create", shape | rest, shape
        case "rename":
            return "vm.set", {"vm": name, "change": {"name": other}}, {"name": other}
        case "set":
            change: dict[str, object] = {"memory_mib": 256 + size, "disk_size_mib": 8192 + size}
            return "vm.set", {"vm": name, "change": change}, change
        case "delete" | "delete --force":
            return "vm.delete", {"vm": name, "force": verb == "delete --force"}, {}
        case "wait":
            goal = ("running", "stopped", "healthy", "deleted")[size % 4]
            return "vm.wait", {"vm": name, "goal": goal, "timeout_s": _WAIT_S}, {}
        case _:
            return f"vm.{verb}", {"vm": name}, {}


def test_two_hundred_calls_of_eight_clients_over_six_machines(home: Home) -> None:
    seed = int(os.environ.get(_SEED) or Random().randrange(1 << 32))
    print(f"\n{_SEED}={seed} draws the same calls again")
    play = Play(home, Random(seed))
    play.people()
    for number in range(_ROUNDS):
        play.round(number)
    play.finish()
    print(dict(play.outcomes))
