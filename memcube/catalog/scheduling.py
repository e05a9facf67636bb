"""The scheduler's journal: what it will do, does and did, and whose turn it is to do it.

Each call is one transaction, or several to ``close`` a tenant's move, under the leader's epoch: it reads the lease
and is refused (``StaleEpoch``) once another has taken it. A cube's *placement* counts what was done to it: an action
commits only at the epoch that it was planned against, and only while the cube is at the version it was planned for.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.action_rows import ActionRecord, record_of, row_of_action
from memcube.catalog.engine import Database
from memcube.catalog.fence import LEASE, fence
from memcube.catalog.placing import (
    Listed,
    Placement,
    epochs_for,
    list_again,
    list_copy,
    list_tenant,
    placement_of,
    strike,
    take_epoch,
)
from memcube.catalog.rows import row_by_id
from memcube.catalog.schema import micros
from memcube.catalog.tasks import MAX_ATTEMPTS, NewTask, put_task
from memcube.errors import Conflict
from memcube.ids import CubeId, IdSource, TenantId, digest
from memcube.scheduler.actions import (
    Action,
    ActionKind,
    ActionState,
    Archive,
    Consolidate,
    Copy,
    Drop,
    Expire,
    Medium,
    Place,
    Reindex,
    Tier,
    kind_of,
)

_CHUNK = 500
"""Payloads that are listed anew in one transaction."""
_REST_S = 0.1
"""The pause after it: SQLite's writers in other processes look for a free moment no more often."""
_actions, _placements = schema.actions, schema.placements
_cubes, _residency = schema.cubes, schema.residency


class Passed(NamedTuple):
    """An action that was not journaled, and why: the world is not what it was planned in."""

    action: Action
    why: str


class ActionBook:
    """The journal."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    # -- what is to be done --------------------------------------------------------------------

    def plan(
        self, actions: Sequence[Action], *, leader: int, now: datetime
    ) -> list[ActionRecord | Passed]:
        """Journal actions, in one transaction; of each its record, or why it is not to be done.

        Work for the queue is queued by it, and its record is closed.

        Raises:
            StaleEpoch: another leads. Nothing is journaled.
        """

        def work(connection: sa.Connection) -> list[ActionRecord | Passed]:
            fence(connection, LEASE, leader)
            moves = [action for action in actions if isinstance(action, Copy | Drop)]
            epochs = epochs_for(connection, moves, now)
            busy = _busy(connection, moves)
            found: list[ActionRecord | Passed] = []
            rows: list[dict[str, Any]] = []
            ids = sorted(self._new_id(now) for _ in actions)
            for action, id in zip(actions, ids, strict=True):
                row = row_of_action(action, id=id, leader=leader, now=now)
                if isinstance(action, Copy | Drop):
                    why = _passed(action, epochs, busy)
                    if why is None:
                        busy.add((action.tenant, row["cube"]))
                else:
                    new = task_of(action)
                    _, is_new = put_task(
                        connection, action.tenant, new, id=self._new_id(now), now=now
                    )
                    why = None if is_new else "the queue has it"
                    row |= {"state": ActionState.DONE, "closed_at": micros(now)}
                if why is None:
                    rows.append(row)
                    found.append(record_of(row))
                else:
                    found.append(Passed(action, why))
            if rows:
                connection.execute(sa.insert(_actions), rows)
            return found

        return self._database.write(work)

    def adopt(self, *, leader: int, now: datetime) -> list[ActionRecord]:
        """All open actions, oldest first, which are this leader's from now on.

        Raises:
            StaleEpoch: another leads.
        """

        def work(connection: sa.Connection) -> list[ActionRecord]:
            fence(connection, LEASE, leader)
            connection.execute(
                sa.update(_actions).where(_actions.c.closed_at.is_(None)).values(leader=leader)
            )
            return _many(connection, _OPEN)

        return self._database.write(work)

    # -- what happens to one -------------------------------------------------------------------

    def prepared(self, id: str, checksum: str, *, leader: int, now: datetime) -> ActionRecord:
        """Note that a copy was verified at its target. Idempotent.

        Raises:
            StaleEpoch: another leads. Conflict: it is closed.
        """

        def work(connection: sa.Connection) -> ActionRecord:
            record = _mine(connection, id, leader)
            if record.state is ActionState.PLANNED:
                values = {"state": ActionState.PREPARED, "checksum": checksum}
                return _set(connection, id, now, **values)
            if not record.is_open:
                raise Conflict(f"action {id} is {record.state}")
            return record

        return self._database.write(work)

    def commit(self, id: str, *, leader: int, now: datetime) -> ActionRecord:
        """Let a prepared copy count, or strike what is to be dropped; takes the cube's epoch. Idempotent.

        A crash before it leaves a copy that is not listed, and is freed; one after it a listed copy,
        which the next leader publishes. The source is still there either way.

        Raises:
            StaleEpoch: another leads.
            Conflict: the cube's epoch has passed, it is at another version or gone, or what is to be
                dropped is the last copy or the owner's. Nothing is changed.
        """

        def work(connection: sa.Connection) -> ActionRecord:
            record = _mine(connection, id, leader)
            if record.state is ActionState.COMMITTED:
                return record
            needed = (
                ActionState.PREPARED if record.action is ActionKind.COPY else ActionState.PLANNED
            )
            if record.state is not needed:
                raise Conflict(f"action {id} is {record.state}, not {needed}")
            placement = placement_of(connection, record.tenant, record.cube, lock=True)
            if placement.epoch != record.epoch:
                raise Conflict(f"the cube is at epoch {placement.epoch}, not {record.epoch}")
            if record.action is ActionKind.COPY:
                list_copy(connection, record, now)
            else:
                strike(connection, record, placement)
            take_epoch(connection, record, now, epoch=record.epoch + 1)
            return _set(connection, id, now, state=ActionState.COMMITTED, attempts=0)

        return self._database.write(work)

    def restore(self, id: str, why: str, *, leader: int, now: datetime) -> ActionRecord:
        """List again what a committed drop struck, whose bytes the caller knows to be there still, and end
        the drop as undone; takes the cube's epoch. Idempotent: one that is closed stays as it is.

        A crash before it leaves a committed drop, which the next leader finishes or restores; one after it
        leaves nothing to do.

        Raises:
            StaleEpoch: another leads.
            Conflict: it is no committed drop, or the cube is at another version or gone. Nothing is changed.
        """

        def work(connection: sa.Connection) -> ActionRecord:
            record = _mine(connection, id, leader)
            if not record.is_open:
                return record
            if (record.action, record.state) != (ActionKind.DROP, ActionState.COMMITTED):
                raise Conflict(f"action {id} is a {record.action} that is {record.state}")
            list_again(connection, record, now)
            values = {"state": ActionState.UNDONE, "outcome": why, "closed_at": micros(now)}
            return _set(connection, id, now, **values)

        return self._database.write(work)

    def put_off(
        self, id: str, why: str, *, until: datetime, leader: int, now: datetime
    ) -> ActionRecord:
        """Note that an attempt failed, and when the next one is due.

        Raises:
            StaleEpoch: another leads.
        """

        def work(connection: sa.Connection) -> ActionRecord:
            record = _mine(connection, id, leader)
            if not record.is_open:
                return record
            values = {"attempts": record.attempts + 1, "next_at": micros(until), "outcome": why}
            return _set(connection, id, now, **values)

        return self._database.write(work)

    def close(
        self, id: str, state: ActionState, why: str, *, leader: int, now: datetime
    ) -> ActionRecord:
        """End an action. Idempotent: one that is closed stays as it is. Before a tenant's copy ends its cubes
        are listed at the target, by short transactions, which hold nobody up.

        Raises:
            StaleEpoch: another leads.
            Conflict: one that is committed can't be undone, nor one done that isn't.
        """

        def list_some(connection: sa.Connection) -> int:
            record = _mine(connection, id, leader)
            is_moved = record.state is ActionState.COMMITTED and record.action is ActionKind.COPY
            if record.cube is not None or not is_moved:
                return 0
            return list_tenant(connection, record, now, limit=_CHUNK)

        while self._database.write(list_some) == _CHUNK:
            if self._database.sqlite:
                time.sleep(_REST_S)

        def work(connection: sa.Connection) -> ActionRecord:
            record = _mine(connection, id, leader)
            if not record.is_open:
                return record
            is_committed = record.state is ActionState.COMMITTED
            if (state is ActionState.UNDONE and is_committed) or (
                state is ActionState.DONE and not is_committed
            ):
                raise Conflict(f"action {id} is {record.state} and can't be {state}")
            return _set(connection, id, now, state=state, outcome=why, closed_at=micros(now))

        return self._database.write(work)

    # -- what there is -------------------------------------------------------------------------

    def get(self, id: str) -> ActionRecord:
        """
        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as connection:
            return _one(connection, id)

    def open(self) -> list[ActionRecord]:
        """Actions that are under way, oldest first."""
        with self._database.reading() as connection:
            return _many(connection, _OPEN)

    def page(
        self,
        *,
        tenant: TenantId | None = None,
        cube: CubeId | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[ActionRecord]:
        """The journal, newest first, from the action before ``before`` on."""
        query = sa.select(_actions)
        if tenant is not None:
            query = query.where(_actions.c.tenant == tenant)
        if cube is not None:
            query = query.where(_actions.c.cube == cube)
        if before is not None:
            query = query.where(_actions.c.id < before)
        with self._database.reading() as connection:
            return _many(connection, query.order_by(_actions.c.id.desc()).limit(limit))

    def placement(self, tenant: TenantId, cube: CubeId | None) -> Placement:
        """A cube's epoch and owner; of one that nothing was ever done to, 0 and None."""
        with self._database.reading() as connection:
            return placement_of(connection, tenant, cube)

    def copies(self, tenant: TenantId, cube: CubeId, tier: Tier) -> list[tuple[Place, int]]:
        """Where payloads of a cube are listed in a tier, with their versions."""
        query = (
            sa.select(_residency)
            .join(_cubes, _cubes.c.id == _residency.c.cube)
            .where(_cubes.c.tenant == tenant, _residency.c.cube == cube, _residency.c.tier == tier)
            .order_by(_residency.c.location, _residency.c.medium)
        )
        with self._database.reading() as connection:
            return [
                (Place(tier, Medium(row.medium), row.location), row.version)
                for row in connection.execute(query)
            ]

    def listed(self, place: Place) -> Iterator[Listed]:
        """All payloads that are listed at a place."""
        now_searchable = sa.case((_cubes.c.searchable, _cubes.c.version), else_=None)
        query = (
            sa.select(
                _cubes.c.tenant,
                _residency.c.cube,
                _residency.c.version,
                _residency.c.size_bytes,
                sa.func.coalesce(_placements.c.epoch, 0),
                now_searchable,
            )
            .join(_cubes, _cubes.c.id == _residency.c.cube)
            .outerjoin(
                _placements,
                sa.and_(
                    _placements.c.cube == _residency.c.cube, _placements.c.tenant == _cubes.c.tenant
                ),
            )
            .where(
                _residency.c.tier == place.tier,
                _residency.c.medium == place.medium,
                _residency.c.location == place.location,
            )
        )
        with self._database.reading() as connection:
            for row in connection.execute(query.execution_options(yield_per=2000)):
                yield Listed(*row)

    def forget_location(self, location: str, *, leader: int, now: datetime) -> int:
        """Strike all that is listed at a location that will not come back; how many payloads.

        Raises:
            StaleEpoch: another leads.
        """

        def work(connection: sa.Connection) -> int:
            fence(connection, LEASE, leader)
            gone = connection.execute(
                sa.delete(_residency).where(_residency.c.location == location)
            ).rowcount
            connection.execute(
                sa.update(_placements)
                .where(_placements.c.owner_location == location)
                .values(
                    owner_location=None,
                    owner_medium=None,
                    epoch=_placements.c.epoch + 1,
                    updated_at=micros(now),
                )
            )
            return gone

        return self._database.write(work)

    def prune(self, *, before: datetime) -> int:
        """Forget actions that ended before a time; how many."""

        def work(connection: sa.Connection) -> int:
            return connection.execute(
                sa.delete(_actions).where(_actions.c.closed_at < micros(before))
            ).rowcount

        return self._database.write(work)


_OPEN = sa.select(_actions).where(_actions.c.closed_at.is_(None)).order_by(_actions.c.id)


# -- planning --------------------------------------------------------------------------------------


def _busy(connection: sa.Connection, moves: Sequence[Copy | Drop]) -> set[tuple[str, str]]:
    """The cubes, and tenants as a whole, that have an open action."""
    tenants = sorted({move.tenant for move in moves})
    query = sa.select(_actions.c.tenant, _actions.c.cube).where(
        _actions.c.closed_at.is_(None), _actions.c.tenant.in_(tenants)
    )
    return {(tenant, cube) for tenant, cube in connection.execute(query)}


def _passed(
    action: Copy | Drop, epochs: Mapping[tuple[str, str], int], busy: set[tuple[str, str]]
) -> str | None:
    name = (action.tenant, action.cube or "")
    if epochs[name] != action.epoch:
        return f"the cube is at epoch {epochs[name]}, not {action.epoch}"
    if name in busy:
        return "the cube has an action under way"
    if action.cube is None and any(tenant == action.tenant for tenant, _ in busy):
        return "cubes of the tenant have actions under way"
    if action.cube is not None and (action.tenant, "") in busy:
        return "the tenant as a whole has an action under way"
    return None


def task_of(action: Consolidate | Reindex | Expire | Archive) -> NewTask:
    """What the queue is to do about an action that moves no bytes."""
    kind = kind_of(action)
    if isinstance(action, Consolidate):
        about = [action.scope, action.epoch]
        payload = {"scope": action.scope, "cubes": list(action.cubes), "reason": action.reason}
    else:
        about = [action.cube, action.version if isinstance(action, Reindex) else 0]
        payload = {"cube": action.cube, "reason": action.reason}
    return NewTask(
        kind=kind,
        key=digest("task", kind, action.tenant, *about),
        payload=payload,
        max_attempts=MAX_ATTEMPTS if isinstance(action, Consolidate) else 0,
        once=isinstance(action, Consolidate),
    )


# -- rows ------------------------------------------------------------------------------------------


def _mine(connection: sa.Connection, id: str, leader: int) -> ActionRecord:
    fence(connection, LEASE, leader)
    return _one(connection, id, lock=True)


def _set(connection: sa.Connection, id: str, now: datetime, **values: Any) -> ActionRecord:
    connection.execute(
        sa.update(_actions).where(_actions.c.id == id).values(updated_at=micros(now), **values)
    )
    return _one(connection, id)


def _one(connection: sa.Connection, id: str, *, lock: bool = False) -> ActionRecord:
    return record_of(row_by_id(connection, _actions, id, what="action", lock=lock))


def _many(connection: sa.Connection, query: sa.Select[Any]) -> list[ActionRecord]:
    return [record_of(row) for row in connection.execute(query).mappings()]
