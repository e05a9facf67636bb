"""Long work as jobs: queued, claimed by one runner at a time, ended in one of four ways.

A runner holds a job by a lease with an epoch: what it writes under an epoch that was taken over is
refused, so two runners never both end a job. A job survives every crash: one whose lease ran out is
claimed again, and goes on from its own checkpoints. Nothing here holds a memory's text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.adapters import moved_on
from memcube.catalog.engine import Database
from memcube.catalog.rows import row_by_id
from memcube.catalog.schema import micros, moment, moment_or_none
from memcube.errors import Conflict, IdempotencyMismatch, StaleEpoch, TooBusy
from memcube.ids import CubeId, IdSource, TenantId

MAX_ATTEMPTS = 5
"""Claims of a job; then it has failed, as it ends its runner each time."""
MAX_LOG_LINES = 2_000
"""Of one job; the oldest go first."""
_jobs, _logs = schema.jobs, schema.job_logs


class JobKind(StrEnum):
    """What a job does."""

    CONSOLIDATE = "consolidate"
    FUSE = "fuse"
    PROBE = "probe"


class JobState(StrEnum):
    """queued → running → done, refused (what it made was not good enough), failed or cancelled.

    A failed or cancelled job can be queued again, and goes on from where it was.
    """

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN = (JobState.QUEUED, JobState.RUNNING)
RESUMABLE = (JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """Work to queue. ``key``: a tenant has one job for each; none is never the same as another."""

    kind: JobKind
    spec: Mapping[str, Any]
    author: str
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job. ``held`` are the cubes that it works on, each in its version, once they are chosen."""

    id: str
    tenant: TenantId
    kind: JobKind
    state: JobState
    spec: Mapping[str, Any]
    author: str
    held: Mapping[CubeId, int] | None
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: str | None
    attempts: int
    is_cancelled: bool
    epoch: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


class LogLine(NamedTuple):
    """A line of a job's log."""

    seq: int
    at: datetime
    text: str


class JobBook:
    """The jobs of all tenants."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    # -- for who asks

    def add(
        self, tenant: TenantId, new: NewJob, *, now: datetime, max_open: int | None = None
    ) -> Job:
        """Queue a job, or the one that the tenant has by this key already.

        Raises:
            TooBusy: ``max_open`` of the tenant's jobs are queued or running.
            IdempotencyMismatch: the key's job is of another kind or spec.
        """

        def work(connection: sa.Connection) -> Job:
            if new.key is not None:
                query = sa.select(_jobs).where(_jobs.c.tenant == tenant, _jobs.c.key == new.key)
                if (row := connection.execute(query).mappings().first()) is not None:
                    if (row["kind"], row["spec"]) != (new.kind, dict(new.spec)):
                        raise IdempotencyMismatch(new.key)
                    return _job(row)
            query = sa.select(sa.func.count()).where(
                _jobs.c.tenant == tenant, _jobs.c.state.in_(OPEN)
            )
            if max_open is not None and (connection.scalar(query) or 0) >= max_open:
                raise TooBusy(f"{max_open} jobs of this tenant are queued or running", 60.0)
            row = {
                "id": self._new_id(now),
                "tenant": tenant,
                "kind": new.kind,
                "key": new.key,
                "state": JobState.QUEUED,
                "spec": dict(new.spec),
                "author": new.author,
                "progress": {},
                "attempts": 0,
                "is_cancelled": False,
                "epoch": 0,
                "leased_until": 0,
                "keeps_files": False,
                "created_at": micros(now),
            }
            connection.execute(sa.insert(_jobs), row)
            return _one(connection, row["id"], tenant)

        return self._database.write(work)

    def get(self, tenant: TenantId, id: str) -> Job:
        """
        Raises:
            NotFound: none of this tenant's.
        """
        with self._database.reading() as connection:
            return _one(connection, id, tenant)

    def find(self, tenant: TenantId, key: str) -> Job | None:
        """The tenant's job of this key."""
        query = sa.select(_jobs).where(_jobs.c.tenant == tenant, _jobs.c.key == key)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
            return None if row is None else _job(row)

    def page(
        self,
        tenant: TenantId,
        *,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """The tenant's jobs, newest first, from the one before ``before`` on."""
        query = sa.select(_jobs).where(_jobs.c.tenant == tenant)
        if state is not None:
            query = query.where(_jobs.c.state == state)
        if before is not None:
            query = query.where(_jobs.c.id < before)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_jobs.c.id.desc()).limit(limit))
            return [_job(row) for row in rows.mappings()]

    def load(self) -> tuple[dict[JobState, int], list[Job]]:
        """How many jobs of all tenants there are by state, and those that run."""
        query = sa.select(_jobs.c.state, sa.func.count()).group_by(_jobs.c.state)
        running = sa.select(_jobs).where(_jobs.c.state == JobState.RUNNING)
        with self._database.reading() as connection:
            found = {state: count for state, count in connection.execute(query)}
            jobs = [_job(row) for row in connection.execute(running).mappings()]
        return {state: found.get(state, 0) for state in JobState}, jobs

    def cancel(self, tenant: TenantId, id: str, *, now: datetime) -> Job:
        """Ask for a job's end: a queued one is cancelled at once, a running one soon. Idempotent; one
        that has ended stays as it is.

        Raises:
            NotFound: none of this tenant's.
        """

        def work(connection: sa.Connection) -> Job:
            job = _one(connection, id, tenant, lock=True)
            if job.state is JobState.QUEUED:
                _set(connection, id, state=JobState.CANCELLED, finished_at=micros(now))
            elif job.state is JobState.RUNNING:
                _set(connection, id, is_cancelled=True)
            return _one(connection, id, tenant)

        return self._database.write(work)

    def resume(self, tenant: TenantId, id: str) -> Job:
        """Queue a failed or cancelled job again; it goes on from where it was. Idempotent.

        Raises:
            NotFound: none of this tenant's. Conflict: it has ended in another way.
        """

        def work(connection: sa.Connection) -> Job:
            job = _one(connection, id, tenant, lock=True)
            if job.state in RESUMABLE:
                _set(
                    connection,
                    id,
                    state=JobState.QUEUED,
                    error=None,
                    attempts=0,
                    is_cancelled=False,
                    finished_at=None,
                )
            elif not job.is_open:
                raise Conflict(f"job {id} is {job.state}; start a new one")
            return _one(connection, id, tenant)

        return self._database.write(work)

    def logs(self, tenant: TenantId, id: str, *, after: int = 0, limit: int = 500) -> list[LogLine]:
        """Lines of a job's log, oldest first, from the one after ``after`` on.

        Raises:
            NotFound: none of this tenant's.
        """
        query = sa.select(_logs).where(_logs.c.job == id, _logs.c.seq > after)
        with self._database.reading() as connection:
            _one(connection, id, tenant)
            rows = connection.execute(query.order_by(_logs.c.seq).limit(limit))
            return [LogLine(row.seq, moment(row.at), row.text) for row in rows]

    # -- for who runs them

    def claim(self, runner: str, *, now: datetime, ttl_s: float) -> Job | None:
        """The next job to run, held by this runner: one that was left by a runner that is gone, or by
        this one before, comes before those that are queued. None if there is none.

        One that was claimed ``MAX_ATTEMPTS`` times has failed.
        """
        left = sa.and_(
            _jobs.c.state == JobState.RUNNING,
            sa.or_(_jobs.c.leased_until <= micros(now), _jobs.c.runner == runner),
        )
        query = (
            sa.select(_jobs)
            .where(sa.or_(left, _jobs.c.state == JobState.QUEUED))
            .order_by(
                _jobs.c.state.desc(), _jobs.c.created_at, _jobs.c.id
            )  # "running" comes after "queued"
            .limit(1)
            .with_for_update(skip_locked=True)
        )

        def work(connection: sa.Connection) -> Job | None:
            while (row := connection.execute(query).mappings().first()) is not None:
                if row["attempts"] < MAX_ATTEMPTS:
                    break
                _set(
                    connection,
                    row["id"],
                    state=JobState.FAILED,
                    error=f"its runner ended {MAX_ATTEMPTS} times; see the log",
                    finished_at=micros(now),
                )
            if row is None:
                return None
            _set(
                connection,
                row["id"],
                state=JobState.RUNNING,
                runner=runner,
                epoch=row["epoch"] + 1,
                attempts=row["attempts"] + 1,
                leased_until=_until(now, ttl_s),
                started_at=row["started_at"] or micros(now),
            )
            return _one(connection, row["id"])

        return self._database.write(work)

    def keep(
        self, job: Job, *, now: datetime, ttl_s: float, progress: Mapping[str, Any] | None = None
    ) -> Job:
        """Extend a runner's hold, and note how far it is; the job as it is now.

        Raises:
            StaleEpoch: another runner holds it.
        """
        values: dict[str, Any] = {"leased_until": _until(now, ttl_s)}
        if progress is not None:
            values["progress"] = dict(progress)
        return self._held(job, values)

    def hold(self, job: Job, cubes: Mapping[CubeId, int]) -> Job:
        """Note the versions that a job works on. From here on it keeps files of its own.

        Raises:
            StaleEpoch: another runner holds it.
        """
        return self._held(job, {"held": dict(sorted(cubes.items())), "keeps_files": True})

    def begin_anew(self, job: Job) -> Job:
        """Queue a running job again without the versions that it worked on.

        Raises:
            StaleEpoch: another runner holds it.
        """
        return self._held(
            job, {"held": None, "state": JobState.QUEUED, "progress": {}, "leased_until": 0}
        )

    def requeue(self, job: Job, *, is_attempt: bool = True) -> Job:
        """Queue a running job again, to go on from where it is. One that the runner's own end cut off
        was no attempt.

        Raises:
            StaleEpoch: another runner holds it.
        """
        attempts = job.attempts if is_attempt else job.attempts - 1
        return self._held(job, {"state": JobState.QUEUED, "leased_until": 0, "attempts": attempts})

    def finish(
        self,
        job: Job,
        state: JobState,
        *,
        now: datetime,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> Job:
        """End a running job.

        Raises:
            StaleEpoch: another runner holds it.
        """
        values = {
            "state": state,
            "result": None if result is None else dict(result),
            "error": error,
            "is_cancelled": False,
            "leased_until": 0,
            "finished_at": micros(now),
        }
        return self._held(job, values)

    def log(self, id: str, text: str, *, now: datetime) -> None:
        """Add a line to a job's log."""

        def work(connection: sa.Connection) -> None:
            last = connection.scalar(sa.select(sa.func.max(_logs.c.seq)).where(_logs.c.job == id))
            seq = (last or 0) + 1
            row = {"job": id, "seq": seq, "at": micros(now), "text": text}
            connection.execute(sa.insert(_logs), row)
            connection.execute(
                sa.delete(_logs).where(_logs.c.job == id, _logs.c.seq <= seq - MAX_LOG_LINES)
            )

        self._database.write(work)

    def ended_with_files(self, *, after: str = "", limit: int = 100) -> list[Job]:
        """Jobs that have ended and whose files were not removed, by id."""
        query = (
            sa.select(_jobs)
            .where(_jobs.c.keeps_files, _jobs.c.state.not_in(OPEN), _jobs.c.id > after)
            .order_by(_jobs.c.id)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def files_removed(self, id: str) -> None:
        """Note that nothing of a job's files is left."""
        self._database.write(lambda connection: _set(connection, id, keeps_files=False))

    def moved_on(self, job: Job, *, now: datetime) -> Sequence[CubeId]:
        """Those of the cubes a job works on that have changed since, or are gone."""
        with self._database.reading() as connection:
            return moved_on(connection, job.tenant, job.held or {}, now, lock=False)

    def _held(self, job: Job, values: Mapping[str, Any]) -> Job:
        def work(connection: sa.Connection) -> Job:
            done = connection.execute(
                sa.update(_jobs)
                .where(
                    _jobs.c.id == job.id,
                    _jobs.c.epoch == job.epoch,
                    _jobs.c.state == JobState.RUNNING,
                )
                .values(values)
            )
            if done.rowcount == 0:
                raise StaleEpoch(job.epoch, _one(connection, job.id).epoch)
            return _one(connection, job.id)

        return self._database.write(work)


def _until(now: datetime, ttl_s: float) -> int:
    return micros(now) + round(ttl_s * 1e6)


def _set(connection: sa.Connection, id: str, **values: Any) -> None:
    connection.execute(sa.update(_jobs).where(_jobs.c.id == id).values(values))


def _one(
    connection: sa.Connection, id: str, tenant: TenantId | None = None, *, lock: bool = False
) -> Job:
    return _job(row_by_id(connection, _jobs, id, what="job", tenant=tenant, lock=lock))


def _job(row: Mapping[Any, Any]) -> Job:
    held = row["held"]
    return Job(
        id=row["id"],
        tenant=row["tenant"],
        kind=JobKind(row["kind"]),
        state=JobState(row["state"]),
        spec=row["spec"],
        author=row["author"],
        held=None if held is None else {CubeId(id): version for id, version in held.items()},
        progress=row["progress"],
        result=row["result"],
        error=row["error"],
        attempts=row["attempts"],
        is_cancelled=row["is_cancelled"],
        epoch=row["epoch"],
        created_at=moment(row["created_at"]),
        started_at=moment_or_none(row["started_at"]),
        finished_at=moment_or_none(row["finished_at"]),
    )
