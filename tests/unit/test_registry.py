"""Which drivers settings lead to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from banger.base import procfs
from banger.base.errors import BadRequest
from banger.base.extents import makes_clones
from banger.base.model import NetworkMode
from banger.base.procfs import Process
from banger.drivers import registry
from banger.drivers.base import Check, Level
from banger.drivers.hypervisor import kvm
from banger.drivers.hypervisor.firecracker import FirecrackerHypervisor
from banger.drivers.storage.reflink import ReflinkStorage
from banger.hostops.client import HelperHost
from banger.hostops.ops import HostOps, bridge_of
from banger.services.addresses import Addresses

RUNTIME_DIR = Path("/nowhere/run/vms")
AUTO = {"hypervisor": "auto", "accelerator": "auto", "storage": "auto", "network": "auto"}


class _InstalledHost(HelperHost):
    installed = True


def select(
    settings: dict[str, str],
    host: HostOps | None = None,
    vms_dir: Path = Path("/nowhere/vms"),
    qemu_bin: str = "qemu-system-x86_64",
    jails_dir: Path = Path("/nowhere/jails"),
) -> registry.Selection:
    return asyncio.run(
        registry.select(
            **settings,
            firecracker_bin="firecracker",
            jailer_enabled=True,
            qemu_bin=qemu_bin,
            probe_cache=Path("/nowhere"),
            vms_dir=vms_dir,
            runtime_dirs=(RUNTIME_DIR,),
            jails_dir=jails_dir,
            host=host or HelperHost(Path("/nowhere")),
            bridge=bridge_of("banger0", "10.213.0.0/16"),
            tap_pool_size=2,
            names=Addresses({}),
        )
    )


def test_auto_leads_to_what_needs_no_root() -> None:
    selection = select(AUTO)
    assert selection.hypervisor.name == "qemu"
    assert selection.storage.name == "qcow2"
    assert selection.networks.default is NetworkMode.USER
    assert selection.storage.format in selection.hypervisor.features.disk_formats


def test_where_banger_is_installed_machines_are_on_its_bridge() -> None:
    settings = {**AUTO, "hypervisor": "qemu"}
    selection = select(settings, _InstalledHost())
    assert selection.networks.default is NetworkMode.BRIDGE
    assert select({**settings, "network": "user"}, _InstalledHost()).networks.default == "user"


def test_each_choice_has_its_reason() -> None:
    settings = {**AUTO, "storage": "reflink"}
    choices = select(settings).choices
    assert [(choice.setting, choice.name, choice.reason) for choice in choices] == [
        ("hypervisor", "qemu", "auto: not firecracker: banger is not installed on this host"),
        ("storage", "reflink", "as configured"),
        ("network", "user", "auto: it needs nothing of this host"),
    ]


@pytest.fixture
def for_firecracker(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """A host that has all that Firecracker needs; what is put into the list it is said to lack."""
    lacks: list[Check] = []

    async def program_checks(_: FirecrackerHypervisor) -> list[Check]:
        ours = [each for each in lacks if each.name != "accelerator"]
        return [Check("hypervisor firecracker", Level.OK, "v1.16.1"), *ours]

    async def accelerator_check(_: FirecrackerHypervisor) -> Check:
        accelerators = (each for each in lacks if each.name == "accelerator")
        return next(accelerators, Check("accelerator", Level.OK, "kvm"))

    async def makes_clones(_: ReflinkStorage) -> bool:
        return True

    monkeypatch.setattr(FirecrackerHypervisor, "program_checks", program_checks)
    monkeypatch.setattr(FirecrackerHypervisor, "accelerator_check", accelerator_check)
    monkeypatch.setattr(ReflinkStorage, "makes_clones", makes_clones)
    return lacks


def hypervisor_of(selection: registry.Selection) -> tuple[str, str]:
    (choice,) = (each for each in selection.choices if each.setting == "hypervisor")
    assert choice.name == selection.hypervisor.name
    return choice.name, choice.reason


def test_auto_is_firecracker_where_all_that_it_needs_is_there(
    for_firecracker: list[Check], tmp_path: Path
) -> None:
    selection = select(AUTO, _InstalledHost(), tmp_path)
    assert hypervisor_of(selection) == ("firecracker", "auto: all that it needs is here")
    assert selection.storage.name == "reflink"
    assert selection.networks.default is NetworkMode.BRIDGE
    assert hypervisor_of(select(AUTO))[0] == "qemu", "nobody has installed banger"
    for_firecracker.append(Check("accelerator", Level.FAIL, "there is no /dev/kvm"))
    found = hypervisor_of(select(AUTO, _InstalledHost(), tmp_path))
    assert found == ("qemu", "auto: not firecracker: there is no /dev/kvm")


def test_auto_is_not_firecracker_where_kvm_is_not_proved(
    for_firecracker: list[Check], tmp_path: Path
) -> None:
    """Whom the user names is tried; what is chosen for him has to work."""
    for_firecracker.append(Check("accelerator", Level.WARN, "kvm, not proved"))
    found = hypervisor_of(select(AUTO, _InstalledHost(), tmp_path))
    assert found == ("qemu", "auto: not firecracker: kvm, not proved")


def test_who_lacks_firecracker_is_not_kept_waiting_for_kvm(
    for_firecracker: list[Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That question may take 10 s at each start of a daemon."""

    async def accelerator_check(_: FirecrackerHypervisor) -> Check:
        raise AssertionError("KVM is tried")

    monkeypatch.setattr(FirecrackerHypervisor, "accelerator_check", accelerator_check)
    for_firecracker.append(Check("jailer", Level.FAIL, "there is no jailer"))
    found = hypervisor_of(select(AUTO, _InstalledHost(), tmp_path))
    assert found == ("qemu", "auto: not firecracker: there is no jailer")


@pytest.mark.parametrize("setting", [{"storage": "qcow2"}, {"network": "user"}])
def test_auto_is_not_firecracker_beside_what_that_cannot_use(
    for_firecracker: list[Check], setting: dict[str, str], tmp_path: Path
) -> None:
    selection = select({**AUTO, **setting}, _InstalledHost(), tmp_path)
    (value,) = setting.values()
    assert hypervisor_of(selection) == ("qemu", f"auto: not firecracker: {value} is configured")


def test_auto_leaves_no_machines_behind(for_firecracker: list[Check], tmp_path: Path) -> None:
    (tmp_path / "0123456789ab").mkdir()
    (tmp_path / "0123456789ab/system.qcow2").touch()
    found = hypervisor_of(select(AUTO, _InstalledHost(), tmp_path))
    assert found == ("qemu", "auto: not firecracker: there are VMs with qcow2 disks")


REPLACED = Check("jailer", Level.FAIL, "firecracker is v1.17.0 and jailer is v1.16.1")
TIMED_OUT = Check("accelerator", Level.FAIL, "KVM runs no vCPU within 10 s")
DENIED = Check("accelerator", Level.WARN, "kvm, not proved")
VM_ID = "0123456789ab"
_ARGV = {
    "qemu": ("qemu-system-x86_64", "-chardev", "socket,id=control,path={},server=on,wait=off"),
    "firecracker": ("firecracker", "--id", VM_ID, "--api-sock", "{}"),
}


def with_disk(vms_dir: Path, name: str) -> Path:
    """A VM's directory, in which it has this disk."""
    (vms_dir / VM_ID).mkdir(exist_ok=True)
    (vms_dir / VM_ID / name).touch()
    return vms_dir / VM_ID


@pytest.mark.parametrize("lack", [REPLACED, TIMED_OUT, None, DENIED])
def test_auto_stays_with_firecracker_for_its_disks_whatever_that_lacks_now(
    for_firecracker: list[Check],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lack: Check | None,
) -> None:
    """Else the next VM had a qcow2 disk, and no daemon would ever start those that there are."""

    async def makes_no_clones(_: ReflinkStorage) -> bool:
        return False

    monkeypatch.setattr(ReflinkStorage, "makes_clones", makes_no_clones)
    with_disk(tmp_path, "system-0a1b.raw")
    for_firecracker.extend([lack] if lack is not None else [])
    selection = select(AUTO, _InstalledHost(), tmp_path)
    reason = 'auto: there are VMs with raw disks (hypervisor = "qemu" would leave them)'
    if lack in (REPLACED, TIMED_OUT):
        reason += f", though {lack.detail}"
    assert hypervisor_of(selection) == ("firecracker", reason)
    assert selection.storage.name == "reflink"


def test_raw_disks_that_are_not_firecrackers_keep_auto_with_nothing(
    for_firecracker: list[Check], tmp_path: Path
) -> None:
    for_firecracker.append(REPLACED)
    lacks = ("qemu", f"auto: not firecracker: {REPLACED.detail}")
    vm = with_disk(tmp_path, "work.raw")  # as that of one with dm_snapshot is
    assert hypervisor_of(select(AUTO, _InstalledHost(), tmp_path)) == lacks
    with_disk(tmp_path, "system.raw")
    configured = {**AUTO, "storage": "reflink"}  # with which QEMU has such, too
    assert hypervisor_of(select(configured, _InstalledHost(), tmp_path)) == lacks
    (vm / "network.log").touch()  # passt's, of users' networking
    assert hypervisor_of(select(AUTO, _InstalledHost(), tmp_path)) == lacks


def test_auto_stays_with_firecracker_while_it_has_machines_in_jails(
    for_firecracker: list[Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are not to be seen; not for a mark of one that has ended."""
    living = {"ba9876543210"}  # another home's
    monkeypatch.setattr(registry, "has_jail", lambda vm_id, _: vm_id in living)
    jails = tmp_path / "jails"
    jails.mkdir()
    (jails / VM_ID).touch()
    for_firecracker.append(REPLACED)
    settings = {**AUTO, "storage": "reflink"}
    assert hypervisor_of(select(settings, _InstalledHost(), jails_dir=jails))[0] == "qemu"
    living.add(VM_ID)
    reason = f"auto: firecracker runs machines here, though {REPLACED.detail}"
    found = hypervisor_of(select(settings, _InstalledHost(), jails_dir=jails))
    assert found == ("firecracker", reason)
    found = hypervisor_of(select({**AUTO, "network": "user"}, _InstalledHost(), jails_dir=jails))
    assert found == ("qemu", "auto: not firecracker: user is configured")


@pytest.mark.parametrize("runs", sorted(_ARGV))
def test_auto_stays_with_what_runs_machines(
    for_firecracker: list[Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: str
) -> None:
    """A daemon that turned to the other would not start, for what nobody has configured."""
    socket = RUNTIME_DIR / VM_ID / "control.sock"
    processes: list[tuple[int, Process]] = []
    monkeypatch.setattr(procfs, "own_processes", lambda: iter(processes))
    settings = {**AUTO, "storage": "reflink"}
    if runs == "firecracker":
        for_firecracker.append(REPLACED)
    other = "firecracker" if runs == "qemu" else "qemu"
    another_homes = Path("/another/run/vms") / VM_ID / "control.sock"
    for path, expected in ((another_homes, other), (socket, runs)):
        processes[:] = [(7, Process(tuple(word.format(path) for word in _ARGV[runs])))]
        assert hypervisor_of(select(settings, _InstalledHost(), tmp_path))[0] == expected
    # Of a VM of ours, with the runtime directory of an earlier daemon.
    with_disk(tmp_path, "work.raw")
    processes[:] = [(7, Process(tuple(word.format(another_homes) for word in _ARGV[runs])))]
    assert hypervisor_of(select(settings, _InstalledHost(), tmp_path))[0] == runs


def test_auto_is_not_firecracker_where_each_disk_would_be_a_copy(
    for_firecracker: list[Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    if makes_clones(tmp_path):
        pytest.skip(f"{tmp_path} makes clones")
    name, reason = hypervisor_of(select(AUTO, _InstalledHost(), tmp_path))
    assert (name, "no clones" in reason) == ("qemu", True)


def test_the_qemu_that_is_configured_is_that_of_machines_and_of_all_who_try_kvm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kvm, "_obstacle", lambda _: None)
    selection = select(AUTO, qemu_bin="~/bin/qemu")
    (firecracker,) = selection.other_hypervisors
    assert isinstance(firecracker, FirecrackerHypervisor)
    (machines,) = asyncio.run(selection.hypervisor.checks())
    tried = asyncio.run(firecracker.accelerator_check())
    for check in (machines, tried):
        assert check.level is Level.FAIL
        assert f"there is no {tmp_path}/bin/qemu" in check.detail
        assert "qemu_bin" in check.hint


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
