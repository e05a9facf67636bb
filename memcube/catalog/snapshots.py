"""Snapshots: a name for a scope at a time, and a pin on what it was then.

Nothing is copied: the version chain says what a scope was at any time. The pin keeps the sweep from
forgetting (``lifecycle.forget``) a cube that a snapshot shows. It holds nothing against a deletion or
an expiry: those are promises to somebody.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.schema import micros, moment
from memcube.catalog.state_log import scope_is
from memcube.cube import Scope
from memcube.errors import Conflict, NotFound
from memcube.ids import IdSource, TenantId

_snapshots, _cubes = schema.snapshots, schema.cubes


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A scope as it was ``at`` a time."""

    id: str
    name: str
    scope: Scope
    at: datetime
    created_at: datetime
    author: str


class SnapshotBook:
    """Snapshots by tenant. A foreign id is NotFound, as an unknown one is."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    def create(
        self, scope: Scope, name: str, *, at: datetime, author: str, now: datetime
    ) -> Snapshot:
        """Give a time of a scope a name. The same once more is the same snapshot.

        Raises:
            Conflict: another one has the name.
        """

        def work(connection: sa.Connection) -> Snapshot:
            known = _named(connection, scope.tenant, name)
            if known is not None:
                if (known.scope, known.at) != (scope, at):
                    raise Conflict(
                        f"there is a snapshot {name!r} already; delete it, or take another"
                    )
                return known
            row = {
                "id": self._new_id(now),
                "tenant": scope.tenant,
                "name": name,
                "user_id": scope.user_id,
                "agent_id": scope.agent_id,
                "run_id": scope.run_id,
                "at": micros(at),
                "created_at": micros(now),
                "author": author,
            }
            connection.execute(sa.insert(_snapshots), row)
            return _snapshot(row)

        return self._database.write(work)

    def all(self, tenant: TenantId) -> list[Snapshot]:
        """The tenant's snapshots, the latest time first."""
        query = (
            sa.select(_snapshots)
            .where(_snapshots.c.tenant == tenant)
            .order_by(_snapshots.c.at.desc(), _snapshots.c.id.desc())
        )
        with self._database.reading() as connection:
            return [_snapshot(row) for row in connection.execute(query).mappings()]

    def get(self, tenant: TenantId, id: str) -> Snapshot:
        """A snapshot by its id or its name.

        Raises:
            NotFound: none in this tenant.
        """
        query = sa.select(_snapshots).where(
            _snapshots.c.tenant == tenant,
            sa.or_(_snapshots.c.id == id, _snapshots.c.name == id),
        )
        # An id goes before a name that looks like one.
        query = query.order_by(sa.case((_snapshots.c.id == id, 0), else_=1)).limit(1)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound("snapshot", id)
        return _snapshot(row)

    def delete(self, tenant: TenantId, id: str) -> None:
        """Take a snapshot's name and pin away; no cube changes.

        Raises:
            NotFound: none in this tenant.
        """
        which = (_snapshots.c.tenant == tenant, _snapshots.c.id == id)

        def work(connection: sa.Connection) -> None:
            if not connection.execute(sa.delete(_snapshots).where(*which)).rowcount:
                raise NotFound("snapshot", id)

        self._database.write(work)


def pinned() -> sa.ColumnElement[bool]:
    """The condition on a cube that a snapshot shows it."""
    same = [
        sa.or_(_snapshots.c[name].is_(None), _snapshots.c[name] == _cubes.c[name])
        for name in ("user_id", "agent_id", "run_id")
    ]
    return sa.exists().where(
        _snapshots.c.tenant == _cubes.c.tenant, _snapshots.c.at >= _cubes.c.created_at, *same
    )


def drop_snapshots(
    connection: sa.Connection, tenant: TenantId, scope: Mapping[str, str | None]
) -> None:
    """Delete the snapshots of a scope and of its parts: their names and ids are its owner's too."""
    connection.execute(
        sa.delete(_snapshots).where(_snapshots.c.tenant == tenant, *scope_is(_snapshots, scope))
    )


def _named(connection: sa.Connection, tenant: TenantId, name: str) -> Snapshot | None:
    query = sa.select(_snapshots).where(_snapshots.c.tenant == tenant, _snapshots.c.name == name)
    row = connection.execute(query).mappings().first()
    return None if row is None else _snapshot(row)


def _snapshot(row: Mapping[Any, Any]) -> Snapshot:
    return Snapshot(
        id=row["id"],
        name=row["name"],
        scope=Scope(
            tenant=TenantId(row["tenant"]),
            user_id=row["user_id"],
            agent_id=row["agent_id"],
            run_id=row["run_id"],
        ),
        at=moment(row["at"]),
        created_at=moment(row["created_at"]),
        author=row["author"],
    )
