"""Finishes what a crash left half done: the catalog says what must be, the index is made to agree.

One round is cheap when there is nothing to do: every question to the catalog is answered by a
partial index over what is pending. When a shard has been restarted (its epoch grew), all of its
cubes are compared with the catalog once, in both directions.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from memcube.catalog import Catalog
from memcube.config import SchedulerConfig
from memcube.errors import StaleEpoch, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.indexing import Indexer, Shards
from memcube.lifecycle import State
from memcube.tiers.moving import Standing
from memcube.tiers.shard import ShardClient

PRUNE_EVERY = timedelta(hours=1)
INFO_DEADLINE_S = 5.0
"""A shard that opens or hangs holds the others up for no longer."""


@dataclass(slots=True)
class Report:
    """What one round did."""

    expired: int = 0
    indexed: int = 0
    removed: int = 0
    missing: int = 0
    orphans: int = 0
    pruned: int = 0

    @property
    def total(self) -> int:
        return self.expired + self.indexed + self.removed + self.missing + self.orphans


class Reconciler:
    """The reconcile loop's body. The caller holds the lease and gives the time."""

    def __init__(
        self,
        catalog: Catalog,
        indexer: Indexer,
        shards: Shards,
        config: SchedulerConfig,
        *,
        num_shards: int,
    ) -> None:
        self._catalog = catalog
        self._indexer = indexer
        self._shards = shards
        self._config = config
        self._num_shards = num_shards
        self._compared: dict[int, int] = {}
        self._pruned_at: datetime | None = None

    async def step(self, now: datetime) -> Report:
        """One round over all shards.

        Raises:
            Unavailable, StaleEpoch: a shard or the embedder did not answer. The other shards were
                gone over; what was done stays done.
        """
        report = Report()
        report.expired = await asyncio.to_thread(
            self._catalog.cubes.expire_due,
            now=now,
            limit=self._config.batch,
            retention=timedelta(seconds=self._config.expired_kept_s),
        )
        if self._pruned_at is None or now - self._pruned_at >= PRUNE_EVERY:
            report.pruned = await asyncio.to_thread(self._catalog.cubes.prune, now=now)
            self._pruned_at = now
        failed: Unavailable | StaleEpoch | None = None
        shards = await asyncio.to_thread(self._catalog.shards.numbers, self._num_shards)
        for shard in shards:
            try:
                await self._bring_in_line(shard, report, now)
            except (Unavailable, StaleEpoch) as first:
                failed = failed or first
        if failed is not None:
            raise failed
        return report

    async def _bring_in_line(self, shard: int, report: Report, now: datetime) -> None:
        try:
            async with asyncio.timeout(INFO_DEADLINE_S):
                info = await self._shards(shard).info()
        except TimeoutError:
            raise Unavailable(f"shard {shard} of the plaintext tier says nothing") from None
        if self._compared.get(shard) != info.epoch:
            await self._compare(shard, info.index, report, now)
            self._compared[shard] = info.epoch
        await self._remove(shard, report)
        await self._index(shard, report, now)

    async def _remove(self, shard: int, report: Report) -> None:
        removals = await asyncio.to_thread(
            self._catalog.index.removals, shard=shard, limit=self._config.batch
        )
        grouped: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
        for removal in removals:
            grouped[removal.tenant][removal.id] = removal.version
        for tenant, versions in grouped.items():
            await self._indexer.remove(tenant, versions, shard=shard)
        report.removed += len(removals)

    async def _index(self, shard: int, report: Report, now: datetime) -> None:
        before = now - timedelta(seconds=self._config.pending_grace_s)
        pending = await asyncio.to_thread(
            self._catalog.index.pending, shard=shard, before=before, limit=self._config.batch
        )
        if pending:
            await self._indexer.index(pending, shard=shard)
        report.indexed += len(pending)

    async def _compare(self, shard: int, index: str, report: Report, now: datetime) -> None:
        """Catalog against index, both ways. Another embedder's index counts as holding nothing."""
        await asyncio.to_thread(self._catalog.index.adopt, index=index, shard=shard, now=now)
        in_index = {
            (tenant, id): version for tenant, id, version in await self._shards(shard).versions()
        }
        noted = await asyncio.to_thread(lambda: list(self._catalog.index.held(shard=shard)))
        missing: dict[TenantId, list[CubeId]] = defaultdict(list)
        for tenant, id, version in noted:
            if in_index.pop((tenant, id), 0) < version:
                missing[tenant].append(id)
        for tenant, ids in missing.items():
            await asyncio.to_thread(self._catalog.index.unmark, tenant, ids, now=now)
            report.missing += len(ids)
        await self._drop_orphans(in_index, shard, report, now)

    async def _drop_orphans(
        self,
        unnoted: Mapping[tuple[TenantId, CubeId], int],
        shard: int,
        report: Report,
        now: datetime,
    ) -> None:
        """Remove what the index holds and the catalog doesn't want there. What it wants, but has not
        noted yet, is pending and will be put again. What belongs to tenants of other shards is left to the
        scheduler."""
        grouped: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
        for (tenant, id), version in unnoted.items():
            grouped[tenant][id] = version
        left = await note_strangers(self._catalog, self._shards(shard), shard, grouped)
        report.orphans += sum(len(cubes) for cubes in left.values())
        for tenant, versions in grouped.items():
            wanted = await asyncio.to_thread(
                self._catalog.cubes.live_versions, tenant, list(versions), now=now
            )
            orphans = {id: version for id, version in versions.items() if id not in wanted}
            await self._indexer.remove(tenant, orphans, shard=shard)
            report.orphans += len(orphans)

    async def record_uses(
        self, uses: Mapping[TenantId, Mapping[CubeId, int]], now: datetime
    ) -> None:
        """Count uses in the catalog, and tell the index of cubes that became ``activated``.

        Raises:
            Unavailable, StaleEpoch: a shard did not answer, or the catalog. All tenants were gone over.
        """
        failed: Unavailable | StaleEpoch | None = None
        for tenant, counts in uses.items():
            try:
                await self._record_uses_of(tenant, counts, now)
            except (Unavailable, StaleEpoch) as first:
                failed = failed or first
        if failed is not None:
            raise failed

    async def _record_uses_of(
        self, tenant: TenantId, counts: Mapping[CubeId, int], now: datetime
    ) -> None:
        activated = await asyncio.to_thread(
            self._catalog.cubes.record_uses, tenant, counts, now=now
        )
        if activated:
            shard = await self._shard(tenant)
            await self._indexer.set_state(tenant, list(activated), State.ACTIVATED, shard=shard)

    async def _shard(self, tenant: TenantId) -> int:
        return await asyncio.to_thread(self._catalog.shards.shard_of, tenant)


async def note_strangers(
    catalog: Catalog, client: ShardClient, shard: int, held: dict[TenantId, dict[CubeId, int]]
) -> dict[TenantId, dict[CubeId, int]]:
    """Take out of ``held`` what belongs to tenants that do not lie in this shard, or are on their way; of
    those what was left behind, which the shard is told of."""
    moving = await asyncio.to_thread(catalog.shards.moving)
    left: dict[TenantId, dict[CubeId, int]] = {}
    for tenant in list(held):
        standing = await asyncio.to_thread(catalog.shards.standing, tenant, shard)
        if standing is Standing.HERE:
            continue
        cubes = held.pop(tenant)
        if standing is not Standing.LEAVING and tenant not in moving:
            left[tenant] = cubes
    if left:
        await client.note_left(list(left))
    return left
