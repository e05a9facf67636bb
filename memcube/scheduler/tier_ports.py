"""All tiers as one port: each call goes to the port of its place's tier."""

from collections.abc import Mapping, Sequence

from memcube.catalog.action_rows import ActionRecord
from memcube.errors import UnknownBackend
from memcube.ids import CubeId, TenantId
from memcube.scheduler.actions import Place, Tier
from memcube.scheduler.port import Stored, TierPort


class TierPorts:
    """A ``TierPort`` made of one for each tier. An action is of one tier."""

    def __init__(self, ports: Mapping[Tier, TierPort]) -> None:
        self._ports = dict(ports)

    async def prepare(self, move: ActionRecord, *, leader: int) -> None:
        await self._for(move).prepare(move, leader=leader)

    async def copy(self, move: ActionRecord, *, leader: int) -> str:
        return await self._for(move).copy(move, leader=leader)

    async def verify(self, move: ActionRecord, *, leader: int) -> str:
        return await self._for(move).verify(move, leader=leader)

    async def publish(self, move: ActionRecord, *, leader: int) -> None:
        await self._for(move).publish(move, leader=leader)

    async def free(self, move: ActionRecord, *, leader: int) -> None:
        await self._for(move).free(move, leader=leader)

    async def release(self, move: ActionRecord, *, leader: int, moved: bool) -> None:
        await self._for(move).release(move, leader=leader, moved=moved)

    async def has(
        self, place: Place, tenant: TenantId, cube: CubeId, version: int, *, leader: int
    ) -> bool:
        return await self._at(place).has(place, tenant, cube, version, leader=leader)

    async def drop(self, drop: ActionRecord, *, leader: int) -> None:
        await self._for(drop).drop(drop, leader=leader)

    async def inventory(self, place: Place, *, leader: int) -> Sequence[Stored]:
        return await self._at(place).inventory(place, leader=leader)

    async def sweep(self, place: Place, stored: Sequence[Stored], *, leader: int) -> int:
        return await self._at(place).sweep(place, stored, leader=leader)

    def _for(self, action: ActionRecord) -> TierPort:
        place = action.target or action.source
        if place is None:
            raise AssertionError("an action that moves bytes has a place")
        return self._at(place)

    def _at(self, place: Place) -> TierPort:
        if place.tier not in self._ports:
            raise UnknownBackend("port of the tier", place.tier, tuple(self._ports))
        return self._ports[place.tier]
