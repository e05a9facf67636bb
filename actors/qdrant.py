"""The plaintext tier's actor: hosts one shard, fenced by an epoch from the catalog."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.calls import answer, pack, unpack
from actors.embedder import RemoteEmbedder
from memcube.catalog import Catalog
from memcube.config import Config
from memcube.embedding import LocalQueries, open_encoder
from memcube.embedding.contract import Embedder
from memcube.errors import Unavailable
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId, digest
from memcube.retrieval.ranker import Hit, Mode, Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.tiers.edge import EdgeStore
from memcube.tiers.plaintext import IndexedCube, IndexSpec, PlaintextStore
from memcube.tiers.shard import PlaintextShard, ShardInfo

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
        catalog = Catalog.open(self._config.catalog_url())
        try:
            epoch = catalog.leases.next_epoch(f"plaintext/{self._number}", f"pid {os.getpid()}")
        finally:
            catalog.close()
        weights = RankerWeights.load(self._config.retrieval_weights)
        if isinstance(store, EdgeStore):
            self._optimising = asyncio.create_task(_keep_optimised(store))
        return PlaintextShard(
            store,
            Retriever(store, embedder, weights),
            shard=self._number,
            epoch=epoch,
            location=location,
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

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        return await (await self._shard()).versions()

    async def close(self) -> None:
        """Flush and release the store; the actor is of no use afterwards."""
        if self._opening is not None:
            await (await self._opening).close()


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

    def __init__(self, handle: ActorHandle[Any], shard: int) -> None:
        self._handle = handle
        self._name = f"shard {shard} of the plaintext tier"

    async def info(self) -> ShardInfo:
        return await self._answer(self._handle.info.remote(), deadline_s=180.0)

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None:
        await self._answer(self._handle.put.remote(list(cubes), epoch=epoch))

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int) -> None:
        await self._answer(self._handle.delete.remote(tenant, dict(versions), epoch=epoch))

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None:
        await self._answer(self._handle.set_state.remote(tenant, list(ids), state, epoch=epoch))

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
        found = await self._answer(self._handle.search.remote(pack(tenant, query, how)))
        return list(unpack(found))

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        return await self._answer(self._handle.versions.remote())

    async def _answer(self, call: Any, deadline_s: float = CALL_DEADLINE_S) -> Any:
        return await answer(call, of=self._name, deadline_s=deadline_s)


def spawn_qdrant_actor(
    config: Config, *, shard: int, embedder: ActorHandle[Any]
) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options.

    Every call is idempotent and writes carry an epoch, so Ray may repeat a call whose answer was
    lost with the process: a repeated write under the old epoch is refused with StaleEpoch.
    """
    spawned = (
        ray.remote(QdrantActor)
        .options(
            name=f"qdrant-{shard}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=1000,
            max_restarts=-1,
            max_task_retries=-1,
            enable_task_events=False,
        )
        .remote(config, shard, embedder)
    )
    return cast(ActorHandle[Any], spawned)
