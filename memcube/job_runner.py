"""Runs queued jobs, one at a time, each by the function of its kind.

A runner holds its job by a lease that it renews while the job runs. One that finds its lease taken
over ends what it does: another runner goes on from the job's own checkpoints. A job whose part of the
system can't answer is queued again, a few times; any other error ends it as failed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memcube.catalog import Catalog, Job, JobKind, JobState
from memcube.errors import MemCubeError, StaleEpoch, UnknownBackend
from memcube.ids import CubeId
from memcube.indexing import Clock

log = logging.getLogger("memcube.jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job's work ended. ``result`` holds no memory's text."""

    state: JobState
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class Interrupted(Exception):
    """The runner is to stop: the job stays as it is, for the next runner."""


class Anew(Exception):
    """What the job works on has changed: it begins again, with its cubes chosen anew."""


Performs = Callable[["JobRun"], Awaitable[Ended]]


class JobRun:
    """One job in its runner's hands: what its work reads of it and says of itself."""

    def __init__(self, catalog: Catalog, job: Job, *, clock: Clock) -> None:
        self._catalog = catalog
        self._clock = clock
        self.job = job
        self.progress: dict[str, Any] = dict(job.progress)
        self.is_stopping = False
        self._writing = asyncio.Lock()

    @property
    def should_stop(self) -> bool:
        """Whether the work is to end between its steps: it was cancelled, or the runner stops."""
        return self.job.is_cancelled or self.is_stopping

    def ended_early(self) -> Ended:
        """How work ends that found ``should_stop``.

        Raises:
            Interrupted: it is the runner that stops.
        """
        if not self.job.is_cancelled:
            raise Interrupted
        return Ended(state=JobState.CANCELLED)

    async def say(self, text: str) -> None:
        """Add a line to the job's log; never a memory's text."""
        await asyncio.to_thread(self._catalog.jobs.log, self.job.id, text, now=self._clock())

    async def hold(self, cubes: Mapping[CubeId, int]) -> None:
        """Note the versions that the job works on."""
        async with self._writing:
            self.job = await asyncio.to_thread(self._catalog.jobs.hold, self.job, cubes)

    async def keep(self, ttl_s: float) -> None:
        """Renew the lease, tell the progress, and learn whether the job was cancelled."""
        async with self._writing:
            self.job = await asyncio.to_thread(
                lambda: self._catalog.jobs.keep(
                    self.job, now=self._clock(), ttl_s=ttl_s, progress=self.progress
                )
            )

    async def moved_on(self) -> Sequence[CubeId]:
        """Those of its cubes that have changed since, or are gone."""
        return await asyncio.to_thread(
            lambda: self._catalog.jobs.moved_on(self.job, now=self._clock())
        )


class JobRunner:
    """Claims jobs under one name. ``run_next`` is for one loop: a runner has one job at a time."""

    def __init__(
        self,
        catalog: Catalog,
        kinds: Mapping[JobKind, Performs],
        *,
        name: str,
        clock: Clock,
        ttl_s: float = 30.0,
        renew_s: float = 2.0,
    ) -> None:
        self._catalog = catalog
        self._kinds = kinds
        self._name = name
        self._clock = clock
        self._ttl_s, self._renew_s = ttl_s, renew_s
        self._run: JobRun | None = None
        self.is_stopping = False

    def stop(self) -> None:
        """Let the present job's work end at its next step; the job stays for the next runner."""
        self.is_stopping = True
        if self._run is not None:
            self._run.is_stopping = True

    async def run_next(self) -> Job | None:
        """Run one job to its end; None if there is none to run.

        Raises:
            MemCubeError: the catalog doesn't answer. The job, if there was one, is left to its lease.
        """
        if self.is_stopping:
            return None
        job = await asyncio.to_thread(
            self._catalog.jobs.claim, self._name, now=self._clock(), ttl_s=self._ttl_s
        )
        if job is None:
            return None
        run = self._run = JobRun(self._catalog, job, clock=self._clock)
        run.is_stopping = self.is_stopping
        work = asyncio.ensure_future(self._perform(run))
        keeper = asyncio.ensure_future(self._keep(run, work))
        try:
            await work
        except asyncio.CancelledError:
            if not work.cancelled():
                raise
            log.warning("job %s is another runner's now", job.id)
        except StaleEpoch:
            log.warning("job %s is another runner's now", job.id)
        finally:
            self._run = None
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        return await asyncio.to_thread(self._catalog.jobs.get, job.tenant, job.id)

    async def _perform(self, run: JobRun) -> None:
        jobs, again = self._catalog.jobs, run.job.attempts > 1
        await run.say(f"attempt {run.job.attempts} goes on" if again else "begun")
        try:
            if (performs := self._kinds.get(run.job.kind)) is None:
                raise UnknownBackend("kind of job", run.job.kind, tuple(self._kinds))
            ended = await performs(run)
        except Interrupted:
            await run.say("interrupted; the next runner goes on")
            await asyncio.to_thread(jobs.requeue, run.job, is_attempt=False)
            return
        except Anew:
            await run.say("cubes changed meanwhile; begins anew")
            await asyncio.to_thread(jobs.begin_anew, run.job)
            return
        except StaleEpoch:
            raise
        except MemCubeError as failed:
            if failed.retryable:
                await run.say(f"not now: {failed}")
                await asyncio.to_thread(jobs.requeue, run.job)
                return
            ended = Ended(state=JobState.FAILED, error=str(failed))
        except Exception as broken:
            log.exception("job %s failed", run.job.id)
            # Of an error that isn't ours only the type is told: its text may hold a memory's.
            ended = Ended(
                state=JobState.FAILED, error=f"{type(broken).__name__}; see the runner's log"
            )
        # The log first: who follows it stops at the end's state.
        await run.say(ended.state if ended.error is None else f"{ended.state}: {ended.error}")
        await asyncio.to_thread(
            lambda: jobs.finish(
                run.job,
                ended.state,
                now=self._clock(),
                result=ended.result or None,
                error=ended.error,
            )
        )

    async def _keep(self, run: JobRun, work: asyncio.Future[None]) -> None:
        """Renew the lease and tell the progress until the work is done; end it if the lease is lost."""
        while True:
            await asyncio.sleep(self._renew_s)
            try:
                await run.keep(self._ttl_s)
            except StaleEpoch:
                work.cancel()
                return
            except MemCubeError as failed:
                log.warning("job %s: its lease was not renewed: %s", run.job.id, failed)
