"""bangerd: the composition root. It puts the parts together, serves, and takes them apart.

One daemon for each user and home (`daemon.lock`). VMs are processes of their own: they run on when
the daemon ends, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TextIO

import msgspec

from banger import __version__
from banger.base.config import Config, load_config
from banger.base.errors import BangerError, Internal, PreconditionFailed
from banger.base.log import configure, get_logger, open_log
from banger.base.model import NetworkMode
from banger.base.notify import take_notifier
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths, prepare_private_dir
from banger.daemon.dispatch import Dispatch, Services
from banger.daemon.lock import only_daemon
from banger.daemon.parts import Parts
from banger.drivers import registry
from banger.drivers.base import Check, Level, NameServer
from banger.drivers.registry import Selection
from banger.hostops.client import HelperHost
from banger.hostops.local import LocalHost
from banger.hostops.ops import HostOps, bridge_of
from banger.rpc.server import Server, error_info
from banger.services.addresses import LOOPBACK_NETWORK, Addresses
from banger.services.doctor import Doctor
from banger.services.name_routing import NameRouting
from banger.services.vm_start import Drivers
from banger.store.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bangerd", description="The daemon that owns the VMs; banger starts it when needed."
    )
    parser.add_argument("--version", action="version", version=f"bangerd {__version__}")
    parser.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)
    ready_fd: int = parser.parse_args().ready_fd
    os.umask(0o077)
    try:
        _run_logged(Paths.from_environment(), ready_fd)
    except BangerError as error:
        _tell_starter(ready_fd, msgspec.json.encode(error_info(error)))
        if ready_fd < 0:  # with a starter, stderr is the log, and all lines of that are JSON
            hint = f" ({error.hint})" if error.hint else ""
            print(f"bangerd: {error.message}{hint}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _run_logged(paths: Paths, ready_fd: int) -> None:
    """Run to the end with the log open: asyncio has things to say on its way out, too."""
    try:
        for directory in (paths.state_dir, paths.data_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_file = open_log(paths.daemon_log)
    except OSError as error:
        raise _failure(error) from error
    with log_file:
        configure(log_file, "info")  # until the configuration has been read
        logging.captureWarnings(True)
        current_op_id.set(new_op_id())
        try:
            asyncio.run(_run(paths, log_file, ready_fd))
        except Exception as error:
            # A supervisor's boundary: the traceback goes to the log, the starter gets a sentence.
            failure = _failure(error)
            trace = not isinstance(error, BangerError)
            get_logger().error(
                "bangerd failed", error=failure.message, hint=failure.hint, exc_info=trace
            )
            raise failure from None


def _failure(error: Exception) -> BangerError:
    """What is told of a failure to start or to run."""
    if isinstance(error, BangerError):
        return error
    if isinstance(error, OSError):
        subject = f"{error.filename}: " if error.filename else ""
        return PreconditionFailed(f"bangerd failed: {subject}{error.strerror or error}")
    return Internal(f"bangerd failed: {type(error).__name__}", hint="see: banger daemon logs")


async def _run(paths: Paths, log_file: TextIO, ready_fd: int) -> None:
    notify = take_notifier()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    prepare_private_dir(paths.runtime_dir)
    async with only_daemon(paths, stopping):
        config = load_config(paths.config_file)
        configure(log_file, config.log_level)
        async with _composed(paths, config, stopping) as server:
            await server.start()
            get_logger().info("bangerd ready", version=__version__, pid=os.getpid())
            _tell_starter(ready_fd, b"ready\n")
            notify(f"READY=1\nSTATUS=banger {__version__}")
            await stopping.wait()
            notify("STOPPING=1")
            get_logger().info("bangerd stopping")
        get_logger().info("bangerd stopped")


def _tell_starter(ready_fd: int, message: bytes) -> None:
    """Tell the client that started this daemon, if one did and is still there."""
    if ready_fd >= 0:
        with suppress(OSError):
            os.write(ready_fd, message)
        os.close(ready_fd)


@asynccontextmanager
async def _composed(paths: Paths, config: Config, stopping: asyncio.Event) -> AsyncIterator[Server]:
    """The parts, put together; taken apart in reverse order at the end."""
    host = _host(config)
    # Several homes are several daemons, which keep off each other's bridges.
    instance = f"{zlib.crc32(os.fsencode(paths.state_dir)):08x}"
    bridge = bridge_of(config.bridge_name, config.bridge_cidr, instance)
    addresses = Addresses({NetworkMode.BRIDGE: bridge.network})
    selection = await registry.select(
        hypervisor=config.hypervisor,
        accelerator=config.accelerator,
        storage=config.storage,
        network=config.network,
        firecracker_bin=config.firecracker_bin,
        jailer_enabled=config.jailer_enabled,
        qemu_bin=config.qemu_bin,
        probe_cache=paths.probe_cache,
        vms_dir=paths.vms_dir,
        runtime_dirs=(paths.vms_runtime_dir, paths.templates_runtime_dir),
        jails_dir=paths.jails_dir,
        host=host,
        bridge=bridge,
        tap_pool_size=config.tap_pool_size,
        names=addresses,
    )
    # What ``auto`` fell back to, and why: each daemon says it once.
    get_logger().info("drivers chosen", **_as_texts(selection))
    reverse = [LOOPBACK_NETWORK, bridge.network]
    drivers = Drivers(
        hypervisor=selection.hypervisor,
        storage=selection.storage,
        networks=selection.networks,
        others=selection.other_hypervisors,
        devices=selection.devices,
        hypervisor_reason=selection.reasons["hypervisor"],
    )
    store = await Store.open(paths.database)
    try:
        parts = Parts(paths, config, drivers, addresses, store)
        names = registry.name_server(config.dns_address, addresses, reverse)
        routing = NameRouting(host, names)
        try:
            async with parts.disk_room.running():
                await parts.reconcile()
                await names.open()
                await routing.open()
                services = _services(parts, selection, names, routing, stopping)
                server = Server(paths.daemon_socket, Dispatch(services))
                async with parts.stats.polling():
                    try:
                        async with parts.maintenance().running():
                            yield server
                    finally:
                        # Together: a session's end may wait for the lock of an operation.
                        await asyncio.gather(server.stop(), parts.operations.close())
        finally:
            await routing.close()
            await names.close()
            await parts.close()
    finally:
        await store.close()


def _host(config: Config) -> HostOps:
    """Who does what needs root."""
    if os.geteuid() != 0:
        return HelperHost()
    return LocalHost(firecracker=config.firecracker_bin, jailer=config.jailer_bin)


def _services(
    parts: Parts,
    selection: Selection,
    names: NameServer,
    routing: NameRouting,
    stopping: asyncio.Event,
) -> Services:
    return Services(
        paths=parts.paths,
        drivers=parts.drivers,
        operations=parts.operations,
        images=parts.images,
        image_maker=parts.image_maker,
        image_bundles=parts.image_bundles,
        image_pulls=parts.image_pulls,
        image_imports=parts.image_imports,
        image_cache=parts.image_cache,
        kernels=parts.kernels,
        vms=parts.vms,
        creator=parts.creator,
        lifecycle=parts.lifecycle,
        health=parts.health,
        prune=parts.prune,
        ports=parts.ports,
        stats=parts.stats,
        templates=parts.templates,
        standbys=parts.standbys,
        snapshots=parts.snapshots,
        forks=parts.forks,
        suspension=parts.suspension,
        workspaces=parts.workspaces,
        fork_runs=parts.fork_runs,
        results=parts.results,
        ssh=parts.ssh,
        names=names,
        doctor=Doctor(parts.paths, parts.drivers, _as_checks(selection), routing),
        reasons=selection.reasons,
        stop=stopping.set,
    )


def _as_checks(selection: Selection) -> list[Check]:
    return [Check(setting, Level.OK, choice) for setting, choice in _as_texts(selection).items()]


def _as_texts(selection: Selection) -> dict[str, str]:
    """By setting."""
    return {choice.setting: f"{choice.name} ({choice.reason})" for choice in selection.choices}


if __name__ == "__main__":
    main()
