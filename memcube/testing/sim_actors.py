"""Who acts in a simulation: leaders with the real control and enactor, and clients that write and read."""

from collections.abc import Callable, Sequence
from typing import Any

from memcube.catalog.action_rows import ActionRecord
from memcube.catalog.fence import LEASE
from memcube.catalog.tasks import Task
from memcube.errors import (
    Conflict,
    MemCubeError,
    NotFound,
    StaleEpoch,
    StorageFull,
    Unavailable,
)
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import Event
from memcube.scheduler.actions import Copy, Place, Tier
from memcube.scheduler.control import Control
from memcube.scheduler.enact import Enactor
from memcube.scheduler.planner import Planner
from memcube.scheduler.world import Capacity, Node, World
from memcube.testing.sim_catalog import About, SimCatalog, SimFeed
from memcube.testing.sim_kernel import Kernel, Process, Wait
from memcube.testing.sim_nodes import Read, SimNode, SimPort

LEASE_TTL_S = 8.0
ROUND_S = 5.0


class Violation(AssertionError):
    """An invariant that does not hold."""


class Cluster:
    """What all share: the kernel, the nodes, the catalog and the message paths."""

    def __init__(self, seed: int, make_catalog: Callable[..., SimCatalog]) -> None:
        self.kernel = Kernel(seed)
        self.nodes: dict[str, SimNode] = {}
        self.draining: set[str] = set()
        self.since: dict[str, float] = {}
        self.capacities: dict[Place, Capacity] = {}
        self.catalog = make_catalog(self.home)
        self.touched: dict[tuple[TenantId, CubeId], None] = {}
        self.feeds: list[SimFeed] = []
        self.heard: Callable[[Read], None] = lambda read: None
        """Told of payloads that a leader has found to be there."""

    def home(self, tenant: TenantId, cube: CubeId) -> Place:
        """Where a cube's writes go at first: of the nodes that are not lost."""
        names = sorted(name for name, node in self.nodes.items() if not node.is_lost)
        places = [p for p in self.capacities if p.tier is Tier.PLAINTEXT and p.node in names]
        return sorted(places)[(int(cube) + len(tenant)) % len(places)]

    def ask(self, do: Callable[..., Any], *given: Any, **more: Any) -> Wait:
        """A transaction of the catalog."""
        return self.kernel.request(lambda: do(*given, **more), what="catalog", is_message=False)

    def touch(self, tenant: TenantId, cube: CubeId) -> None:
        self.touched[tenant, cube] = None

    def text(self, move: ActionRecord) -> Wait:
        return self.ask(self.catalog.text, move.tenant, move.cube, move.version)

    def port(self) -> SimPort:
        return SimPort(
            self.kernel, self.nodes, self.text, self.touch, lambda read: self.heard(read)
        )

    def put(self, place: Place, slot: Any, version: int, epoch: int, num_bytes: int) -> Wait:
        def do(node: SimNode) -> None:
            self.touch(slot[1], slot[2])
            node.put(slot, version, epoch, num_bytes, self.kernel.time().timestamp())

        return self.port().send(place, None, do)

    async def index(self, tenant: TenantId, cube: CubeId) -> bool:
        """Bring the owner's index to the present version, as the indexer does."""
        version = await self.ask(self.catalog.live_version, tenant, cube)
        if version is None:
            return True
        place, epoch = await self.ask(self.catalog.owner, tenant, cube)
        size = self.catalog.about[tenant, cube].num_bytes
        await self.put(place, (place, tenant, cube), version, epoch, size)
        return await self.ask(self.catalog.mark, tenant, cube, version, place, epoch)

    async def erase(self, tenant: TenantId, cube: CubeId, version: int, place: Place) -> None:
        """Take a cube that is out of search from a place."""

        def do(node: SimNode) -> None:
            self.touch(tenant, cube)
            node.erase((place, tenant, cube), version)

        await self.port().send(place, None, do)
        await self.ask(self.catalog.mark_removed, tenant, cube, place)


class Leader:
    """What an actor of the scheduler does: leads while it has the lease, one ``Control`` an epoch."""

    def __init__(
        self,
        cluster: Cluster,
        process: Process,
        make_planner: Callable[[], Planner],
        enactor_class: type[Enactor],
    ) -> None:
        self._cluster = cluster
        self._process = process
        self._make_planner = make_planner
        self._enactor_class = enactor_class
        self._feed: SimFeed | None = None
        self.control: Control | None = None
        self.epoch = 0
        self._forgotten: set[str] = set()
        self._tasks: set[str] = set()

    async def run(self) -> None:
        """For ever, until the process ends."""
        kernel, catalog = self._cluster.kernel, self._cluster.catalog
        lease = None
        while True:
            try:
                now = kernel.time(self._process)
                if lease is None:
                    lease = await self._cluster.ask(
                        catalog.leases.acquire,
                        LEASE,
                        self._process.name,
                        now=now,
                        ttl_s=LEASE_TTL_S,
                    )
                    await self._begin(lease.epoch)
                else:
                    lease = await self._cluster.ask(
                        catalog.leases.renew, lease, now=now, ttl_s=LEASE_TTL_S
                    )
                await self._round(lease.epoch)
            except (StaleEpoch, Conflict):
                lease = None
                self._end()
            except (Unavailable, NotFound, StorageFull):
                if self.control is None:
                    lease = None  # it did not get to the end of its beginning
            await kernel.sleep(ROUND_S)

    async def _begin(self, epoch: int) -> None:
        cluster = self._cluster
        self._end()
        self.epoch = epoch
        self._forgotten.clear()
        self._tasks.clear()
        self._feed = SimFeed(cluster.catalog)
        cluster.feeds.append(self._feed)
        world = World(kv_bytes_per_token=10, half_life_s=3_600.0)
        enactor = self._enactor_class(
            cluster.port(),
            cluster.catalog.actions,
            leader=epoch,
            clock=self._clock,
            spawn=self._process.start,
            call=cluster.ask,
        )
        control = Control(
            world,
            self._make_planner(),
            enactor,
            cluster.port(),
            cluster.catalog.actions,
            self._feed,
            leader=epoch,
            clock=self._clock,
            call=cluster.ask,
            compare_every_s=20.0,
            grace_s=15.0,
        )
        await control.recover()
        self.control = control

    def _end(self) -> None:
        self.control = None
        if self._feed in self._cluster.feeds:
            self._cluster.feeds.remove(self._feed)

    async def _round(self, epoch: int) -> None:
        cluster, control = self._cluster, self.control
        if control is None:
            return
        await self._look_at_nodes(control)
        await control.round()
        if control.num_failures:
            raise Violation("the enactor met an error that it doesn't know; see the log")
        if control.is_deposed:
            raise StaleEpoch(epoch, epoch + 1)
        catalog = cluster.catalog
        for tenant, cube, version, place in (await cluster.ask(catalog.removals))[:8]:
            try:
                await cluster.erase(tenant, cube, version, place)
            except MemCubeError:
                continue  # it is listed still: the next round tries again
        now = self._clock()
        for task in await cluster.ask(
            catalog.tasks.claim, leader=epoch, now=now, limit=8, held=tuple(self._tasks)
        ):
            self._tasks.add(task.id)
            self._process.start(self._do(task, epoch))

    async def _look_at_nodes(self, control: Control) -> None:
        cluster, world = self._cluster, control.world
        for place, capacity in list(cluster.capacities.items()):
            world.set_place(place, capacity)
        for name, node in list(cluster.nodes.items()):
            if node.is_lost:
                if name not in self._forgotten:
                    await control.forget(name)
                    self._forgotten.add(name)
            else:
                world.set_node(
                    Node(
                        name=name,
                        alive=node.is_up,
                        draining=name in cluster.draining,
                        since=cluster.since.get(name, 0.0),
                    )
                )

    async def _do(self, task: Task, epoch: int) -> None:
        """One task of the queue."""
        cluster, tasks = self._cluster, self._cluster.catalog.tasks
        try:
            try:
                await self._work(task)
            except NotFound:
                pass  # the cube went before its turn came: there is nothing to do
            except MemCubeError as failed:
                await cluster.ask(tasks.failed, task, str(failed), leader=epoch, now=self._clock())
                return
            await cluster.ask(tasks.done, task, leader=epoch, now=self._clock())
        except (StaleEpoch, Unavailable):
            return  # whoever leads claims it again
        finally:
            if self.epoch == epoch:
                self._tasks.discard(task.id)

    async def _work(self, task: Task) -> None:
        cluster, catalog = self._cluster, self._cluster.catalog
        if task.kind == "reindex":
            if not await cluster.index(task.tenant, task.payload["cube"]):
                raise Conflict("it changed meanwhile")
        elif task.kind in ("expire", "archive"):
            event = Event(task.kind)
            await cluster.ask(catalog.remove, task.tenant, task.payload["cube"], event)

    def _clock(self):
        return self._cluster.kernel.time(self._process)


class Client:
    """One caller's requests, each a coroutine that may end at any step, as its process may."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.num_reads = self.num_found = 0

    async def add(self, tenant: TenantId, about: About) -> None:
        cluster = self._cluster
        cube = await cluster.ask(cluster.catalog.add, tenant, about)
        await cluster.index(tenant, cube)

    async def change(self, tenant: TenantId, cube: CubeId) -> None:
        cluster = self._cluster
        now = cluster.kernel.time().timestamp()
        await cluster.ask(cluster.catalog.change, tenant, cube, now)
        await cluster.index(tenant, cube)

    async def delete(self, tenant: TenantId, cube: CubeId) -> None:
        cluster = self._cluster
        version = await cluster.ask(cluster.catalog.remove, tenant, cube, Event.DELETE)
        cluster.catalog.acked_deletes.add((tenant, cube))
        for place, _ in await cluster.ask(cluster.catalog.listed, tenant, cube, Tier.PLAINTEXT):
            await cluster.erase(tenant, cube, version, place)

    async def use(self, tenant: TenantId, cube: CubeId) -> None:
        cluster = self._cluster
        await cluster.ask(cluster.catalog.use, tenant, cube, cluster.kernel.time().timestamp())

    async def read(self, tenant: TenantId, cube: CubeId, tier: Tier) -> None:
        """A search that hits, or KV that is attached: from any place that lists it, checked as the gateway
        checks it."""
        cluster = self._cluster
        was_deleted = (tenant, cube) in cluster.catalog.acked_deletes
        self.num_reads += 1
        wanted = await cluster.ask(cluster.catalog.live_version, tenant, cube)
        for place, _ in await cluster.ask(cluster.catalog.listed, tenant, cube, tier):
            slot = place, tenant, cube
            try:
                version, content = await cluster.port().send(
                    place, None, lambda n, s=slot: n.get(s)
                )
            except MemCubeError:
                continue  # the next place may have it
            live = await cluster.ask(cluster.catalog.live_version, tenant, cube)
            if version not in (live, wanted) or live is None or content is None:
                continue  # dropped from the answer
            if tier is Tier.ACTIVATION and version != wanted:
                continue  # KV is asked for by its version
            if content != (tenant, cube, version) or was_deleted:
                raise Violation(f"{content} was served for {cube} v{version} of {tenant}")
            self.num_found += 1
            return


def asked_copy(
    catalog: SimCatalog, tenant: TenantId, cube: CubeId, target: Place, sources: Sequence[Place]
) -> Copy:
    """What an operator asks for: a cube to a place."""
    about, version = catalog.about[tenant, cube], catalog.store.cubes[tenant, cube].version
    is_text = target.tier is Tier.PLAINTEXT
    return Copy(
        tenant=tenant,
        cube=cube,
        version=version,
        epoch=catalog.actions.placement(tenant, cube).epoch,
        source=sources[0] if sources else None,
        target=target,
        num_bytes=about.num_bytes if is_text else about.tokens * 10,
        takes_over=is_text,
        urgent=True,
        policy="operator",
        reason="asked for",
    )
