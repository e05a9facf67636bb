"""When cubes left the search and came back, and what is known of those that were wiped.

For the transactions that do it. Of a wiped cube its id, its time and digests of whose it was are kept,
for FORGOTTEN_KEPT: so much that a comparison or a rollback can say what it can't bring back.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.schema import micros
from memcube.ids import TenantId, digest

FORGOTTEN_KEPT = timedelta(days=30)
_cubes, _states, _forgotten = schema.cubes, schema.cube_states, schema.forgotten


def note_state(connection: sa.Connection, id: str, state: str, now: datetime) -> None:
    """A move led to this state."""
    connection.execute(sa.insert(_states), {"cube": id, "at": micros(now), "state": state})


def note_forgotten(connection: sa.Connection, ids: Sequence[str], now: datetime) -> None:
    """At most some hundred cubes are about to be wiped, or have run out; those noted already stay."""
    known = sa.select(_forgotten.c.cube)
    query = sa.select(
        _cubes.c.id, _cubes.c.tenant, _cubes.c.user_id, _cubes.c.agent_id, _cubes.c.run_id
    ).where(_cubes.c.id.in_(ids), _cubes.c.id.not_in(known.where(_forgotten.c.cube.in_(ids))))
    rows = [
        {"cube": row.id, "tenant": row.tenant, "at": micros(now)}
        | digests(row.tenant, row._asdict())
        for row in connection.execute(query)
    ]
    if rows:
        connection.execute(sa.insert(_forgotten), rows)


def digests(tenant: TenantId, scope: Mapping[str, str | None]) -> dict[str, str | None]:
    """The parts of a scope as they are kept of a wiped cube."""
    return {
        name: None if scope[name] is None else digest("forgotten", tenant, name, scope[name])
        for name in ("user_id", "agent_id", "run_id")
    }


def drop_log(connection: sa.Connection, ids: Sequence[str]) -> None:
    """Wiped cubes have no past."""
    connection.execute(sa.delete(_states).where(_states.c.cube.in_(ids)))


def prune_forgotten(connection: sa.Connection, now: datetime) -> None:
    """Forget also that they were forgotten."""
    until = micros(now - FORGOTTEN_KEPT)
    connection.execute(sa.delete(_forgotten).where(_forgotten.c.at < until))


def scope_is(
    table: sa.FromClause, wanted: Mapping[str, str | None]
) -> Iterable[sa.ColumnElement[bool]]:
    """The conditions that a row lies in a scope: what is None there may be anything."""
    return [table.c[name] == value for name, value in wanted.items() if value is not None]
