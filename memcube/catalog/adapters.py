"""Adapters as the catalog knows them: their versions and states, and which cubes are inside.

An adapter is a line of versions with a name and a scope. Each version is *candidate*, *serving* or
*retired*, and at most one of a line serves. A version that holds a cube which is changed, archived
or deleted is retired as stale in the very transaction that does it, so that the next look-up doesn't
find it; it never serves again. The weights lie among the objects: ``memcube.parametric.registry``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.kv_book import and_above
from memcube.catalog.schema import micros, moment, moment_or_none
from memcube.cube import Origin, Relation, Scope
from memcube.errors import BadRequest, Conflict, NotFound
from memcube.ids import CubeId, IdSource, TenantId
from memcube.lifecycle import READABLE

WRITTEN_BY = "adapter_sha256"
"""In the metadata of a cube that an adapter's answers were written back as: which weights said so."""

_CHUNK = 500
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_lines, _versions, _held = schema.adapters, schema.adapter_versions, schema.adapter_cubes
_cubes, _texts = schema.cubes, schema.versions
_HOLDS = sa.and_(_held.c.adapter == _versions.c.adapter, _held.c.version == _versions.c.version)


class AdapterState(StrEnum):
    """candidate → serving → retired; by a rollback from retired to serving again."""

    CANDIDATE = "candidate"
    SERVING = "serving"
    RETIRED = "retired"


class _Why(StrEnum):
    """Why a version is retired. A stale one never serves again."""

    NONE = ""
    SUPERSEDED = "superseded"
    ROLLED_BACK = "rolled back"
    STOPPED = "stopped"
    STALE = "stale"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdapter:
    """A version to note. ``sha256`` is its file's; ``cubes`` are those it was trained on, each in its
    version. A name that the tenant has already is the next version of that line."""

    name: str
    scope: Scope
    base: str
    sha256: str
    size_bytes: int
    rank: int
    cubes: Mapping[CubeId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLine:
    """An adapter by all its versions."""

    id: str
    name: str
    scope: Scope
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """One version of an adapter. ``reason`` says why a retired one is so."""

    line: AdapterLine
    version: int
    state: AdapterState
    reason: str
    base: str
    sha256: str
    size_bytes: int
    rank: int
    created_at: datetime
    activated_at: datetime | None
    retired_at: datetime | None

    @property
    def stale(self) -> bool:
        return self.reason == _Why.STALE


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """An adapter's version that has a version of a cube inside."""

    adapter: str
    version: int
    state: AdapterState
    cube: CubeId
    cube_version: int


class AdapterBook:
    """The parametric tier's bookkeeping."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    def add(self, tenant: TenantId, new: NewAdapter, *, now: datetime) -> AdapterRecord:
        """Note a version as a candidate; the newest one of its name, if that is one with
        the same file and cubes.

        Raises:
            BadRequest: no name, or no cubes.
            Conflict: the line is of another scope, or a cube has moved on since that version.
        """
        if not _NAME.fullmatch(new.name):
            raise BadRequest("has 1 to 63 of a-z, 0-9, '.', '_' and '-'", "name")
        if not new.cubes:
            raise BadRequest("is empty; an adapter holds some", "cubes")

        def work(connection: sa.Connection) -> AdapterRecord:
            if changed := moved_on(connection, tenant, new.cubes, now):
                raise Conflict(f"cubes have changed since they were read: {_few(changed)}")
            id = self._line(connection, tenant, new, now)
            last = connection.scalar(
                sa.select(sa.func.max(_versions.c.version)).where(_versions.c.adapter == id)
            )
            if last is not None:  # a job that ended between this and its own end publishes again
                before = _one(connection, tenant, id, last)
                is_same = before.sha256 == new.sha256 and _inside(connection, before) == new.cubes
                if is_same and before.state is AdapterState.CANDIDATE:
                    return before
            version = (last or 0) + 1
            row = {
                "adapter": id,
                "version": version,
                "state": AdapterState.CANDIDATE,
                "reason": _Why.NONE,
                "base": new.base,
                "sha256": new.sha256,
                "size_bytes": new.size_bytes,
                "rank": new.rank,
                "created_at": micros(now),
            }
            connection.execute(sa.insert(_versions), row)
            held = [
                {"adapter": id, "version": version, "cube": cube, "cube_version": at}
                for cube, at in new.cubes.items()
            ]
            connection.execute(sa.insert(_held), held)
            return _one(connection, tenant, id, version)

        return self._database.write(work)

    def activate(self, tenant: TenantId, id: str, version: int, *, now: datetime) -> AdapterRecord:
        """Let a version serve, in place of the one that does. Idempotent.

        Raises:
            NotFound: no such version.
            Conflict: it is stale: a cube inside has changed or is gone.
        """

        def work(connection: sa.Connection) -> AdapterRecord:
            _lock(connection, tenant, id)
            found = _one(connection, tenant, id, version)
            if found.state is not AdapterState.SERVING:
                _check_whole(connection, tenant, found, now)
                _retire(connection, _serving_of(id), _Why.SUPERSEDED, now)
                _serve(connection, id, version, now)
            return _one(connection, tenant, id, version)

        return self._database.write(work)

    def rollback(self, tenant: TenantId, id: str, *, now: datetime) -> AdapterRecord:
        """Let the version serve again that did before; the present one is retired.

        Raises:
            NotFound: no such adapter.
            Conflict: none before it can serve. Nothing is changed.
        """

        def work(connection: sa.Connection) -> AdapterRecord:
            _lock(connection, tenant, id)
            query = _records(tenant).where(
                _versions.c.adapter == id, _versions.c.reason == _Why.SUPERSEDED
            )
            query = query.order_by(_versions.c.retired_at.desc(), _versions.c.version.desc())
            for row in connection.execute(query).mappings().all():
                before = _record(row)
                if not moved_on(connection, tenant, _inside(connection, before), now):
                    _retire(connection, _serving_of(id), _Why.ROLLED_BACK, now)
                    _serve(connection, id, before.version, now)
                    return _one(connection, tenant, id, before.version)
            raise Conflict(f"adapter {id!r} has no earlier version that can serve")

        return self._database.write(work)

    def stop(self, tenant: TenantId, id: str, *, now: datetime) -> None:
        """Let no version of an adapter serve. Idempotent.

        Raises:
            NotFound: no such adapter.
        """

        def work(connection: sa.Connection) -> None:
            _lock(connection, tenant, id)
            _retire(connection, _serving_of(id), _Why.STOPPED, now)

        self._database.write(work)

    def get(self, tenant: TenantId, id: str, version: int) -> AdapterRecord:
        """One version.

        Raises:
            NotFound: none in this tenant.
        """
        with self._database.reading() as connection:
            return _one(connection, tenant, id, version)

    def versions(self, tenant: TenantId) -> list[AdapterRecord]:
        """All versions of the tenant's adapters, by name, the newest first."""
        query = _records(tenant).order_by(_lines.c.name, _versions.c.version.desc())
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def serving(self, tenant: TenantId, name: str, *, base: str, now: datetime) -> AdapterRecord:
        """The version that serves on this base model, by the adapter's name or id.

        Raises:
            NotFound: none does.
        """
        named = sa.or_(_lines.c.name == name, _lines.c.id == name)
        found = self._serving(tenant, base, named, now)
        if not found:
            raise NotFound("serving adapter", name)
        return found[0]

    def serving_scope(self, scope: Scope, *, base: str, now: datetime) -> AdapterRecord | None:
        """The version that serves exactly this scope; the one activated last, of several."""
        same = [
            column.is_not_distinct_from(value)
            for column, value in (
                (_lines.c.user_id, scope.user_id),
                (_lines.c.agent_id, scope.agent_id),
                (_lines.c.run_id, scope.run_id),
            )
        ]
        found = self._serving(scope.tenant, base, sa.and_(*same), now)
        return max(found, key=lambda record: record.activated_at or now) if found else None

    def live(self, tenant: TenantId, *, now: datetime) -> list[AdapterRecord]:
        """The versions that serve, on whatever base model."""
        return self._serving(tenant, None, sa.true(), now)

    def retired(self, tenant: TenantId, *, since: datetime) -> list[AdapterRecord]:
        """The versions that have stopped serving since then."""
        query = _records(tenant).where(
            _versions.c.state == AdapterState.RETIRED,
            _versions.c.activated_at.is_not(None),
            _versions.c.retired_at >= micros(since),
        )
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def to_train_anew(self, *, limit: int = 100) -> list[AdapterRecord]:
        """Of all tenants, versions that stopped serving as a cube inside changed and that no later one
        of their line was activated in place of, by adapter: what is to be trained anew."""
        newer = _versions.alias()
        superseded = sa.exists().where(
            newer.c.adapter == _versions.c.adapter,
            sa.or_(
                newer.c.state == AdapterState.SERVING,
                sa.and_(newer.c.version > _versions.c.version, newer.c.activated_at.is_not(None)),
            ),
        )
        query = (
            _records()
            .where(
                _versions.c.reason == _Why.STALE, _versions.c.activated_at.is_not(None), ~superseded
            )
            .order_by(_versions.c.adapter)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def to_erase(self, *, limit: int = 100) -> list[AdapterRecord]:
        """Of all tenants, stale versions whose files were not removed."""
        query = (
            _records()
            .where(_versions.c.reason == _Why.STALE, _versions.c.erased_at.is_(None))
            .order_by(_versions.c.adapter, _versions.c.version)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def is_shared(self, record: AdapterRecord) -> bool:
        """Whether a version of the same tenant that isn't stale has the same file."""
        query = _records(record.line.scope.tenant).where(
            _versions.c.sha256 == record.sha256, _versions.c.reason != _Why.STALE
        )
        with self._database.reading() as connection:
            return connection.execute(query).first() is not None

    def erased(self, record: AdapterRecord, *, now: datetime) -> None:
        """Note that the files of a stale version are gone."""
        self._database.write(
            lambda connection: connection.execute(
                sa.update(_versions)
                .where(_versions.c.adapter == record.line.id, _versions.c.version == record.version)
                .values(erased_at=micros(now))
            )
        )

    def inside(self, tenant: TenantId, id: str, version: int) -> dict[CubeId, int]:
        """The cubes inside a version of an adapter, each in the version that was trained on.

        Raises:
            NotFound: no such version.
        """
        with self._database.reading() as connection:
            return _inside(connection, _one(connection, tenant, id, version))

    def holding(self, tenant: TenantId, cube: CubeId) -> Sequence[Holding]:
        """The versions of adapters that have a cube inside."""
        query = (
            sa.select(_held, _versions.c.state)
            .join(_versions, _HOLDS)
            .join(_lines, _lines.c.id == _held.c.adapter)
            .where(_lines.c.tenant == tenant, _held.c.cube == cube)
            .order_by(_held.c.adapter, _held.c.version)
        )
        with self._database.reading() as connection:
            return [
                Holding(
                    adapter=row["adapter"],
                    version=row["version"],
                    state=AdapterState(row["state"]),
                    cube=CubeId(row["cube"]),
                    cube_version=row["cube_version"],
                )
                for row in connection.execute(query).mappings()
            ]

    def written_back(
        self, tenant: TenantId, cubes: Sequence[CubeId], *, now: datetime
    ) -> list[CubeId]:
        """The cubes that say what an adapter said of some: they go where those are changed or go."""
        edge = schema.edges
        found: list[CubeId] = []
        with self._database.reading() as connection:
            for start in range(0, len(cubes), _CHUNK):
                query = (
                    sa.select(_cubes.c.id, _cubes.c.metadata)
                    .join(edge, edge.c.child == _cubes.c.id)
                    .where(
                        edge.c.parent.in_(cubes[start : start + _CHUNK]),
                        edge.c.relation == Relation.DERIVED,
                        _cubes.c.tenant == tenant,
                        _cubes.c.origin == Origin.INFERENCE,
                        _cubes.c.state.in_(sorted(READABLE)),
                        schema.unexpired(now),
                    )
                    .order_by(_cubes.c.id)
                )
                rows = connection.execute(query).all()
                found += [CubeId(row.id) for row in rows if WRITTEN_BY in row.metadata]
        return list(dict.fromkeys(found))

    def _line(
        self, connection: sa.Connection, tenant: TenantId, new: NewAdapter, now: datetime
    ) -> str:
        query = sa.select(_lines).where(_lines.c.tenant == tenant, _lines.c.name == new.name)
        row = connection.execute(query.with_for_update()).mappings().first()
        if row is None:
            id = self._new_id(now)
            scope = {
                "user_id": new.scope.user_id,
                "agent_id": new.scope.agent_id,
                "run_id": new.scope.run_id,
            }
            named = {"id": id, "tenant": tenant, "name": new.name, "created_at": micros(now)}
            connection.execute(sa.insert(_lines), named | scope)
            return id
        if _scope(tenant, row) != new.scope:
            raise Conflict(f"adapter {new.name!r} is of another scope; choose another name")
        return row["id"]

    def _serving(
        self, tenant: TenantId, base: str | None, which: sa.ColumnElement[bool], now: datetime
    ) -> list[AdapterRecord]:
        # An expiry takes effect at its time, not when it is noted.
        expired = (
            sa.exists()
            .where(_HOLDS, _cubes.c.id == _held.c.cube)
            .where(sa.or_(~_cubes.c.searchable, _cubes.c.expires_at <= micros(now)))
        )
        query = _records(tenant).where(which, _versions.c.state == AdapterState.SERVING, ~expired)
        if base is not None:
            query = query.where(_versions.c.base == base)
        return [_record(row._mapping) for row in self._database.rows(query, {})]


def retire_holders(connection: sa.Connection, ids: Sequence[str], now: datetime) -> None:
    """Retire as stale all versions that hold one of at most some hundred cubes, or a composite that
    holds one; for the transaction that changes the cubes."""
    # By the held cubes' index: this is in every change of a cube.
    held = sa.select(_held.c.adapter, _held.c.version).where(_held.c.cube.in_(and_above(ids)))
    holds = sa.tuple_(_versions.c.adapter, _versions.c.version).in_(held)
    _retire(connection, holds, _Why.STALE, now)


# -- inside a transaction


def _serving_of(id: str) -> sa.ColumnElement[bool]:
    return sa.and_(_versions.c.adapter == id, _versions.c.state == AdapterState.SERVING)


def _retire(
    connection: sa.Connection, which: sa.ColumnElement[bool], why: _Why, now: datetime
) -> None:
    new = {"state": AdapterState.RETIRED, "reason": why, "retired_at": micros(now)}
    connection.execute(
        sa.update(_versions).where(which, _versions.c.reason != _Why.STALE).values(new)
    )


def _serve(connection: sa.Connection, id: str, version: int, now: datetime) -> None:
    new = {
        "state": AdapterState.SERVING,
        "reason": _Why.NONE,
        "activated_at": micros(now),
        "retired_at": None,
    }
    which = (_versions.c.adapter == id, _versions.c.version == version)
    connection.execute(sa.update(_versions).where(*which).values(new))


def _lock(connection: sa.Connection, tenant: TenantId, id: str) -> None:
    query = sa.select(_lines.c.id).where(_lines.c.tenant == tenant, _lines.c.id == id)
    if connection.scalar(query.with_for_update()) is None:
        raise NotFound("adapter", id)


def _check_whole(
    connection: sa.Connection, tenant: TenantId, record: AdapterRecord, now: datetime
) -> None:
    changed = moved_on(connection, tenant, _inside(connection, record), now)
    if changed or record.stale:
        which = f": {_few(changed)}" if changed else ""
        raise Conflict(
            f"version {record.version} of adapter {record.line.id!r} is stale, as cubes inside have "
            f"changed or are gone{which}; train it anew"
        )


def moved_on(
    connection: sa.Connection,
    tenant: TenantId,
    held: Mapping[CubeId, int],
    now: datetime,
    *,
    lock: bool = True,
) -> list[CubeId]:
    """Those of the cubes whose text is no longer that of the version given.

    With ``lock`` the others' rows are held: a change comes before, and is seen, or after the
    transaction, and finds what it wrote.
    """
    ids, whole = sorted(held), set[str]()
    for start in range(0, len(ids), _CHUNK):
        query = (
            sa.select(_cubes.c.id, _texts.c.version)
            .join(_texts, _texts.c.cube == _cubes.c.id)
            .where(
                _cubes.c.tenant == tenant,
                _cubes.c.id.in_(ids[start : start + _CHUNK]),
                _cubes.c.searchable,
                schema.unexpired(now),
                _cubes.c.text == _texts.c.text,
            )
            .order_by(_cubes.c.id)
        )
        if lock:
            query = query.with_for_update(read=True, of=_cubes)
        found = connection.execute(query).all()
        whole |= {row.id for row in found if row.version == held[CubeId(row.id)]}
    return [id for id in ids if id not in whole]


def _inside(connection: sa.Connection, record: AdapterRecord) -> dict[CubeId, int]:
    query = sa.select(_held.c.cube, _held.c.cube_version).where(
        _held.c.adapter == record.line.id, _held.c.version == record.version
    )
    return {CubeId(row.cube): row.cube_version for row in connection.execute(query)}


def _one(connection: sa.Connection, tenant: TenantId, id: str, version: int) -> AdapterRecord:
    query = _records(tenant).where(_versions.c.adapter == id, _versions.c.version == version)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound("version of adapter", f"{id}@{version}")
    return _record(row)


def _records(tenant: TenantId | None = None) -> sa.Select[Any]:
    """Versions of one tenant's adapters, or of all tenants'."""
    found = sa.select(
        _versions,
        _lines.c.tenant,
        _lines.c.name,
        _lines.c.user_id,
        _lines.c.agent_id,
        _lines.c.run_id,
        _lines.c.created_at.label("begun_at"),
    ).join(_lines, _lines.c.id == _versions.c.adapter)
    return found if tenant is None else found.where(_lines.c.tenant == tenant)


def _record(row: Mapping[Any, Any]) -> AdapterRecord:
    return AdapterRecord(
        line=AdapterLine(
            id=row["adapter"],
            name=row["name"],
            scope=_scope(row["tenant"], row),
            created_at=moment(row["begun_at"]),
        ),
        version=row["version"],
        state=AdapterState(row["state"]),
        reason=row["reason"],
        base=row["base"],
        sha256=row["sha256"],
        size_bytes=row["size_bytes"],
        rank=row["rank"],
        created_at=moment(row["created_at"]),
        activated_at=moment_or_none(row["activated_at"]),
        retired_at=moment_or_none(row["retired_at"]),
    )


def _scope(tenant: TenantId, row: Mapping[Any, Any]) -> Scope:
    return Scope(
        tenant=tenant, user_id=row["user_id"], agent_id=row["agent_id"], run_id=row["run_id"]
    )


def _few(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - 3:,} more" if len(ids) > 3 else ""
    return ", ".join(ids[:3]) + rest
