"""The settings: one table, from which the parser, the defaults and the help are made.

``config.toml`` may set any of them; an unknown key is an error that names the nearest known one.
Settings are here once something reads them.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from banger.base.bridge import check_bridge_cidr, check_bridge_name
from banger.base.errors import BadRequest, BangerError
from banger.base.model import Egress, InitMode, check_artifact_name
from banger.base.units import parse_duration_s, parse_size_mib
from banger.base.url import check_catalog_location

LOG_LEVELS = {"": "info", "info": "info", "debug": "debug", "warn": "warning",
              "warning": "warning", "error": "error"}  # fmt: skip


def parse_log_level(text: str) -> str:
    """``debug info warning error`` from what a person wrote; empty is info."""
    level = LOG_LEVELS.get(text.strip().lower())
    if level is None:
        raise BadRequest(f'unsupported log_level "{text}" (use debug, info, warn, or error)')
    return level


def _choice(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise BadRequest(f'"{value}" is not one of {", ".join(allowed)}')
        return str(value)

    return parse


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{value!r} is not text")
    return value


def _own_path(value: object) -> str:
    text = _text(value)
    if text and not text.startswith(("/", "~/")):
        raise BadRequest(f'"{text}" is neither absolute nor below ~/')
    return text


def _program(value: object) -> str:
    text = _text(value)
    if not text or ("/" in text and not text.startswith(("/", "~/"))):
        raise BadRequest(f'"{text}" is neither a name nor absolute nor below ~/')
    return text


def _count(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise BadRequest(f"{value!r} is not a whole number from {least} to {most}")
        return value

    return parse


def _size(value: object) -> int:
    return parse_size_mib(str(value)) if isinstance(value, int) else parse_size_mib(_text(value))


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{value!r} is neither true nor false")
    return value


def parse_dns_address(value: object) -> tuple[str, int] | None:
    """``127.0.0.1:5354``; None for ``off``. Loopback only: names of VMs are nobody else's."""
    text = _text(value)
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    try:
        is_valid = IPv4Address(host).is_loopback and 1 <= int(port) <= 65535
    except ValueError:
        is_valid = False
    if not is_valid:
        raise BadRequest(
            f'"{text}" is not a loopback address and a port', hint="like 127.0.0.1:5354; or: off"
        )
    return host, int(port)


def _duration(least_s: float) -> Callable[[object], float]:
    """A duration: 0, which means never, or at least `least_s` seconds."""

    def parse(value: object) -> float:
        seconds = parse_duration_s("0" if value == 0 else _text(value))
        if 0 < seconds < least_s:
            raise BadRequest(f'"{value}" is less than {least_s:g} s', hint="0 means never")
        return seconds

    return parse


#: Of any VM: a hypervisor may have less for its machines.
VCPU_MAX = 64

_LOG_LEVEL_VARIABLE = "BANGER_LOG_LEVEL"


@dataclass(frozen=True)
class Config:
    """The effective settings. Field names are the keys, with ``.`` written as ``_``.

    Sizes are in MiB, durations in seconds.
    """

    log_level: str
    hypervisor: str
    firecracker_bin: str
    jailer_bin: str
    jailer_enabled: bool
    qemu_bin: str
    accelerator: str
    storage: str
    network: str
    bridge_name: str
    bridge_cidr: str
    tap_pool_size: int
    #: Host and port; None: no name server.
    dns_address: tuple[str, int] | None
    forward_ports: bool
    default_image_name: str
    ssh_key_path: str
    catalog_url: str
    auto_stop_stale_after: float
    stats_poll_interval: float
    template_limit: int
    template_size_limit: int
    standby_limit: int
    image_size_limit: int
    image_cache_limit: int
    vm_defaults_vcpu: int
    vm_defaults_memory: int
    vm_defaults_disk_size: int
    vm_defaults_system_overlay_size: int
    vm_defaults_init: InitMode
    vm_defaults_egress: Egress


@dataclass(frozen=True)
class Setting:
    """One row of the table. ``default`` is as a person would write it in the file."""

    key: str
    parse: Callable[[object], Any]
    default: str | int
    help: str

    @property
    def field(self) -> str:
        return self.key.replace(".", "_")


SETTINGS: tuple[Setting, ...] = (
    Setting("log_level", lambda value: parse_log_level(_text(value)), "info",
            "what goes to the daemon's log: debug, info, warn or error"),
    Setting("hypervisor", _choice("auto", "qemu", "firecracker"), "auto",
            "which hypervisor runs VMs; firecracker needs KVM, raw disks and the bridge: auto takes"
            " it on an installed host that has all of that and clones files, else qemu, and"
            " stays with what runs VMs there, or alone can use their disks"),
    Setting("firecracker_bin", _program, "firecracker",
            "Firecracker itself: a name to be found on PATH, or absolute, or below ~/; for jails an"
            " installation's helper takes the one on root's PATH"),
    Setting("jailer_bin", _program, "jailer",
            "Firecracker's jailer, of the same release, for a daemon that is root; else as above"),
    Setting("jailer_enabled", _switch, True,
            "whether each Firecracker has a uid, root directory, network and limits of its own;"
            " false is for debugging only"),
    Setting("qemu_bin", _program, "qemu-system-x86_64",
            "QEMU itself: a name to be found on PATH, or absolute, or below ~/"),
    Setting("accelerator", _choice("auto", "kvm", "tcg"), "auto",
            "what QEMU runs vCPUs with; auto takes kvm when a vCPU really runs"),
    Setting("storage", _choice("auto", "qcow2", "reflink", "dm_snapshot"), "auto",
            "how disks share an image: qcow2 (layers), reflink (raw files, clones where the file"
            " system makes them), or dm_snapshot (device-mapper, by whoever has root; auto never"
            " takes it); VMs keep what they were made with"),
    Setting("network", _choice("auto", "bridge", "user"), "auto",
            "how VMs reach the network that do not say; auto takes bridge where banger's helper is"
            " installed"),
    Setting("bridge_name", lambda value: check_bridge_name(_text(value)), "banger0",
            "the bridge of this daemon's VMs, made when the first of them needs it: banger0 to"
            " banger99"),
    Setting("bridge_cidr", lambda value: check_bridge_cidr(_text(value)), "10.213.0.0/16",
            "the private network that VMs on the bridge have their addresses of"),
    Setting("tap_pool_size", _count(0, 64), 2, "how many taps wait for the next starts"),
    Setting("dns_address", parse_dns_address, "127.0.0.1:5354",
            "where the daemon answers NAME.vm by DNS: a loopback address and a port; or off"),
    Setting("forward_ports", _switch, True,
            "whether the ports from 1024 up that listen in VMs are open at their own addresses"),
    Setting("default_image_name", lambda value: check_artifact_name(_text(value)),
            "debian-bookworm", "the image of a VM that names none"),
    Setting("ssh_key_path", _own_path, "",
            "the private key that guests let in, made on first use: absolute, or below ~/; empty: a"
            " key of banger's own"),
    Setting("catalog_url", lambda value: check_catalog_location(_text(value)), "",
            "where `image pull` and `kernel pull` find what they know by name: a https or file URL,"
            " or a path"),
    Setting("auto_stop_stale_after", _duration(1), "0",
            "stop VMs that nobody has used for so long (24h, 2h30m; 0: never)"),
    Setting("stats_poll_interval", _duration(0.5), "10s",
            "how often to look at what running VMs use (0: only when asked)"),
    Setting("template_limit", _count(0, 1000), 8,
            "how many templates are kept, those used last (0: every start is a boot)"),
    Setting("template_size_limit", _size, "8G", "how much of the disk they may take together"),
    Setting("standby_limit", _count(0, 16), 1,
            "how many machines wait ready for the next start (100 MB each, for 10 minutes)"),
    Setting("image_size_limit", _size, "32G",
            "how much an image that is pulled or imported may hold, unpacked"),
    Setting("image_cache_limit", _size, "4G",
            "how much of the disk the layers take that are kept for further pulls"),
    Setting("vm_defaults.vcpu", _count(1, VCPU_MAX), 2, "vCPUs of a new VM"),
    Setting("vm_defaults.memory", _size, "2G", "memory of a new VM"),
    Setting("vm_defaults.disk_size", _size, "8G", "size of a new VM's work disk, /root"),
    Setting("vm_defaults.system_overlay_size", _size, "8G",
            "size of a new VM's system disk; never below the image's"),
    Setting("vm_defaults.init", lambda value: InitMode(_choice(*InitMode)(value)), "auto",
            "who is PID 1: auto (what the image says), minimal or systemd"),
    Setting("vm_defaults.egress",
            lambda value: Egress(_choice(Egress.ALL, Egress.NONE)(value)), "all",
            "what of the outside a new VM reaches: all or none"),
)  # fmt: skip


@dataclass(frozen=True)
class Effective:
    """A setting as it is in force: its value as text, and where that came from."""

    setting: Setting
    value: str
    origin: str


def load_config(file: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """The settings of `file` (none if it is not there) over the defaults.

    ``BANGER_LOG_LEVEL`` wins over the file. Raises BadRequest, naming the file and the key.
    """
    given = _given(file)
    values = {}
    for setting in SETTINGS:
        try:
            values[setting.field] = setting.parse(given.get(setting.key, setting.default))
        except BangerError as error:
            raise BadRequest(f"{file}: {setting.key}: {error.message}", hint=error.hint) from None
    if _LOG_LEVEL_VARIABLE in environment:
        values["log_level"] = parse_log_level(environment[_LOG_LEVEL_VARIABLE])
    return Config(**values)


def effective(file: Path, environment: Mapping[str, str] = os.environ) -> list[Effective]:
    """Every setting with its value, as a person would write it, and its origin.

    Raises as `load_config` does: what the daemon would not take is not shown as in force.
    """
    load_config(file, environment)
    given = _given(file)
    shown = []
    for setting in SETTINGS:
        value = given.get(setting.key, setting.default)
        origin = str(file) if setting.key in given else "default"
        if setting.key == "log_level" and _LOG_LEVEL_VARIABLE in environment:
            value, origin = environment[_LOG_LEVEL_VARIABLE], _LOG_LEVEL_VARIABLE
        shown.append(Effective(setting, _written(value), origin))
    return shown


def markdown() -> str:
    """docs/config.md: every setting, by the table."""
    rows = "".join(
        f"| `{setting.key}` | {_default_cell(setting)} | {setting.help} |\n" for setting in SETTINGS
    )
    return f"""# Configuration

`~/.config/banger/config.toml` (`$XDG_CONFIG_HOME/banger/config.toml`), read when the daemon starts:
after a change, `banger daemon restart`; machines run on. All settings are optional. A key with a
dot stands in the table of its first part: `[vm_defaults]`, then `memory = "4G"`. Sizes are written
like `512M` or `8G`, durations like `30s`, `2h30m` or `7d`, 0 for never. An unknown key is an error
that names the nearest known one. `banger config show` prints what is in force, and where it comes
from; `BANGER_LOG_LEVEL` in the environment wins over `log_level`.

| setting | default | what it says |
|---|---|---|
{rows}
This page is made from the table in `src/banger/base/config.py` by `make docs`.
"""


def _default_cell(setting: Setting) -> str:
    return "none" if setting.default == "" else f"`{_written(setting.default)}`"


def _written(value: object) -> str:
    """As TOML has it, but for quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _given(file: Path) -> dict[str, object]:
    """What `file` says, by key; every key is known."""
    try:
        given = dict(_flatten(tomllib.loads(file.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} is not valid TOML: {error}") from error
    except OSError as error:
        raise BadRequest(f"cannot read {file}: {error.strerror}") from error
    known = {setting.key for setting in SETTINGS}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else ""
            raise BadRequest(f'{file}: unknown setting "{key}"', hint=hint)
    return given


def _flatten(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
