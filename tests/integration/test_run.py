"""The main job: a command in a fresh machine, with its status."""

from __future__ import annotations

import pytest

from product import Banger

pytestmark = pytest.mark.guest


def test_a_command_runs_on_a_machine_of_its_own_and_nothing_stays(
    banger: Banger, image: str
) -> None:
    answer = banger.ok("vm", "run", "--rm", "--image", image, "--name", "mine", "--", "uname", "-n")
    assert answer == "mine\n"
    assert banger.json("vm", "list") == []
