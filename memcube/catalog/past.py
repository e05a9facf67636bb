"""A scope as it was: read at a time, compared at two, taken back to one.

Content (text, members, tags, metadata) comes from the version chain and is exact at any time. Whether
a cube was merged or archived comes from a log of moves; that it was *activated* by a use is not in it.
The rest of the header (frozen, expiry, priority, sources, usage) is today's. A cube that was wiped
since is nowhere: of it only the id, the time and digests of whose it was are known, for
``FORGOTTEN_KEPT``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.adapters import retire_holders
from memcube.catalog.cubes import (
    UNSET,
    Change,
    Cubes,
    Idempotency,
    Page,
    as_it_was,
    cursor_id,
    cursor_of,
    remember,
    remembered,
)
from memcube.catalog.engine import Database
from memcube.catalog.kv_book import drop_rows
from memcube.catalog.rows import version_of, version_row
from memcube.catalog.schema import micros, moment
from memcube.catalog.state_log import digests, scope_is
from memcube.cube import Scope, Shape, Version
from memcube.errors import BadRequest, Frozen, LimitExceeded
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import READABLE, SEARCHABLE, Event, State

_CHUNK = 500
_MANY = 1 << 31
_cubes, _versions, _states, _forgotten = (
    schema.cubes,
    schema.versions,
    schema.cube_states,
    schema.forgotten,
)
_BACK = {State.MERGED: Event.MERGE, State.ARCHIVED: Event.ARCHIVE}
_CONTENT = ("text", "members", "tags", "metadata")


class ChangeKind(StrEnum):
    """What became of a cube between two times."""

    ADDED = "added"
    CHANGED = "changed"
    MOVED = "moved"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One cube. Of a deleted one nothing but the id is left; of one that was added there is no
    ``before``. *Moved* ones left the search (merged, archived) or came back, with the same content."""

    id: CubeId
    kind: ChangeKind
    before: Version | None = None
    after: Version | None = None
    state_before: State | None = None
    state_after: State | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences in the order of their ids; ``next_cursor`` is None at the end."""

    differences: list[Difference]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """A cube that was wiped, and when."""

    id: CubeId
    at: datetime


class CubeVersion(NamedTuple):
    """A cube at a version."""

    id: CubeId
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """What a rollback did, each cube at the version it is at then. ``out`` are those that left the search: what was
    added since is archived, and what was merged or archived at that time is so again.
    ``cannot_restore`` are cubes of that time that have been wiped since."""

    changed: tuple[CubeVersion, ...]
    out: tuple[CubeVersion, ...]
    cannot_restore: tuple[Forgotten, ...]
    replayed: bool = False


class Past:
    """The time machine's part of the catalog."""

    def __init__(self, database: Database, cubes: Cubes) -> None:
        self._database = database
        self._cubes = cubes

    def find(
        self,
        scope: Scope,
        *,
        as_of: datetime,
        now: datetime,
        limit: int,
        cursor: str | None = None,
        kind: str | None = None,
    ) -> Page:
        """A page of the cubes that were there at a time and are still, newest first.

        Raises:
            BadRequest: a cursor that this method did not make.
        """
        query = _there_now(scope, now).where(_cubes.c.created_at <= micros(as_of))
        if kind is not None:
            query = query.where(_cubes.c.kind == kind)
        if cursor is not None:
            query = query.where(_cubes.c.id < cursor_id(cursor))
        query = query.order_by(_cubes.c.id.desc()).limit(limit + 1)
        with self._database.reading() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
            found = rows[:limit]
            past = _contents(connection, [row["id"] for row in found], as_of)
            states = _states_at(connection, found, as_of)
        cubes = [
            as_it_was(row | _state_of(states[row["id"]]), past[row["id"]])
            for row in found
            if row["id"] in past
        ]
        return Page(cubes=cubes, next_cursor=cursor_of(found[-1]["id"]) if rows[limit:] else None)

    def compare(
        self,
        scope: Scope,
        *,
        since: datetime,
        until: datetime,
        now: datetime,
        limit: int,
        cursor: str | None = None,
    ) -> Comparison:
        """What was added, changed, moved and deleted in a scope after ``since`` and up to ``until``.

        Raises:
            BadRequest: the first time is after the second, or a foreign cursor.
        """
        if since > until:
            raise BadRequest("is after the other time", "since")
        after = "" if cursor is None else cursor_id(cursor)
        with self._database.reading() as connection:
            query = _touched(scope, since, until, now).where(_cubes.c.id > after)
            query = query.order_by(_cubes.c.id).limit(limit + 1)
            rows = [dict(row) for row in connection.execute(query).mappings()]
            gone = _gone(connection, scope, since, until, after=after, limit=limit + 1)
            ids = sorted([row["id"] for row in rows] + [one.id for one in gone])
            shown = set(ids[:limit])
            rows = [row for row in rows if row["id"] in shown]
            found = _differences(connection, rows, since, until)
        found += [Difference(id=one.id, kind=ChangeKind.DELETED) for one in gone if one.id in shown]
        return Comparison(
            differences=sorted(found, key=lambda one: one.id),
            next_cursor=cursor_of(ids[limit - 1]) if len(ids) > limit else None,
        )

    def rollback(
        self,
        scope: Scope,
        *,
        to: datetime,
        author: str,
        now: datetime,
        limit: int,
        idempotency: Idempotency | None = None,
    ) -> RolledBack:
        """Take a scope back to a time: new versions with the content of then, merged and archived
        cubes brought back, and what was added since archived. All of it or nothing; rolling back twice
        changes nothing the second time, and a rollback can be rolled back.

        Raises:
            Frozen: a cube that would change is frozen.
            LimitExceeded: more than ``limit`` cubes would.
            IdempotencyMismatch: the key belongs to another request.
        """

        def work(connection: sa.Connection) -> RolledBack:
            if idempotency is not None:
                before = remembered(connection, scope.tenant, idempotency)
                if before is not None:
                    return _again(before)
            query = _touched(scope, to, None, now).order_by(_cubes.c.id.desc()).limit(limit + 1)
            rows = [dict(row) for row in connection.execute(query.with_for_update()).mappings()]
            if len(rows) > limit:
                raise LimitExceeded("cubes changed since then", limit)
            gone = _gone(connection, scope, to, None, after="", limit=_MANY)
            changed, out = self._take_back(connection, rows, to, author=author, now=now)
            result = RolledBack(changed=changed, out=out, cannot_restore=tuple(gone))
            if idempotency is not None:
                remember(connection, scope.tenant, idempotency, _outcome(result), now)
            return result

        return self._database.write(work)

    def _take_back(
        self,
        connection: sa.Connection,
        rows: Sequence[dict[str, Any]],
        to: datetime,
        *,
        author: str,
        now: datetime,
    ) -> tuple[tuple[CubeVersion, ...], tuple[CubeVersion, ...]]:
        """Those that are searchable then, and those that left the search. What is new goes first: it
        may have the text of what comes back."""
        new = [row for row in rows if row["created_at"] > micros(to) and row["searchable"]]
        old = [row for row in rows if row["created_at"] <= micros(to)]
        past = _contents(connection, [row["id"] for row in old], to)
        states = _states_at(connection, old, to)
        done = [self._cubes.take(connection, row, Event.ARCHIVE, now, deferred=True) for row in new]
        for row in old:
            if row["id"] in past:
                taken = self._one_back(
                    connection, row, past[row["id"]], states[row["id"]], to, author=author, now=now
                )
                done += [] if taken is None else [taken]
        _let_go(connection, rows, done, now)
        sides = ([row for row in done if bool(row["searchable"]) is side] for side in (True, False))
        changed, out = (
            tuple(CubeVersion(CubeId(row["id"]), row["version"]) for row in side) for side in sides
        )
        return changed, out

    def _one_back(
        self,
        connection: sa.Connection,
        row: dict[str, Any],
        past: Mapping[Any, Any],
        state: State,
        to: datetime,
        *,
        author: str,
        now: datetime,
    ) -> dict[str, Any] | None:
        """The row after it; None where nothing is to be done."""
        tenant = TenantId(row["tenant"])
        held = self._cubes.present(connection, tenant, sorted(set(past["members"])), now, lock=True)
        members = [id for id in past["members"] if id in held]
        same = members == row["members"] and all(
            row[name] == past[name] for name in ("text", "tags", "metadata")
        )
        out = state not in SEARCHABLE
        if same and (row["state"] == state if out else row["searchable"]):
            return None
        if row["frozen"]:
            raise Frozen(row["id"])
        reason = f"rollback to {to.isoformat()}"
        if not row["searchable"]:
            row = self._cubes.take(connection, row, Event.RESTORE, now, deferred=True)
            entry = version_row(row, author=author, reason=reason)
            connection.execute(sa.insert(_versions), entry)
        if not same:
            change = Change(
                text=past["text"],
                tags=tuple(past["tags"]),
                metadata=past["metadata"],
                members=tuple(members) if row["shape"] == Shape.COMPOSITE else UNSET,
            )
            self._cubes.apply(
                connection, row, change, author=author, reason=reason, now=now, deferred=True
            )
            query = sa.select(_cubes).where(_cubes.c.id == row["id"])
            row = dict(connection.execute(query).mappings().one())
        if not out:
            return row
        return self._cubes.take(connection, row, _BACK[state], now, deferred=True)


def _let_go(
    connection: sa.Connection,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    now: datetime,
) -> None:
    """What a change of each cube does to the KV and the adapters that hold it, for all at once."""
    were = {row["id"]: row for row in before}
    ids = [row["id"] for row in after]
    other = [
        row["id"]
        for row in after
        if not row["searchable"]
        or any(row[name] != were[row["id"]][name] for name in ("text", "members"))
    ]
    for start in range(0, len(ids), _CHUNK):
        drop_rows(connection, ids[start : start + _CHUNK])
    for start in range(0, len(other), _CHUNK):
        retire_holders(connection, other[start : start + _CHUNK], now)


def _there_now(scope: Scope, now: datetime) -> sa.Select[Any]:
    return sa.select(_cubes).where(
        _cubes.c.tenant == scope.tenant,
        _cubes.c.state.in_([str(state) for state in READABLE]),
        schema.unexpired(now),
        *scope_is(_cubes, _names(scope)),
    )


def _touched(
    scope: Scope, since: datetime, until: datetime | None, now: datetime
) -> sa.Select[Any]:
    """The cubes of a scope with a version or a move after ``since`` and up to ``until``."""

    def between(column: sa.Column[int]) -> list[sa.ColumnElement[bool]]:
        after = column > micros(since)
        return [after] if until is None else [after, column <= micros(until)]

    changed = sa.exists().where(_versions.c.cube == _cubes.c.id, *between(_versions.c.created_at))
    moved = sa.exists().where(_states.c.cube == _cubes.c.id, *between(_states.c.at))
    query = _there_now(scope, now).where(sa.or_(changed, moved))
    return query if until is None else query.where(_cubes.c.created_at <= micros(until))


def _gone(
    connection: sa.Connection,
    scope: Scope,
    since: datetime,
    until: datetime | None,
    *,
    after: str,
    limit: int,
) -> list[Forgotten]:
    """The cubes of a scope that were there at ``since`` and were wiped up to ``until``."""
    query = (
        sa.select(_forgotten.c.cube, _forgotten.c.at)
        .join(_cubes, _cubes.c.id == _forgotten.c.cube)
        .where(
            _forgotten.c.tenant == scope.tenant,
            _forgotten.c.at > micros(since),
            _cubes.c.created_at <= micros(since),
            _forgotten.c.cube > after,
            *scope_is(_forgotten, digests(scope.tenant, _names(scope))),
        )
        .order_by(_forgotten.c.cube)
        .limit(limit)
    )
    if until is not None:
        query = query.where(_forgotten.c.at <= micros(until))
    rows = connection.execute(query).all()
    return [Forgotten(id=CubeId(row.cube), at=moment(row.at)) for row in rows]


def _contents(
    connection: sa.Connection, ids: Sequence[str], at: datetime
) -> dict[str, Mapping[Any, Any]]:
    """The versions that these cubes had at a time, by id."""
    found: dict[str, Mapping[Any, Any]] = {}
    for start in range(0, len(ids), _CHUNK):
        last = (
            sa.select(_versions.c.cube, sa.func.max(_versions.c.version).label("version"))
            .where(
                _versions.c.cube.in_(ids[start : start + _CHUNK]),
                _versions.c.created_at <= micros(at),
            )
            .group_by(_versions.c.cube)
            .subquery()
        )
        same = sa.and_(_versions.c.cube == last.c.cube, _versions.c.version == last.c.version)
        rows = connection.execute(sa.select(_versions).join(last, same)).mappings()
        found |= {row["cube"]: row for row in rows}
    return found


def _states_at(
    connection: sa.Connection, rows: Iterable[Mapping[str, Any]], at: datetime
) -> dict[str, State]:
    """The states of cubes at a time. A use is not in the log: before any move a cube counts as
    ``activated`` if it has ever been used."""
    states = {row["id"]: State.ACTIVATED if row["uses"] else State.GENERATED for row in rows}
    ids = list(states)
    for start in range(0, len(ids), _CHUNK):
        last = (
            sa.select(sa.func.max(_states.c.id))
            .where(_states.c.cube.in_(ids[start : start + _CHUNK]), _states.c.at <= micros(at))
            .group_by(_states.c.cube)
        )
        for found in connection.execute(sa.select(_states).where(_states.c.id.in_(last))):
            states[found.cube] = State(found.state)
    return states


def _differences(
    connection: sa.Connection, rows: Sequence[dict[str, Any]], since: datetime, until: datetime
) -> list[Difference]:
    ids = [row["id"] for row in rows]
    before, after = (_contents(connection, ids, time) for time in (since, until))
    was, became = (_states_at(connection, rows, time) for time in (since, until))
    found: list[Difference] = []
    for id in ids:
        if id not in after:
            continue
        if id not in before:
            kind = ChangeKind.ADDED
        elif any(before[id][name] != after[id][name] for name in _CONTENT):
            kind = ChangeKind.CHANGED
        elif _place(was[id]) != _place(became[id]):
            kind = ChangeKind.MOVED
        else:
            continue
        found.append(
            Difference(
                id=CubeId(id),
                kind=kind,
                before=version_of(before[id]) if id in before else None,
                after=version_of(after[id]),
                state_before=was[id] if id in before else None,
                state_after=became[id],
            )
        )
    return found


def _state_of(state: State) -> dict[str, Any]:
    return {"state": str(state), "searchable": state in SEARCHABLE}


def _place(state: State) -> State | None:
    """What a use does not change of a state."""
    return None if state in SEARCHABLE else state


def _names(scope: Scope) -> dict[str, str | None]:
    return {"user_id": scope.user_id, "agent_id": scope.agent_id, "run_id": scope.run_id}


def _outcome(result: RolledBack) -> dict[str, Any]:
    return {
        "changed": [list(one) for one in result.changed],
        "out": [list(one) for one in result.out],
        "gone": [[one.id, micros(one.at)] for one in result.cannot_restore],
    }


def _again(outcome: Mapping[str, Any]) -> RolledBack:
    changed, out = (
        tuple(CubeVersion(CubeId(id), version) for id, version in outcome[name])
        for name in ("changed", "out")
    )
    gone = tuple(Forgotten(id=CubeId(id), at=moment(at)) for id, at in outcome["gone"])
    return RolledBack(changed=changed, out=out, cannot_restore=gone, replayed=True)
