"""What calls that ran at once may have left behind: an account of each, held against the records.

Moments are counted, not timed. A call that was answered with success has happened, somewhere
between its two moments; a change that was refused has changed nothing; a call that was cut off may
have done all or nothing. `check` ends a round in which every call has ended: what is there then is
what the next round begins with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from banger.base.model import Vm, VmState

_CHANGEABLE = ("name", "vcpu_count", "memory_mib", "disk_size_mib")


class Outcome(StrEnum):
    DONE = "done"
    REFUSED = "refused"
    #: Cancelled half-way, or its daemon was killed.
    CUT_OFF = "cut off"


_CREATIONS = frozenset({"create", "create stopped"})
_DELETIONS = frozenset({"delete", "delete --force", "prune"})
#: Whether a VM runs after each of these.
_RUNS_AFTER = {
    "create": True,
    "create stopped": False,
    "start": True,
    "restart": True,
    "stop": False,
    "kill": False,
}


@dataclass
class Entry:
    """One call: what it was to change of a VM, how it ended, and which VMs it was answered with."""

    verb: str
    began: int
    changes: dict[str, object] = field(default_factory=dict)
    ended: int = 0
    outcome: Outcome = Outcome.CUT_OFF
    #: By id, as they were then.
    answers: dict[str, Vm] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.outcome is Outcome.DONE


class Ledger:
    def __init__(self) -> None:
        self._moments = itertools.count(1)
        self._entries: list[Entry] = []
        #: When a machine ended by itself, or the daemon was killed, for the last time.
        self._mishap = 0
        self._before: dict[str, Vm] = {}

    def found(self, vms: Iterable[Vm]) -> None:
        """These are there to begin with."""
        self._before = {vm.id: vm for vm in vms}

    def begin(self, verb: str, **changes: object) -> Entry:
        """A call begins. `changes` are fields of a VM, as `value_of` knows them."""
        entry = Entry(verb, next(self._moments), changes)
        self._entries.append(entry)
        return entry

    def end(self, entry: Entry, outcome: Outcome, vms: Iterable[Vm] = ()) -> None:
        """It has ended, and was answered with `vms`."""
        entry.ended, entry.outcome = next(self._moments), outcome
        entry.answers = {vm.id: vm for vm in vms}
        if entry.done:
            for name, value in entry.changes.items():
                assert [value_of(vm, name) for vm in entry.answers.values()] == [value], entry
        if entry.verb in _CREATIONS:
            for vm in entry.answers.values():
                entry.changes = {name: value_of(vm, name) for name in _CHANGEABLE}

    def mishap(self) -> None:
        """A machine has ended by itself, or the daemon was killed."""
        self._mishap = next(self._moments)

    def check(self, vms: list[Vm]) -> None:
        """Every call has ended, and `vms` is what is recorded now."""
        assert all(entry.ended for entry in self._entries), "a call has not ended"
        names = [vm.name for vm in vms]
        assert len(set(names)) == len(names), names
        self._check_who_is_there({vm.id for vm in vms})
        for vm in vms:
            for name in _CHANGEABLE:
                self._check_value(vm, name)
            self._check_state(vm)
            self._check_use(vm)
        self.found(vms)
        self._entries.clear()
        self._mishap = 0

    def _check_who_is_there(self, there: set[str]) -> None:
        made = {*self._before, *self._done_to(*_CREATIONS)}
        deleted = self._done_to(*_DELETIONS)
        assert not there & deleted, f"deleted and still there: {there & deleted}"
        # A guest that does not come up is kept: its creation was refused.
        if all(each.done for each in self._entries if each.verb in _CREATIONS):
            assert there <= made, f"there, and nobody has made it: {there - made}"
        if all(each.done for each in self._entries if each.verb in _DELETIONS):
            lost = made - deleted - there
            assert not lost, f"gone, and nobody has deleted it: {lost}"

    def _done_to(self, *verbs: str) -> set[str]:
        done = (each for each in self._entries if each.done and each.verb in verbs)
        return {vm_id for each in done for vm_id in each.answers}

    def _check_value(self, vm: Vm, name: str) -> None:
        """It is what somebody asked for, and nobody has been told of another since."""
        changes = [each for each in self._entries if name in each.changes]
        done = [each for each in changes if each.done and vm.id in each.answers]
        last_begun = max((each.began for each in done), default=0)
        possible = [
            each.changes[name]
            for each in changes
            if (each in done or each.outcome is Outcome.CUT_OFF) and each.ended > last_begun
        ]
        if not done and vm.id in self._before:
            possible.append(value_of(self._before[vm.id], name))
        if vm.id not in self._before and not self._done_to(*_CREATIONS) & {vm.id}:
            return  # what a creation asked for that was refused is not known to be this VM's
        value = value_of(vm, name)
        assert value in possible, f"{name} of {vm.id} is {value}, not one of {possible}"

    def _check_state(self, vm: Vm) -> None:
        """It is as the last call left it, when that began after all others had ended."""
        assert vm.runtime.state in (VmState.RUNNING, VmState.STOPPED, VmState.ERROR), vm
        acting = [each for each in self._entries if each.verb in {*_RUNS_AFTER, *_DELETIONS}]
        concerned = [each for each in acting if not each.done or vm.id in each.answers]
        if not concerned:
            return
        last = max(concerned, key=lambda each: each.began)
        others_end = max((each.ended for each in concerned if each is not last), default=0)
        if last.done and last.verb in _RUNS_AFTER and last.began > max(others_end, self._mishap):
            runs = vm.runtime.state is VmState.RUNNING
            assert runs == _RUNS_AFTER[last.verb], (last, vm)

    def _check_use(self, vm: Vm) -> None:
        for each in self._entries:
            moment = each.answers[vm.id].touched_at if vm.id in each.answers else None
            if each.done and moment is not None:
                assert vm.touched_at is not None
                assert vm.touched_at >= moment, f"a use of {vm.id} is lost"


def value_of(vm: Vm, name: str) -> object:
    """A field of a VM that can be changed, wherever it is."""
    return vm.name if name == "name" else getattr(vm.spec, name)
