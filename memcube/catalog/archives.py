"""Which archived cubes have a copy among the objects, and which copies are to be removed.

The object is written first and noted here after, while the cube is archived still at the version that
was copied. It is *doomed* in the very transaction that restores or wipes the cube, so a crash at any
point leaves an object that the sweep or the doctor removes, never a row that promises what is not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.rows import version_of
from memcube.catalog.schema import micros, moment
from memcube.cube import Version
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import State

_archives, _cubes, _versions = schema.archives, schema.cubes, schema.versions
_FALSE = sa.literal(False, literal_execute=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveRecord:
    """One copy. ``sha256`` is of the object's bytes, ``content_sha256`` of what they stand for."""

    tenant: TenantId
    cube: CubeId
    version: int
    sha256: str
    content_sha256: str
    size_bytes: int
    created_at: datetime


class ArchiveBook:
    """The book of copies, over all tenants: the sweep's and the doctor's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def waiting(self, *, now: datetime, limit: int) -> list[tuple[TenantId, CubeId]]:
        """Archived cubes without a copy of their version."""
        copied = sa.exists().where(
            _archives.c.cube == _cubes.c.id,
            _archives.c.version == _cubes.c.version,
            ~_archives.c.doomed,
        )
        query = (
            sa.select(_cubes.c.tenant, _cubes.c.id)
            .where(_cubes.c.state == str(State.ARCHIVED), schema.unexpired(now), ~copied)
            .order_by(_cubes.c.id)
            .limit(limit)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [(TenantId(row.tenant), CubeId(row.id)) for row in rows]

    def contents(
        self, tenant: TenantId, id: CubeId
    ) -> tuple[Mapping[str, Any], list[Version]] | None:
        """An archived cube's row and versions, of one instant; None where it is none (any more)."""
        with self._database.reading() as connection:
            row = connection.execute(_archived(tenant, id)).mappings().first()
            if row is None:
                return None
            query = sa.select(_versions).where(_versions.c.cube == id).order_by(_versions.c.version)
            return dict(row), [version_of(v) for v in connection.execute(query).mappings()]

    def note(self, record: ArchiveRecord) -> bool:
        """The object is there; whether it is still wanted. If not, its writer removes it."""

        def work(connection: sa.Connection) -> bool:
            query = _archived(record.tenant, record.cube).with_for_update()
            row = connection.execute(query).mappings().first()
            if row is None or row["version"] != record.version:
                return False
            mine = _archives.c.cube == record.cube
            connection.execute(
                sa.update(_archives)
                .where(mine, _archives.c.sha256 != record.sha256)
                .values(doomed=True)
            )
            connection.execute(
                sa.delete(_archives).where(mine, _archives.c.sha256 == record.sha256)
            )
            connection.execute(
                sa.insert(_archives),
                {
                    "cube": record.cube,
                    "sha256": record.sha256,
                    "tenant": record.tenant,
                    "version": record.version,
                    "content_sha256": record.content_sha256,
                    "size_bytes": record.size_bytes,
                    "created_at": micros(record.created_at),
                    "doomed": False,
                },
            )
            return True

        return self._database.write(work)

    def of(self, tenant: TenantId, id: CubeId) -> ArchiveRecord | None:
        """A cube's copy, if it has one."""
        query = sa.select(_archives).where(
            _archives.c.tenant == tenant, _archives.c.cube == id, ~_archives.c.doomed
        )
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _record(row)

    def page(self, *, after: str = "", limit: int) -> list[ArchiveRecord]:
        """Copies in the order of their cubes' ids, over all tenants."""
        query = (
            sa.select(_archives)
            .where(_archives.c.cube > after, ~_archives.c.doomed)
            .order_by(_archives.c.cube)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def doomed(self, *, limit: int) -> list[ArchiveRecord]:
        """Copies whose objects are to be removed."""
        query = sa.select(_archives).where(_archives.c.doomed).limit(limit)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def removed(self, record: ArchiveRecord) -> None:
        """The object is gone."""
        which = (_archives.c.cube == record.cube, _archives.c.sha256 == record.sha256)
        self._database.write(
            lambda connection: connection.execute(
                sa.delete(_archives).where(*which, _archives.c.doomed)
            )
        )

    def lost(self, record: ArchiveRecord) -> None:
        """The object is missing or damaged: let another be made, and this one be removed."""
        which = (_archives.c.cube == record.cube, _archives.c.sha256 == record.sha256)
        self._database.write(
            lambda connection: connection.execute(
                sa.update(_archives).where(*which).values(doomed=True)
            )
        )

    def known(self, sha256s: Sequence[str]) -> set[str]:
        """Those of some hundred objects that a row names, doomed ones too."""
        query = sa.select(_archives.c.sha256).where(_archives.c.sha256.in_(sha256s))
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def put_back(
        self,
        record: ArchiveRecord,
        content: Mapping[str, Any],
        versions: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Write a copy's content over the cube's, which was found damaged; False where the cube has
        moved on meanwhile. ``versions`` are rows of the table."""

        def work(connection: sa.Connection) -> bool:
            query = _archived(record.tenant, record.cube).with_for_update()
            row = connection.execute(query).mappings().first()
            if row is None or row["version"] != record.version:
                return False
            connection.execute(
                sa.update(_cubes).where(_cubes.c.id == record.cube).values(**content)
            )
            connection.execute(sa.delete(_versions).where(_versions.c.cube == record.cube))
            connection.execute(sa.insert(_versions), list(versions))
            return True

        return self._database.write(work)


def doom_archives(connection: sa.Connection, ids: Sequence[str]) -> None:
    """For the transaction that wipes or restores at most some hundred cubes."""
    connection.execute(
        sa.update(_archives)
        .where(_archives.c.cube.in_(ids), _archives.c.doomed == _FALSE)
        .values(doomed=True)
    )


def _archived(tenant: TenantId, id: CubeId) -> sa.Select[Any]:
    return sa.select(_cubes).where(
        _cubes.c.tenant == tenant, _cubes.c.id == id, _cubes.c.state == str(State.ARCHIVED)
    )


def _record(row: Mapping[Any, Any]) -> ArchiveRecord:
    return ArchiveRecord(
        tenant=TenantId(row["tenant"]),
        cube=CubeId(row["cube"]),
        version=row["version"],
        sha256=row["sha256"],
        content_sha256=row["content_sha256"],
        size_bytes=row["size_bytes"],
        created_at=moment(row["created_at"]),
    )
