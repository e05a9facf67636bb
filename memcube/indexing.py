"""Brings the plaintext index in line with the catalog.

The catalog is written first, always. This module then embeds and puts what the catalog holds, or
removes what it no longer holds, and notes the outcome in the catalog. The gateway calls it right
after a write; the scheduler's reconcile loop calls it for whatever a crash left behind. Both are
idempotent, so both may do the same cube.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime

from memcube.catalog import Catalog
from memcube.cube import MemCube, slot
from memcube.embedding.contract import Embedder, Purpose
from memcube.errors import StaleEpoch, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import SEARCHABLE
from memcube.retrieval.passage import passage_text
from memcube.tiers.moving import Whereabouts
from memcube.tiers.plaintext import IndexedCube, Vector
from memcube.tiers.shard import ShardClient, ShardInfo

Clock = Callable[[], datetime]


def whereabouts(catalog: Catalog) -> Whereabouts:
    """Follows tenants by what the catalog says."""

    async def shard_of(tenant: TenantId) -> int:
        return await asyncio.to_thread(catalog.shards.shard_of, tenant)

    return Whereabouts(shard_of)


Shards = Callable[[int], ShardClient]

MAX_STALE_RETRIES = 5
PUT_SLICE = 64
"""Cubes embedded and put at once: the next slice is embedded while this one is being put."""


def indexed_cube(cube: MemCube, vector: Vector) -> IndexedCube:
    """What the index is told of a cube."""
    d = cube.descriptive
    thread, seq = d.thread, d.seq
    place = prev_place = next_place = None
    if thread is not None and seq is not None:
        place, next_place = slot(thread, seq), slot(thread, seq + 1)
        prev_place = slot(thread, seq - 1) if seq > 0 else None
    return IndexedCube(
        id=cube.id,
        tenant=cube.tenant,
        version=cube.version,
        text=cube.text,
        vector=vector,
        kind=d.kind,
        state=cube.state,
        user_id=d.user_id,
        agent_id=d.agent_id,
        run_id=d.run_id,
        role=d.role,
        speaker=d.speaker,
        tags=d.tags,
        metadata=d.metadata,
        created_at=d.created_at,
        updated_at=cube.updated_at,
        event_time=d.event_time,
        expires_at=cube.governance.expires_at,
        slot=place,
        prev_slot=prev_place,
        next_slot=next_place,
        thread=thread,
        seq=seq,
    )


class Indexer:
    """Embeds, puts and removes; writes down what the index now holds."""

    def __init__(
        self, catalog: Catalog, embedder: Embedder, shards: Shards, *, clock: Clock
    ) -> None:
        self._catalog = catalog
        self._embedder = embedder
        self._shards = shards
        self._clock = clock
        self._infos: dict[int, ShardInfo] = {}
        self._whereabouts = whereabouts(catalog)

    async def index(self, cubes: Sequence[MemCube], *, shard: int) -> None:
        """Bring cubes into the index at their present version. Idempotent.

        A cube that was changed or deleted meanwhile is left to whoever changed it.

        Raises:
            Unavailable: the embedder or the shard did not answer; the catalog still lists the
                cubes as pending, and the reconcile loop will index them.
        """
        wanted: dict[TenantId, list[MemCube]] = defaultdict(list)
        for cube in cubes:
            if cube.text and cube.state in SEARCHABLE:
                wanted[cube.tenant].append(cube)
        await asyncio.gather(
            *(
                self._index_slice(tenant, mine[i : i + PUT_SLICE], shard)
                for tenant, mine in wanted.items()
                for i in range(0, len(mine), PUT_SLICE)
            )
        )

    async def _index_slice(self, tenant: TenantId, cubes: Sequence[MemCube], shard: int) -> None:
        texts = [passage_text(cube.text, speaker=cube.descriptive.speaker) for cube in cubes]
        vectors = await self._embedder.embed(texts, Purpose.PASSAGE)
        rows = {cube.id: indexed_cube(cube, vectors[i]) for i, cube in enumerate(cubes)}
        known = {cube.id: cube for cube in cubes}

        tried: set[int] = set()

        async def put(shard: int, info: ShardInfo) -> None:
            if tried and shard not in tried:
                await look_again()  # tombstones stay with the shard that the tenant left
            tried.add(shard)
            await self._shards(shard).put(list(rows.values()), epoch=info.epoch)

        async def look_again() -> None:
            # The shard lost its tombstones with its process: ask the catalog what still holds.
            nonlocal known, rows
            known = await self._still_current(known.values())
            rows = {id: rows[id] for id in known}

        info, shard = await self._whereabouts.follow(
            tenant, shard, lambda shard: self._at_epoch(shard, put, look_again)
        )
        await asyncio.to_thread(
            self._catalog.index.mark,
            tenant,
            {id: cube.version for id, cube in known.items()},
            sizes={id: _size_bytes(cube, self._embedder.dim) for id, cube in known.items()},
            index=info.index,
            shard=shard,
            epoch=info.epoch,
            now=self._clock(),
        )

    async def remove(self, tenant: TenantId, versions: Mapping[CubeId, int], *, shard: int) -> None:
        """Take cubes out of the index, up to these versions. Idempotent."""
        if not versions:
            return

        async def delete(shard: int, info: ShardInfo) -> None:
            await self._shards(shard).delete(tenant, versions, epoch=info.epoch)

        await self._whereabouts.follow(tenant, shard, lambda shard: self._at_epoch(shard, delete))
        await asyncio.to_thread(self._catalog.index.mark_removed, tenant, list(versions))

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, shard: int
    ) -> None:
        """Tell the index of a new state. If it can't be told, the cubes are put again later."""

        async def tell(shard: int) -> None:
            info = await self.info(shard)
            try:
                await self._shards(shard).set_state(tenant, ids, state, epoch=info.epoch)
            except (StaleEpoch, Unavailable):
                self._infos.pop(shard, None)
                raise

        try:
            await self._whereabouts.follow(tenant, shard, tell)
        except (StaleEpoch, Unavailable):
            await asyncio.to_thread(self._catalog.index.unmark, tenant, ids, now=self._clock())

    async def info(self, shard: int) -> ShardInfo:
        """The shard's epoch and index, as last heard."""
        info = self._infos.get(shard)
        if info is None:
            info = self._infos[shard] = await self._shards(shard).info()
        return info

    async def _at_epoch(
        self,
        shard: int,
        write: Callable[[int, ShardInfo], Awaitable[None]],
        refused: Callable[[], Awaitable[None]] | None = None,
    ) -> ShardInfo:
        """Write under the shard's present epoch; after a restart of the shard, under its new one.

        Raises:
            StaleEpoch: the shard was restarted again and again.
        """
        for attempt in range(MAX_STALE_RETRIES):
            info = await self.info(shard)
            try:
                await write(shard, info)
            except StaleEpoch:
                self._infos.pop(shard, None)
                if attempt + 1 == MAX_STALE_RETRIES:
                    raise
                if refused is not None:
                    await refused()
            else:
                return info
        raise AssertionError("unreachable")

    async def _still_current(self, cubes: Iterable[MemCube]) -> dict[CubeId, MemCube]:
        now = self._clock()
        current: dict[CubeId, MemCube] = {}
        for tenant, versions in _by_tenant(cubes).items():
            found = await asyncio.to_thread(
                self._catalog.cubes.get_many, tenant, list(versions), now=now
            )
            for cube in found:
                if cube.version == versions[cube.id] and cube.state in SEARCHABLE:
                    current[cube.id] = cube
        return current


def _by_tenant(cubes: Iterable[MemCube]) -> dict[TenantId, dict[CubeId, int]]:
    grouped: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
    for cube in cubes:
        grouped[cube.tenant][cube.id] = cube.version
    return grouped


def _size_bytes(cube: MemCube, dim: int) -> int:
    """Text and float32 vector; the engine's own overhead is not counted."""
    return len(cube.text.encode("utf-8", "surrogatepass")) + 4 * dim
