"""Which drivers settings lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.base.errors import BadRequest
from banger.base.model import NetworkMode
from banger.drivers import registry
from banger.hostops.client import HelperHost
from banger.hostops.ops import HostOps, bridge_of
from banger.services.addresses import Addresses

AUTO = {"hypervisor": "auto", "accelerator": "auto", "storage": "auto", "network": "auto"}


class _InstalledHost(HelperHost):
    installed = True


def select(settings: dict[str, str], host: HostOps | None = None) -> registry.Selection:
    return registry.select(
        **settings,
        firecracker_bin="firecracker",
        jailer_enabled=True,
        probe_cache=Path("/nowhere"),
        vms_dir=Path("/nowhere/vms"),
        runtime_dirs=(),
        jails_dir=Path("/nowhere/jails"),
        host=host or HelperHost(Path("/nowhere")),
        bridge=bridge_of("banger0", "10.213.0.0/16"),
        tap_pool_size=2,
        names=Addresses({}),
    )


def test_auto_leads_to_what_needs_no_root() -> None:
    selection = select(AUTO)
    assert selection.hypervisor.name == "qemu"
    assert selection.storage.name == "qcow2"
    assert selection.networks.default is NetworkMode.USER
    assert selection.storage.format in selection.hypervisor.features.disk_formats


def test_where_banger_is_installed_machines_are_on_its_bridge() -> None:
    selection = select(AUTO, _InstalledHost())
    assert selection.networks.default is NetworkMode.BRIDGE
    assert select({**AUTO, "network": "user"}, _InstalledHost()).networks.default == "user"


def test_each_choice_has_its_reason() -> None:
    settings = {**AUTO, "storage": "reflink"}
    choices = select(settings).choices
    assert [(choice.setting, choice.name, choice.reason) for choice in choices] == [
        ("hypervisor", "qemu", "auto: preferred over firecracker"),
        ("storage", "reflink", "as configured"),
        ("network", "user", "auto: it needs nothing of this host"),
    ]


@pytest.mark.parametrize("setting", sorted(AUTO))
def test_every_available_name_can_be_selected_and_no_other(setting: str) -> None:
    for name in registry.available()[setting]:
        select({**AUTO, setting: name})
    with pytest.raises(BadRequest, match=f'there is no {setting} driver "vbox"') as caught:
        select({**AUTO, setting: "vbox"})
    assert caught.value.hint.startswith("use auto, ")


def test_firecracker_gets_raw_disks_and_the_bridge_and_nothing_else() -> None:
    settings = {**AUTO, "hypervisor": "firecracker"}
    selection = select(settings)
    assert selection.hypervisor.name == "firecracker"
    assert selection.storage.format in selection.hypervisor.features.disk_formats
    assert selection.networks.default is NetworkMode.BRIDGE
    reasons = {choice.setting: choice.reason for choice in selection.choices}
    assert reasons["storage"] == "auto: firecracker needs raw disks"
    assert reasons["network"] == "auto: firecracker needs taps"
    with pytest.raises(BadRequest, match="cannot use qcow2 disks"):
        select({**settings, "storage": "qcow2"})
    with pytest.raises(BadRequest, match="cannot join machines to user networking"):
        select({**settings, "network": "user"})
