"""The lifecycle's part of a scheduler's round: what has faded, what waits for the archive, what could
be one memory.

One step is bounded whatever the catalog holds: it goes on where the one before ended. Expiry is the
reconcile loop's (``Cubes.expire_due``), since it must not wait for any of this.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from memcube.archive import Archive, archive_of
from memcube.catalog import Catalog
from memcube.config import Config, LifecycleConfig, SchedulerConfig
from memcube.cube import MemCube
from memcube.decay import Decay
from memcube.errors import Conflict, IllegalMove, NotFound
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock, Indexer, Shards
from memcube.merging import Merging
from memcube.objects import OpenObjects
from memcube.settling import Changed, Settling

OpenArchive = Callable[[], Awaitable[Archive]]

AUTHOR = "scheduler"
PRUNE_EVERY = timedelta(hours=1)
LOOK_BACK = timedelta(days=1)
"""After a start, cubes that were added so long before are looked at for merges again."""


SETTLED = timedelta(seconds=10)
"""Ids begin with their times, but a later one may be committed first: so long it is waited for."""


@dataclass(slots=True)
class SweepReport:
    """What one step did."""

    faded: int = 0
    copied: int = 0
    removed: int = 0
    proposed: int = 0
    merged: int = 0
    pruned: int = 0


class LifecycleSweep:
    """Call ``step`` under the scheduler's lease. Every part is idempotent."""

    def __init__(
        self,
        catalog: Catalog,
        settling: Settling,
        merging: Merging,
        open_archive: OpenArchive | None,
        scheduler: SchedulerConfig,
        config: LifecycleConfig,
    ) -> None:
        self._catalog = catalog
        self._settling = settling
        self._merging = merging
        self._open_archive = open_archive
        self._archive: Archive | None = None
        self._scheduler = scheduler
        self._config = config
        self._faded_to = ""
        self._merged_to: str | None = None
        self._pruned_at: datetime | None = None

    async def step(self, now: datetime) -> SweepReport:
        """One bounded step of each part.

        Raises:
            Unavailable, StorageFull: a shard or the object store can't answer. What was done stays
                done, and the rest is done by a later step.
        """
        report = SweepReport()
        if self._config.forget != "off":
            report.faded = await self._fade(now)
        if self._pruned_at is None or now - self._pruned_at >= PRUNE_EVERY:
            report.pruned = await asyncio.to_thread(self._catalog.proposals.prune, now=now)
            self._pruned_at = now
        if self._scheduler.merge != "off":
            await self._merge(now, report)
        # The last: an object store that is down holds nothing else up.
        if self._open_archive is not None:
            if self._archive is None:
                self._archive = await self._open_archive()
            done = await self._archive.step(now, limit=self._scheduler.batch)
            report.copied, report.removed = done.copied, done.removed
        return report

    async def _fade(self, now: datetime) -> int:
        """Look at the next cubes and let those go that have faded; how many."""
        decay = Decay(
            half_life=timedelta(days=self._config.half_life_days), below=self._config.forget_below
        )
        last, idle = await asyncio.to_thread(
            self._catalog.cubes.idle,
            since=now - decay.least_idle,
            after=self._faded_to,
            limit=self._scheduler.batch,
            now=now,
        )
        self._faded_to = last or ""
        gone = 0
        for cube in idle:
            if decay.faded(cube, now) and await self._let_go(cube):
                gone += 1
        return gone

    async def _let_go(self, cube: MemCube) -> bool:
        """Archive or delete a cube, if nobody used, changed or froze it since it was read."""
        tenant, id, settling = cube.tenant, cube.id, self._settling
        shard = await self._shard(tenant)
        try:
            if self._config.forget == "delete":
                await settling.delete(tenant, id, shard=shard, expected_version=cube.version)
            else:
                await settling.archive(
                    tenant, id, shard=shard, author=AUTHOR, expected_version=cube.version
                )
        except (NotFound, Conflict, IllegalMove):
            return False
        return True

    async def _merge(self, now: datetime, report: SweepReport) -> None:
        """Look for what could be merged with the cubes that were added since the last step."""
        after = self._merged_to or first_id(now - LOOK_BACK)
        fresh = await asyncio.to_thread(
            self._catalog.cubes.added_between,
            after,
            first_id(now - SETTLED),
            limit=self._scheduler.batch,
            now=now,
        )
        # What is not indexed yet has no neighbours: the next step begins with it.
        ready = next((i for i, cube in enumerate(fresh) if not cube.indexed), len(fresh))
        by_tenant: dict[TenantId, list[MemCube]] = {}
        for cube in fresh[:ready]:
            by_tenant.setdefault(cube.tenant, []).append(cube)
        for id, cubes in by_tenant.items():
            shard = await self._shard(id)
            found = await self._merging.find_near(id, cubes, shard=shard)
            report.proposed += len(found)
            for proposal in found if self._scheduler.merge == "apply" else ():
                # Turns are the record of a conversation: an operator may merge them, no policy does.
                if not proposal.why["turns"] and await self._apply(id, proposal.id, shard):
                    report.merged += 1
        self._merged_to = fresh[ready - 1].id if ready else after

    async def _apply(self, tenant: TenantId, id: str, shard: int) -> bool:
        try:
            await self._merging.apply(tenant, id, shard=shard, author=AUTHOR)
        except (NotFound, Conflict):
            return False  # a cube of it changed meanwhile
        return True

    async def _shard(self, tenant: TenantId) -> int:
        return await asyncio.to_thread(self._catalog.shards.shard_of, tenant)


def first_id(time: datetime) -> CubeId:
    """No cube that was added from a time on has a smaller id: ids begin with their milliseconds."""
    return CubeId(str(UUID(int=int(time.timestamp() * 1000) << 80)))


def lifecycle_sweep(
    catalog: Catalog,
    indexer: Indexer,
    shards: Shards,
    config: Config,
    *,
    clock: Clock,
    open_objects: OpenObjects,
    changed: Changed | None = None,
) -> LifecycleSweep:
    """The sweep of a configuration. ``open_objects`` is called once, when the archive is first needed."""
    settling = Settling(catalog, indexer, changed, clock=clock)

    async def open_archive() -> Archive:
        return archive_of(catalog, await open_objects(), config)

    return LifecycleSweep(
        catalog,
        settling,
        Merging(catalog, shards, settling, config.lifecycle, clock=clock),
        open_archive if config.lifecycle.archive else None,
        config.scheduler,
        config.lifecycle,
    )
