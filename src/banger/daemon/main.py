"""bangerd: the composition root. It puts the parts together, serves, and takes them apart.

One daemon for each user, by a lock that the kernel drops with the process. VMs are processes of
their own: they run on when the daemon ends, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from banger import __version__
from banger.base.config import Config, load_config
from banger.base.errors import BangerError, Conflict, PreconditionFailed
from banger.base.log import configure, get_logger, open_log
from banger.base.opid import current_op_id, new_op_id
from banger.base.paths import Paths, prepare_private_dir
from banger.daemon.dispatch import Dispatch, Services
from banger.daemon.reconcile import Reconciler
from banger.drivers import registry
from banger.drivers.base import Check, Level
from banger.rpc.server import Server, error_info
from banger.services.agents import Agents
from banger.services.doctor import Doctor
from banger.services.handles import HandleCache
from banger.services.image import ImageService
from banger.services.kernel import KernelService
from banger.services.liveness import Liveness
from banger.services.operations import Operations
from banger.services.vm import VmService
from banger.services.vm_create import Drivers, VmCreator
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
        _run_until_stopped(ready_fd)
    except BangerError as error:
        if ready_fd >= 0:
            with suppress(OSError):
                os.write(ready_fd, msgspec.json.encode(error_info(error)))
        hint = f" ({error.hint})" if error.hint else ""
        print(f"bangerd: {error.message}{hint}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _run_until_stopped(ready_fd: int) -> None:
    try:
        asyncio.run(_run(Paths.from_environment(), ready_fd))
    except OSError as error:
        subject = f"{error.filename}: " if error.filename else ""
        raise PreconditionFailed(f"bangerd failed: {subject}{error.strerror or error}") from error


async def _run(paths: Paths, ready_fd: int) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    prepare_private_dir(paths.runtime_dir)
    lock = _lock(paths.daemon_lock)
    try:
        for directory in (paths.state_dir, paths.data_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = load_config(paths.config_file)
        with open_log(paths.daemon_log) as log_file:
            configure(log_file, config.log_level)
            current_op_id.set(new_op_id())
            async with _composed(paths, config, stopping) as server:
                await server.start()
                get_logger().info("bangerd ready", version=__version__, pid=os.getpid())
                if ready_fd >= 0:
                    os.write(ready_fd, b"ready\n")
                    os.close(ready_fd)
                await stopping.wait()
                get_logger().info("bangerd stopping")
            get_logger().info("bangerd stopped")
    finally:
        os.close(lock)


@asynccontextmanager
async def _composed(paths: Paths, config: Config, stopping: asyncio.Event) -> AsyncIterator[Server]:
    """The parts, put together; taken apart in reverse order at the end."""
    selection = registry.select(
        hypervisor=config.hypervisor,
        accelerator=config.accelerator,
        storage=config.storage,
        network=config.network,
        probe_cache=paths.probe_cache,
    )
    drivers = Drivers(
        hypervisor=selection.hypervisor, storage=selection.storage, network=selection.network
    )
    store = await Store.open(paths.database)
    operations = Operations()
    agents = Agents()
    try:
        handles = HandleCache(paths)
        liveness = Liveness(drivers.hypervisor, drivers.network, handles)
        kernels = KernelService(paths, store)
        images = ImageService(paths, store, operations, kernels)
        vms = VmService(paths, store, handles, liveness, agents)
        creator = VmCreator(
            paths=paths,
            config=config,
            store=store,
            drivers=drivers,
            images=images,
            kernels=kernels,
            vms=vms,
            liveness=liveness,
            agents=agents,
        )
        await Reconciler(
            paths=paths,
            store=store,
            drivers=drivers,
            vms=vms,
            liveness=liveness,
            images=images,
            kernels=kernels,
        ).run()
        services = Services(
            paths=paths,
            drivers=drivers,
            operations=operations,
            images=images,
            kernels=kernels,
            vms=vms,
            creator=creator,
            doctor=Doctor(
                paths,
                drivers,
                [
                    Check(choice.setting, Level.OK, f"{choice.name} ({choice.reason})")
                    for choice in selection.choices
                ],
            ),
            stop=stopping.set,
        )
        server = Server(paths.daemon_socket, Dispatch(services))
        try:
            yield server
        finally:
            await server.stop()
            await operations.close()
            await vms.close()
    finally:
        await agents.close()
        await store.close()


def _lock(path: Path) -> int:
    """The daemon's lock, held while the descriptor is open. Conflict when another daemon has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(
            "another bangerd of this user is running", hint="see: banger daemon status"
        ) from None
    return descriptor


if __name__ == "__main__":
    main()
