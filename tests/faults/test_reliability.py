"""The page about the fault matrix has a place for every cell, and says which failed."""

from __future__ import annotations

from pathlib import Path

import pytest

import matrix
from reliability import Finding, write_page


@pytest.mark.parametrize("drivers", matrix.DRIVERS, ids=lambda drivers: drivers.name)
def test_every_cell_is_in_the_page_and_a_failure_shows(
    drivers: matrix.Drivers, tmp_path: Path
) -> None:
    cells = tuple(matrix.cells(drivers))
    findings = {
        cell: Finding(f"state-{number}", answered_s=number / 10)
        for number, cell in enumerate(cells)
    }
    findings[cells[3]] = Finding(failed="left behind: a process")
    text = write_page(tmp_path, drivers, findings, took_s=600).read_text()
    for number, cell in enumerate(cells):
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {cell.operation.title} | {cell.stage.name} |")
        )
        assert (f" state-{number}, " in row) == (number != 3)
    assert text.count("**left behind: a process**") == 1
    assert "in 10 minutes" in text
    assert drivers.note in text


def test_the_reduced_form_has_every_killed_daemon_of_vms_and_each_fault() -> None:
    killed = {
        cell
        for cell in matrix.ALL
        if cell.fault is matrix.Fault.DAEMON_KILLED and cell.operation.name != "image.build"
    }
    assert killed < set(matrix.REDUCED)
    assert {cell.fault for cell in matrix.REDUCED} == set(matrix.Fault)
    assert len({cell.id for cell in matrix.ALL}) == len(matrix.ALL)
