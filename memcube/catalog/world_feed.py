"""What the scheduler is told of cubes: which changed, and how they are now.

No text leaves the catalog here: of it the length is enough.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.schema import micros, moment
from memcube.cube import Kind, Sensitivity
from memcube.ids import CubeId, TenantId, digest
from memcube.lifecycle import State
from memcube.scheduler.actions import Medium, Place, Tier
from memcube.scheduler.world import NEVER, CubeFacts, Held

OVERLAP = timedelta(seconds=30)
"""A write may be stamped before it commits, by a clock that is not ours: so far is looked back."""
CHARS_PER_TOKEN = 4
ADAPTERS = Place(Tier.PARAMETRIC, Medium.OBJECT, "objects")
_CHUNK = 500
_cubes, _residency, _placements = schema.cubes, schema.residency, schema.placements
_inside, _adapters = schema.adapter_cubes, schema.adapter_versions
Key = tuple[TenantId, CubeId]


class WorldFeed:
    """The catalog as the scheduler's feed (``memcube.scheduler.control.Feed``).

    Uses are not told of: who counts them knows them. Nor are epochs that changed with a member: what is
    planned at an old one is refused, and read again then.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], datetime],
        consents: Callable[[TenantId], bool] = lambda tenant: False,
    ) -> None:
        """``consents``: whether a tenant's owner lets its cubes be trained."""
        self._database = database
        self._clock = clock
        self._consents = consents
        self._told: dict[Key, set[tuple[int, int, int]]] = {}
        """What was told of lately, and when each was written: the time that is looked back is read again and
        again."""

    def changed(self, cursor: int) -> tuple[Sequence[Key], int]:
        """Cubes that were written since a cursor, or of which a payload was listed, and the next one; with
        0 all that can be read. What was told once and was not written since is not told again."""
        upcoming = micros(self._clock() - OVERLAP)
        if not cursor:
            self._told = {}
            with self._database.reading() as connection:
                rows = connection.execute(_ALL)
                return [(TenantId(row.tenant), CubeId(row.id)) for row in rows], upcoming
        stamps: defaultdict[Key, set[tuple[int, int, int]]] = defaultdict(set)
        with self._database.reading() as connection:
            for row in connection.execute(_WRITTEN, {"cursor": cursor}):
                key = TenantId(row.tenant), CubeId(row.id)
                stamps[key].add((row.changed_at, row.version, row.listed_at))
        # A stamp that leaves the time that is looked back tells nothing new; one that joins does.
        fresh = [key for key, found in stamps.items() if found - self._told.get(key, set())]
        self._told = stamps
        return fresh, upcoming

    def read(self, keys: Sequence[Key]) -> list[tuple[CubeFacts, list[Held]]]:
        """How cubes are now; those that are gone are left out."""
        found: list[tuple[CubeFacts, list[Held]]] = []
        with self._database.reading() as connection:
            owners = {
                row.tenant: row
                for row in connection.execute(
                    sa.select(_placements).where(_placements.c.cube == "")
                )
            }
            for start in range(0, len(keys), _CHUNK):
                ids = [id for _, id in keys[start : start + _CHUNK]]
                held, listed_at = _held(connection, ids)
                query = _FACTS.where(_cubes.c.id.in_(ids))
                for row in connection.execute(query):
                    owner = row if row.owner_location is not None else owners.get(row.tenant)
                    facts = self._facts(row, owner, listed_at.get(row.id))
                    found.append((facts, held[row.id]))
        return found

    def _facts(self, row: Any, owner: Any, kv_listed_at: int | None) -> CubeFacts:
        tenant = TenantId(row.tenant)
        # What was built by request is in no placement, and has as much time to be used as what was moved.
        moved = [at / 1e6 for at in (row.moved_at, kv_listed_at) if at is not None]
        place = None
        if owner is not None and owner.owner_location is not None:
            place = Place(Tier.PLAINTEXT, Medium(owner.owner_medium), owner.owner_location)
        return CubeFacts(
            id=CubeId(row.id),
            tenant=tenant,
            version=row.version,
            epoch=row.epoch or 0,
            owner=place,
            num_bytes=row.chars,
            tokens=-(-row.chars // CHARS_PER_TOKEN),
            changed_at=moment(row.updated_at).timestamp(),
            created_at=moment(row.created_at).timestamp(),
            state=State(row.state),
            kind=Kind(row.kind),
            sensitivity=Sensitivity(row.sensitivity),
            scope=digest("scope", row.user_id, row.agent_id),
            labels=frozenset(row.tags),
            frozen=row.frozen,
            consents=self._consents(tenant),
            session_bound=row.run_id is not None,
            indexed_version=row.indexed_version,
            rate=row.rate,
            used_at=0.0 if row.last_used_at is None else row.last_used_at / 1e6,
            expires_at=NEVER if row.expires_at is None else row.expires_at / 1e6,
            moved_at=max(moved, default=-NEVER),
        )


_ALL = sa.select(_cubes.c.tenant, _cubes.c.id).where(
    _cubes.c.state.not_in((State.DELETED, State.EXPIRED))
)
_STAMPED = _cubes.c.tenant, _cubes.c.id, _cubes.c.changed_at, _cubes.c.version
_WRITTEN = sa.union_all(
    sa.select(*_STAMPED, sa.literal(0).label("listed_at")).where(
        _cubes.c.changed_at >= sa.bindparam("cursor")
    ),
    sa.select(*_STAMPED, _residency.c.updated_at.label("listed_at"))
    .join(_residency, _residency.c.cube == _cubes.c.id)
    .where(_residency.c.updated_at >= sa.bindparam("cursor")),
)
_FACTS = (
    sa.select(
        *(
            _cubes.c[name]
            for name in (
                "id",
                "tenant",
                "state",
                "version",
                "kind",
                "sensitivity",
                "user_id",
                "agent_id",
                "run_id",
                "tags",
                "frozen",
                "indexed_version",
                "rate",
                "last_used_at",
                "expires_at",
                "created_at",
                "updated_at",
            )
        ),
        sa.func.length(_cubes.c.text).label("chars"),
        _placements.c.epoch,
        _placements.c.owner_medium,
        _placements.c.owner_location,
        _placements.c.updated_at.label("moved_at"),
    )
    .outerjoin(
        _placements,
        sa.and_(_placements.c.cube == _cubes.c.id, _placements.c.tenant == _cubes.c.tenant),
    )
    .where(_cubes.c.state.not_in((State.DELETED, State.EXPIRED)))
)


def _held(
    connection: sa.Connection, ids: Sequence[str]
) -> tuple[defaultdict[str, list[Held]], dict[str, int]]:
    """What is listed of cubes, and the adapters that serve with them inside; and when KV was listed last."""
    found: defaultdict[str, list[Held]] = defaultdict(list)
    kv_listed_at: dict[str, int] = {}
    for row in connection.execute(sa.select(_residency).where(_residency.c.cube.in_(ids))):
        place = Place(Tier(row.tier), Medium(row.medium), row.location)
        found[row.cube].append(Held(place, row.version, row.size_bytes))
        if place.tier is Tier.ACTIVATION:
            kv_listed_at[row.cube] = max(row.updated_at, kv_listed_at.get(row.cube, 0))
    serving = (
        sa.select(_inside.c.cube, sa.func.max(_inside.c.cube_version).label("version"))
        .join(
            _adapters,
            sa.and_(
                _adapters.c.adapter == _inside.c.adapter, _adapters.c.version == _inside.c.version
            ),
        )
        .where(_inside.c.cube.in_(ids), _adapters.c.state == "serving")
        .group_by(_inside.c.cube)
    )
    for row in connection.execute(serving):
        found[row.cube].append(Held(ADAPTERS, row.version, 0))
    return found, kv_listed_at
