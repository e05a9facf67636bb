"""Nodes and shards as the world of the scheduler has them, brought up to date before each round.

Shards stand in the world as nodes of their own (``shard-3``), with the labels and the fitness of the node they
run on: what is planned for a shard holds wherever it is started again. One that runs away from its home, since
that was down, drains once the home is back, and is started there when it is empty.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from memcube.catalog.access import Tenant
from memcube.catalog.shard_book import NodeRecord, NodeSeen, ShardRecord
from memcube.ids import TenantId
from memcube.scheduler.actions import Drop, shard_at, shard_location, shard_place
from memcube.scheduler.enact import Call
from memcube.scheduler.world import Capacity, Node, World
from memcube.tiers.shard import ShardInfo

NOTE_EVERY = timedelta(seconds=30)
"""How often nodes are noted that are as they were."""
RESTART_EVERY = timedelta(minutes=1)
POLICY = "leftovers"


class Shards(Protocol):
    """What is asked of the catalog: ``memcube.catalog.ShardBook``."""

    def note_nodes(self, seen: Sequence[NodeSeen], *, leader: int, now: datetime) -> None: ...
    def nodes(self) -> list[NodeRecord]: ...
    def shards(self) -> list[ShardRecord]: ...
    def epochs(self) -> dict[TenantId, int]: ...
    def add(self, node: str, *, leader: int, now: datetime) -> ShardRecord: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """What a topology asks of the cluster. ``open_shard`` starts a shard on a node, after it has ended the one
    that runs where ``again`` is true; ``info`` asks one, and answers None where it says nothing in time."""

    nodes: Callable[[], Awaitable[Sequence[NodeSeen]]]
    info: Callable[[int], Awaitable[ShardInfo | None]]
    open_shard: Callable[[int, str, bool], Awaitable[None]]
    tenants: Callable[[], Sequence[Tenant]]


class Topology:
    """Brings a world up to date, and gives nodes that joined a shard of their own."""

    def __init__(
        self,
        book: Shards,
        ports: Ports,
        *,
        num_configured: int,
        shard_bytes: int,
        shard_per_node: bool,
        call: Call = asyncio.to_thread,
    ) -> None:
        """``num_configured`` shards there are from the beginning. ``shard_bytes`` is the room that placement
        reckons with. Without ``shard_per_node`` the shards that there are stay all."""
        self._num_configured = num_configured
        self._book = book
        self._ports = ports
        self._shard_bytes = shard_bytes
        self._shard_per_node = shard_per_node
        self._call = call
        self._noted: Mapping[str, NodeSeen] = {}
        self._noted_at: datetime | None = None
        self._opened: set[int] = set()
        self._restarted: dict[int, datetime] = {}
        self.shards: Sequence[ShardRecord] = ()

    async def update(self, world: World, *, leader: int, now: datetime) -> Sequence[Drop]:
        """Note the nodes that there are, and tell the world of them, of the shards and of who lies where; what
        is to be removed of what tenants left behind.

        Raises:
            StaleEpoch: another leads. Unavailable: the catalog does not answer.
        """
        await self._note(leader, now)
        nodes = {node.name: node for node in await self._call(self._book.nodes)}
        for node in nodes.values():
            world.set_node(_node(node.name, node))
        for name in set(world.nodes) - set(nodes):
            if shard_at(name) is None:
                world.remove_node(name)
        await self._open_shards(world, nodes, leader, now)
        for shard in self.shards:
            is_leaving = shard.is_away and _takes_new(nodes, shard.home)
            world.set_node(
                _node(shard_location(shard.shard), nodes.get(shard.node), is_leaving=is_leaving)
            )
            world.set_place(shard_place(shard.shard), Capacity(num_bytes=self._shard_bytes))
        world.tenant_epochs = await self._call(self._book.epochs)
        tenants = await self._call(self._ports.tenants)
        world.tenant_places = {tenant.id: shard_place(tenant.shard) for tenant in tenants}
        return await self._leftovers(world)

    async def _leftovers(self, world: World) -> list[Drop]:
        asked = [
            shard.shard
            for shard in self.shards
            if shard.epoch and world.is_readable(world.places.get(shard_place(shard.shard)))
        ]
        infos = await asyncio.gather(*(self._ports.info(shard) for shard in asked))
        return [
            Drop(
                tenant=tenant,
                cube=None,
                version=0,
                epoch=world.tenant_epochs.get(tenant, 0),
                place=shard_place(info.shard),
                num_bytes=0,
                policy=POLICY,
                reason="the tenant was moved to another shard",
            )
            for info in infos
            if info is not None
            for tenant in sorted(info.left)
            if tenant not in world.moving_tenants
            and world.tenant_places.get(tenant, shard_place(info.shard)) != shard_place(info.shard)
        ]

    async def _note(self, leader: int, now: datetime) -> None:
        seen = {node.name: node for node in await self._ports.nodes()}
        is_due = self._noted_at is None or now - self._noted_at >= NOTE_EVERY
        if is_due or seen != self._noted:
            await self._call(self._book.note_nodes, list(seen.values()), leader=leader, now=now)
            self._noted, self._noted_at = seen, now

    async def _open_shards(
        self, world: World, nodes: Mapping[str, NodeRecord], leader: int, now: datetime
    ) -> None:
        """Give each node that takes something a shard, and see that all shards are there, and at home."""
        self.shards = await self._call(self._book.shards)
        if sum(shard.shard < self._num_configured for shard in self.shards) < self._num_configured:
            return  # those of the configuration are not open yet
        if self._shard_per_node:
            served = {shard.home for shard in self.shards}
            for node in nodes.values():
                if node.takes_new and node.name not in served:
                    added = await self._call(self._book.add, node.name, leader=leader, now=now)
                    self.shards = [*self.shards, added]
        for shard in self.shards:
            if shard.shard not in self._opened:
                await self._ports.open_shard(shard.shard, shard.home, False)
                self._opened.add(shard.shard)
            elif shard.is_away and _takes_new(nodes, shard.home):
                await self._go_home(shard, world, now)

    async def _go_home(self, shard: ShardRecord, world: World, now: datetime) -> None:
        """Start a shard at home, once nothing lies in it and nothing is on its way. It takes some seconds to
        open, and is left alone for so long."""
        last = self._restarted.get(shard.shard)
        if shard.num_tenants or (last is not None and now - last < RESTART_EVERY):
            return
        info = await self._ports.info(shard.shard)
        if info is not None and not info.left and not world.moving_tenants:
            self._restarted[shard.shard] = now
            await self._ports.open_shard(shard.shard, shard.home, True)


def _takes_new(nodes: Mapping[str, NodeRecord], name: str) -> bool:
    return name in nodes and nodes[name].takes_new


def _node(name: str, on: NodeRecord | None, *, is_leaving: bool = False) -> Node:
    """A node, or a shard that runs on one. Of a shard whose node was forgotten it is not known that it is
    down."""
    if on is None:
        return Node(name=name, draining=is_leaving)
    return Node(
        name=name,
        labels=on.words,
        alive=on.alive,
        draining=on.draining or is_leaving,
        since=on.since.timestamp(),
    )
