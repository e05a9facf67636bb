"""A tenant's way from one shard to another while it is searched and written: what each shard keeps of it.

The source notes what changes from the time on that the copying begins (``Departure``); the target keeps what
it has taken in apart from what it serves (``Arrival``). Both last as long as their process: the journal
(``memcube.catalog.ActionBook``) is what outlives a crash.

A shard serves a tenant that the catalog says lies in it. One that is being taken over is *sealed* for the last
stretch: neither read nor written, so that nobody reads the old place after the new one took a write.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TypeVar

from memcube.errors import Moved, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.tiers.plaintext import IndexedCube, StoredCube

T = TypeVar("T")
PATIENCE_S = 10.0
"""How long a caller waits for a tenant that is on its way: a successor of the leader finishes within it."""
LOOK_EVERY_S, ASK_EVERY_S = 0.02, 0.25
"""How often the catalog is looked at meanwhile, and the shard asked whether it serves the tenant again."""
_STORED = frozenset(one.name for one in fields(IndexedCube)) - {
    "id",
    "version",
    "text",
    "vector",
    "tenant",
}


class Standing(StrEnum):
    """How a tenant stands to a shard, as the catalog has it."""

    HERE = "here"
    LEAVING = "leaving"
    """It lies here, and a move that takes it away is under way."""
    ELSEWHERE = "elsewhere"
    UNKNOWN = "unknown"
    """The catalog has no such tenant."""


@dataclass(slots=True)
class Departure:
    """A tenant that is being copied away. ``changed``: cubes that were written since they were last read
    out, with the version up to which they were deleted, 0 for those that were not."""

    move: str
    changed: dict[CubeId, int] = field(default_factory=dict)

    def note(self, versions: Mapping[CubeId, int]) -> None:
        for id, version in versions.items():
            self.changed[id] = max(version, self.changed.get(id, 0))

    def take(self) -> dict[CubeId, int]:
        """What changed since the last call."""
        changed, self.changed = self.changed, {}
        return changed


@dataclass(slots=True)
class Arrival:
    """A tenant that is being copied here: the versions that were read back from the store."""

    move: str
    versions: dict[CubeId, int] = field(default_factory=dict)


class Tenants:
    """Whom a shard serves, who leaves it and who arrives. One event loop."""

    def __init__(
        self,
        shard: int,
        look_up: Callable[[TenantId], Awaitable[Standing]],
        *,
        moving: Collection[TenantId] = (),
    ) -> None:
        """``look_up`` reads the catalog. ``moving`` are those whose moves were under way when this process
        began: whether they were sealed is known no more, so they are not served until that is over."""
        self._shard = shard
        self._look_up = look_up
        self._unsure = set(moving)
        self._known: set[TenantId] = set()
        self._left: set[TenantId] = set()
        """Those that left while this process ran; what they had may lie here still."""
        self._sealed: dict[TenantId, str] = {}
        self._writing: Counter[TenantId] = Counter()
        self._idle = asyncio.Condition()
        self.departures: dict[TenantId, Departure] = {}
        self.arrivals: dict[TenantId, Arrival] = {}

    @property
    def left(self) -> frozenset[TenantId]:
        """Those whose memories went elsewhere and may lie here still."""
        return frozenset(self._left)

    async def admit(self, tenant: TenantId) -> None:
        """Return if this tenant is served here now.

        Raises:
            Moved: it is on its way, or lies elsewhere. Unavailable: the catalog does not answer.
        """
        if tenant not in self._known:
            standing = await self._look_up(tenant)
            if standing is Standing.HERE:
                self._unsure.discard(tenant)
            is_served = standing is Standing.HERE or (
                standing is Standing.LEAVING and tenant not in self._unsure
            )
            if not is_served:
                raise Moved(tenant, self._shard)
            if standing is Standing.HERE and not {tenant} & (self._left | self._sealed.keys()):
                self._known.add(tenant)
        if tenant in self._sealed or tenant in self._left:
            raise Moved(tenant, self._shard)

    async def write(
        self, versions: Mapping[TenantId, Mapping[CubeId, int]], work: Callable[[], Awaitable[None]]
    ) -> None:
        """Do a write of cubes of tenants that are served here; ``versions`` are those that it deletes,
        0 for the others. Who seals one of the tenants waits for it.

        Raises:
            Moved: one of them is on its way, or lies elsewhere; nothing is written.
        """
        for tenant in versions:
            await self.admit(tenant)
        for tenant in versions:  # while a later one was asked for, another may have been sealed
            if tenant in self._sealed:
                raise Moved(tenant, self._shard)
        self._writing.update(versions.keys())
        try:
            await work()
        finally:
            for tenant, cubes in versions.items():
                if tenant in self.departures:
                    self.departures[tenant].note(cubes)
            self._writing.subtract(versions.keys())
            async with self._idle:
                self._idle.notify_all()

    async def standing(self, tenant: TenantId) -> Standing:
        return await self._look_up(tenant)

    def begin(self, tenant: TenantId, move: str) -> None:
        """Note from now on what changes. A move that begins again lets the tenant be written again."""
        self._sealed.pop(tenant, None)
        self._unsure.discard(tenant)
        self.departures[tenant] = Departure(move)

    def departure(self, tenant: TenantId, move: str) -> Departure:
        """
        Raises:
            Unavailable: the shard was restarted since the move began; it must begin again.
        """
        found = self.departures.get(tenant)
        if found is None or found.move != move:
            raise Unavailable(f"shard {self._shard} knows nothing of move {move}; begin it again")
        return found

    async def seal(self, tenant: TenantId, move: str) -> dict[CubeId, int]:
        """Serve the tenant no more, and wait for the writes that are on their way; what changed last."""
        departure = self.departure(tenant, move)
        self._sealed[tenant] = move
        self._known.discard(tenant)
        async with self._idle:
            await self._idle.wait_for(lambda: not self._writing[tenant])
        return departure.take()

    def let_go(self, tenant: TenantId, *, moved: bool) -> None:
        """End a departure: the tenant is gone, or stays and is served again. Idempotent."""
        self.departures.pop(tenant, None)
        self._sealed.pop(tenant, None)
        self._known.discard(tenant)
        if moved:
            self._left.add(tenant)

    def expect(self, tenant: TenantId, move: str) -> None:
        """Begin an arrival, with nothing taken in yet."""
        self.arrivals[tenant] = Arrival(move)

    def arrival(self, tenant: TenantId, move: str) -> Arrival | None:
        found = self.arrivals.get(tenant)
        return found if found is not None and found.move == move else None

    def welcome(self, tenant: TenantId) -> None:
        """Serve a tenant that the catalog has put here, whatever an earlier move of it left undone."""
        self.arrivals.pop(tenant, None)
        self.departures.pop(tenant, None)
        self._sealed.pop(tenant, None)
        self._left.discard(tenant)

    def forget(self, tenant: TenantId) -> None:
        """Note that nothing of a tenant lies here any more."""
        self.arrivals.pop(tenant, None)
        self._left.discard(tenant)
        self._known.discard(tenant)


def indexed_again(tenant: TenantId, cube: StoredCube) -> IndexedCube:
    """A cube that was read with its vector, as another shard is told of it."""
    if cube.vector is None:
        raise ValueError(f"cube {cube.id} was read without its vector")
    known = {name: value for name, value in cube.payload.items() if name in _STORED}
    known["tags"] = tuple(known.get("tags", ()))
    return IndexedCube(
        id=cube.id, tenant=tenant, version=cube.version, text=cube.text, vector=cube.vector, **known
    )


def digest_of(versions: Mapping[CubeId, int]) -> str:
    """The SHA-256 of which cubes lie somewhere, in which versions."""
    hasher = hashlib.sha256()
    for id in sorted(versions):
        hasher.update(f"{id} {versions[id]}\n".encode())
    return hasher.hexdigest()


class Whereabouts:
    """Follows tenants to the shard that they lie in now. All callers that wait for a tenant share one look at the
    catalog: what they wait for must not wait for them."""

    def __init__(
        self,
        shard_of: Callable[[TenantId], Awaitable[int]],
        *,
        patience_s: float = PATIENCE_S,
        look_every_s: float = LOOK_EVERY_S,
        ask_every_s: float = ASK_EVERY_S,
    ) -> None:
        """``shard_of`` reads the catalog."""
        self._shard_of = shard_of
        self._patience_s = patience_s
        self._look_every_s = look_every_s
        self._ask_every_s = ask_every_s
        self._looks: dict[tuple[TenantId, int], asyncio.Task[int]] = {}

    async def follow(
        self, tenant: TenantId, shard: int, call: Callable[[int], Awaitable[T]]
    ) -> tuple[T, int]:
        """What a call to the tenant's shard returned, and the shard: the one it was thought to lie in, or
        the one that it has moved to.

        Raises:
            Moved: it is still on its way after ``patience_s``; and what the call raises.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience_s
        while True:
            try:
                return await call(shard), shard
            except Moved:
                found = await self._look(tenant, shard)
                if found == shard and loop.time() >= until:
                    raise
                shard = found

    async def _look(self, tenant: TenantId, shard: int) -> int:
        """Where a tenant lies that this shard refused: at once where that is another, else after a while, when
        the shard is to be asked again."""
        look = self._looks.get((tenant, shard))
        if look is None:
            look = asyncio.create_task(self._wait(tenant, shard))
            self._looks[tenant, shard] = look
            look.add_done_callback(lambda _: self._looks.pop((tenant, shard)))
        return await asyncio.shield(look)

    async def _wait(self, tenant: TenantId, shard: int) -> int:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._ask_every_s
        while True:
            found = await self._shard_of(tenant)
            if found != shard or loop.time() >= until:
                return found
            await asyncio.sleep(self._look_every_s)
