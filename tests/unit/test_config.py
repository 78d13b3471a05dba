"""The settings: defaults that hold, names that are checked, and errors that say where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.config import (
    LOG_LEVELS,
    SETTINGS,
    Config,
    Setting,
    effective,
    load_config,
    markdown,
    parse_log_level,
)
from banger.base.errors import BadRequest
from banger.base.model import InitMode


def load(tmp_path: Path, text: str, environment: Mapping[str, str] | None = None) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, environment or {})


def test_without_a_file_every_setting_has_its_default(tmp_path: Path) -> None:
    config = load_config(tmp_path / "none.toml", {})
    assert config.vm_defaults_vcpu == 2
    assert config.vm_defaults_memory == 2048
    assert config.vm_defaults_disk_size == 8192
    assert config.vm_defaults_init is InitMode.AUTO
    assert config.log_level == "info"
    assert config.default_image_name == "debian-bookworm"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_default_is_a_value_that_the_file_may_hold(tmp_path: Path, setting: Setting) -> None:
    key, default = setting.key, setting.default
    written = f'"{default}"' if isinstance(default, str) else str(default).lower()
    assert load(tmp_path, f"{key} = {written}\n") == load_config(tmp_path / "none.toml", {})


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_says_what_it_is_for(setting: Setting) -> None:
    assert setting.help


def test_the_file_wins_over_the_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path, 'log_level = "WARN"\n[vm_defaults]\nvcpu = 3\nmemory = "1G"\ndisk_size = 512\n'
    )
    assert config.log_level == "warning"
    assert config.vm_defaults_vcpu == 3
    assert config.vm_defaults_memory == 1024
    assert config.vm_defaults_disk_size == 512


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("log_levle = 1", "log_levle", "log_level"),
        ("[vm_defaults]\nvcpus = 1", "vm_defaults.vcpus", "vm_defaults.vcpu"),
        ("[vm_default]\nmemory = 1", "vm_default.memory", "vm_defaults.memory"),
        ("[log_level]\nx = 1", "log_level.x", "log_level"),
        ("[[hypervisor]]\nx = 1", None, None),
    ],
)
def test_an_unknown_setting_is_refused_and_the_nearest_named(
    tmp_path: Path, text: str, unknown: str | None, nearest: str | None
) -> None:
    with pytest.raises(BadRequest) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "config.toml") in caught.value.message
    if unknown is not None:
        assert f'unknown setting "{unknown}"' in caught.value.message
        assert caught.value.hint == f'did you mean "{nearest}"?'


def test_a_setting_like_no_other_gets_no_guess(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match='unknown setting "zzz"') as caught:
        load(tmp_path, "zzz = 1")
    assert caught.value.hint == ""


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('hypervisor = "xen"', "hypervisor"),
        ("hypervisor = 1", "hypervisor"),
        ("log_level = 1", "log_level"),
        ('default_image_name = "../x"', "default_image_name"),
        ("[vm_defaults]\nvcpu = 0", "vm_defaults.vcpu"),
        ("[vm_defaults]\nvcpu = 65", "vm_defaults.vcpu"),
        ("[vm_defaults]\nvcpu = true", "vm_defaults.vcpu"),
        ('[vm_defaults]\nvcpu = "2"', "vm_defaults.vcpu"),
        ("[vm_defaults]\nmemory = 1.5", "vm_defaults.memory"),
        ("[vm_defaults]\nmemory = -1", "vm_defaults.memory"),
        ('[vm_defaults]\ninit = "upstart"', "vm_defaults.init"),
        ("forward_ports = 1", "forward_ports"),
        ('qemu_bin = "bin/qemu"', "qemu_bin"),
        ('qemu_bin = ""', "qemu_bin"),
        ("qemu_bin = true", "qemu_bin"),
    ],
)
def test_a_bad_value_is_refused_with_its_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(BadRequest) as caught:
        load(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path / 'config.toml'}: {key}: ")


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "[x", b"\xff = 1"])
def test_what_is_not_toml_is_refused_with_its_file(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadRequest, match="not valid TOML") as caught:
        load_config(file, {})
    assert str(file) in caught.value.message


@pytest.mark.parametrize("program", ["qemu-kvm", "/opt/qemu/bin/qemu", "~/bin/qemu"])
def test_a_program_is_a_name_or_a_path_that_is_the_same_from_everywhere(
    tmp_path: Path, program: str
) -> None:
    assert load(tmp_path, f'qemu_bin = "{program}"').qemu_bin == program


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"cannot read {tmp_path}"):
        load_config(tmp_path, {})


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environment = {"BANGER_LOG_LEVEL": "debug"}
    assert load(tmp_path, 'log_level = "error"', environment).log_level == "debug"


def test_an_empty_level_in_the_environment_is_info(tmp_path: Path) -> None:
    assert load(tmp_path, 'log_level = "error"', {"BANGER_LOG_LEVEL": " "}).log_level == "info"


@pytest.mark.parametrize("level", ["x", "information", "warnin", "debug error", "0"])
def test_an_unsupported_level_has_this_very_text(tmp_path: Path, level: str) -> None:
    expected = f'unsupported log_level "{level}" (use debug, info, warn, or error)'
    with pytest.raises(BadRequest) as caught:
        load(tmp_path, "", {"BANGER_LOG_LEVEL": level})
    assert caught.value.message == expected


@given(st.sampled_from(sorted(LOG_LEVELS)), st.sampled_from(["", " ", "\t", "\n "]), st.data())
def test_levels_are_read_in_any_case_and_with_space_around(
    level: str, space: str, data: st.DataObject
) -> None:
    upper = data.draw(st.lists(st.booleans(), min_size=len(level), max_size=len(level)))
    mixed = "".join(
        letter.upper() if up else letter for letter, up in zip(level, upper, strict=True)
    )
    assert parse_log_level(f"{space}{mixed}{space}") == LOG_LEVELS[level]


def test_the_settings_in_force_say_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[vm_defaults]\nmemory = "4G"\n')
    shown = {each.setting.key: each for each in effective(file, {"BANGER_LOG_LEVEL": "debug"})}
    assert list(shown) == [setting.key for setting in SETTINGS]
    memory, level = shown["vm_defaults.memory"], shown["log_level"]
    assert (memory.value, memory.origin) == ("4G", str(file))
    assert (level.value, level.origin) == ("debug", "BANGER_LOG_LEVEL")
    assert shown["vm_defaults.vcpu"].origin == "default"
    file.write_text("memory = 1")
    with pytest.raises(BadRequest, match="unknown setting"):
        effective(file, {})


def test_the_page_about_the_settings_is_the_tables() -> None:
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == markdown(), "run: make docs"
    assert all(f"`{setting.key}`" in markdown() for setting in SETTINGS)


@pytest.mark.parametrize(
    ("text", "seconds"), [('"24h"', 86400), ('"2h30m"', 9000), ('"0"', 0), ("0", 0), ('"90s"', 90)]
)
def test_a_duration_is_in_seconds(tmp_path: Path, text: str, seconds: float) -> None:
    assert load(tmp_path, f"auto_stop_stale_after = {text}").auto_stop_stale_after == seconds


@pytest.mark.parametrize("text", ['"soon"', "24", '"1"', '"-1h"', '"0.1s"', "true", '"10ms"'])
def test_what_is_no_duration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRequest, match="auto_stop_stale_after: "):
        load(tmp_path, f"auto_stop_stale_after = {text}")


@pytest.mark.parametrize(("text", "address"), [("127.0.0.2:53", ("127.0.0.2", 53)), ("off", None)])
def test_the_name_servers_address_is_one_of_the_loopback(
    tmp_path: Path, text: str, address: tuple[str, int] | None
) -> None:
    assert load(tmp_path, f'dns_address = "{text}"').dns_address == address


@pytest.mark.parametrize(
    "text",
    ["", "5354", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "0.0.0.0:53",
     "192.0.2.1:53", "[::1]:53", "localhost:53", "127.0.0.1:" + "9" * 5000],
)  # fmt: skip
def test_names_are_answered_nowhere_else(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRequest, match="is not a loopback address and a port"):
        load(tmp_path, f'dns_address = "{text}"')
