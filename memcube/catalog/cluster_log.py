"""What happened to the cluster: nodes that came, went and were to drain, shards that were opened, who leads.

Each line is written by the transaction that makes it so. With the actions (``memcube.catalog.ActionBook``) it is
the scheduler's journal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.engine import Database
from memcube.catalog.rows import row_by_id
from memcube.catalog.schema import micros, moment
from memcube.ids import IdSource

_events = schema.cluster_events


class ClusterEventKind(StrEnum):
    """What happened."""

    NODE_UP = "node_up"
    NODE_DOWN = "node_down"
    NODE_DRAINS = "node_drains"
    NODE_UNDRAINED = "node_undrained"
    NODE_FORGOTTEN = "node_forgotten"
    SHARD_OPENED = "shard_opened"
    LEADER = "leader"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """One line. ``node`` is empty where it is about none."""

    id: str
    kind: ClusterEventKind
    node: str
    reason: str
    at: datetime


class ClusterLog:
    """Reads and shortens it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, *, before: str | None = None, limit: int = 50) -> list[ClusterEvent]:
        """Newest first, from the event before ``before`` on."""
        query = sa.select(_events)
        if before is not None:
            query = query.where(_events.c.id < before)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_events.c.id.desc()).limit(limit)).mappings()
            return [_event_of(row) for row in rows]

    def get(self, id: str) -> ClusterEvent:
        """
        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as connection:
            return _event_of(row_by_id(connection, _events, id, what="event"))

    def prune(self, *, before: datetime) -> int:
        """Forget what happened before a time; how many events."""
        query = sa.delete(_events).where(_events.c.at < micros(before))
        return self._database.write(lambda connection: connection.execute(query).rowcount)


def note_event(
    connection: sa.Connection,
    kind: ClusterEventKind,
    *,
    node: str = "",
    reason: str,
    new_id: IdSource,
    now: datetime,
) -> None:
    """Write a line in a transaction that is open."""
    row = {"id": new_id(now), "kind": kind, "node": node, "reason": reason, "at": micros(now)}
    connection.execute(sa.insert(_events), row)


def _event_of(row: Mapping[Any, Any]) -> ClusterEvent:
    return ClusterEvent(
        id=row["id"],
        kind=ClusterEventKind(row["kind"]),
        node=row["node"],
        reason=row["reason"],
        at=moment(row["at"]),
    )
