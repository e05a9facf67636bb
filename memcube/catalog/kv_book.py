"""Where the KV payloads of cubes lay when they were migrated, as the catalog knows it.

A cache may lose what it holds at any time, so a row here is what was last seen, not what must be
there. It is gone in the very transaction that makes its payload unservable: when the cube, or any
member of it at any depth, is changed, archived or wiped.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.placing import next_epochs
from memcube.catalog.schema import micros
from memcube.ids import CubeId, TenantId

TIER = "activation"
_CHUNK = 500
_cubes = schema.cubes


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlace:
    """Bytes of a cube's KV in one medium of one place (a node, or an engine on it)."""

    medium: str
    location: str
    size_bytes: int


class KvBook:
    """The activation tier's bookkeeping."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def is_listed_on(self, node: str) -> bool:
        """Whether KV of any cube is listed on a node, or in an engine there."""
        at, places = schema.residency.c.location, f"{node}/"
        query = sa.select(schema.residency.c.cube).where(
            schema.residency.c.tier == TIER,
            sa.or_(at == node, sa.func.substr(at, 1, len(places)) == places),
        )
        with self._database.reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def mark(
        self,
        tenant: TenantId,
        id: CubeId,
        versions: Mapping[CubeId, int],
        places: Sequence[KvPlace],
        *,
        now: datetime,
    ) -> list[CubeId]:
        """Note where a cube's KV lies, in place of what was noted before.

        ``versions`` are those that the KV was built of: the cube's own and its members'. Returns those
        that are no longer so; then nothing is noted.
        """

        def work(connection: sa.Connection) -> list[CubeId]:
            ids = sorted(versions)
            found: dict[CubeId, int] = {}
            for start in range(0, len(ids), _CHUNK):
                # Locked until the rows stand: a change comes before, and is seen, or after them.
                query = (
                    sa.select(_cubes.c.id, _cubes.c.version)
                    .where(
                        _cubes.c.tenant == tenant,
                        _cubes.c.id.in_(ids[start : start + _CHUNK]),
                        _cubes.c.searchable,
                        schema.unexpired(now),
                    )
                    .order_by(_cubes.c.id)
                    .with_for_update(read=True)
                )
                found |= {CubeId(row.id): row.version for row in connection.execute(query)}
            if moved_on := [id for id in ids if found.get(id) != versions[id]]:
                return moved_on
            _delete(connection, [id])
            if places:
                rows = [
                    {
                        "cube": id,
                        "tier": TIER,
                        "medium": place.medium,
                        "location": place.location,
                        "version": versions[id],
                        "size_bytes": place.size_bytes,
                        "epoch": 0,
                        "updated_at": micros(now),
                    }
                    for place in places
                ]
                connection.execute(sa.insert(schema.residency), rows)
            _tell(connection, [id], now)
            return []

        return self._database.write(work)

    def drop(self, tenant: TenantId, ids: Collection[CubeId], *, now: datetime) -> None:
        """Note that nothing of these cubes, and of composites that hold them, lies in the tier."""
        wanted = sorted(ids)

        def work(connection: sa.Connection) -> None:
            for start in range(0, len(wanted), _CHUNK):
                query = sa.select(_cubes.c.id).where(
                    _cubes.c.tenant == tenant, _cubes.c.id.in_(wanted[start : start + _CHUNK])
                )
                found = connection.execute(query).scalars().all()
                drop_rows(connection, found)
                _tell(connection, found, now)

        if wanted:
            self._database.write(work)


def drop_rows(connection: sa.Connection, ids: Sequence[str]) -> None:
    """Delete the rows of at most some hundred cubes and of all composites that hold them. What the scheduler
    has under way for them can't commit any more."""
    _delete(connection, and_above(ids))
    next_epochs(connection, and_above(ids))


def _tell(connection: sa.Connection, ids: Sequence[str], now: datetime) -> None:
    """Let the scheduler look at these cubes and the composites above again (``WorldFeed.changed``)."""
    connection.execute(
        sa.update(_cubes).where(_cubes.c.id.in_(and_above(ids))).values(changed_at=micros(now))
    )


def and_above(ids: Sequence[str]) -> sa.Select[tuple[str]]:
    """The ids of these cubes and of all composites that hold one of them at any depth."""
    link = schema.members
    above = sa.select(_cubes.c.id).where(_cubes.c.id.in_(ids)).cte("above", recursive=True)
    above = above.union(sa.select(link.c.composite).join(above, link.c.member == above.c.id))
    return sa.select(above.c.id)


def _delete(connection: sa.Connection, cubes: Sequence[str] | sa.Select[tuple[str]]) -> None:
    table = schema.residency
    connection.execute(sa.delete(table).where(table.c.tier == TIER, table.c.cube.in_(cubes)))
