"""The queue of background work: what is to be done, once or again, until it is done or looked at.

A task waits, is claimed under the leader's epoch, and is done, put off for a while, or dead after so many
attempts. A dead one stays until somebody retries it: nothing is ever dropped. Of what is to be done (``kind``
and ``key``) there is one open task at most, so that who asks twice gets the same one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.fence import LEASE, fence
from memcube.catalog.rows import row_by_id
from memcube.catalog.schema import micros, moment, moment_or_none
from memcube.errors import Conflict, StaleEpoch
from memcube.ids import IdSource, TenantId

MAX_ATTEMPTS = 8
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
SUPERSEDED = "superseded"
"""The outcome of a task in whose place a later one stands."""
_tasks = schema.tasks


class TaskState(StrEnum):
    """waiting → running → done, or waiting again, or dead; a dead one can be made to wait again."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """Work to queue. ``key`` says what it is about; ``once``: also a task that was done is the same one.

    ``payload`` is JSON, and holds no text of a memory, which a deletion would have to reach.
    ``max_attempts`` 0 is as many as it takes: what keeps tiers true to the catalog is never given up.
    """

    kind: str
    key: str
    payload: Mapping[str, Any]
    priority: int = 0
    max_attempts: int = MAX_ATTEMPTS
    once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task. ``leader`` is the epoch under which it was last claimed."""

    id: str
    tenant: TenantId
    kind: str
    key: str
    state: TaskState
    payload: Mapping[str, Any]
    result: Mapping[str, Any] | None
    priority: int
    attempts: int
    max_attempts: int
    next_at: datetime
    leader: int | None
    error: str
    created_at: datetime
    updated_at: datetime
    closed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """Tasks by state, and since when the oldest that may run has waited."""

    by_state: Mapping[str, int]
    oldest_due: datetime | None


def wait_s(attempts: int) -> float:
    """How long a task waits after so many failed attempts."""
    return min(FIRST_WAIT_S * 2.0 ** min(attempts - 1, 30), LONGEST_WAIT_S)


class TaskQueue:
    """The tasks of all tenants."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id
        self._served = ""
        """The tenant whose turn was last."""

    # -- for who asks --------------------------------------------------------------------------

    def put(
        self, tenant: TenantId, new: NewTask, *, now: datetime, not_before: datetime | None = None
    ) -> Task:
        """Queue a task, or find the open one of this kind and key. Durable when it returns."""

        def work(connection: sa.Connection) -> Task:
            id, _ = put_task(
                connection, tenant, new, id=self._new_id(now), now=now, not_before=not_before
            )
            return _one(connection, id)

        return self._database.write(work)

    def supersede(self, tenant: TenantId, new: NewTask, *, now: datetime) -> Task:
        """Queue a task in place of the open one of this kind and key, or find that one if it asks for the
        same: the later word holds. The other one is done, with the result ``superseded``."""

        def work(connection: sa.Connection) -> Task:
            query = sa.select(_tasks.c.id, _tasks.c.payload).where(
                _tasks.c.kind == new.kind, _tasks.c.key == new.key, _tasks.c.closed_at.is_(None)
            )
            id = self._new_id(now)
            found = connection.execute(query.with_for_update()).first()
            if found is not None and found.payload != dict(new.payload):
                _set(
                    connection,
                    found.id,
                    now,
                    state=TaskState.DONE,
                    result={"outcome": SUPERSEDED, "by": id},
                    error="",
                    closed_at=micros(now),
                )
            id, _ = put_task(connection, tenant, new, id=id, now=now)
            return _one(connection, id)

        return self._database.write(work)

    def get(self, tenant: TenantId | None, id: str) -> Task:
        """One; of any tenant where none is named.

        Raises:
            NotFound: none of this tenant's.
        """
        with self._database.reading() as connection:
            return _one(connection, id, tenant)

    def page(
        self,
        *,
        tenant: TenantId | None = None,
        state: TaskState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Task]:
        """Tasks, newest first, from the one before ``before`` on; of all tenants where none is named."""
        query = sa.select(_tasks)
        if tenant is not None:
            query = query.where(_tasks.c.tenant == tenant)
        if state is not None:
            query = query.where(_tasks.c.state == state)
        if before is not None:
            query = query.where(_tasks.c.id < before)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_tasks.c.id.desc()).limit(limit))
            return [_task(row) for row in rows.mappings()]

    def retry(self, id: str, *, tenant: TenantId | None = None, now: datetime) -> Task:
        """Let a dead task run again, with all its attempts. Idempotent.

        Raises:
            NotFound: none, or none of this tenant's. Conflict: it is done.
        """

        def work(connection: sa.Connection) -> Task:
            task = _one(connection, id, tenant, lock=True)
            if task.state is TaskState.DONE:
                raise Conflict(f"task {id} is done")
            if task.state is TaskState.DEAD:
                values = {"state": TaskState.WAITING, "attempts": 0, "next_at": micros(now)}
                _set(connection, id, now, **values)
            return _one(connection, id)

        return self._database.write(work)

    def stats(self, *, now: datetime, tenant: TenantId | None = None) -> QueueStats:
        """How much there is, and how old."""
        mine = sa.true() if tenant is None else _tasks.c.tenant == tenant
        counts = sa.select(_tasks.c.state, sa.func.count()).where(mine).group_by(_tasks.c.state)
        oldest = sa.select(sa.func.min(_tasks.c.next_at)).where(
            mine, _tasks.c.state == TaskState.WAITING, _tasks.c.next_at <= micros(now)
        )
        with self._database.reading() as connection:
            found = {state: count for state, count in connection.execute(counts)}
            return QueueStats(
                by_state={str(state): found.get(state, 0) for state in TaskState},
                oldest_due=moment_or_none(connection.scalar(oldest)),
            )

    # -- for who does them ---------------------------------------------------------------------

    def claim(
        self,
        *,
        leader: int,
        now: datetime,
        limit: int,
        kinds: Sequence[str] | None = None,
        held: Collection[str] = (),
    ) -> list[Task]:
        """Tasks that are due, now running under this leader; tenants in turn, of each the most urgent first.

        Those that an earlier leader had claimed wait again, and count as tried; so do this leader's that it
        doesn't have among those it works on (``held``): it never heard that they were its own.

        Raises:
            StaleEpoch: another leads.
        """
        due = [_tasks.c.state == _WAITING, _tasks.c.next_at <= micros(now)]
        if kinds is not None:
            due.append(_tasks.c.kind.in_(kinds))

        def work(connection: sa.Connection) -> list[Task]:
            fence(connection, LEASE, leader)
            connection.execute(
                sa.update(_tasks)
                .where(
                    _tasks.c.state == TaskState.RUNNING,
                    sa.or_(_tasks.c.leader < leader, _tasks.c.id.not_in(list(held))),
                )
                .values(state=TaskState.WAITING, updated_at=micros(now))
            )
            tenants = sorted(
                connection.execute(sa.select(_tasks.c.tenant).where(*due).distinct()).scalars()
            )
            tenants = [t for t in tenants if t > self._served] + [
                t for t in tenants if t <= self._served
            ]
            ids = in_turn(
                {tenant: self._first(connection, tenant, due, limit) for tenant in tenants[:limit]},
                limit,
            )
            if ids:
                connection.execute(
                    sa.update(_tasks)
                    .where(_tasks.c.id.in_(ids))
                    .values(
                        state=TaskState.RUNNING,
                        leader=leader,
                        attempts=_tasks.c.attempts + 1,
                        updated_at=micros(now),
                    )
                )
            rows = connection.execute(sa.select(_tasks).where(_tasks.c.id.in_(ids))).mappings()
            found = {row["id"]: _task(row) for row in rows}
            return [found[id] for id in ids]

        claimed = self._database.write(work)
        if claimed:
            self._served = claimed[-1].tenant
        return claimed

    def done(
        self,
        task: Task,
        *,
        leader: int,
        now: datetime,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """Note that a claimed task is done. Idempotent.

        Raises:
            StaleEpoch: another leads, or has claimed it since.
        """

        def work(connection: sa.Connection) -> None:
            if self._mine(connection, task, leader).state is not TaskState.DONE:
                _set(
                    connection,
                    task.id,
                    now,
                    state=TaskState.DONE,
                    result=None if result is None else dict(result),
                    error="",
                    closed_at=micros(now),
                )

        self._database.write(work)

    def failed(self, task: Task, error: str, *, leader: int, now: datetime) -> Task:
        """Put a claimed task off for a while, or let it be dead when it has had its attempts.

        Raises:
            StaleEpoch: another leads, or has claimed it since.
        """

        def work(connection: sa.Connection) -> Task:
            found = self._mine(connection, task, leader)
            if found.state is TaskState.RUNNING:
                is_dead = 0 < found.max_attempts <= found.attempts
                wait = timedelta(seconds=wait_s(found.attempts))
                _set(
                    connection,
                    task.id,
                    now,
                    state=TaskState.DEAD if is_dead else TaskState.WAITING,
                    next_at=micros(now + wait),
                    error=error,
                )
            return _one(connection, task.id)

        return self._database.write(work)

    def prune(self, *, before: datetime) -> int:
        """Forget tasks that were done before a time; how many. Dead ones stay."""

        def work(connection: sa.Connection) -> int:
            return connection.execute(
                sa.delete(_tasks).where(_tasks.c.closed_at < micros(before))
            ).rowcount

        return self._database.write(work)

    @staticmethod
    def _first(
        connection: sa.Connection, tenant: str, due: Sequence[sa.ColumnElement[bool]], limit: int
    ) -> list[str]:
        query = (
            sa.select(_tasks.c.id)
            .where(_tasks.c.tenant == tenant, *due)
            .order_by(_tasks.c.priority.desc(), _tasks.c.next_at, _tasks.c.id)
            .limit(limit)
        )
        return list(connection.execute(query.with_for_update(skip_locked=True)).scalars())

    @staticmethod
    def _mine(connection: sa.Connection, task: Task, leader: int) -> Task:
        fence(connection, LEASE, leader)
        found = _one(connection, task.id, lock=True)
        if found.leader != leader or found.attempts != task.attempts:
            raise StaleEpoch(leader, found.leader or 0)
        return found


_WAITING = sa.literal("waiting", literal_execute=True)
"""Written out, since a partial index is chosen by the text of its condition."""


def put_task(
    connection: sa.Connection,
    tenant: TenantId,
    new: NewTask,
    *,
    id: str,
    now: datetime,
    not_before: datetime | None = None,
) -> tuple[str, bool]:
    """Queue a task within a transaction: its id, and whether it is new."""
    query = sa.select(_tasks.c.id).where(_tasks.c.kind == new.kind, _tasks.c.key == new.key)
    if not new.once:
        query = query.where(_tasks.c.closed_at.is_(None))
    if (found := connection.scalar(query.limit(1))) is not None:
        return found, False
    connection.execute(
        sa.insert(_tasks),
        {
            "id": id,
            "tenant": tenant,
            "kind": new.kind,
            "key": new.key,
            "state": TaskState.WAITING,
            "payload": dict(new.payload),
            "priority": new.priority,
            "attempts": 0,
            "max_attempts": new.max_attempts,
            "next_at": micros(not_before or now),
            "error": "",
            "created_at": micros(now),
            "updated_at": micros(now),
        },
    )
    return id, True


def in_turn(waiting: Mapping[str, Sequence[str]], limit: int) -> list[str]:
    """One of each in turn, in their order."""
    found: list[str] = []
    for turn in range(max(map(len, waiting.values()), default=0)):
        for ids in waiting.values():
            if turn < len(ids) and len(found) < limit:
                found.append(ids[turn])
    return found


def _set(connection: sa.Connection, id: str, now: datetime, **values: Any) -> None:
    connection.execute(
        sa.update(_tasks).where(_tasks.c.id == id).values(updated_at=micros(now), **values)
    )


def _one(
    connection: sa.Connection, id: str, tenant: TenantId | None = None, *, lock: bool = False
) -> Task:
    return _task(row_by_id(connection, _tasks, id, what="task", tenant=tenant, lock=lock))


def _task(row: Mapping[Any, Any]) -> Task:
    return Task(
        **{name: row[name] for name in _AS_THEY_ARE},
        tenant=TenantId(row["tenant"]),
        state=TaskState(row["state"]),
        next_at=moment(row["next_at"]),
        created_at=moment(row["created_at"]),
        updated_at=moment(row["updated_at"]),
        closed_at=moment_or_none(row["closed_at"]),
    )


_AS_THEY_ARE = (
    "id",
    "kind",
    "key",
    "payload",
    "result",
    "priority",
    "attempts",
    "max_attempts",
    "leader",
    "error",
)
