"""Ranks the cubes of one store for a query.

``dense`` is plain cosine and ``sparse`` plain BM25, both of the query as given. ``hybrid`` takes the
best of both as a pool, with the turns next to them, and orders it by a learned linear function of a
few features (``features``, docs/retrieval.md). Its score is the chance that a cube answers the query,
as calibrated on the training questions.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from memcube import cube
from memcube.embedding.contract import Embedder, Purpose
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId
from memcube.retrieval.features import NAMES, Candidate, Place, Pool, Scores, TextReader, matrix
from memcube.retrieval.query import analyse
from memcube.retrieval.weights import RankerWeights
from memcube.tiers.plaintext import PlaintextStore, Scored, StoredCube, Vector

SEEDS = 16
"""The best of each search whose neighbours are looked at. More cost more and rank no better."""

MAX_SPEAKERS = 64
SPEAKERS_FOR = timedelta(seconds=10)
"""A scope's speakers are asked for this seldom: counting those of 20,000 cubes takes 6 CPU-ms."""

MAX_SCOPES = 1024
_AROUND = (-2, -1, 1, 2)
_slot = functools.lru_cache(maxsize=65_536)(cube.slot)


class Mode(StrEnum):
    """How cubes are ranked."""

    DENSE = "dense"
    SPARSE = "sparse"
    HYBRID = "hybrid"


class Hit(NamedTuple):
    """A cube found. ``score``: cosine, BM25, or the chance that it answers the query.

    ``explain``: each feature's part of the hybrid score, and the plain ``cosine`` and ``bm25``.
    """

    id: CubeId
    score: float
    cube: StoredCube
    explain: Mapping[str, float] | None = None


class Retriever:
    """Searches one store."""

    def __init__(self, store: PlaintextStore, embedder: Embedder, weights: RankerWeights) -> None:
        self._store = store
        self._embedder = embedder
        self._weights = weights
        self._reader = TextReader()
        self._speakers: dict[tuple[TenantId, Filter | None], tuple[datetime, list[str]]] = {}

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
        """The best cubes for a query, best first, at or above ``threshold``; ties go by id."""
        if mode is Mode.HYBRID:
            pool = await self.pool(tenant, query, where=where, now=now, limit=limit)
            hits = self._rank(pool, limit, explain)
        else:
            hits = await self._plain(tenant, query, where, now, limit, mode, explain)
        return [hit for hit in hits if threshold is None or hit.score >= threshold]

    async def pool(
        self, tenant: TenantId, query: str, *, where: Filter | None, now: datetime, limit: int
    ) -> Pool:
        """The candidates of a query: the best by cosine and by BM25, at least ``limit`` of each,
        and the turns right before and after the best ``SEEDS`` of each."""
        asked = analyse(query, await self._speakers_of(tenant, where, now))
        (vector,) = await self._embedder.embed([asked.dense_text], Purpose.QUERY)
        size = max(SEEDS, limit)
        dense = await self._store.search_dense(tenant, vector, where=where, now=now, limit=size)
        sparse = await self._store.search_sparse(tenant, query, where=where, now=now, limit=size)
        cosines = {hit.id: hit.score for hit in dense}
        terms = {hit.id: hit.score for hit in sparse}
        cubes = await self._store.get(tenant, list(cosines | terms))
        seeds = {hit.id for hit in (*dense[:SEEDS], *sparse[:SEEDS])}
        near = _places_near(cubes, seeds)
        found = await self._store.score_slots(
            tenant, list(near), vector=vector, text=query, where=where, now=now
        )
        turns: dict[Place, Scores] = {}
        beside: list[CubeId] = []
        for turn in found:
            place, is_beside = near[turn.slot]
            turns[place] = Scores(turn.cosine, turn.bm25)
            if is_beside and turn.id not in cosines and turn.id not in terms:
                beside.append(turn.id)
            cosines.setdefault(turn.id, turn.cosine)
            terms.setdefault(turn.id, turn.bm25)
        cubes += await self._store.get(tenant, beside)
        cosines |= await self._cosines(tenant, [c.id for c in cubes if c.id not in cosines], vector)
        return Pool(
            query=asked,
            candidates=[
                Candidate(
                    cube=cube,
                    cosine=cosines[cube.id],
                    bm25=terms.get(cube.id, 0.0),
                    place=_place(cube),
                )
                for cube in cubes
                if cube.id in cosines
            ],
            turns=turns,
            best_cosine=dense[0].score if dense else 0.0,
            low_cosine=dense[:SEEDS][-1].score if dense else 0.0,
            best_bm25=sparse[0].score if sparse else 0.0,
        )

    async def _speakers_of(
        self, tenant: TenantId, where: Filter | None, now: datetime
    ) -> list[str]:
        held = self._speakers.get((tenant, where))
        if held is not None and abs(now - held[0]) < SPEAKERS_FOR:
            return held[1]
        found = await self._store.speakers(tenant, where=where, now=now, limit=MAX_SPEAKERS)
        if len(self._speakers) >= MAX_SCOPES:
            self._speakers.clear()
        if found:
            self._speakers[tenant, where] = now, found
        return found

    async def _cosines(
        self, tenant: TenantId, ids: Sequence[CubeId], vector: Vector
    ) -> dict[CubeId, float]:
        """Cosines of cubes that only BM25 found and that have no place to be scored at."""
        if not ids:
            return {}
        cubes = await self._store.get(tenant, ids, with_vectors=True)
        return {c.id: float(np.dot(c.vector, vector)) for c in cubes if c.vector is not None}

    def _rank(self, pool: Pool, limit: int, explain: bool) -> list[Hit]:
        if not pool.candidates:
            return []
        x = matrix(pool, self._reader)
        scores = x @ self._weights.weights
        order = sorted(
            range(len(scores)), key=lambda row: (-scores[row], pool.candidates[row].cube.id)
        )
        hits = []
        for row in order[:limit]:
            candidate = pool.candidates[row]
            parts = None
            if explain:
                terms = (x[row] * self._weights.weights).tolist()
                parts = {name: term for name, term in zip(NAMES, terms, strict=True) if term}
                parts |= {"cosine": candidate.cosine, "bm25": candidate.bm25}
            hits.append(
                Hit(
                    id=candidate.cube.id,
                    score=self._weights.probability(float(scores[row]), pool.best_cosine),
                    cube=candidate.cube,
                    explain=parts,
                )
            )
        return hits

    async def _plain(
        self,
        tenant: TenantId,
        query: str,
        where: Filter | None,
        now: datetime,
        limit: int,
        mode: Mode,
        explain: bool,
    ) -> list[Hit]:
        found: Sequence[Scored]
        if mode is Mode.DENSE:
            (vector,) = await self._embedder.embed([query], Purpose.QUERY)
            found = await self._store.search_dense(
                tenant, vector, where=where, now=now, limit=limit
            )
        else:
            found = await self._store.search_sparse(
                tenant, query, where=where, now=now, limit=limit
            )
        cubes = {c.id: c for c in await self._store.get(tenant, [hit.id for hit in found])}
        name = "cosine" if mode is Mode.DENSE else "bm25"
        return [
            Hit(
                id=hit.id,
                score=hit.score,
                cube=cubes[hit.id],
                explain={name: hit.score} if explain else None,
            )
            for hit in found
            if hit.id in cubes
        ]


def _place(cube: StoredCube) -> Place | None:
    thread, seq = cube.payload.get("thread"), cube.payload.get("seq")
    return None if thread is None or seq is None else (thread, seq)


def _places_near(
    cubes: Iterable[StoredCube], seeds: Iterable[CubeId]
) -> dict[int, tuple[Place, bool]]:
    """By slot: the places of all cubes and those up to two turns from a seed, and whether a place
    is right beside a seed."""
    near: dict[int, tuple[Place, bool]] = {}
    placed = [(cube.id, place) for cube in cubes if (place := _place(cube)) is not None]
    for id, (thread, seq) in placed:
        near.setdefault(_slot(thread, seq), ((thread, seq), False))
        if id not in seeds:
            continue
        for step in _AROUND:
            if seq + step >= 0:
                slot, beside = _slot(thread, seq + step), abs(step) == 1
                if beside or slot not in near:
                    near[slot] = ((thread, seq + step), beside)
    return near
