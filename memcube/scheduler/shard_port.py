"""Tenants from shard to shard of the plaintext tier, while they are searched and written.

A tenant moves as one. ``copy`` reads all of it out of the source and into the target, goes after what is
written meanwhile until little is left, then seals the tenant at the source and brings over the rest: from then
on until the catalog has it at the target its callers wait (``memcube.tiers.moving.Whereabouts``). The target has
read back every cube that it took in. What is left behind at the source is removed by a ``Drop`` of its own.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from memcube.catalog.action_rows import ActionRecord
from memcube.errors import Conflict, NotFound, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Place, shard_at
from memcube.scheduler.port import Stored
from memcube.tiers.moving import digest_of
from memcube.tiers.shard import MovingShard

BATCH = 64
"""Cubes that are read out and taken in at once: a search waits for no more than one such step."""
FEW = 16
"""So few changes may be brought over while the tenant's callers wait."""
LONGEST_RESTS = 4.0
"""So many times as long as a step took may the rest after it be."""
MEMORY = 64
"""Of so many steps the fastest tells how long one takes that nobody is in the way of."""
MAX_ROUNDS = 50
"""A tenant that is written faster than it is copied is sealed all the same after so many rounds."""


class ShardPort:
    """``memcube.scheduler.port.TierPort`` for whole tenants; a single cube does not move here."""

    def __init__(self, shards: Callable[[int], MovingShard]) -> None:
        self._shards = shards

    async def prepare(self, move: ActionRecord, *, leader: int) -> None:
        """Begin the arrival, with nothing of the tenant at the target."""
        _check(move)
        await self._target(move).expect(move.tenant, move.id, leader=leader)

    async def copy(self, move: ActionRecord, *, leader: int) -> str:
        source = self._source(move)
        lying = await source.begin_move(move.tenant, move.id, leader=leader)
        copied: dict[CubeId, int] = {}
        await self._bring(move, dict.fromkeys(lying, 0), copied, leader, rests=True)
        for _ in range(MAX_ROUNDS):
            changed = await source.changes(move.tenant, move.id, leader=leader)
            await self._bring(move, changed, copied, leader)
            if len(changed) <= FEW:
                break
        try:
            last = await source.seal(move.tenant, move.id, leader=leader)
            await self._bring(move, last, copied, leader)
        except BaseException:
            await source.let_go(move.tenant, moved=False, leader=leader)
            raise
        return digest_of(copied)

    async def _bring(
        self,
        move: ActionRecord,
        changed: dict[CubeId, int],
        copied: dict[CubeId, int],
        leader: int,
        *,
        rests: bool = False,
    ) -> None:
        """Bring cubes over as they are now, and take those out that are gone. With ``rests`` it does nothing
        for half of the time or more (``rest_s``): who is served by these shards comes first."""
        source, target = self._source(move), self._target(move)
        wanted = list(changed)
        steps_s: deque[float] = deque(maxlen=MEMORY)
        for ids in (wanted[i : i + BATCH] for i in range(0, len(wanted), BATCH)):
            began = time.monotonic()
            cubes = await source.read_out(move.tenant, ids, leader=leader)
            here = {cube.id: cube.version for cube in cubes}
            gone = {id: changed[id] for id in ids if id not in here}
            try:
                await target.take_in(move.tenant, move.id, cubes, gone, leader=leader)
            except NotFound:
                raise Unavailable(f"{move.target} was restarted; the move begins again") from None
            copied |= here
            for id in gone:
                copied.pop(id, None)
            if rests:
                took_s = time.monotonic() - began
                if len(here) == BATCH:
                    steps_s.append(took_s)
                await asyncio.sleep(rest_s(took_s, min(steps_s, default=took_s)))

    async def verify(self, move: ActionRecord, *, leader: int) -> str:
        try:
            return await self._target(move).arrived(move.tenant, move.id, leader=leader)
        except (NotFound, Unavailable) as lost:
            await self._source(move).let_go(move.tenant, moved=False, leader=leader)
            raise Unavailable(f"{move.target}: {lost}; the move begins again") from None

    async def publish(self, move: ActionRecord, *, leader: int) -> None:
        await self._target(move).welcome(move.tenant, leader=leader)

    async def free(self, move: ActionRecord, *, leader: int) -> None:
        try:
            await self._target(move).drop_tenant(move.tenant, leader=leader)
        except Conflict:
            return  # it lies there by the catalog: nothing of it is a reservation

    async def release(self, move: ActionRecord, *, leader: int, moved: bool) -> None:
        await self._source(move).let_go(move.tenant, moved=moved, leader=leader)

    async def has(
        self, place: Place, tenant: TenantId, cube: CubeId, version: int, *, leader: int
    ) -> bool:
        found = await self._shards(_number(place)).read_out(tenant, [cube], leader=leader)
        return any(one.version == version for one in found)

    async def drop(self, drop: ActionRecord, *, leader: int) -> None:
        """Remove what a tenant has left behind."""
        _check(drop)
        await self._source(drop).drop_tenant(drop.tenant, leader=leader)

    async def inventory(self, place: Place, *, leader: int) -> Sequence[Stored]:
        """Nothing: ``memcube.reconcile`` compares the shards, cube by cube."""
        del place, leader
        return ()

    async def sweep(self, place: Place, stored: Sequence[Stored], *, leader: int) -> int:
        del place, stored, leader
        return 0

    def _source(self, move: ActionRecord) -> MovingShard:
        return self._shards(_number(move.source))

    def _target(self, move: ActionRecord) -> MovingShard:
        return self._shards(_number(move.target))


def rest_s(took_s: float, fastest_s: float) -> float:
    """How long to rest after a step: as long as it took, and longer the slower it was than the fastest, which tells
    that others need the machines, as delays do in LEDBAT (RFC 6817)."""
    slower = took_s / fastest_s if fastest_s > 0 else 1.0
    return took_s * min(max(slower, 1.0), LONGEST_RESTS)


def _check(move: ActionRecord) -> None:
    if move.cube is not None:
        raise Conflict("a tenant's shard moves as one; a single cube stays with it")


def _number(place: Place | None) -> int:
    number = None if place is None else shard_at(place.location)
    if number is None:
        raise NotFound("shard", str(place))
    return number
