"""The control plane's actor: one leads, by a lease in the catalog."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.calls import answer
from actors.embedder import RemoteEmbedder
from actors.engines import RemoteChatModel
from actors.nodes import PLACED, nodes_seen, on_head
from actors.objects import open_objects
from actors.qdrant import RemoteShards
from memcube.catalog import Catalog, NodeSeen
from memcube.chat.contract import in_time
from memcube.config import Config
from memcube.errors import Unavailable
from memcube.ids import CubeId, TenantId
from memcube.indexing import Indexer
from memcube.reconcile import Reconciler
from memcube.scheduler.host import SchedulerHost
from memcube.scheduler.lease import LeaseKeeper
from memcube.scheduler.parts import scheduler_host
from memcube.scheduler.shard_port import ShardPort
from memcube.scheduler.topology import Ports, Topology
from memcube.sweep import lifecycle_sweep
from memcube.tiers.shard import ShardInfo

NAME = "scheduler"
CALL_DEADLINE_S = 30.0
LOOK_DEADLINE_S = 2.0
_T = TypeVar("_T")
log = logging.getLogger("memcube.scheduler")


class SchedulerActor:
    """Hosts a ``SchedulerHost``; without the lease it acts on nothing.

    The host runs in a thread with a loop of its own, so that calls are answered while a round is long, and
    the lease is kept by another, which no round can hold up. A restarted actor is the same holder, takes
    the lease at once, and gets a new epoch.
    """

    def __init__(
        self,
        config: Config,
        embedder: ActorHandle[Any],
        engines: list[ActorHandle[Any]],
    ) -> None:
        self._config = config
        self._embedder = embedder
        self._engines = [RemoteChatModel(handle, i) for i, handle in enumerate(engines)]
        self._catalog = Catalog.open(config.catalog_url())
        self._shards = RemoteShards(config, embedder, self._catalog.shards.homes)
        holder = ray.get_runtime_context().get_actor_id() or NAME
        self._keeper = LeaseKeeper(self._catalog.leases, holder=holder, clock=_now)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: SchedulerHost | None = None
        self._failures = 0
        self._stopping = threading.Event()
        keeping = threading.Thread(target=self._keeper.keep, args=(self._stopping,), daemon=True)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        keeping.start()
        self._thread.start()

    def record_uses(
        self,
        uses: Mapping[TenantId, Mapping[CubeId, int]],
        scores: Mapping[TenantId, Mapping[CubeId, float]],
    ) -> None:
        """Take a batch of uses, and how close cubes were to what was asked; counted in the next round. A crash
        loses those not yet counted."""
        if self._host is not None:
            self._host.used(uses, scores)

    def status(self) -> dict[str, Any]:
        """Epoch of the lease (None: not leading), rounds, failures and the last round's report."""
        if self._host is None:
            told = {"epoch": self._keeper.epoch, "rounds": 0, "failures": 0, "last": {}}
        else:
            told = self._host.status()
        return {**told, "failures": told["failures"] + self._failures}

    def details(self) -> dict[str, Any]:
        """All there is to tell of it; see ``SchedulerHost.details``."""
        return self._of_host(_details)

    def plan(self, limit: int) -> dict[str, Any]:
        """A dry run; see ``SchedulerHost.plan``."""

        async def plan(host: SchedulerHost) -> dict[str, Any]:
            return host.plan(limit=limit)

        return self._of_host(plan)

    def round_now(self) -> dict[str, Any]:
        """A round now; see ``SchedulerHost.round_now``."""
        return self._of_host(SchedulerHost.round_now)

    def stop(self) -> None:
        """End after the rounds that are under way, and give the lease back."""
        self._stopping.set()
        if self._loop is not None and self._host is not None:
            self._loop.call_soon_threadsafe(self._host.stop)
        self._thread.join(timeout=30)
        self._keeper.release()
        self._catalog.close()

    def _of_host(self, ask: Callable[[SchedulerHost], Coroutine[Any, Any, _T]]) -> _T:
        """What the host answers, in its own loop: its state is that loop's."""
        if self._host is None or self._loop is None:
            raise Unavailable("the scheduler is starting", 2.0)
        asked = asyncio.run_coroutine_threadsafe(ask(self._host), self._loop)
        try:
            return asked.result(CALL_DEADLINE_S)
        except TimeoutError:
            asked.cancel()
            raise Unavailable("the scheduler is busy with a long round", 5.0) from None

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._host = await self._make()
                break
            except Exception:
                self._failures += 1
                log.exception("the scheduler could not begin; it tries again")
                await asyncio.to_thread(self._stopping.wait, self._config.scheduler.interval_s)
        self._loop = asyncio.get_running_loop()
        if self._host is not None and not self._stopping.is_set():
            await self._host.run()

    async def _make(self) -> SchedulerHost:
        config, catalog = self._config, self._catalog
        embedder = await RemoteEmbedder.connect(self._embedder)
        shards = self._shards
        indexer = Indexer(catalog, embedder, shards, clock=_now)
        return scheduler_host(
            catalog,
            config,
            self._keeper,
            reconciler=Reconciler(
                catalog, indexer, shards, config.scheduler, num_shards=config.plaintext.shards
            ),
            indexer=indexer,
            sweep=lifecycle_sweep(
                catalog,
                indexer,
                shards,
                config,
                clock=_now,
                open_objects=lambda: open_objects(config),
            ),
            engines=self._engines,
            plaintext=(self._topology(), ShardPort(shards)),
            clock=_now,
        )

    def _topology(self) -> Topology:
        config = self._config

        async def nodes() -> list[NodeSeen]:
            return await asyncio.to_thread(nodes_seen)

        async def info(shard: int) -> ShardInfo | None:
            return await in_time(self._shards(shard).info(), LOOK_DEADLINE_S)

        async def open_shard(shard: int, node: str, again: bool) -> None:
            (self._shards.restart if again else self._shards.open)(shard, node)

        return Topology(
            self._catalog.shards,
            Ports(
                nodes=nodes,
                info=info,
                open_shard=open_shard,
                tenants=self._catalog.access.tenants,
            ),
            num_configured=config.plaintext.shards,
            shard_bytes=config.plaintext.shard_mb << 20,
            shard_per_node=config.plaintext.shard_per_node,
        )


class RemoteScheduler:
    """A ``serve.backend.Scheduler`` behind the actor."""

    def __init__(self, handle: ActorHandle[Any]) -> None:
        self._handle = handle

    async def details(self) -> dict[str, Any]:
        return await self._ask(self._handle.details.remote())

    async def plan(self, *, limit: int) -> dict[str, Any]:
        return await self._ask(self._handle.plan.remote(limit))

    async def round_now(self) -> dict[str, Any]:
        return await self._ask(self._handle.round_now.remote())

    @staticmethod
    async def _ask(call: Any) -> dict[str, Any]:
        return await answer(call, of="the scheduler", deadline_s=CALL_DEADLINE_S + 5.0)


async def _details(host: SchedulerHost) -> dict[str, Any]:
    return host.details()


def _now() -> datetime:
    return datetime.now(UTC)


def spawn_scheduler_actor(
    config: Config,
    *,
    embedder: ActorHandle[Any],
    engines: list[ActorHandle[Any]],
) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options."""
    spawned = (
        ray.remote(SchedulerActor)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=PLACED,
            max_concurrency=16,
            scheduling_strategy=on_head(),
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(config, embedder, engines)
    )
    return cast(ActorHandle[Any], spawned)
