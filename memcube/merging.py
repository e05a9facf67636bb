"""Finds what could be one memory, proposes it, and merges what was accepted.

Nothing is overwritten: a merge is a fusion, whose parents are kept as merged and named in its lineage,
and only of the very versions that were proposed. A search is bounded: at most ``merge_cubes`` cubes of
a scope, the newest first, and the index's NEIGHBOURS nearest of each.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from memcube.alike import Near, contradictions, duplicates
from memcube.catalog import Catalog, NewProposal, Proposal, ProposalState
from memcube.config import LifecycleConfig
from memcube.cube import MemCube, Scope
from memcube.errors import Conflict
from memcube.filters import of_scope
from memcube.fusing import fused_draft
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock, Shards, whereabouts
from memcube.lifecycle import SEARCHABLE
from memcube.settling import Settling

NEIGHBOURS = 8


class Merging:
    """Proposals, from finding to merging."""

    def __init__(
        self,
        catalog: Catalog,
        shards: Shards,
        settling: Settling,
        config: LifecycleConfig,
        *,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._shards = shards
        self._whereabouts = whereabouts(catalog)
        self._settling = settling
        self._config = config
        self._clock = clock

    async def find(self, scope: Scope, *, shard: int, limit: int | None = None) -> list[Proposal]:
        """Look at the newest cubes of a scope and what is near them; the proposals that are new.

        Raises:
            Unavailable: the shard did not answer.
        """
        page = await asyncio.to_thread(
            self._catalog.cubes.find,
            scope.tenant,
            now=self._clock(),
            limit=min(limit or self._config.merge_cubes, self._config.merge_cubes),
            user_id=scope.user_id,
            agent_id=scope.agent_id,
            run_id=scope.run_id,
        )
        return await self.find_near(scope.tenant, page.cubes, shard=shard)

    async def find_near(
        self, tenant: TenantId, seeds: Sequence[MemCube], *, shard: int
    ) -> list[Proposal]:
        """The new proposals among these cubes and what is near them."""
        now = self._clock()
        seeds = [cube for cube in seeds if cube.state in SEARCHABLE and cube.indexed]
        near = await self._near(tenant, seeds, shard, now)
        known = {cube.id: cube for cube in seeds}
        others = {one.id for found in near.values() for one in found} - known.keys()
        for cube in await asyncio.to_thread(
            self._catalog.cubes.get_many, tenant, sorted(others), now=now
        ):
            if cube.state in SEARCHABLE and cube.indexed:
                known[cube.id] = cube
        found: list[NewProposal] = contradictions(known.values())
        found += duplicates(
            seeds,
            near,
            known,
            cosine=self._config.merge_cosine,
            min_overlap=self._config.merge_overlap,
        )
        return await asyncio.to_thread(self._catalog.proposals.note, tenant, found, now=now)

    async def _near(
        self, tenant: TenantId, seeds: Sequence[MemCube], shard: int, now: datetime
    ) -> dict[CubeId, list[Near]]:
        by_scope: dict[Scope, list[CubeId]] = defaultdict(list)
        for cube in seeds:
            by_scope[cube.scope].append(cube.id)
        near: dict[CubeId, list[Near]] = {}
        for scope, ids in by_scope.items():
            where = of_scope(scope.user_id, scope.agent_id, scope.run_id)
            found, shard = await self._whereabouts.follow(
                tenant,
                shard,
                lambda shard, ids=ids, where=where: self._shards(shard).nearest(
                    tenant, ids, where=where, now=now, limit=NEIGHBOURS
                ),
            )
            near |= {id: [Near(*one) for one in nearest] for id, nearest in found.items()}
        return near

    async def proposals(
        self,
        tenant: TenantId,
        *,
        state: ProposalState | None = None,
        limit: int,
        after: str | None = None,
    ) -> list[Proposal]:
        """The tenant's, newest first; ``after`` is the last id of the page before."""
        return await asyncio.to_thread(
            self._catalog.proposals.find,
            tenant,
            state=state,
            limit=limit,
            after=after,
            now=self._clock(),
        )

    async def apply(
        self, tenant: TenantId, id: str, *, shard: int, author: str
    ) -> tuple[Proposal, MemCube]:
        """Merge a proposal's cubes, and index what they became.

        Raises:
            NotFound: no such proposal.
            Conflict: it was dismissed, or is outdated. Frozen: a cube of it is frozen.
        """
        now = self._clock()
        found = await asyncio.to_thread(self._catalog.proposals.get, tenant, id, now=now)
        if found.state is ProposalState.OUTDATED:
            raise Conflict(f"proposal {id!r} is outdated: a cube of it has changed; find anew")
        ids = sorted(found.cubes)
        parents = await asyncio.to_thread(self._catalog.cubes.get_many, tenant, ids, now=now)
        parents.sort(key=lambda cube: (cube.updated_at, cube.id))
        draft = fused_draft(found.text, [_at(cube, found) for cube in parents])
        proposal, cube = await asyncio.to_thread(
            self._catalog.proposals.apply, tenant, id, draft, author=author, now=now
        )
        await self._settling.unindex(tenant, found.cubes, shard=shard)
        await self._settling.take_back(tenant, ids, shard=shard)
        (settled,) = await self._settling.reindex([cube], shard=shard)
        return proposal, settled

    async def dismiss(self, tenant: TenantId, id: str, *, author: str) -> Proposal:
        """Close a proposal without a change."""
        return await asyncio.to_thread(
            self._catalog.proposals.dismiss, tenant, id, author=author, now=self._clock()
        )


def _at(cube: MemCube, proposal: Proposal) -> MemCube:
    """A parent as the lineage names it: where it has moved on meanwhile, nothing is merged."""
    return replace(cube, version=proposal.cubes[cube.id])
