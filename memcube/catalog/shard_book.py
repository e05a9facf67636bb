"""Nodes of the cluster and shards of the plaintext tier: which there are, where they run, whom they serve.

A tenant lies in one shard (``tenants.shard``). A shard belongs on one node, its *home*, and is started on
another one while that is down. What a payload's location names is the shard, so that nothing need be noted
anew when it is. Nodes are noted by the scheduler's leader; that one *drains* is an operator's word, which
stands until it is taken back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.cluster_log import ClusterEventKind, note_event
from memcube.catalog.engine import Database
from memcube.catalog.fence import LEASE, fence
from memcube.catalog.schema import micros, moment
from memcube.errors import Conflict, NotFound
from memcube.ids import IdSource, TenantId
from memcube.scheduler.actions import shard_location
from memcube.tiers.moving import Standing

_nodes, _shards, _tenants = schema.nodes, schema.shards, schema.tenants
_actions, _placements = schema.actions, schema.placements


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSeen:
    """A node as the cluster has it now."""

    name: str
    labels: Mapping[str, str]
    alive: bool
    is_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node as it is noted. ``since`` is when it came, went, or was told to drain or not to."""

    name: str
    labels: Mapping[str, str]
    alive: bool
    is_head: bool
    draining: bool
    since: datetime
    seen_at: datetime

    @property
    def takes_new(self) -> bool:
        """Whether it is up and may be given something."""
        return self.alive and not self.draining

    @property
    def words(self) -> frozenset[str]:
        """What names it, and what labels of cubes are matched with: its name, ``key=value`` of its labels, and
        the keys of those that are ``true``."""
        words = {self.name}
        for key, value in self.labels.items():
            words.add(f"{key}={value}")
            if str(value).lower() == "true":
                words.add(key)
        return frozenset(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A shard. ``node`` is where it was opened last; ``epoch`` 0: it never was."""

    shard: int
    home: str
    node: str
    epoch: int
    location: str
    updated_at: datetime
    num_tenants: int = 0

    @property
    def is_away(self) -> bool:
        """Whether it runs elsewhere than where it belongs."""
        return self.node != self.home


class ShardBook:
    """The nodes and the shards."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    # -- shards --------------------------------------------------------------------------------

    def opened(self, shard: int, *, node: str, location: str, epoch: int, now: datetime) -> None:
        """Note that a shard runs on a node, unless a later epoch of it is noted already."""
        values = {
            "node": node,
            "location": location,
            "epoch": epoch,
            "updated_at": micros(now),
        }

        def work(connection: sa.Connection) -> None:
            known = connection.scalar(sa.select(_shards.c.epoch).where(_shards.c.shard == shard))
            if known is None:
                connection.execute(sa.insert(_shards), {"shard": shard, "home": node, **values})
            elif (
                connection.execute(
                    sa.update(_shards)
                    .where(_shards.c.shard == shard, _shards.c.epoch < epoch)
                    .values(values)
                ).rowcount
                != 1
            ):
                return
            self._note(
                connection,
                ClusterEventKind.SHARD_OPENED,
                node,
                f"shard {shard}, under epoch {epoch}",
                now,
            )

        self._database.write(work)

    def add(self, node: str, *, leader: int, now: datetime) -> ShardRecord:
        """A new shard, which belongs on a node and is to be opened there.

        Raises:
            StaleEpoch: another leads.
        """

        def work(connection: sa.Connection) -> ShardRecord:
            fence(connection, LEASE, leader)
            last = connection.scalar(sa.select(sa.func.max(_shards.c.shard)))
            row = {
                "shard": 0 if last is None else last + 1,
                "home": node,
                "node": node,
                "location": "",
                "epoch": 0,
                "updated_at": micros(now),
            }
            connection.execute(sa.insert(_shards), row)
            return ShardRecord(**{**row, "updated_at": now})

        return self._database.write(work)

    def shards(self) -> list[ShardRecord]:
        """All shards that were ever opened or added, by number, with how many tenants lie in each."""
        counts = (
            sa.select(_tenants.c.shard, sa.func.count().label("num"))
            .group_by(_tenants.c.shard)
            .subquery()
        )
        query = (
            sa.select(_shards, sa.func.coalesce(counts.c.num, 0).label("num"))
            .outerjoin(counts, counts.c.shard == _shards.c.shard)
            .order_by(_shards.c.shard)
        )
        with self._database.reading() as connection:
            return [
                ShardRecord(
                    shard=row.shard,
                    home=row.home,
                    node=row.node,
                    epoch=row.epoch,
                    location=row.location,
                    updated_at=moment(row.updated_at),
                    num_tenants=row.num,
                )
                for row in connection.execute(query)
            ]

    def homes(self) -> dict[int, str]:
        """The node that each shard belongs on which was ever opened or added."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(_shards.c.shard, _shards.c.home))
            return {shard: home for shard, home in rows}

    def numbers(self, configured: int) -> list[int]:
        """The shards that there are: those of the configuration, and those that were added."""
        with self._database.reading() as connection:
            return sorted({*range(configured), *connection.scalars(sa.select(_shards.c.shard))})

    # -- tenants -------------------------------------------------------------------------------

    def shard_of(self, tenant: TenantId) -> int:
        """The shard that a tenant lies in.

        Raises:
            NotFound: no such tenant.
        """
        rows = self._database.rows(_SHARD_OF, {"tenant": tenant})
        if not rows:
            raise NotFound("tenant", tenant)
        return rows[0].shard

    def standing(self, tenant: TenantId, shard: int) -> Standing:
        """How a tenant stands to a shard."""
        rows = self._database.rows(_STANDING, {"tenant": tenant, "location": shard_location(shard)})
        if not rows:
            return Standing.UNKNOWN
        if rows[0].shard != shard:
            return Standing.ELSEWHERE
        return Standing.LEAVING if rows[0].num_moves else Standing.HERE

    def moving(self) -> set[TenantId]:
        """The tenants of which a move as a whole is under way."""
        query = sa.select(_actions.c.tenant).where(
            _actions.c.cube == "", _actions.c.closed_at.is_(None)
        )
        with self._database.reading() as connection:
            return {TenantId(name) for name in connection.scalars(query)}

    def epochs(self) -> dict[TenantId, int]:
        """The epochs of tenants that were ever moved as a whole; those of the others are 0."""
        query = sa.select(_placements.c.tenant, _placements.c.epoch).where(_placements.c.cube == "")
        with self._database.reading() as connection:
            return {TenantId(tenant): epoch for tenant, epoch in connection.execute(query)}

    # -- nodes ---------------------------------------------------------------------------------

    def note_nodes(self, seen: Sequence[NodeSeen], *, leader: int, now: datetime) -> None:
        """Note what the cluster has now. A node that is not among ``seen`` is down.

        Raises:
            StaleEpoch: another leads.
        """

        def work(connection: sa.Connection) -> None:
            fence(connection, LEASE, leader)
            held = sa.select(_nodes).order_by(_nodes.c.name).with_for_update()
            known = {row.name: row for row in connection.execute(held)}
            for node in seen:
                row = known.pop(node.name, None)
                if row is None and not node.alive:
                    continue  # Ray remembers it; here it was forgotten, or never used
                values = {
                    "labels": dict(node.labels),
                    "alive": node.alive,
                    "is_head": node.is_head,
                    "seen_at": micros(now) if row is None or node.alive else row.seen_at,
                }
                if row is None:
                    fresh = {"name": node.name, "draining": False, "since": micros(now)}
                    connection.execute(sa.insert(_nodes), fresh | values)
                    self._note(connection, ClusterEventKind.NODE_UP, node.name, "it joined", now)
                else:
                    values["since"] = row.since if row.alive == node.alive else micros(now)
                    connection.execute(
                        sa.update(_nodes).where(_nodes.c.name == node.name).values(values)
                    )
                    if row.alive and not node.alive:
                        self._note_down(connection, row, now)
                    elif node.alive and not row.alive:
                        self._note(
                            connection, ClusterEventKind.NODE_UP, node.name, "it came back", now
                        )
            gone = [row for row in known.values() if row.alive]
            for row in gone:
                self._note_down(connection, row, now)
            if gone:
                connection.execute(
                    sa.update(_nodes)
                    .where(_nodes.c.name.in_([row.name for row in gone]))
                    .values(alive=False, since=micros(now))
                )

        self._database.write(work)

    def nodes(self) -> list[NodeRecord]:
        """All nodes that were not forgotten, by name."""
        with self._database.reading() as connection:
            return [
                _node(row) for row in connection.execute(sa.select(_nodes).order_by(_nodes.c.name))
            ]

    def node(self, name: str) -> NodeRecord:
        """
        Raises:
            NotFound: no such node.
        """
        with self._database.reading() as connection:
            return _node_of(connection, name)

    def nodes_with(self, word: str) -> frozenset[str]:
        """The nodes of a name or label that may be given something.

        Raises:
            NotFound: none.
        """
        found = frozenset(n.name for n in self.nodes() if n.takes_new and word in n.words)
        if not found:
            raise NotFound("node that is up and not drained, by name or label", word)
        return found

    def drain(self, name: str, draining: bool, *, now: datetime) -> NodeRecord:
        """Note that a node takes nothing new and is to be emptied, or may be used again. Idempotent.

        Raises:
            NotFound: no such node.
            Conflict: there is no other to take over what lies there.
        """

        def work(connection: sa.Connection) -> NodeRecord:
            # All are held, so that of two calls one sees what the other did.
            connection.execute(sa.select(_nodes.c.name).order_by(_nodes.c.name).with_for_update())
            node = _node_of(connection, name)
            if node.draining == draining:
                return node
            others = sa.select(_nodes.c.name).where(
                _nodes.c.alive, ~_nodes.c.draining, _nodes.c.name != name
            )
            if draining and connection.execute(others.limit(1)).first() is None:
                raise Conflict(
                    f"no other node is up and takes anything; let one join before {name!r} is drained"
                )
            connection.execute(
                sa.update(_nodes)
                .where(_nodes.c.name == name)
                .values(draining=draining, since=micros(now))
            )
            kind = ClusterEventKind.NODE_DRAINS if draining else ClusterEventKind.NODE_UNDRAINED
            self._note(connection, kind, name, "an operator asked for it", now)
            return _node_of(connection, name)

        return self._database.write(work)

    def forget_node(self, name: str, *, now: datetime) -> None:
        """Take a node that is down off the list. Its shards belong where they run.

        Raises:
            NotFound: no such node. Conflict: it is up.
        """

        def work(connection: sa.Connection) -> None:
            if _node_of(connection, name, lock=True).alive:
                raise Conflict(f"node {name!r} is up; stop its Ray first")
            connection.execute(sa.delete(_nodes).where(_nodes.c.name == name))
            connection.execute(
                sa.update(_shards).where(_shards.c.home == name).values(home=_shards.c.node)
            )
            self._note(
                connection, ClusterEventKind.NODE_FORGOTTEN, name, "an operator asked for it", now
            )

        self._database.write(work)

    def _note_down(self, connection: sa.Connection, row: sa.Row, now: datetime) -> None:
        why = "it left, as it was to drain" if row.draining else "Ray sees it no more"
        self._note(connection, ClusterEventKind.NODE_DOWN, row.name, why, now)

    def _note(
        self,
        connection: sa.Connection,
        kind: ClusterEventKind,
        node: str,
        reason: str,
        now: datetime,
    ) -> None:
        note_event(connection, kind, node=node, reason=reason, new_id=self._new_id, now=now)


def shards_to_choose(connection: sa.Connection) -> list[int]:
    """The shards that a new tenant may get: those that run where they belong, on nodes that take something
    new; where there are none, all that were opened."""
    opened = sa.select(_shards.c.shard).where(_shards.c.epoch > 0).order_by(_shards.c.shard)
    query = opened.outerjoin(_nodes, _nodes.c.name == _shards.c.node).where(
        _shards.c.node == _shards.c.home,
        sa.or_(_nodes.c.name.is_(None), sa.and_(_nodes.c.alive, ~_nodes.c.draining)),
    )
    return list(connection.scalars(query)) or list(connection.scalars(opened))


def _node_of(connection: sa.Connection, name: str, *, lock: bool = False) -> NodeRecord:
    query = sa.select(_nodes).where(_nodes.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound("node", name)
    return _node(row)


def _node(row: sa.Row) -> NodeRecord:
    return NodeRecord(
        name=row.name,
        labels=row.labels,
        alive=row.alive,
        is_head=row.is_head,
        draining=row.draining,
        since=moment(row.since),
        seen_at=moment(row.seen_at),
    )


_SHARD_OF = sa.select(_tenants.c.shard).where(_tenants.c.id == sa.bindparam("tenant"))
_STANDING = sa.select(
    _tenants.c.shard,
    sa.select(sa.func.count())
    .select_from(_actions)
    .where(
        _actions.c.tenant == sa.bindparam("tenant"),
        _actions.c.cube == "",
        _actions.c.closed_at.is_(None),
        _actions.c.takes_over,
        _actions.c.from_location == sa.bindparam("location"),
    )
    .scalar_subquery()
    .label("num_moves"),
).where(_tenants.c.id == sa.bindparam("tenant"))
