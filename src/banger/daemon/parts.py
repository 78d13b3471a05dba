"""The services of a daemon, put together over its drivers and its store.

What each is handed is all that it knows of the others. The composition root makes one of these,
and so do tests, with drivers in memory.
"""

from __future__ import annotations

from dataclasses import replace

from banger.base.config import Config
from banger.base.model import Image
from banger.base.paths import Paths
from banger.daemon.maintenance import Maintenance
from banger.daemon.reconcile import Reconciler
from banger.services.addresses import Addresses
from banger.services.agents import Agents
from banger.services.automatic_ports import AutomaticPorts
from banger.services.capabilities import Capabilities
from banger.services.disk_room import DiskRoom
from banger.services.disks import SystemDisk, WorkDisk
from banger.services.fork_run import ForkRuns
from banger.services.forks import ForkService
from banger.services.forwards import Forwards
from banger.services.handles import HandleCache
from banger.services.health import Health
from banger.services.identity import Identity
from banger.services.image import ImageService
from banger.services.image_bundles import ImageBundles
from banger.services.image_cache import ImageCache
from banger.services.image_import import ImageImports
from banger.services.image_make import ImageMaker
from banger.services.image_pull import ImagePulls
from banger.services.kernel import KernelService
from banger.services.layers import DiskLayers
from banger.services.lifecycle import Lifecycle
from banger.services.liveness import Liveness
from banger.services.network import Networking
from banger.services.operations import Operations
from banger.services.ports import PortService
from banger.services.prune import Prune
from banger.services.publishing import Publishing
from banger.services.results import ResultsService
from banger.services.resumption import Resumption
from banger.services.snapshots import SnapshotService
from banger.services.ssh import SshService
from banger.services.standby import Standbys
from banger.services.stats import StatsService
from banger.services.suspension import Suspension
from banger.services.templates import TemplateService
from banger.services.vm import VmService
from banger.services.vm_create import VmCreator
from banger.services.vm_start import Drivers, VmStarter
from banger.services.workspace import WorkspaceService
from banger.store.store import Store


class Parts:
    """As long as the daemon lives; `close` ends all that is open, but the store."""

    def __init__(
        self,
        paths: Paths,
        config: Config,
        drivers: Drivers,
        addresses: Addresses,
        store: Store,
    ) -> None:
        names = [drivers.storage.file_name(disk) for disk in ("system", "work")]
        paths = replace(paths, system_disk_name=names[0], work_disk_name=names[1])
        self.paths = paths
        self.config = config
        self.drivers = drivers
        self.store = store
        self.operations = Operations()
        self.addresses = addresses
        self.agents = Agents(drivers.hypervisor.features.agent_vsock_port)
        self.handles = HandleCache(paths)
        self.liveness = Liveness(drivers.hypervisor, drivers.networks, self.handles)
        # Each of these takes what those before it have made.
        self._put_images_together()
        self._put_capabilities_together()
        self._put_machines_together()
        self._put_lives_together()
        self._put_uses_together()

    def _put_images_together(self) -> None:
        self.image_cache = ImageCache(self.paths, self.config.image_cache_limit)
        self.kernels = KernelService(
            self.paths, self.store, self.operations, self.image_cache, self.config.catalog_url
        )
        self.images = ImageService(self.paths, self.store, self.operations, self.kernels)
        self.image_bundles = ImageBundles(
            self.paths,
            self.images,
            self.operations,
            self.image_cache,
            self.config.catalog_url,
            size_limit_mib=self.config.image_size_limit,
        )
        self.image_pulls = ImagePulls(
            self.images,
            self.operations,
            self.image_cache,
            self.image_bundles,
            size_limit_mib=self.config.image_size_limit,
        )
        self.image_imports = ImageImports(
            self.images,
            self.operations,
            lambda image: self._forget(image),
            size_limit_mib=self.config.image_size_limit,
        )

    def _put_capabilities_together(self) -> None:
        self.disk_room = DiskRoom(self.drivers.devices, self.drivers.hypervisor)
        self.forwards = Forwards(self.agents, lambda vm: self.vms.in_use(vm))
        self.publishing = Publishing(self.forwards, self.liveness)
        self.automatic_ports = AutomaticPorts(
            self.forwards, self.agents, enabled=self.config.forward_ports
        )
        self.addresses.asked = self.automatic_ports.look
        self.networking = Networking(
            self.paths, self.drivers.networks, self.liveness, self.addresses
        )
        self.capabilities = Capabilities(
            [
                SystemDisk(
                    self.paths,
                    self.drivers.storage,
                    self.drivers.devices,
                    self.liveness,
                    self.disk_room,
                ),
                WorkDisk(self.paths, self.drivers.storage, self.images),
                self.networking,
                Identity(self.liveness, self.agents),
                self.publishing,
                self.automatic_ports,
            ]
        )

    def _put_machines_together(self) -> None:
        self.templates = TemplateService(
            paths=self.paths,
            config=self.config,
            store=self.store,
            hypervisor=self.drivers.hypervisor,
            networks=self.drivers.networks,
            capabilities=self.capabilities,
            kernels=self.kernels,
            operations=self.operations,
            room=self.disk_room,
        )
        self.vms = VmService(
            self.paths,
            self.store,
            self.handles,
            self.liveness,
            self.agents,
            self.capabilities,
            self.addresses,
        )
        self.standbys = Standbys(
            paths=self.paths,
            hypervisor=self.drivers.hypervisor,
            vms=self.vms,
            liveness=self.liveness,
            agents=self.agents,
            templates=self.templates,
            room=self.disk_room,
            limit=self.config.standby_limit,
        )
        self.layers = DiskLayers(
            self.drivers.hypervisor, self.drivers.storage, self.vms, self.liveness
        )
        self.resumption = Resumption(
            self.paths, self.drivers.hypervisor, self.vms, self.layers, self.disk_room
        )
        self.snapshots = SnapshotService(
            paths=self.paths,
            store=self.store,
            hypervisor=self.drivers.hypervisor,
            storage=self.drivers.storage,
            networks=self.drivers.networks,
            capabilities=self.capabilities,
            images=self.images,
            kernels=self.kernels,
            vms=self.vms,
            liveness=self.liveness,
            layers=self.layers,
            agents=self.agents,
            room=self.disk_room,
            resumption=self.resumption,
        )
        self.suspension = Suspension(
            self.paths,
            self.drivers.hypervisor,
            self.vms,
            self.liveness,
            self.snapshots,
            self.disk_room,
            self.resumption,
        )

    def _put_lives_together(self) -> None:
        starter = VmStarter(
            paths=self.paths,
            drivers=self.drivers,
            capabilities=self.capabilities,
            kernels=self.kernels,
            vms=self.vms,
            liveness=self.liveness,
            agents=self.agents,
            templates=self.templates,
            standbys=self.standbys,
        )
        self.lifecycle = Lifecycle(
            hypervisor=self.drivers.hypervisor,
            capabilities=self.capabilities,
            images=self.images,
            kernels=self.kernels,
            vms=self.vms,
            starter=starter,
            liveness=self.liveness,
            agents=self.agents,
            suspension=self.suspension,
            room=self.disk_room,
        )
        self.creator = VmCreator(
            paths=self.paths,
            config=self.config,
            hypervisor=self.drivers.hypervisor,
            store=self.store,
            images=self.images,
            kernels=self.kernels,
            vms=self.vms,
            starter=starter,
            snapshots=self.snapshots,
            default_network=self.drivers.networks.default,
        )

    def _put_uses_together(self) -> None:
        self.image_maker = ImageMaker(
            paths=self.paths,
            operations=self.operations,
            images=self.images,
            vms=self.vms,
            creator=self.creator,
            lifecycle=self.lifecycle,
            size_limit_mib=self.config.image_size_limit,
        )
        self.forks = ForkService(self.vms, self.snapshots, self.creator, self.lifecycle)
        self.health = Health(
            self.paths,
            self.drivers.hypervisor,
            self.liveness,
            self.agents,
            self.disk_room,
            self.resumption,
        )
        self.prune = Prune(self.vms, self.lifecycle, self.drivers.storage)
        self.ports = PortService(
            self.vms, self.lifecycle, self.agents, self.publishing, self.automatic_ports
        )
        self.workspaces = WorkspaceService(self.paths, self.store, self.vms)
        self.results = ResultsService(self.paths)
        self.ssh = SshService(self.paths, self.vms, self.agents, self.config.ssh_key_path)
        self.fork_runs = ForkRuns(
            self.vms, self.creator, self.lifecycle, self.forks, self.workspaces, self.results
        )
        self.stats = StatsService(
            vms=self.vms,
            agents=self.agents,
            handles=self.handles,
            hypervisor=self.drivers.hypervisor,
            storage=self.drivers.storage,
            interval_s=self.config.stats_poll_interval,
        )

    async def _forget(self, image: Image) -> None:
        """Delete what was saved of machines of an image."""
        await self.standbys.retire_all()
        await self.templates.forget_image(image.id)

    async def reconcile(self) -> None:
        """See `reconcile`: before anybody is served."""
        self.addresses.load(await self.store.vms())
        await Reconciler(
            paths=self.paths,
            store=self.store,
            capabilities=self.capabilities,
            networking=self.networking,
            vms=self.vms,
            liveness=self.liveness,
            images=self.images,
            kernels=self.kernels,
            templates=self.templates,
            hypervisor=self.drivers.hypervisor,
            hypervisor_reason=self.drivers.hypervisor_reason,
            devices=self.drivers.devices,
            disk_room=self.disk_room,
            resumption=self.resumption,
            others=self.drivers.others,
            snapshots=self.snapshots,
        ).run()
        await self.image_cache.remove_leftovers()
        await self.results.settle()

    def maintenance(self) -> Maintenance:
        return Maintenance(
            paths=self.paths,
            hypervisor=self.drivers.hypervisor,
            vms=self.vms,
            lifecycle=self.lifecycle,
            stale_after_s=self.config.auto_stop_stale_after,
        )

    async def close(self) -> None:
        """Wait for clean-ups, close listeners and channels. VMs run on."""
        await self.standbys.close()
        await self.resumption.close()
        await self.vms.close()
        await self.automatic_ports.close()
        await self.forwards.close()
        await self.agents.close()
        for network in self.drivers.networks.by_mode.values():
            await network.close()
