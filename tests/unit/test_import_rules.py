"""The layers of `docs/architecture.md`, held: who may import whom, and who may start processes.

Every rule is checked on the syntax tree of each module, so an import inside a function counts too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import banger

PACKAGE = Path(banger.__file__).parent

_BELOW_DRIVERS = (
    "banger.rpc",
    "banger.store",
    "banger.guest",
    "banger.images",
    "banger.git",
    "banger.hostops",
)
_DRIVER_FAMILIES = ("banger.drivers.hypervisor", "banger.drivers.network", "banger.drivers.storage")
# Concrete drivers are handed in: services and the daemon know the protocols only.
_SERVICES = ("banger", "banger.base", *_BELOW_DRIVERS, "banger.drivers.base")
_DAEMON = (*_SERVICES, "banger.services")

#: The layers, and which others each may import. A module is in the most specific one that covers
#: it, and may import what is in its own.
LAYERS: dict[str, tuple[str, ...]] = {
    "banger": (),  # the package's own module: the version
    "banger.base": ("banger",),
    **dict.fromkeys(_BELOW_DRIVERS, ("banger", "banger.base")),
    "banger.drivers": (),
    "banger.drivers.base": ("banger.base",),
    **dict.fromkeys(
        _DRIVER_FAMILIES, ("banger.base", "banger.hostops", "banger.guest", "banger.drivers.base")
    ),
    # Which drivers there are is one module's business.
    "banger.drivers.registry": (
        "banger.base",
        "banger.hostops",
        "banger.drivers.base",
        *_DRIVER_FAMILIES,
    ),
    "banger.services": _SERVICES,
    "banger.daemon": _DAEMON,
    # The composition root.
    "banger.daemon.main": (*_DAEMON, "banger.daemon", "banger.drivers.registry"),
    "banger.sdk": ("banger", "banger.base", "banger.rpc"),
    # What root's own command does, without a daemon.
    "banger.system": ("banger", "banger.base"),
    "banger.cli": ("banger", "banger.base", "banger.rpc", "banger.sdk", "banger.system"),
}

#: What may be imported from outside the standard library, where that is limited at all.
BASE_MAY_IMPORT = frozenset({"msgspec"})
LOG_MAY_IMPORT = frozenset({"msgspec", "structlog"})

#: One runs programs and waits for them; by the other a process becomes another program.
STARTS_PROCESSES = ("banger.base.proc", "banger.base.fork")
_PROCESS_MODULES = frozenset({"subprocess", "multiprocessing"})
_PROCESS_NAMES = {
    "os": ("system", "popen", "fork", "exec", "spawn", "posix_spawn"),
    "pty": ("fork", "spawn"),
    "asyncio": ("create_subprocess", "subprocess"),
}


def violations(module: str, source: str, known: frozenset[str]) -> list[str]:
    """The rules that `module` with this source text breaks, one line for each place.

    `known` has the names of all modules: it tells ``from package import module`` from
    ``from module import name``.
    """
    tree = ast.parse(source)
    found = [
        f"{module}:{line}: imports {target}: {reason}"
        for line, target in _imports(tree, known)
        if (reason := _objection(module, target))
    ]
    if module not in STARTS_PROCESSES:
        found += [
            f"{module}:{line}: uses {name}: only {STARTS_PROCESSES[0]} starts processes"
            for line, name in _process_starts(tree)
        ]
    return found


def layer_of(module: str) -> str:
    covering = [layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")]
    return max(covering, key=len)


def _objection(module: str, target: str) -> str:
    if target.startswith("."):
        return "imports are absolute here"
    top = target.partition(".")[0]
    own = layer_of(module)
    if top == "banger":
        other = layer_of(target)
        return "" if other == own or other in LAYERS[own] else f"{own} may not import {other}"
    if own == "banger.base" and top not in sys.stdlib_module_names:
        allowed = LOG_MAY_IMPORT if module == "banger.base.log" else BASE_MAY_IMPORT
        return "" if top in allowed else "base is for everyone, so it needs next to nothing"
    return ""


def _imports(tree: ast.AST, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            for alias in node.names:
                module = f"{package}.{alias.name}"
                yield node.lineno, module if module in known else package


def _process_starts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that starts a process, imported or used as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = [(node.value.id, node.attr)]
        else:
            continue
        for module, name in named:
            top, _, rest = module.partition(".")
            prefixes = _PROCESS_NAMES.get(top, ())
            # The event loop's own methods, whatever the loop is called.
            if top in _PROCESS_MODULES or (rest or name).startswith((*prefixes, "subprocess_")):
                yield node.lineno, ".".join(filter(None, (module, name)))


def _all_modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _all_modules()
KNOWN = frozenset(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_to_its_layer(module: str) -> None:
    assert violations(module, MODULES[module].read_text(), KNOWN) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_belongs_to_a_layer(module: str) -> None:
    assert module == "banger" or layer_of(module) != "banger"


BROKEN = [
    ("banger.base.model", "import structlog"),
    ("banger.base.model", "from banger.rpc import client"),
    ("banger.base.paths", "def late():\n    import click"),
    ("banger.rpc.client", "from banger.store.store import Store"),
    ("banger.guest.channel", "import banger.drivers.base"),
    ("banger.images.build", "from banger.guest import channel"),
    ("banger.drivers.base", "from banger.guest.channel import Channel"),
    ("banger.drivers.hypervisor.qemu", "from banger.drivers.network.user import UserNetwork"),
    ("banger.drivers.hypervisor.qemu", "from banger.store import store"),
    ("banger.drivers.hypervisor.qemu", "from banger.services import vm"),
    ("banger.drivers.storage.qcow2", "import banger.drivers.registry"),
    ("banger.services.vm", "from banger.drivers.hypervisor import qemu"),
    ("banger.services.vm", "import banger.drivers.registry"),
    ("banger.services.vm", "from banger.daemon import dispatch"),
    ("banger.services.vm", "from . import vm"),
    ("banger.daemon.dispatch", "from banger.drivers import registry"),
    ("banger.daemon.dispatch", "from banger.cli import main"),
    ("banger.daemon.main", "import banger.sdk"),
    ("banger.sdk", "from banger.services.vm import VmService"),
    ("banger.cli.vm", "from banger.services import vm"),
    ("banger.cli.vm", "if TYPE_CHECKING:\n    from banger.daemon.main import main"),
    ("banger.cli.vm", "import subprocess"),
    ("banger.cli.vm", "from subprocess import Popen"),
    ("banger.cli.vm", "import os\nos.system('true')"),
    ("banger.cli.vm", "import os\nos.execvp('true', ['true'])"),
    ("banger.cli.vm", "from os import fork"),
    ("banger.images.build", "import asyncio\nasyncio.create_subprocess_exec('true')"),
    ("banger.images.build", "loop.subprocess_exec(None, 'true')"),
    ("banger.images.build", "from asyncio.subprocess import PIPE"),
    ("banger.images.build", "import pty\npty.spawn('true')"),
    ("banger.images.build", "from multiprocessing import Pool"),
]

KEPT = [
    ("banger.base.log", "import structlog\nimport msgspec\nimport json"),
    ("banger.base.proc", "import subprocess\nimport asyncio\nasyncio.create_subprocess_exec"),
    ("banger.base.model", "from banger.base.errors import BadRequest"),
    ("banger.drivers.hypervisor.qemu", "from banger.drivers.hypervisor import qemu_argv"),
    ("banger.drivers.registry", "from banger.drivers.hypervisor.qemu import Qemu"),
    ("banger.daemon.main", "from banger.drivers import registry"),
    ("banger.services.vm", "from banger.drivers.base import Machine\nimport qemu.qmp"),
    (
        "banger.cli.vm",
        "from banger import __version__\nimport os, signal\nos.kill(1, signal.SIGHUP)",
    ),
]

_SYNTHETIC = (
    KNOWN | {module for module, _ in BROKEN + KEPT} | {"banger.drivers.hypervisor.qemu_argv"}
)


@pytest.mark.parametrize(("module", "source"), BROKEN)
def test_a_broken_rule_is_found(module: str, source: str) -> None:
    assert len(violations(module, source, _SYNTHETIC)) >= 1


@pytest.mark.parametrize(("module", "source"), KEPT)
def test_what_the_rules_allow_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source, _SYNTHETIC) == []
