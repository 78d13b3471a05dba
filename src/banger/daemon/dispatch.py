"""From a request to the service that does it: one table of methods."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from banger import __version__
from banger.base.errors import BadRequest, UnknownMethod
from banger.base.log import OperationLog
from banger.base.malformed import MALFORMED
from banger.base.model import (
    DaemonStatus,
    Operation,
    Snapshot,
    Template,
    VmState,
)
from banger.base.opid import current_op_id
from banger.base.paths import Paths
from banger.base.ssh import SshAccess, SshFiles
from banger.base.usage import ShownVm
from banger.daemon.images import Images
from banger.daemon.kernels import Kernels
from banger.daemon.observation import Observation
from banger.daemon.params import (
    Nothing,
    OperationReference,
    PruneTemplates,
    SnapshotReference,
    SshTo,
    TemplateReference,
    VmReference,
)
from banger.daemon.sessions import Sessions
from banger.daemon.trials import Trials
from banger.daemon.verbs import Verbs
from banger.daemon.workspaces import Workspaces
from banger.drivers.base import Check, NameServer
from banger.rpc.protocol import Request
from banger.rpc.server import Connection
from banger.services.doctor import Doctor
from banger.services.fork_run import ForkRuns
from banger.services.forks import ForkService
from banger.services.health import Health
from banger.services.image import ImageService
from banger.services.image_bundles import ImageBundles
from banger.services.image_cache import ImageCache
from banger.services.image_import import ImageImports
from banger.services.image_make import ImageMaker
from banger.services.image_pull import ImagePulls
from banger.services.kernel import KernelService
from banger.services.lifecycle import Lifecycle
from banger.services.operations import Operations
from banger.services.ports import PortService
from banger.services.prune import Prune
from banger.services.results import ResultsService
from banger.services.snapshots import SnapshotService
from banger.services.ssh import SshService
from banger.services.standby import Standbys
from banger.services.stats import StatsService
from banger.services.suspension import Suspension
from banger.services.templates import TemplateService
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_spec import CreateRequest
from banger.services.vm_start import Drivers
from banger.services.workspace import WorkspaceService

P = TypeVar("P", bound=msgspec.Struct)


@dataclass(frozen=True)
class Services:
    """What the methods are made of; the composition root fills it."""

    paths: Paths
    drivers: Drivers
    operations: Operations
    images: ImageService
    image_maker: ImageMaker
    image_bundles: ImageBundles
    image_pulls: ImagePulls
    image_imports: ImageImports
    image_cache: ImageCache
    kernels: KernelService
    vms: VmService
    creator: VmCreator
    lifecycle: Lifecycle
    health: Health
    prune: Prune
    ports: PortService
    stats: StatsService
    templates: TemplateService
    standbys: Standbys
    snapshots: SnapshotService
    forks: ForkService
    suspension: Suspension
    workspaces: WorkspaceService
    fork_runs: ForkRuns
    results: ResultsService
    ssh: SshService
    names: NameServer
    doctor: Doctor
    #: By setting (hypervisor, storage, network): why that driver is used.
    reasons: Mapping[str, str]
    stop: Callable[[], None]


@dataclass(frozen=True)
class Method(Generic[P]):
    """One row: the type of the parameters, and what is called with them.

    A method that answers by itself (events, frames) has ``answers`` set and returns None.
    """

    params: type[P]
    call: Callable[[P, Connection], Awaitable[Any]]
    answers: bool = False


class Dispatch:
    """Callable by the server with each request."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._started = time.monotonic()
        sessions = Sessions(
            services.vms,
            services.creator,
            services.lifecycle,
            services.workspaces,
            services.operations,
        )
        workspaces = Workspaces(services.workspaces, services.operations)
        verbs = Verbs(
            services.vms,
            services.creator,
            services.lifecycle,
            services.health,
            services.prune,
            services.ports,
            services.snapshots,
            services.forks,
            services.suspension,
            services.operations,
        )
        trials = Trials(
            services.fork_runs,
            services.results,
            services.workspaces,
            services.creator,
            services.operations,
        )
        observation = Observation(services.stats)
        self._methods: dict[str, Method[Any]] = {
            "daemon.status": Method(Nothing, self._status),
            "daemon.stop": Method(Nothing, self._stop, answers=True),
            "doctor.run": Method(Nothing, self._doctor),
            "operations.list": Method(Nothing, self._operations),
            "operations.cancel": Method(OperationReference, self._cancel),
            "operations.leave": Method(OperationReference, self._leave),
            "operations.watch": Method(OperationReference, self._watch, answers=True),
            "template.list": Method(Nothing, self._template_list),
            "template.show": Method(TemplateReference, self._template),
            "template.delete": Method(TemplateReference, self._template_delete),
            "template.prune": Method(PruneTemplates, self._template_prune),
            "snapshot.list": Method(Nothing, self._snapshot_list),
            "snapshot.show": Method(SnapshotReference, self._snapshot),
            "snapshot.delete": Method(SnapshotReference, self._snapshot_delete),
            "vm.create.begin": Method(CreateRequest, self._create_begin),
            "vm.create.status": Method(OperationReference, self._create_status),
            "vm.create.cancel": Method(OperationReference, self._cancel),
            "vm.show": Method(VmReference, self._vm),
            "vm.ssh": Method(SshTo, self._ssh),
            "ssh.files": Method(Nothing, self._ssh_files),
            **{
                name: Method(params, call, answers=True)
                for group in (
                    *(sessions, verbs, workspaces, trials, observation),
                    Images(
                        services.images,
                        services.image_maker,
                        services.image_bundles,
                        services.image_pulls,
                        services.image_imports,
                        services.image_cache,
                        services.vms,
                        services.stats,
                        services.templates,
                        services.standbys,
                    ),
                    Kernels(services.kernels),
                )
                for name, (params, call) in group.methods().items()
            },
        }

    async def __call__(self, request: Request, connection: Connection) -> None:
        method = self._methods.get(request.method)
        if method is None:
            raise UnknownMethod(
                f'unknown method "{request.method}"',
                hint="this bangerd is of another version: banger daemon restart",
            )
        try:
            params = msgspec.json.decode(request.params, type=method.params)
        except MALFORMED as error:
            raise BadRequest(f"bad parameters for {request.method}: {error}") from None
        with OperationLog(request.method, quiet=True):
            result = await method.call(params, connection)
            if not method.answers:
                await connection.result(result)

    async def _status(self, _: Nothing, __: Connection) -> DaemonStatus:
        services = self._services
        vms = await services.vms.all()
        return DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started, 3),
            socket=str(services.paths.daemon_socket),
            log_path=str(services.paths.daemon_log),
            database=str(services.paths.database),
            vms=len(vms),
            running_vms=sum(vm.runtime.state is VmState.RUNNING for vm in vms),
            hypervisor=services.drivers.hypervisor.name,
            storage=services.drivers.storage.name,
            network=services.drivers.networks.default.value,
            hypervisor_reason=services.reasons["hypervisor"],
            storage_reason=services.reasons["storage"],
            network_reason=services.reasons["network"],
            standbys=services.standbys.count,
            dns=_dns(services.names),
        )

    async def _stop(self, _: Nothing, connection: Connection) -> None:
        await connection.result({})
        self._services.stop()

    async def _doctor(self, _: Nothing, __: Connection) -> list[Check]:
        return await self._services.doctor.run()

    async def _operations(self, _: Nothing, __: Connection) -> list[Operation]:
        return self._services.operations.all()

    async def _watch(self, params: OperationReference, connection: Connection) -> None:
        """Events until the operation ends, then its last state as the result."""
        async for state in self._services.operations.get(params.id).changes():
            if state.done:
                await connection.result(state)
            else:
                await connection.event(state)

    async def _template_list(self, _: Nothing, __: Connection) -> list[Template]:
        return await self._services.templates.all()

    async def _template(self, params: TemplateReference, _: Connection) -> Template:
        return await self._services.templates.resolve(params.template)

    async def _template_delete(self, params: TemplateReference, _: Connection) -> Template:
        template = await self._services.templates.delete(params.template)
        await self._services.standbys.retire_all()
        return template

    async def _template_prune(self, params: PruneTemplates, _: Connection) -> list[Template]:
        gone = await self._services.templates.prune(
            everything=params.everything, dry_run=params.dry_run
        )
        if gone and not params.dry_run:
            await self._services.standbys.retire_all()
        return gone

    async def _snapshot_list(self, _: Nothing, __: Connection) -> list[Snapshot]:
        return await self._services.snapshots.all()

    async def _snapshot(self, params: SnapshotReference, _: Connection) -> Snapshot:
        return await self._services.snapshots.resolve(params.snapshot)

    async def _snapshot_delete(self, params: SnapshotReference, _: Connection) -> Snapshot:
        return await self._services.snapshots.delete(params.snapshot)

    async def _create_begin(self, params: CreateRequest, _: Connection) -> dict[str, str]:
        services = self._services
        services.creator.check(params)
        if params.ephemeral:
            raise BadRequest("only vm.run has a session that an ephemeral VM could belong to")
        services.operations.begin(
            "vm.create", params.name, lambda progress: services.creator.work(params, progress)
        )
        return {"operation_id": current_op_id.get()}

    async def _create_status(self, params: OperationReference, _: Connection) -> Operation:
        return self._services.operations.get(params.id).record

    async def _cancel(self, params: OperationReference, _: Connection) -> Operation:
        return await self._services.operations.cancel(params.id)

    async def _leave(self, params: OperationReference, _: Connection) -> Operation:
        """Want no more what several may be waiting for: it goes on for the others."""
        return await self._services.operations.leave(params.id)

    async def _ssh(self, params: SshTo, _: Connection) -> SshAccess:
        return await self._services.ssh.admit(params.vm, params.user)

    async def _ssh_files(self, _: Nothing, __: Connection) -> SshFiles:
        return await self._services.ssh.files()

    async def _vm(self, params: VmReference, _: Connection) -> ShownVm:
        return await self._services.stats.shown(await self._services.vms.show(params.vm))


def _dns(names: NameServer) -> str:
    if not names.where:
        return "off"
    return f"{names.where}: not open: {names.problem}" if names.problem else names.where
