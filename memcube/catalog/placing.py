"""Where payloads are listed, and the epochs by which they change hands.

A cube's *placement* is its epoch, and who takes its writes where that was ever moved. To commit an action
is to change the list and to take the epoch in one transaction; a change of content counts one more too.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.action_rows import ActionRecord
from memcube.catalog.schema import micros
from memcube.errors import Conflict
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Copy, Drop, Medium, Place, Tier, shard_at

_CHUNK = 500
_cubes, _residency, _placements = schema.cubes, schema.residency, schema.placements
_tenants = schema.tenants


class Placement(NamedTuple):
    """A cube's epoch, and who takes its writes where that was ever moved."""

    epoch: int
    owner: Place | None


class Listed(NamedTuple):
    """A payload as the catalog has it. ``current`` is the cube's version, None where it is out of search."""

    tenant: TenantId
    cube: CubeId
    version: int
    num_bytes: int
    epoch: int
    current: int | None


def next_epochs(connection: sa.Connection, cubes: sa.Select[tuple[str]]) -> None:
    """Count one more for cubes whose content changed: what was planned before can't commit any more."""
    connection.execute(
        sa.update(_placements)
        .where(_placements.c.cube.in_(cubes))
        .values(epoch=_placements.c.epoch + 1)
    )


def epochs_for(
    connection: sa.Connection, moves: Sequence[Copy | Drop], now: datetime
) -> dict[tuple[str, str], int]:
    """The epochs of the cubes; a cube of which none is noted gets one."""
    wanted = {(move.tenant, move.cube or "") for move in moves}
    found: dict[tuple[str, str], int] = {}
    cubes = sorted({cube for _, cube in wanted})
    for start in range(0, len(cubes), _CHUNK):
        query = sa.select(_placements.c.tenant, _placements.c.cube, _placements.c.epoch)
        query = query.where(_placements.c.cube.in_(cubes[start : start + _CHUNK]))
        found |= {(tenant, cube): epoch for tenant, cube, epoch in connection.execute(query)}
    fresh = sorted(wanted - set(found))
    if fresh:
        rows = [
            {"tenant": tenant, "cube": cube, "epoch": 0, "updated_at": micros(now)}
            for tenant, cube in fresh
        ]
        connection.execute(sa.insert(_placements), rows)
        found |= dict.fromkeys(fresh, 0)
    return found


def list_copy(connection: sa.Connection, record: ActionRecord, now: datetime) -> None:
    """Note a copy as resident, if the cube is still what was copied."""
    if record.target is None:
        raise AssertionError("a copy has a target")
    if record.cube is None:
        _take_tenant(connection, record)
        return
    _list(connection, record, record.cube, record.target, epoch=record.epoch + 1, now=now)


def list_again(connection: sa.Connection, record: ActionRecord, now: datetime) -> None:
    """Note what a drop struck as resident again, if the cube is still what it was, and count one epoch more."""
    if record.source is None or record.cube is None:
        raise Conflict("only a cube's payload is listed again")
    epoch = placement_of(connection, record.tenant, record.cube, lock=True).epoch + 1
    _list(connection, record, record.cube, record.source, epoch=epoch, now=now)
    take_epoch(connection, record, now, epoch=epoch)


def _list(
    connection: sa.Connection,
    record: ActionRecord,
    cube: CubeId,
    place: Place,
    *,
    epoch: int,
    now: datetime,
) -> None:
    query = sa.select(_cubes.c.version).where(
        _cubes.c.id == cube,
        _cubes.c.tenant == record.tenant,
        _cubes.c.searchable,
        schema.unexpired(now),
    )
    version = connection.scalar(query.with_for_update(read=True))
    if version != record.version:
        raise Conflict(
            "the cube is gone"
            if version is None
            else f"the cube is at version {version}, not {record.version}"
        )
    connection.execute(sa.delete(_residency).where(*_at(cube, place)))
    connection.execute(
        sa.insert(_residency),
        {
            "cube": cube,
            "tier": place.tier,
            "medium": place.medium,
            "location": place.location,
            "version": record.version,
            "size_bytes": record.num_bytes,
            "epoch": epoch,
            "updated_at": micros(now),
        },
    )


def _take_tenant(connection: sa.Connection, record: ActionRecord) -> None:
    """Let a tenant lie in the target's shard. Its callers wait for this transaction, so it is a short one:
    what is listed of its cubes follows when the copy is done (``list_tenant``)."""
    source, target = record.source, record.target
    if source is None or target is None:
        raise Conflict("a tenant is copied from a place to another one")
    here, there = shard_at(source.location), shard_at(target.location)
    if here is None or there is None:
        return
    moved = connection.execute(
        sa.update(_tenants)
        .where(_tenants.c.id == record.tenant, _tenants.c.shard == here)
        .values(shard=there)
    )
    if moved.rowcount != 1:
        raise Conflict(f"the tenant does not lie in {source.location}")


def list_tenant(
    connection: sa.Connection, record: ActionRecord, now: datetime, *, limit: int
) -> int:
    """Note of some of what a tenant had at the source of a committed copy that it lies at the target; how many
    payloads. What was put there since is listed already."""
    source, target = record.source, record.target
    if source is None or target is None:
        raise AssertionError("a tenant was copied from a place to another one")
    mine = sa.select(_cubes.c.id).where(_cubes.c.tenant == record.tenant)
    query = sa.select(_residency.c.cube).where(*_lies_at(source), _residency.c.cube.in_(mine))
    cubes = list(connection.scalars(query.limit(limit)))
    if not cubes:
        return 0
    some = (*_lies_at(source), _residency.c.cube.in_(cubes))
    there = sa.select(_residency.c.cube).where(*_lies_at(target), _residency.c.cube.in_(cubes))
    connection.execute(sa.delete(_residency).where(*some, _residency.c.cube.in_(there)))
    connection.execute(
        sa.update(_residency)
        .where(*some)
        .values(
            medium=target.medium,
            location=target.location,
            epoch=record.epoch + 1,
            updated_at=micros(now),
        )
    )
    return len(cubes)


def strike(connection: sa.Connection, record: ActionRecord, placement: Placement) -> None:
    """Take a payload off the list, unless a search needs it there."""
    place = record.source
    if place is None:
        raise AssertionError("a drop has a place")
    is_owner = placement.owner == place
    if record.cube is None:
        if is_owner:
            raise Conflict("the place takes the tenant's writes; another must take over first")
        mine = sa.select(_cubes.c.id).where(_cubes.c.tenant == record.tenant)
        here = sa.select(_residency.c.cube).where(_residency.c.cube.in_(mine), *_lies_at(place))
        if connection.execute(here.limit(1)).first() is not None:
            raise Conflict("payloads of the tenant are listed there")
        return
    if place.tier is Tier.PLAINTEXT:
        query = sa.select(_cubes.c.version).where(
            _cubes.c.id == record.cube, _cubes.c.tenant == record.tenant, _cubes.c.searchable
        )
        version = connection.scalar(query.with_for_update(read=True))
        if version is not None and is_owner:
            raise Conflict("the place takes the cube's writes; another must take over first")
        others = sa.select(_residency.c.location).where(
            _residency.c.cube == record.cube,
            _residency.c.tier == place.tier,
            _residency.c.version == version,
            sa.not_(sa.and_(*_at(record.cube, place))),
        )
        if version is not None and connection.execute(others.limit(1)).first() is None:
            raise Conflict("it is the last copy")
    connection.execute(sa.delete(_residency).where(*_at(record.cube, place)))


def _at(cube: str, place: Place) -> list[sa.ColumnElement[bool]]:
    return [_residency.c.cube == cube, *_lies_at(place)]


def _lies_at(place: Place) -> list[sa.ColumnElement[bool]]:
    return [
        _residency.c.tier == place.tier,
        _residency.c.medium == place.medium,
        _residency.c.location == place.location,
    ]


def take_epoch(
    connection: sa.Connection, record: ActionRecord, now: datetime, *, epoch: int
) -> None:
    """Make an epoch a cube's, and a copy's target the owner where it takes over."""
    values: dict[str, Any] = {"epoch": epoch, "updated_at": micros(now)}
    if record.takes_over and record.target is not None:
        values |= {"owner_medium": record.target.medium, "owner_location": record.target.location}
    connection.execute(
        sa.update(_placements)
        .where(_placements.c.tenant == record.tenant, _placements.c.cube == (record.cube or ""))
        .values(**values)
    )


def placement_of(
    connection: sa.Connection, tenant: TenantId, cube: CubeId | None, *, lock: bool = False
) -> Placement:
    """A cube's epoch and owner; of one that nothing was ever done to, 0 and None."""
    query = sa.select(_placements).where(
        _placements.c.tenant == tenant, _placements.c.cube == (cube or "")
    )
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        return Placement(0, None)
    owner = None
    if row.owner_location is not None:
        owner = Place(Tier.PLAINTEXT, Medium(row.owner_medium), row.owner_location)
    return Placement(row.epoch, owner)
