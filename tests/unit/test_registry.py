"""Which drivers settings lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.base.errors import BadRequest
from banger.drivers import registry

AUTO = {"hypervisor": "auto", "accelerator": "auto", "storage": "auto", "network": "auto"}


def test_auto_leads_to_what_needs_no_root() -> None:
    selection = registry.select(**AUTO, probe_cache=Path("/nowhere"))
    assert selection.hypervisor.name == "qemu"
    assert selection.storage.name == "qcow2"
    assert selection.network.name == "user"
    assert selection.storage.format in selection.hypervisor.features.disk_formats


def test_each_choice_has_its_reason() -> None:
    settings = {**AUTO, "storage": "qcow2"}
    choices = registry.select(**settings, probe_cache=Path("/nowhere")).choices
    assert [(choice.setting, choice.name, choice.reason) for choice in choices] == [
        ("hypervisor", "qemu", "auto: the only one there is"),
        ("storage", "qcow2", "as configured"),
        ("network", "user", "auto: the only one there is"),
    ]


@pytest.mark.parametrize("setting", sorted(AUTO))
def test_every_available_name_can_be_selected_and_no_other(setting: str) -> None:
    for name in registry.available()[setting]:
        registry.select(**{**AUTO, setting: name}, probe_cache=Path("/nowhere"))
    with pytest.raises(BadRequest, match=f'there is no {setting} driver "vbox"') as caught:
        registry.select(**{**AUTO, setting: "vbox"}, probe_cache=Path("/nowhere"))
    assert caught.value.hint.startswith("use auto, ")
