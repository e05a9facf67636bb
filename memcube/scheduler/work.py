"""The queue's work: what the scheduler does about tasks, or has a job do.

A kind's function gets the task and the time, and is called again after a failure: it is idempotent. What it
raises is noted at the task (an error of ours by its text, which names no memory's; any other by its type
alone), which is put off, and is dead after its attempts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from memcube.catalog import Catalog, Job, JobKind, NewJob, Task
from memcube.cube import MemCube
from memcube.errors import Conflict, IllegalMove, MemCubeError, NotFound
from memcube.ids import CubeId, TenantId, digest
from memcube.indexing import Clock, Indexer
from memcube.lifecycle import State
from memcube.parametric.selection import Choice
from memcube.parametric.settings import TrainingSettings
from memcube.parametric.specs import ConsolidateSpec, default_name
from memcube.scheduler.actions import ActionKind
from memcube.scheduler.enact import Call
from memcube.settling import Settling

AUTHOR = "scheduler"
LIMIT = 8
"""Tasks of one round."""
log = logging.getLogger(__name__)

Does = Callable[[Task, datetime], Awaitable[Mapping[str, Any]]]
"""Does a task; its result, without a memory's text."""


class TaskWorker:
    """Claims what is due and does it, one task after another."""

    def __init__(
        self,
        catalog: Catalog,
        kinds: Mapping[str, Does],
        *,
        clock: Clock,
        limit: int = LIMIT,
        call: Call = asyncio.to_thread,
    ) -> None:
        self._catalog = catalog
        self._kinds = dict(kinds)
        self._clock = clock
        self._limit = limit
        self._call = call

    async def step(self, leader: int, now: datetime) -> dict[str, int]:
        """Do what is due; how much was done, and how much failed.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer; what was claimed is claimed
                again by a later step.
        """
        queue = self._catalog.tasks
        tasks = await self._call(
            queue.claim, leader=leader, now=now, limit=self._limit, kinds=list(self._kinds)
        )
        counts = {"done": 0, "failed": 0}
        for task in tasks:
            try:
                result = await self._kinds[task.kind](task, self._clock())
            except Exception as failed:
                counts["failed"] += 1
                why = str(failed) if isinstance(failed, MemCubeError) else type(failed).__name__
                if not isinstance(failed, MemCubeError):
                    log.exception("task %s (%s) failed", task.id, task.kind)
                after = await self._call(queue.failed, task, why, leader=leader, now=self._clock())
                log.warning("task %s (%s) is %s: %s", task.id, task.kind, after.state, why)
            else:
                counts["done"] += 1
                await self._call(queue.done, task, leader=leader, now=self._clock(), result=result)
        return counts


class CubeTasks:
    """The tasks that keep the tiers true to the catalog: ``reindex``, ``expire``, ``archive``."""

    def __init__(
        self,
        catalog: Catalog,
        indexer: Indexer,
        settling: Settling,
        *,
        expired_kept: timedelta,
        batch: int,
        call: Call = asyncio.to_thread,
    ) -> None:
        self._catalog = catalog
        self._indexer = indexer
        self._settling = settling
        self._expired_kept = expired_kept
        self._batch = batch
        self._call = call

    def kinds(self) -> dict[str, Does]:
        return {
            ActionKind.REINDEX: self.reindex,
            ActionKind.EXPIRE: self.expire,
            ActionKind.ARCHIVE: self.archive,
        }

    async def reindex(self, task: Task, now: datetime) -> Mapping[str, Any]:
        """Bring the index to a cube's present version."""
        cube = await self._cube(task, now)
        if cube is None:
            return {"gone": True}
        if not cube.indexed:
            await self._indexer.index([cube], shard=await self._shard(task.tenant))
        return {"version": cube.version}

    async def expire(self, task: Task, now: datetime) -> Mapping[str, Any]:
        """Note what has run out as expired, this cube among it; as the reconcile loop does.

        Raises:
            Conflict: more has run out than one step takes, and this one is not among it yet.
        """
        num = await self._call(
            self._catalog.cubes.expire_due,
            now=now,
            limit=self._batch,
            retention=self._expired_kept,
        )
        if num >= self._batch and await self._cube(task, now) is not None:
            raise Conflict("more has run out than one step takes; the next one goes on")
        return {"expired": num}

    async def archive(self, task: Task, now: datetime) -> Mapping[str, Any]:
        """Take a cube out of search, if it may be."""
        cube = await self._cube(task, now)
        if cube is None or cube.state is State.ARCHIVED:
            return {"gone": cube is None}
        try:
            await self._settling.archive(
                task.tenant,
                cube.id,
                shard=await self._shard(task.tenant),
                author=AUTHOR,
                expected_version=cube.version,
            )
        except (Conflict, IllegalMove) as refused:
            return {"refused": str(refused)}
        return {"version": cube.version}

    async def _cube(self, task: Task, now: datetime) -> MemCube | None:
        try:
            return await self._call(
                self._catalog.cubes.get, task.tenant, CubeId(task.payload["cube"]), now=now
            )
        except NotFound:
            return None

    async def _shard(self, tenant: TenantId) -> int:
        return await self._call(self._catalog.shards.shard_of, tenant)


class Consolidations:
    """The task ``consolidate``: a proposal to train what a scope holds, or at once a job that does.

    A proposal *is* its task, done with the result ``proposed``: a writer of its tenant sees it among the tasks
    and accepts it. It names cubes by id, so a wiped one is just not there when the job chooses.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: TrainingSettings,
        *,
        applies: bool,
        max_open_jobs: int,
        call: Call = asyncio.to_thread,
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._applies = applies
        self._max_open_jobs = max_open_jobs
        self._call = call

    def kinds(self) -> dict[str, Does]:
        return {ActionKind.CONSOLIDATE: self.consolidate}

    async def consolidate(self, task: Task, now: datetime) -> Mapping[str, Any]:
        """Queue the job, or leave it to the tenant's writers."""
        if not self._applies:
            return {"outcome": "proposed", "num_cubes": len(task.payload["cubes"])}
        job = await self._call(self.accept, task, author=AUTHOR, now=now)
        return {"outcome": "queued", "job": job.id}

    def accept(self, task: Task, *, author: str, now: datetime) -> Job:
        """Queue the job of a proposal, the one that ``POST /v1/jobs`` would; idempotent. A blocking call.

        Raises:
            Conflict: the task proposes nothing, or no cube of it is left.
            TooBusy: too many jobs of the tenant are open.
        """
        if task.kind != ActionKind.CONSOLIDATE:
            raise Conflict(f"task {task.id} proposes nothing; it is of kind {task.kind}")
        ids = [CubeId(id) for id in task.payload["cubes"]]
        cubes = self._catalog.cubes.get_many(task.tenant, ids, now=now)
        if not cubes:
            raise Conflict(f"no cube of proposal {task.id} is left")
        scope = cubes[0].scope
        spec = ConsolidateSpec(
            name=default_name(scope.user_id, scope.agent_id, None),
            choice=Choice(
                cubes=tuple(sorted(cube.id for cube in cubes)),
                user_id=scope.user_id,
                agent_id=scope.agent_id,
                limit=len(cubes),
            ),
            settings=self._settings,
        )
        new = NewJob(
            kind=JobKind.CONSOLIDATE,
            spec=spec.to_json(),
            author=author,
            key=digest("proposed by task", task.id),
        )
        known = self._catalog.jobs.find(task.tenant, new.key or "")
        if known is not None:
            return known
        return self._catalog.jobs.add(task.tenant, new, now=now, max_open=self._max_open_jobs)
