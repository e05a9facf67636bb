"""The plaintext tier's actor: hosts one shard, fenced by an epoch from the catalog."""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.calls import answer, pack, unpack
from actors.embedder import RemoteEmbedder
from actors.nodes import PLACED, on_node, this_node
from memcube.catalog import Catalog
from memcube.catalog.fence import LEASE
from memcube.config import Config
from memcube.embedding import LocalQueries, open_encoder
from memcube.embedding.contract import Embedder
from memcube.errors import Unavailable
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId, digest
from memcube.retrieval.ranker import Hit, Mode, Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.scheduler.leader_fence import LeaderFence
from memcube.tiers.edge import EdgeStore
from memcube.tiers.moving import Standing
from memcube.tiers.plaintext import IndexedCube, IndexSpec, PlaintextStore, Scored
from memcube.tiers.shard import MOVES, PlaintextShard, ShardInfo

CALL_DEADLINE_S = 60.0
OPEN_DEADLINE_S = 60.0
OPTIMISE_CHECK_S = 30.0
log = logging.getLogger("memcube.qdrant")


class QdrantActor:
    """Owns one shard of the plaintext tier for one epoch.

    The store is opened at the first call, in the actor's own loop: a process that was killed a
    moment ago may still hold the folder, and a restart must wait for it rather than fail.
    """

    def __init__(self, config: Config, shard: int, embedder: ActorHandle[Any]) -> None:
        self._config = config
        self._number = shard
        self._embedder = embedder
        self._opening: asyncio.Task[PlaintextShard] | None = None
        self._catalog: Catalog | None = None

    async def _shard(self) -> PlaintextShard:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except Exception:
            if self._opening is opening:
                self._opening = None
            raise

    async def _open(self) -> PlaintextShard:
        embedder = await self._open_embedder()
        spec = IndexSpec(embedder=embedder.identity, dim=embedder.dim)
        store, location = await self._open_store(spec)
        if self._catalog is None:
            self._catalog = await asyncio.to_thread(Catalog.open, self._config.catalog_url())
        catalog, number, node = self._catalog, self._number, this_node()

        def note_opened() -> tuple[int, int, set[TenantId]]:
            epoch = catalog.leases.next_epoch(f"plaintext/{number}", f"pid {os.getpid()}")
            catalog.shards.opened(
                number, node=node, location=location, epoch=epoch, now=datetime.now(UTC)
            )
            return epoch, catalog.leases.epoch(LEASE), catalog.shards.moving()

        epoch, leader, moving = await asyncio.to_thread(note_opened)
        weights = RankerWeights.load(self._config.retrieval_weights)
        if isinstance(store, EdgeStore):
            self._optimising = asyncio.create_task(_keep_optimised(store))

        async def look_up(tenant: TenantId) -> Standing:
            return await asyncio.to_thread(catalog.shards.standing, tenant, number)

        return PlaintextShard(
            store,
            Retriever(store, embedder, weights),
            shard=number,
            epoch=epoch,
            location=location,
            node=node,
            look_up=look_up,
            moving=moving,
            leader_fence=LeaderFence(leader).check,
        )

    async def _open_embedder(self) -> Embedder:
        embedder = await RemoteEmbedder.connect(self._embedder)
        if "@onnx-" not in embedder.identity:
            return embedder
        config = self._config.embedder.model_copy(update={"backend": "onnx"})
        encoder = await asyncio.to_thread(open_encoder, config, self._config.embedder_folder())
        return LocalQueries(encoder, embedder)

    async def _open_store(self, spec: IndexSpec) -> tuple[PlaintextStore, str]:
        name = digest("index", spec.embedder, spec.dim)[:16]
        if self._config.plaintext.backend == "server":
            from qdrant_client import AsyncQdrantClient

            from memcube.tiers.server import ServerStore

            client = AsyncQdrantClient(
                url=self._config.qdrant_url(), api_key=os.environ.get("QDRANT_API_KEY")
            )
            collection = f"memcube-{self._number:03d}-{name}"
            return await ServerStore.open(client, spec, name=collection), f"qdrant:{collection}"
        folder = Path(self._config.data_dir) / "plaintext" / f"shard-{self._number:03d}" / name
        until = asyncio.get_running_loop().time() + OPEN_DEADLINE_S
        while True:
            try:
                return EdgeStore.open(folder, spec), f"{os.uname().nodename}:{folder}"
            except Unavailable:
                if asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(0.2)

    async def info(self) -> ShardInfo:
        return await (await self._shard()).info()

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None:
        await (await self._shard()).put(cubes, epoch=epoch)

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int) -> None:
        await (await self._shard()).delete(tenant, versions, epoch=epoch)

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None:
        await (await self._shard()).set_state(tenant, ids, state, epoch=epoch)

    async def search(self, asked: bytes) -> bytes:
        """``PlaintextShard.search``, packed both ways."""
        tenant, query, how = unpack(asked)
        return pack(*await (await self._shard()).search(tenant, query, **how))

    async def nearest(
        self, tenant: TenantId, ids: Sequence[CubeId], **how: Any
    ) -> dict[CubeId, list[Scored]]:
        return await (await self._shard()).nearest(tenant, ids, **how)

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        return await (await self._shard()).versions()

    async def move(self, step: str, *given: Any, **named: Any) -> Any:
        """A step of a tenant's move: a method of ``PlaintextShard`` among ``MOVES``."""
        if step not in MOVES:
            raise ValueError(f"no step of a move: {step!r}")
        return await getattr(await self._shard(), step)(*given, **named)

    async def note_left(self, tenants: Sequence[TenantId]) -> None:
        await (await self._shard()).note_left(tenants)

    async def close(self) -> None:
        """Flush and release the store; the actor is of no use afterwards."""
        if self._opening is not None:
            await (await self._opening).close()
        if self._catalog is not None:
            await asyncio.to_thread(self._catalog.close)


async def _keep_optimised(store: EdgeStore) -> None:
    while True:
        await asyncio.sleep(OPTIMISE_CHECK_S)
        try:
            if store.needs_optimise:
                await store.optimise()
        except Exception:
            # The store stays as it was: slower, not wrong. Tried again at the next look.
            log.exception("the graph was not built")


class RemoteShard:
    """A ``ShardClient`` that asks the actor."""

    def __init__(self, shard: int, named: Callable[[int], ActorHandle[Any]]) -> None:
        """``named`` finds the actor of a shard, also one that took the place of another."""
        self.handle = named(shard)
        self._shard = shard
        self._named = named
        self._name = f"shard {shard} of the plaintext tier"

    async def info(self) -> ShardInfo:
        return await self._answer(self.handle.info.remote(), deadline_s=180.0)

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None:
        await self._answer(self.handle.put.remote(list(cubes), epoch=epoch))

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int) -> None:
        await self._answer(self.handle.delete.remote(tenant, dict(versions), epoch=epoch))

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None:
        await self._answer(self.handle.set_state.remote(tenant, list(ids), state, epoch=epoch))

    async def search(
        self,
        tenant: TenantId,
        query: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
        mode: Mode,
        threshold: float | None,
        explain: bool,
    ) -> list[Hit]:
        how = {
            "where": where,
            "now": now,
            "limit": limit,
            "mode": mode,
            "threshold": threshold,
            "explain": explain,
        }
        found = await self._answer(self.handle.search.remote(pack(tenant, query, how)))
        return list(unpack(found))

    async def nearest(
        self,
        tenant: TenantId,
        ids: Sequence[CubeId],
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> dict[CubeId, list[Scored]]:
        call = self.handle.nearest.remote(tenant, list(ids), where=where, now=now, limit=limit)
        return await self._answer(call)

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        return await self._answer(self.handle.versions.remote())

    async def note_left(self, tenants: Sequence[TenantId]) -> None:
        await self._answer(self.handle.note_left.remote(list(tenants)))

    # -- a tenant's move -----------------------------------------------------------------------

    async def begin_move(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        return await self._move("begin_move", tenant, move, leader=leader)

    async def read_out(
        self, tenant: TenantId, ids: Sequence[CubeId], *, leader: int
    ) -> list[IndexedCube]:
        return await self._move("read_out", tenant, list(ids), leader=leader)

    async def changes(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        return await self._move("changes", tenant, move, leader=leader)

    async def seal(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        return await self._move("seal", tenant, move, leader=leader)

    async def let_go(self, tenant: TenantId, *, moved: bool, leader: int) -> None:
        await self._move("let_go", tenant, moved=moved, leader=leader)

    async def expect(self, tenant: TenantId, move: str, *, leader: int) -> None:
        await self._move("expect", tenant, move, leader=leader)

    async def take_in(
        self,
        tenant: TenantId,
        move: str,
        cubes: Sequence[IndexedCube],
        deleted: Mapping[CubeId, int],
        *,
        leader: int,
    ) -> None:
        await self._move("take_in", tenant, move, list(cubes), dict(deleted), leader=leader)

    async def arrived(self, tenant: TenantId, move: str, *, leader: int) -> str:
        return await self._move("arrived", tenant, move, leader=leader)

    async def welcome(self, tenant: TenantId, *, leader: int) -> None:
        await self._move("welcome", tenant, leader=leader)

    async def drop_tenant(self, tenant: TenantId, *, leader: int) -> int:
        return await self._move("drop_tenant", tenant, leader=leader)

    async def _move(self, step: str, *given: Any, **named: Any) -> Any:
        return await self._answer(self.handle.move.remote(step, *given, **named))

    async def _answer(self, call: Any, deadline_s: float = CALL_DEADLINE_S) -> Any:
        try:
            return await answer(call, of=self._name, deadline_s=deadline_s)
        except Unavailable as failed:
            if type(failed) is Unavailable:  # the actor is gone, maybe for good
                self.handle = await asyncio.to_thread(self._named, self._shard)
            raise


Homes = Callable[[], Mapping[int, str]]


def actor_name(shard: int) -> str:
    return f"qdrant-{shard}"


class RemoteShards:
    """All shards by their numbers, asked for when they are first needed: the scheduler may add some."""

    def __init__(self, config: Config, embedder: ActorHandle[Any], homes: Homes) -> None:
        """``homes`` says which nodes shards belong on (``memcube.catalog.ShardBook.homes``)."""
        self._config = config
        self._embedder = embedder
        self._homes = homes
        self._found: dict[int, RemoteShard] = {}

    def __call__(self, shard: int) -> RemoteShard:
        if shard not in self._found:
            self._found[shard] = RemoteShard(shard, self._named)
        return self._found[shard]

    def _named(self, shard: int) -> ActorHandle[Any]:
        """The actor of a shard, which is started at its home where there is none."""
        try:
            return ray.get_actor(actor_name(shard), namespace=NAMESPACE)
        except ValueError:
            return self.open(shard, self._homes().get(shard))

    def open(self, shard: int, node: str | None) -> ActorHandle[Any]:
        """Start a shard on a node, unless it runs already."""
        handle = spawn_qdrant_actor(self._config, shard=shard, embedder=self._embedder, node=node)
        handle.info.remote()  # it opens its store at its first call
        return handle

    def restart(self, shard: int, node: str) -> None:
        """End a shard, and start it on a node. What it was doing ends with ``Unavailable``."""
        ray.kill(self(shard).handle)
        self.open(shard, node)

    def handle(self, shard: int) -> ActorHandle[Any]:
        return self(shard).handle


def spawn_qdrant_actor(
    config: Config, *, shard: int, embedder: ActorHandle[Any], node: str | None = None
) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options. A new one is put on ``node``, and wherever there
    is room when that one is down; one that is there stays where it is.

    Every call is idempotent and writes carry an epoch, so Ray may repeat a call whose answer was
    lost with the process: a repeated write under the old epoch is refused with StaleEpoch.
    """
    spawned = (
        ray.remote(QdrantActor)
        .options(
            name=actor_name(shard),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=PLACED,
            max_concurrency=1000,
            max_restarts=-1,
            max_task_retries=-1,
            enable_task_events=False,
            scheduling_strategy="DEFAULT" if node is None else on_node(node),
        )
        .remote(config, shard, embedder)
    )
    return cast(ActorHandle[Any], spawned)
