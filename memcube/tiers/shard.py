"""One shard of the plaintext tier: a store, its ranker, and the epoch that fences its writers.

Not covered: where the shard runs (``actors.qdrant``) and what should be in it (the catalog).
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

import numpy as np

from memcube.errors import Conflict, Corrupt, MemCubeError, NotFound, StaleEpoch
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId
from memcube.retrieval.ranker import Hit, Mode, Retriever
from memcube.tiers.moving import Arrival, Standing, Tenants, digest_of, indexed_again
from memcube.tiers.plaintext import IndexedCube, PlaintextStore, Scored

LOOK_DEADLINE_S = 2.0


async def _everyone_is_here(_tenant: TenantId) -> Standing:
    return Standing.HERE


def _anyone_leads(_leader: int) -> None:
    return


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself. ``index`` is the embedder's identity, ``location`` where its files lie,
    ``node`` the node it runs on. ``left`` are tenants that moved away, and of which something may lie here."""

    shard: int
    epoch: int
    index: str
    location: str
    node: str = ""
    left: frozenset[TenantId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """What a shard said of itself when it was looked at, or why nothing was heard of it (``error``)."""

    shard: int
    epoch: int | None = None
    index: str | None = None
    location: str | None = None
    node: str | None = None
    error: str | None = None


async def look_at(number: int, shard: "ShardClient") -> ShardState:
    """How a shard is, within ``LOOK_DEADLINE_S``: nobody waits for one whose node is down."""
    try:
        async with asyncio.timeout(LOOK_DEADLINE_S):
            info = await shard.info()
    except TimeoutError:
        error = f"shard {number} does not answer within {LOOK_DEADLINE_S:g} s"
    except MemCubeError as failed:
        error = str(failed)
    else:
        return ShardState(
            shard=number,
            epoch=info.epoch,
            index=info.index,
            location=info.location,
            node=info.node,
        )
    return ShardState(shard=number, error=error)


class ShardClient(Protocol):
    """One shard as its callers see it, wherever it runs.

    Reads may be repeated freely; ``put`` and ``delete`` are idempotent, and raise StaleEpoch
    when the shard was restarted since the caller learnt its epoch: what the caller knew of the
    catalog may be older than the shard's tombstones, so it must be read again.
    """

    async def info(self) -> ShardInfo: ...

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None: ...

    async def delete(
        self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int
    ) -> None: ...

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None: ...

    async def search(
        self,
        tenant: TenantId,
        query: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
        mode: Mode,
        threshold: float | None,
        explain: bool,
    ) -> list[Hit]: ...

    async def nearest(
        self,
        tenant: TenantId,
        ids: Sequence[CubeId],
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> dict[CubeId, list[Scored]]: ...

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]: ...

    async def note_left(self, tenants: Sequence[TenantId]) -> None:
        """Take note that something lies here of tenants which lie elsewhere by the catalog. Of those that it
        does not know all is removed."""
        ...


class MovingShard(Protocol):
    """A shard as the leader of the scheduler moves tenants from it and to it (``memcube.scheduler.shard_port``)."""

    async def begin_move(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        """Note what changes of a tenant from now on; what it has here, with versions."""
        ...

    async def read_out(
        self, tenant: TenantId, ids: Sequence[CubeId], *, leader: int
    ) -> list[IndexedCube]:
        """Those of the cubes that are here."""
        ...

    async def changes(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        """What changed since the last call, with the version up to which it was deleted, or 0."""
        ...

    async def seal(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        """Serve the tenant no more; what changed since ``changes``."""
        ...

    async def let_go(self, tenant: TenantId, *, moved: bool, leader: int) -> None:
        """End the move at the source: the tenant is gone, or is served here again. Idempotent."""
        ...

    async def expect(self, tenant: TenantId, move: str, *, leader: int) -> None:
        """Begin to take a tenant in; what lies here of it from before goes. Idempotent."""
        ...

    async def take_in(
        self,
        tenant: TenantId,
        move: str,
        cubes: Sequence[IndexedCube],
        deleted: Mapping[CubeId, int],
        *,
        leader: int,
    ) -> None:
        """Write cubes of a tenant that arrives, take others out, and read them back."""
        ...

    async def arrived(self, tenant: TenantId, move: str, *, leader: int) -> str:
        """The digest (``digest_of``) of what was taken in and read back."""
        ...

    async def welcome(self, tenant: TenantId, *, leader: int) -> None:
        """Serve a tenant that the catalog has put here. Idempotent."""
        ...

    async def drop_tenant(self, tenant: TenantId, *, leader: int) -> int:
        """Remove all of a tenant that does not lie here by the catalog; how many cubes."""
        ...


MOVES = frozenset(name for name in vars(MovingShard) if not name.startswith("_"))
"""The steps of a tenant's move."""


class PlaintextShard:
    """Owns one store for one epoch.

    With ``look_up`` it serves those tenants alone that lie in it by the catalog, and refuses the others
    (``Moved``), among them those that were ``moving`` when it began; ``leader_fence`` refuses the calls of a leader that another has followed.
    """

    def __init__(
        self,
        store: PlaintextStore,
        retriever: Retriever,
        *,
        shard: int,
        epoch: int,
        location: str,
        node: str = "",
        look_up: Callable[[TenantId], Awaitable[Standing]] = _everyone_is_here,
        moving: Collection[TenantId] = (),
        leader_fence: Callable[[int], None] = _anyone_leads,
    ) -> None:
        self._store = store
        self._retriever = retriever
        self._info = ShardInfo(
            shard=shard, epoch=epoch, index=store.spec.embedder, location=location, node=node
        )
        self._tenants = Tenants(shard, look_up, moving=moving)
        self._fence = leader_fence

    async def info(self) -> ShardInfo:
        """This shard's number, epoch, index and place."""
        return replace(self._info, left=self._tenants.left)

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None:
        """Insert or replace cubes. Idempotent.

        Raises:
            StaleEpoch: the shard was restarted since the caller read the catalog.
        """
        self._check(epoch)
        versions: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
        for cube in cubes:
            versions[cube.tenant][cube.id] = 0
        await self._tenants.write(versions, lambda: self._store.put(cubes))

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int) -> None:
        """Remove cubes up to the given versions, and refuse late puts of those. Idempotent."""
        self._check(epoch)
        await self._tenants.write({tenant: versions}, lambda: self._store.delete(tenant, versions))

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None:
        """Change the state that filters see. Idempotent."""
        self._check(epoch)
        await self._tenants.write(
            {tenant: dict.fromkeys(ids, 0)}, lambda: self._store.set_state(tenant, ids, state)
        )

    async def search(
        self,
        tenant: TenantId,
        query: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
        mode: Mode = Mode.HYBRID,
        threshold: float | None = None,
        explain: bool = False,
    ) -> list[Hit]:
        """The best cubes for a query, best first.

        Raises:
            Moved: the tenant lies elsewhere, or was moved away meanwhile.
        """
        await self._tenants.admit(tenant)
        found = await self._retriever.search(
            tenant,
            query,
            where=where,
            now=now,
            limit=limit,
            mode=mode,
            threshold=threshold,
            explain=explain,
        )
        await self._tenants.admit(tenant)  # a part of it may have been removed meanwhile
        return found

    async def nearest(
        self,
        tenant: TenantId,
        ids: Sequence[CubeId],
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> dict[CubeId, list[Scored]]:
        """The nearest others of each of these cubes by cosine, among those that match ``where``; what
        the index does not hold is left out.

        Raises:
            Moved: as ``search``.
        """
        await self._tenants.admit(tenant)
        found: dict[CubeId, list[Scored]] = {}
        for cube in await self._store.get(tenant, ids, with_vectors=True):
            if cube.vector is not None:
                near = await self._store.search_dense(
                    tenant, cube.vector, where=where, now=now, limit=limit + 1
                )
                found[cube.id] = [other for other in near if other.id != cube.id][:limit]
        await self._tenants.admit(tenant)
        return found

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        """Every cube of the shard with its version."""
        return [entry async for entry in self._store.versions()]

    # -- a tenant's move -----------------------------------------------------------------------

    async def begin_move(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        """
        Raises:
            StaleEpoch: another leads. NotFound: the tenant does not lie here.
        """
        self._fence(leader)
        if await self._tenants.standing(tenant) in (Standing.ELSEWHERE, Standing.UNKNOWN):
            raise NotFound("tenant", f"{tenant} in shard {self._info.shard}")
        self._tenants.begin(tenant, move)
        return {id: version async for _, id, version in self._store.versions(tenant)}

    async def read_out(
        self, tenant: TenantId, ids: Sequence[CubeId], *, leader: int
    ) -> list[IndexedCube]:
        self._fence(leader)
        found = await self._store.get(tenant, ids, with_vectors=True)
        return [indexed_again(tenant, cube) for cube in found]

    async def changes(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        """
        Raises:
            StaleEpoch: another leads. Unavailable: this shard was restarted since ``begin_move``.
        """
        self._fence(leader)
        return self._tenants.departure(tenant, move).take()

    async def seal(self, tenant: TenantId, move: str, *, leader: int) -> dict[CubeId, int]:
        """
        Raises:
            StaleEpoch: another leads. Unavailable: this shard was restarted since ``begin_move``.
        """
        self._fence(leader)
        return await self._tenants.seal(tenant, move)

    async def let_go(self, tenant: TenantId, *, moved: bool, leader: int) -> None:
        self._fence(leader)
        self._tenants.let_go(tenant, moved=moved)

    async def expect(self, tenant: TenantId, move: str, *, leader: int) -> None:
        """
        Raises:
            StaleEpoch: another leads. Conflict: the tenant lies here.
        """
        self._fence(leader)
        await self._check_absent(tenant)
        await self._store.drop(tenant)
        self._tenants.expect(tenant, move)

    async def take_in(
        self,
        tenant: TenantId,
        move: str,
        cubes: Sequence[IndexedCube],
        deleted: Mapping[CubeId, int],
        *,
        leader: int,
    ) -> None:
        """
        Raises:
            StaleEpoch: another leads. NotFound: this shard was restarted since ``expect``.
            Corrupt: what was read back is not what was written.
        """
        self._fence(leader)
        arrival = self._arrival(tenant, move)
        await self._store.put(cubes)
        if deleted:
            await self._store.delete(tenant, deleted)
            for id in deleted:
                arrival.versions.pop(id, None)
        written = {cube.id: cube for cube in cubes}
        for found in await self._store.get(tenant, list(written), with_vectors=True):
            cube = written.pop(found.id)
            is_same = found.vector is not None and np.allclose(found.vector, cube.vector, atol=1e-5)
            if found.version != cube.version or found.text != cube.text or not is_same:
                raise Corrupt(self._info.location, f"cube {cube.id} was read back otherwise")
            arrival.versions[found.id] = found.version
        if written:
            raise Corrupt(self._info.location, f"{len(written)} cubes were written and not found")

    async def arrived(self, tenant: TenantId, move: str, *, leader: int) -> str:
        """
        Raises:
            StaleEpoch: another leads. NotFound: this shard was restarted since ``expect``.
        """
        self._fence(leader)
        return digest_of(self._arrival(tenant, move).versions)

    async def welcome(self, tenant: TenantId, *, leader: int) -> None:
        self._fence(leader)
        self._tenants.welcome(tenant)

    async def drop_tenant(self, tenant: TenantId, *, leader: int) -> int:
        """
        Raises:
            StaleEpoch: another leads. Conflict: the tenant lies here by the catalog.
        """
        self._fence(leader)
        await self._check_absent(tenant)
        num = await self._store.drop(tenant)
        self._tenants.forget(tenant)
        return num

    async def note_left(self, tenants: Sequence[TenantId]) -> None:
        for tenant in tenants:
            standing = await self._tenants.standing(tenant)
            if standing is Standing.ELSEWHERE:
                self._tenants.let_go(tenant, moved=True)
            elif standing is Standing.UNKNOWN:
                await self._store.drop(tenant)

    async def close(self) -> None:
        """Flush and release the store."""
        await self._store.close()

    def _arrival(self, tenant: TenantId, move: str) -> Arrival:
        found = self._tenants.arrival(tenant, move)
        if found is None:
            raise NotFound("move", f"{move} to shard {self._info.shard}")
        return found

    async def _check_absent(self, tenant: TenantId) -> None:
        if await self._tenants.standing(tenant) in (Standing.HERE, Standing.LEAVING):
            raise Conflict(f"tenant {tenant!r} lies in shard {self._info.shard}")

    def _check(self, epoch: int) -> None:
        if epoch != self._info.epoch:
            raise StaleEpoch(epoch, self._info.epoch)
