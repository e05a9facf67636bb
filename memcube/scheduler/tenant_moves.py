"""Tasks that bring a tenant to a node: an operator's word, which is kept until it is so."""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from memcube.catalog import NewTask, Task
from memcube.errors import NotFound, Unavailable
from memcube.ids import TenantId, digest
from memcube.scheduler.actions import Copy, Place, Tier, shard_at
from memcube.scheduler.enact import Call
from memcube.scheduler.planner import OPERATOR
from memcube.scheduler.whole_tenants import bytes_by_tenant, move_tenant
from memcube.scheduler.world import World

KIND = "move_tenant"


class Homes(Protocol):
    """What is asked of the catalog: ``memcube.catalog.ShardBook``."""

    def homes(self) -> dict[int, str]: ...


class Asks(Protocol):
    """What is asked of who plans: ``memcube.scheduler.host.Moves``."""

    @property
    def world(self) -> World: ...
    def ask(self, actions: list[Copy]) -> None: ...


def tenant_move(tenant: TenantId, node: str) -> NewTask:
    """The task to bring a tenant to a node of this name or label. Of each tenant the last one holds
    (``TaskQueue.supersede``)."""
    return NewTask(
        kind=KIND,
        key=digest("task", KIND, tenant),
        payload={"node": node, "reason": f"an operator sends it to {node}"},
        priority=10,
        max_attempts=0,
    )


class TenantMoves:
    """Asks for the move, and is done when the tenant lies there."""

    def __init__(self, book: Homes, moves: Asks, *, call: Call = asyncio.to_thread) -> None:
        self._book = book
        self._moves = moves
        self._call = call

    async def move(self, task: Task, now: datetime) -> Mapping[str, Any]:
        """
        Raises:
            NotFound: no shard runs on such a node now. Unavailable: the move is not done yet.
        """
        del now
        world, wanted = self._moves.world, str(task.payload["node"])
        here = world.tenant_places.get(task.tenant)
        fits = [
            place for place in shards_on(world, wanted) if world.is_fit(world.places.get(place))
        ]
        if here is not None and here in fits:
            number = shard_at(here.location)
            homes = await self._call(self._book.homes)
            return {"shard": number, "node": None if number is None else homes.get(number)}
        if not fits:
            raise NotFound("shard that takes a tenant on node", wanted)
        if here is not None and task.tenant not in world.moving_tenants:
            used = world.used_bytes
            target = min(fits, key=lambda place: (used[world.places.get(place)], place))
            move = move_tenant(
                world,
                task.tenant,
                target,
                bytes_by_tenant(world, here)[task.tenant],
                policy=OPERATOR,
                reason="an operator asked for it",
            )
            self._moves.ask([move])
        raise Unavailable("the tenant is on its way")


def shards_on(world: World, wanted: str) -> list[Place]:
    """The shards on nodes of a name or label."""
    return [
        place
        for place in world.places
        if place.tier is Tier.PLAINTEXT
        and (node := world.nodes.get(place.node)) is not None
        and wanted in node.labels
    ]
