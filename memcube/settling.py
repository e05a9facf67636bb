"""What follows a committed change: its KV is dropped, the index is brought in line, and what adapters
were heard to say of it is forgotten.

The catalog is the truth and is written already. What can't be reached now stays noted there as
pending, every read is checked against it, and the reconcile loop finishes the rest.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from memcube.catalog import Catalog
from memcube.cube import MemCube
from memcube.errors import Frozen, NotFound, StaleEpoch, Unavailable
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock, Indexer
from memcube.lifecycle import Event

Changed = Callable[[TenantId, Sequence[CubeId]], Awaitable[None]]
"""Told of cubes whose text is no longer what it was, and awaited before the caller is answered."""


class Settling:
    """Every call may be repeated."""

    def __init__(
        self, catalog: Catalog, indexer: Indexer, changed: Changed | None = None, *, clock: Clock
    ) -> None:
        self._catalog = catalog
        self._indexer = indexer
        self._changed = changed
        self._clock = clock

    async def forget_kv(self, tenant: TenantId, ids: Iterable[CubeId]) -> None:
        """Tell the engines that KV of these cubes serves no more."""
        if self._changed is not None and (changed := list(ids)):
            await self._changed(tenant, changed)

    async def reindex(self, cubes: Sequence[MemCube], *, shard: int) -> list[MemCube]:
        """Index what isn't; the cubes, each saying whether a search finds it now."""
        waiting = [cube for cube in cubes if cube.text and not cube.indexed]
        if not waiting:
            return list(cubes)
        try:
            await self._indexer.index(waiting, shard=shard)
        except (Unavailable, StaleEpoch):
            return list(cubes)
        return [replace(cube, indexed=True) if cube.text else cube for cube in cubes]

    async def unindex(
        self, tenant: TenantId, versions: Mapping[CubeId, int], *, shard: int
    ) -> None:
        """Drop the KV of cubes that left the search, and take them out of the index."""
        await self.forget_kv(tenant, versions)
        # What can't be reached stays a pending removal, and no answer can hold these cubes.
        with contextlib.suppress(Unavailable, StaleEpoch):
            await self._indexer.remove(tenant, versions, shard=shard)

    async def take_back(
        self, tenant: TenantId, ids: Sequence[CubeId], *, shard: int, deleting: bool = False
    ) -> None:
        """Forget what adapters were heard to say of cubes that aren't what they were.

        A frozen one stays; before a deletion it forbids that, as the cube itself does.
        """
        said = await asyncio.to_thread(
            self._catalog.adapters.written_back, tenant, ids, now=self._clock()
        )
        if said and deleting:
            for cube in await asyncio.to_thread(
                self._catalog.cubes.get_many, tenant, [*ids, *said], now=self._clock()
            ):
                if cube.governance.frozen:
                    raise Frozen(cube.id)
        for id in said:
            with contextlib.suppress(NotFound, Frozen):  # by another call meanwhile; see above
                await self.delete(tenant, id, shard=shard)

    async def delete(
        self, tenant: TenantId, id: CubeId, *, shard: int, expected_version: int | None = None
    ) -> None:
        """Forget a cube, and before it the cubes that say what an adapter said of it, so that who tries
        again after a failure forgets the rest.

        Raises:
            NotFound, Frozen; VersionMismatch: it is not at ``expected_version``.
        """
        await self.take_back(tenant, [id], shard=shard, deleting=True)
        version = await asyncio.to_thread(
            self._catalog.cubes.delete,
            tenant,
            id,
            now=self._clock(),
            expected_version=expected_version,
        )
        await self.unindex(tenant, {id: version}, shard=shard)

    async def archive(
        self,
        tenant: TenantId,
        id: CubeId,
        *,
        shard: int,
        author: str,
        expected_version: int | None = None,
    ) -> MemCube:
        """Take a cube out of search; it stays readable by id.

        Raises:
            NotFound, Frozen, IllegalMove; VersionMismatch: it is not at ``expected_version``.
        """
        cube = await asyncio.to_thread(
            self._catalog.cubes.transition,
            tenant,
            id,
            Event.ARCHIVE,
            author=author,
            now=self._clock(),
            expected_version=expected_version,
        )
        await self.unindex(tenant, {id: cube.version}, shard=shard)
        await self.take_back(tenant, [id], shard=shard)
        return cube
