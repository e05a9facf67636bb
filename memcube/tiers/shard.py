"""One shard of the plaintext tier: a store, its ranker, and the epoch that fences its writers.

Not covered: where the shard runs (``actors.qdrant``) and what should be in it (the catalog).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from memcube.errors import StaleEpoch
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId
from memcube.retrieval.ranker import Hit, Mode, Retriever
from memcube.tiers.plaintext import IndexedCube, PlaintextStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself. ``index`` is the embedder's identity."""

    shard: int
    epoch: int
    index: str
    location: str


class ShardClient(Protocol):
    """One shard as its callers see it, wherever it runs.

    Reads may be repeated freely; ``put`` and ``delete`` are idempotent, and raise StaleEpoch
    when the shard was restarted since the caller learnt its epoch: what the caller knew of the
    catalog may be older than the shard's tombstones, so it must be read again.
    """

    async def info(self) -> ShardInfo: ...

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None: ...

    async def delete(
        self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int
    ) -> None: ...

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None: ...

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
    ) -> list[Hit]: ...

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]: ...


class PlaintextShard:
    """Owns one store for one epoch."""

    def __init__(
        self, store: PlaintextStore, retriever: Retriever, *, shard: int, epoch: int, location: str
    ) -> None:
        self._store = store
        self._retriever = retriever
        self._info = ShardInfo(
            shard=shard, epoch=epoch, index=store.spec.embedder, location=location
        )

    async def info(self) -> ShardInfo:
        """This shard's number, epoch, index and place."""
        return self._info

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None:
        """Insert or replace cubes. Idempotent.

        Raises:
            StaleEpoch: the shard was restarted since the caller read the catalog.
        """
        self._check(epoch)
        await self._store.put(cubes)

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int) -> None:
        """Remove cubes up to the given versions, and refuse late puts of those. Idempotent."""
        self._check(epoch)
        await self._store.delete(tenant, versions)

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None:
        """Change the state that filters see. Idempotent."""
        self._check(epoch)
        await self._store.set_state(tenant, ids, state)

    async def search(
        self,
        tenant: TenantId,
        query: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
        mode: Mode = Mode.HYBRID,
        threshold: float | None = None,
        explain: bool = False,
    ) -> list[Hit]:
        """The best cubes for a query, best first."""
        return await self._retriever.search(
            tenant,
            query,
            where=where,
            now=now,
            limit=limit,
            mode=mode,
            threshold=threshold,
            explain=explain,
        )

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        """Every cube of the shard with its version."""
        return [entry async for entry in self._store.versions()]

    async def close(self) -> None:
        """Flush and release the store."""
        await self._store.close()

    def _check(self, epoch: int) -> None:
        if epoch != self._info.epoch:
            raise StaleEpoch(epoch, self._info.epoch)
