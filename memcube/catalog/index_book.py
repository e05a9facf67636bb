"""What the plaintext index holds, as the catalog knows it: work to do, and work done.

``indexed_version`` is 0 where the index holds nothing of a cube (as far as is known), −1 where it
holds something that must be replaced or removed. A cube is pending while it is searchable and its
indexed version or index differs from what it should be.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.rows import cube_of
from memcube.catalog.schema import micros, moment, moment_or_none
from memcube.cube import MemCube
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import shard_location

STALE = -1
TIER, MEDIUM = "plaintext", "disk"
_cubes = schema.cubes
_ZERO = sa.literal(0, literal_execute=True)
"""Written out, since a partial index is chosen by the text of its condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A cube that the index may hold and must not."""

    tenant: TenantId
    id: CubeId
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A cube that the index should hold, and when index work last arose for it. One whose time is over
    is about to be taken out."""

    tenant: TenantId
    id: CubeId
    version: int
    changed_at: datetime
    unexpired: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of a tenant, or of all."""

    cubes_by_state: Mapping[str, int]
    pending_index: int
    pending_removal: int
    oldest_pending: datetime | None


class IndexBook:
    """The index's bookkeeping."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def mark(
        self,
        tenant: TenantId,
        versions: Mapping[CubeId, int],
        *,
        sizes: Mapping[CubeId, int],
        index: str,
        shard: int,
        epoch: int,
        now: datetime,
    ) -> None:
        """Note that a shard's index holds these versions, of ``sizes`` bytes. A cube that moved on meanwhile
        is left pending; so are all where the tenant lies in another shard by now."""
        if not versions:
            return
        rows = [
            {"b_id": id, "b_version": version, "b_tenant": tenant, "b_index": index}
            for id, version in versions.items()
        ]
        resident = [
            {
                "b_id": id,
                "b_tenant": tenant,
                "b_version": version,
                "b_location": shard_location(shard),
                "b_size": sizes[id],
                "b_epoch": epoch,
                "b_now": micros(now),
            }
            for id, version in versions.items()
        ]

        mine = sa.select(schema.tenants.c.shard).where(schema.tenants.c.id == tenant)

        def work(connection: sa.Connection) -> None:
            # Held until the rows stand, so that no move of the tenant passes between.
            if connection.scalar(mine.with_for_update(read=True)) != shard:
                return
            connection.execute(_MARK, rows)
            self._upsert_residency(connection, resident)

        self._database.write(work)

    def _upsert_residency(self, connection: sa.Connection, rows: list[dict]) -> None:
        """Only of cubes that are at this very version: a late word about a deleted one is dropped."""
        insert = sqlite.insert if self._database.sqlite else postgresql.insert
        statement = insert(schema.residency).from_select(
            [column.name for column in schema.residency.columns], _RESIDENT
        )
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["cube", "tier", "medium", "location"],
                set_={
                    name: statement.excluded[name]
                    for name in ("version", "size_bytes", "epoch", "updated_at")
                },
            ),
            rows,
        )

    def unmark(self, tenant: TenantId, ids: Iterable[CubeId], *, now: datetime) -> None:
        """Note that the index must be given these cubes again."""
        rows = [{"b_id": id, "b_tenant": tenant, "b_now": micros(now)} for id in ids]
        if rows:
            self._database.write(lambda connection: connection.execute(_UNMARK, rows))

    def pending(self, *, shard: int, before: datetime, limit: int) -> list[MemCube]:
        """Cubes that the index should hold and does not, oldest first, last changed before ``before``."""
        query = (
            sa.select(_cubes)
            .join(schema.tenants, schema.tenants.c.id == _cubes.c.tenant)
            .where(
                _cubes.c.searchable,
                _cubes.c.text != "",
                schema.tenants.c.shard == shard,
                _cubes.c.changed_at < micros(before),
                _cubes.c.indexed_version != _cubes.c.version,
            )
            .order_by(_cubes.c.changed_at)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [cube_of(row) for row in connection.execute(query).mappings()]

    def adopt(self, *, index: str, shard: int, now: datetime) -> int:
        """Make every cube of a shard pending that another index holds; returns how many.

        Called once when a shard opens: the embedder may have been changed while it was down.
        """
        mine = sa.select(schema.tenants.c.id).where(schema.tenants.c.shard == shard)

        def work(connection: sa.Connection) -> int:
            done = connection.execute(
                sa.update(_cubes)
                .where(
                    _cubes.c.tenant.in_(mine),
                    _cubes.c.searchable,
                    _cubes.c.indexed_version > 0,
                    _cubes.c.indexed_as != index,
                )
                .values(indexed_version=STALE, indexed_as=None, changed_at=micros(now))
            )
            return done.rowcount

        return self._database.write(work)

    def removals(self, *, shard: int, limit: int) -> list[Removal]:
        """Cubes that the index may hold and must not, oldest first."""
        query = (
            sa.select(_cubes.c.tenant, _cubes.c.id, _cubes.c.version)
            .join(schema.tenants, schema.tenants.c.id == _cubes.c.tenant)
            .where(
                ~_cubes.c.searchable,
                _cubes.c.indexed_version != _ZERO,
                schema.tenants.c.shard == shard,
            )
            .order_by(_cubes.c.changed_at)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [
                Removal(tenant=TenantId(row.tenant), id=CubeId(row.id), version=row.version)
                for row in connection.execute(query)
            ]

    def mark_removed(self, tenant: TenantId, ids: Iterable[CubeId]) -> None:
        """Note that the index no longer holds these cubes. One that is searchable again stays pending."""
        wanted = list(ids)

        def work(connection: sa.Connection) -> None:
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                connection.execute(
                    sa.update(_cubes)
                    .where(_cubes.c.tenant == tenant, _cubes.c.id.in_(part), ~_cubes.c.searchable)
                    .values(indexed_version=0, indexed_as=None)
                )
                connection.execute(
                    sa.delete(schema.residency).where(
                        schema.residency.c.cube.in_(part), schema.residency.c.tier == TIER
                    )
                )

        if wanted:
            self._database.write(work)

    def held(self, *, shard: int) -> Iterator[tuple[TenantId, CubeId, int]]:
        """Every cube of a shard that the index should hold now, with the version noted as held."""
        query = (
            sa.select(_cubes.c.tenant, _cubes.c.id, _cubes.c.indexed_version)
            .join(schema.tenants, schema.tenants.c.id == _cubes.c.tenant)
            .where(schema.tenants.c.shard == shard, _cubes.c.indexed_version > 0)
        )
        with self._database.reading() as connection:
            for row in connection.execute(query.execution_options(yield_per=2000)):
                yield TenantId(row.tenant), CubeId(row.id), row.indexed_version

    def wanted(self, *, shard: int, after: str, limit: int, now: datetime) -> list[Wanted]:
        """The next cubes behind an id that the index of a shard should hold."""
        query = (
            sa.select(
                _cubes.c.tenant,
                _cubes.c.id,
                _cubes.c.version,
                _cubes.c.changed_at,
                schema.unexpired(now).label("unexpired"),
            )
            .join(schema.tenants, schema.tenants.c.id == _cubes.c.tenant)
            .where(
                schema.tenants.c.shard == shard,
                _cubes.c.id > after,
                _cubes.c.searchable,
                _cubes.c.text != "",
            )
            .order_by(_cubes.c.id)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [
                Wanted(
                    tenant=TenantId(row.tenant),
                    id=CubeId(row.id),
                    version=row.version,
                    changed_at=moment(row.changed_at),
                    unexpired=bool(row.unexpired),
                )
                for row in connection.execute(query)
            ]

    def changed_since(
        self, tenant: TenantId, ids: Iterable[CubeId], *, since: datetime
    ) -> set[CubeId]:
        """Those of the cubes for which index work has arisen since."""
        wanted, found = list(ids), set[CubeId]()
        with self._database.reading() as connection:
            for start in range(0, len(wanted), 500):
                query = sa.select(_cubes.c.id).where(
                    _cubes.c.tenant == tenant,
                    _cubes.c.id.in_(wanted[start : start + 500]),
                    _cubes.c.changed_at > micros(since),
                )
                found.update(CubeId(id) for id in connection.execute(query).scalars())
        return found

    def exists(self, id: str) -> bool:
        """Whether the catalog has ever known a cube, of whatever tenant, wiped or not."""
        with self._database.reading() as connection:
            return connection.scalar(sa.select(_cubes.c.id).where(_cubes.c.id == id)) is not None

    def stats(self, tenant: TenantId | None = None) -> Stats:
        """Counts by state and of waiting work."""
        mine = sa.true() if tenant is None else _cubes.c.tenant == tenant
        by_state = sa.select(_cubes.c.state, sa.func.count()).where(mine).group_by(_cubes.c.state)
        pending = sa.select(sa.func.count(), sa.func.min(_cubes.c.changed_at)).where(
            mine,
            _cubes.c.searchable,
            _cubes.c.indexed_version != _cubes.c.version,
            _cubes.c.text != "",
        )
        removal = sa.select(sa.func.count()).where(
            mine, ~_cubes.c.searchable, _cubes.c.indexed_version != _ZERO
        )
        with self._database.reading() as connection:
            waiting, oldest = connection.execute(pending).one()
            return Stats(
                cubes_by_state={state: count for state, count in connection.execute(by_state)},
                pending_index=waiting,
                pending_removal=connection.execute(removal).scalar_one(),
                oldest_pending=moment_or_none(oldest),
            )


_MARK = (
    sa.update(_cubes)
    .where(
        _cubes.c.id == sa.bindparam("b_id"),
        _cubes.c.tenant == sa.bindparam("b_tenant"),
        _cubes.c.version == sa.bindparam("b_version"),
        _cubes.c.searchable,
    )
    .values(indexed_version=sa.bindparam("b_version"), indexed_as=sa.bindparam("b_index"))
)
_RESIDENT = sa.select(
    _cubes.c.id,
    sa.literal(TIER),
    sa.literal(MEDIUM),
    sa.bindparam("b_location", type_=sa.Text),
    _cubes.c.version,
    sa.bindparam("b_size", type_=sa.BigInteger),
    sa.bindparam("b_epoch", type_=sa.BigInteger),
    sa.bindparam("b_now", type_=sa.BigInteger),
).where(
    _cubes.c.id == sa.bindparam("b_id"),
    _cubes.c.tenant == sa.bindparam("b_tenant"),
    _cubes.c.version == sa.bindparam("b_version"),
    _cubes.c.searchable,
)
_UNMARK = (
    sa.update(_cubes)
    .where(_cubes.c.id == sa.bindparam("b_id"), _cubes.c.tenant == sa.bindparam("b_tenant"))
    .values(
        indexed_version=sa.case((_cubes.c.searchable, STALE), else_=_cubes.c.indexed_version),
        changed_at=sa.bindparam("b_now"),
    )
)
