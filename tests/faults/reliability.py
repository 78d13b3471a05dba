"""The pages that say what was found in every cell of the fault matrix: docs/reliability.md, and one
for each of the other drivers."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from banger import __version__
from banger.base.files import write_atomically
from matrix import BUILDS, DEFAULT, DRIVERS, EXPLAINED, OPERATIONS, Cell, Drivers, Fault

#: The state of a VM that has no record.
GONE = "gone"


@dataclass(frozen=True)
class Finding:
    """What was found in one cell; `failed` says what should not have been."""

    #: What the VM's record says at the next call.
    state: str = ""
    #: From that call to its answer.
    answered_s: float = 0.0
    #: How long the command took that was struck.
    ended_s: float = 0.0
    #: The longest between two counts of the bystander.
    pause_s: float = 0.0
    failed: str = ""

    def __str__(self) -> str:
        return f"**{self.failed}**" if self.failed else f"{self.state}, {self.answered_s:.1f} s"


_INTRODUCTION = """\
# Reliability

What is found after something broke in the middle of an operation. `make faults` breaks it, looks,
and writes this page; nothing here is written by hand. Machines are QEMU's here, on qcow2 disks;
with other drivers: {others}.

An operation goes through stages, which are in the daemon's log (`operation stage`). At the moment
it enters one, the daemon kills itself, or stops itself (`BANGER_FAULT`) so that something else can
be harmed, and then goes on. Nothing is simulated: real guests, real signals, a real full disk.

## The faults

{faults}

A stage at which no machine of the VM's runs has no machine to be harmed.

## What is checked, in every cell

A second VM in the same home, the bystander, runs a process all the while. After the fault comes an
ordinary call, `banger vm list`; then:

- **Nothing is left over**: no process, socket, file, directory, mount or loop device that a record
  does not account for. (Locks are the kernel's, and go with the process that held them.)
- **The records are true**: a VM is running, stopped, in error or gone, and never "in creation" or
  "starting"; a running one has exactly one process of its hypervisor's, any other has none.
- **The VM can be used**: it is started if it does not run (ended first if it hangs, made anew if
  it is gone before it was ever there), runs a command, and has the file that was written to its
  work disk before. An image can be built.
- **It can be deleted**, and then nothing of it is left.
- **The bystander never noticed**: same machine, same boot, same process, which has gone on counting
  and is reached by `vm exec`.

"""

_OTHER_INTRODUCTION = """\
# Reliability: {name}

The fault matrix of [reliability.md](reliability.md), which says what is broken and what is checked
in every cell, with other drivers. {note} Builds of images are as they are there. `make faults`
writes this page.

"""

_RESULTS = """\
## Results

What the record says after the fault, and the seconds until the next call has its answer (the start
of a daemon included, where it was killed). "ok" stands for a build, which has no VM.

{table}

All {count} cells together: the next call was answered within {answered_s:.1f} s at most; the
command that was struck had ended, with success or an error, within {ended_s:.0f} s at most; the
bystander, which counts every 0.5 s, never paused for more than {pause_s:.1f} s.

Run on {when} in {took_min:.0f} minutes: banger {version}, {qemu}, Linux {kernel}, {cores} cores,
as {user}.
"""


def write_page(
    folder: Path, drivers: Drivers, findings: Mapping[Cell, Finding], took_s: float
) -> Path:
    """Replace these drivers' page in `folder`."""
    path = folder / _page(drivers)
    text = _introduction(drivers) + _results(drivers, findings, took_s)
    write_atomically(path, text.encode(), mode=0o644)
    return path


def _page(drivers: Drivers) -> str:
    return "reliability.md" if drivers is DEFAULT else f"reliability-{drivers.name}.md"


def _introduction(drivers: Drivers) -> str:
    if drivers is not DEFAULT:
        return _OTHER_INTRODUCTION.format(name=drivers.name, note=drivers.note)
    return _INTRODUCTION.format(
        faults="\n".join(f"- **{_title(fault)}**: {EXPLAINED[fault]}" for fault in Fault),
        others=", ".join(f"[{each.name}]({_page(each)})" for each in DRIVERS[1:]),
    )


def _results(drivers: Drivers, findings: Mapping[Cell, Finding], took_s: float) -> str:
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, check=True)
    return _RESULTS.format(
        table="\n".join(_table(drivers, findings)),
        count=len(findings),
        answered_s=max(each.answered_s for each in findings.values()),
        ended_s=max(each.ended_s for each in findings.values()),
        pause_s=max(each.pause_s for each in findings.values()),
        when=f"{datetime.now(UTC):%Y-%m-%d}",
        took_min=took_s / 60,
        version=__version__,
        qemu=qemu.stdout.decode().splitlines()[0].replace(" version", ""),
        kernel=platform.release(),
        cores=os.cpu_count(),
        user="root" if os.geteuid() == 0 else "an ordinary user",
    )


def _title(fault: Fault) -> str:
    return fault.replace("-", " ")


def _table(drivers: Drivers, findings: Mapping[Cell, Finding]) -> Iterator[str]:
    yield " | ".join(("| operation", "stage", *map(_title, Fault))) + " |"
    yield "|---" * (2 + len(Fault)) + "|"
    for operation in (*OPERATIONS, *(BUILDS if drivers is DEFAULT else ())):
        for stage in operation.stages_of(drivers):
            found = (findings.get(Cell(operation, stage, fault, drivers), "") for fault in Fault)
            yield f"| {operation.title} | {stage.name} | " + " | ".join(map(str, found)) + " |"
