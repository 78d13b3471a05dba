"""What is found after a fault: nothing left over, true records, a VM that can be used, and a
bystander that never noticed.

`make faults` runs all cells of all drivers and writes docs/reliability*.md; `make test` the reduced
form.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable

import pytest

import matrix
from harm import strike
from homes import Home
from matrix import BOOT, Before, Cell, Drivers, Fault, Operation
from product import IMAGE, SLOWNESS
from reliability import GONE, Finding
from scene import Scene
from scenes import Scenes

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_numbers = itertools.count()

#: The bystander counts twice a second; on busy processors it has to wait for its turn.
_PAUSE_MAX_S = 5.0 * SLOWNESS


def _stages(log: str, operation: str) -> list[str]:
    """The stages that an operation has gone through by a daemon's log, each once."""
    records = [json.loads(line) for line in log.splitlines()]
    stages = dict.fromkeys(
        record["stage"]
        for record in records
        if record["message"] == "operation stage" and record["operation"] == operation
    )
    return [stage for stage in stages if stage not in matrix.BY_CHANCE.get(operation, ())]


def _expected(operation: Operation, drivers: Drivers) -> list[str]:
    return [stage.name for stage in operation.stages_of(drivers)]


def test_every_stage_of_a_build_is_in_the_matrix(seed: Home) -> None:
    missing_image, build = matrix.BUILDS
    assert _stages(seed.log, build.name) == _expected(build, matrix.DEFAULT)
    assert _stages(seed.log, missing_image.name)[:1] == _expected(missing_image, matrix.DEFAULT)


@pytest.mark.parametrize("operation", matrix.OPERATIONS, ids=lambda operation: operation.title)
def test_every_stage_of_an_operation_is_in_the_matrix(
    operation: Operation, drivers: Drivers, scenes: Scenes
) -> None:
    with scenes.scene(drivers, without_image=False, small=False) as scene:
        name = _prepare(scene, operation)
        scene.home.banger.ok("daemon", "stop")
        begins = len(scene.home.log)
        scene.home.banger.run(*operation.command(name, drivers))
        assert _stages(scene.home.log[begins:], operation.name) == _expected(operation, drivers)
        _clear(scene, name)


def test_after_a_fault(
    cell: Cell, scenes: Scenes, has_found: Callable[[Cell, Finding], None], all_faults: bool
) -> None:
    if cell.fault is Fault.DISK_FULL and os.geteuid() != 0:
        pytest.skip("run the tests as root, which can mount a small file system")
    try:
        small = cell.fault is Fault.DISK_FULL
        missing = cell.operation.builds
        with scenes.scene(cell.drivers, without_image=missing, small=small) as scene:
            has_found(cell, _walk(scene, cell, thorough=all_faults))
    except BaseException as error:
        has_found(cell, Finding(failed=str(error).partition("\n")[0].replace("|", "/")))
        raise


def _walk(scene: Scene, cell: Cell, *, thorough: bool) -> Finding:
    name = _prepare(scene, cell.operation)
    ended_s = strike(scene, cell, name)
    began = time.monotonic()
    scene.vms()
    answered_s = time.monotonic() - began
    scene.check_records()
    scene.check_account()
    pause_s = scene.check_bystander()
    state = scene.state(name)
    if cell.operation.name == "image.build":
        _check_build(scene, again=thorough)
    elif (state or cell.operation.before is Before.ABSENT) and (
        thorough or not cell.operation.builds  # it would build the image
    ):
        _use(scene, cell, name)
    _clear(scene, name)
    assert scene.record(name) == {}
    scene.check_account()
    pause_s = max(pause_s, scene.check_bystander())
    assert pause_s < _PAUSE_MAX_S
    shown = "ok" if cell.operation.name == "image.build" else state or GONE
    return Finding(shown, answered_s, ended_s, pause_s)


def _clear(scene: Scene, name: str) -> None:
    """Delete the subject, and what was made of it."""
    banger = scene.home.banger
    of_subject = [each["name"] for each in scene.vms() if each["name"].startswith(name)]
    if of_subject:
        banger.ok("vm", "delete", "--force", *of_subject)
    for snapshot in banger.json("snapshot", "list"):
        banger.ok("snapshot", "delete", snapshot["name"])


def _prepare(scene: Scene, operation: Operation) -> str:
    """A name, and under it the VM that the operation expects, with a file on its work disk."""
    name, before = f"subject-{next(_numbers)}", operation.before
    banger = scene.home.banger
    if operation.template is not None:
        _have_template(scene, wanted=operation.template)
    if before is Before.ABSENT:
        return name
    if before is Before.MADE:
        banger.ok("vm", "create", "-q", "--no-start", *scene.small, "--name", name)
        return name
    banger.ok("vm", "create", "-q", *scene.small, *BOOT, "--name", name)
    banger.guest(name, f"echo {name} >/root/kept; sync")
    if before is Before.STOPPED:
        banger.ok("vm", "stop", name)
    if before is Before.SUSPENDED:
        banger.ok("vm", "stop", "--suspend", name)
    return name


def _have_template(scene: Scene, *, wanted: bool) -> None:
    banger = scene.home.banger
    banger.ok("template", "prune", "--all")
    if wanted:
        banger.ok("vm", "run", "-q", "--rm", *scene.small, "--", "true")


def _use(scene: Scene, cell: Cell, name: str) -> None:
    """Whatever was found, the VM can be had, runs a command, and has what it had before."""
    if cell.operation.name == "vm.delete":
        return  # what is left of it is there to be deleted again
    banger = scene.home.banger
    state = scene.state(name)
    was_there = cell.operation.before not in (Before.ABSENT, Before.MADE)
    if state == "running" and banger.run("vm", "exec", name, "--", "true").returncode:
        # Its machine hangs: that is for its user to end.
        banger.ok("vm", "stop", name)
    if state:
        started = banger.run("vm", "start", name)
        assert started.returncode == 0 or not was_there, started
        if started.returncode:
            # Half-made, it never was of any use.
            banger.ok("vm", "delete", "--force", name)
    if not scene.state(name):
        banger.ok("vm", "create", "-q", *scene.small, *BOOT, "--name", name)
    kept = banger.guest(name, "cat /root/kept" if was_there else "true")
    assert kept == (f"{name}\n" if was_there else "")
    scene.check_records()
    scene.check_account()


def _check_build(scene: Scene, *, again: bool) -> None:
    banger = scene.home.banger
    if IMAGE in {image["name"] for image in banger.json("image", "list")}:
        banger.ok("image", "delete", IMAGE)
    if again:
        banger.ok("image", "build", "-q", IMAGE)
        banger.ok("vm", "run", "-q", "--rm", *scene.small, "--", "true")
        banger.ok("image", "delete", IMAGE)
