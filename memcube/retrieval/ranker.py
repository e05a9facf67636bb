"""Ranks the cubes of one store for a query.

``dense`` is plain cosine and ``sparse`` plain BM25, both of the query as given. ``hybrid`` takes the
best of both as a pool, looks at the turns around each candidate, and orders the pool by a learned
linear function of a few features (``features``, docs/retrieval.md). Its score is the chance that a
cube answers the query, as calibrated on the training questions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np

from memcube.cube import slot
from memcube.embedding.contract import Embedder, Purpose
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId
from memcube.retrieval.features import NAMES, Candidate, matrix
from memcube.retrieval.query import Query, analyse
from memcube.retrieval.weights import RankerWeights
from memcube.tiers.plaintext import PlaintextStore, Scored, SlotScore, StoredCube, Vector

POOL = 100
MAX_SPEAKERS = 64
_STEPS = (-1, 1, -2, 2)


class Mode(StrEnum):
    """How cubes are ranked."""

    DENSE = "dense"
    SPARSE = "sparse"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A cube found. ``score``: cosine, BM25, or the chance that it answers the query."""

    id: CubeId
    score: float
    cube: StoredCube
    explain: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The candidates of a query, before they are ranked."""

    query: Query
    candidates: list[Candidate]
    cubes: dict[CubeId, StoredCube]


class Retriever:
    """Searches one store."""

    def __init__(self, store: PlaintextStore, embedder: Embedder, weights: RankerWeights) -> None:
        self._store = store
        self._embedder = embedder
        self._weights = weights

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
            hits = self._rank(
                await self.pool(tenant, query, where=where, now=now, size=max(POOL, limit)),
                limit,
                explain,
            )
        else:
            hits = await self._plain(tenant, query, where, now, limit, mode, explain)
        return [hit for hit in hits if threshold is None or hit.score >= threshold]

    async def pool(
        self,
        tenant: TenantId,
        query: str,
        *,
        where: Filter | None,
        now: datetime,
        size: int,
    ) -> Pool:
        """The candidates of a query: the ``size`` best by cosine and by BM25, with their scores in
        both and those of the turns around them."""
        speakers = await self._store.speakers(tenant, where=where, now=now, limit=MAX_SPEAKERS)
        analysed = analyse(query, speakers)
        (vector,) = await self._embedder.embed([analysed.dense_text], Purpose.QUERY)
        dense = await self._store.search_dense(tenant, vector, where=where, now=now, limit=size)
        sparse = await self._store.search_sparse(tenant, query, where=where, now=now, limit=size)
        ids = list(dict.fromkeys(hit.id for hit in (*dense, *sparse)))
        cubes = {cube.id: cube for cube in await self._store.get(tenant, ids, with_vectors=False)}
        around = await self._around(tenant, cubes.values(), vector, query, where, now)
        cosines = await self._cosines(tenant, [i for i in ids if i in cubes], dense, around, vector)
        terms = {hit.id: hit.score for hit in sparse}
        questions = {
            (c.payload["thread"], c.payload["seq"]): c.text.rstrip().endswith("?")
            for c in cubes.values()
            if "thread" in c.payload
        }
        candidates = []
        for id in ids:
            cube = cubes.get(id)
            if cube is None:
                continue
            thread, seq = cube.payload.get("thread"), cube.payload.get("seq")
            own = around.get(slot(thread, seq)) if thread is not None else None
            places: list[tuple[float, float] | None] = [None] * len(_STEPS)
            if thread is not None and seq is not None:
                for place, step in enumerate(_STEPS):
                    found = around.get(slot(thread, seq + step))
                    places[place] = None if found is None else (found.cosine, found.bm25)
            candidates.append(
                Candidate(
                    id=id,
                    cosine=cosines[id],
                    bm25=terms.get(id, own.bm25 if own else 0.0),
                    text=cube.text,
                    speaker=cube.payload.get("speaker"),
                    thread=thread,
                    neighbours=tuple(places),
                    prev_is_question=seq is not None and questions.get((thread, seq - 1), False),
                )
            )
        return Pool(query=analysed, candidates=candidates, cubes=cubes)

    async def _around(
        self,
        tenant: TenantId,
        cubes: Sequence[StoredCube] | object,
        vector: Vector,
        query: str,
        where: Filter | None,
        now: datetime,
    ) -> dict[int, SlotScore]:
        """Scores of the candidates' own places and of those around them, by slot."""
        wanted: set[int] = set()
        for cube in cubes:  # type: ignore[attr-defined]
            thread, seq = cube.payload.get("thread"), cube.payload.get("seq")
            if thread is not None and seq is not None:
                wanted.add(slot(thread, seq))
                wanted.update(slot(thread, seq + step) for step in _STEPS if seq + step >= 0)
        found = await self._store.score_slots(
            tenant, list(wanted), vector=vector, text=query, where=where, now=now
        )
        return {score.slot: score for score in found}

    async def _cosines(
        self,
        tenant: TenantId,
        ids: Sequence[CubeId],
        dense: Sequence[Scored],
        around: Mapping[int, SlotScore],
        vector: Vector,
    ) -> dict[CubeId, float]:
        """Every candidate's cosine; those that only BM25 found are computed from their vectors."""
        known = {score.id: score.cosine for score in around.values()}
        known.update((hit.id, hit.score) for hit in dense)
        missing = [id for id in ids if id not in known]
        for cube in await self._store.get(tenant, missing, with_vectors=True):
            if cube.vector is not None:
                known[cube.id] = float(np.dot(cube.vector, vector))
        return {id: known.get(id, 0.0) for id in ids}

    def _rank(self, pool: Pool, limit: int, explain: bool) -> list[Hit]:
        if not pool.candidates:
            return []
        x = matrix(pool.query, pool.candidates)
        scores = x @ self._weights.weights
        order = sorted(
            range(len(scores)), key=lambda row: (-scores[row], pool.candidates[row].id)
        )[:limit]
        hits = []
        for row in order:
            candidate = pool.candidates[row]
            logit = self._weights.scale * float(scores[row]) + self._weights.offset
            parts = None
            if explain:
                terms = x[row] * self._weights.weights
                parts = {name: round(float(t), 4) for name, t in zip(NAMES, terms, strict=True) if t}
                parts |= {"cosine": candidate.cosine, "bm25_score": candidate.bm25}
            hits.append(
                Hit(
                    id=candidate.id,
                    score=1 / (1 + math.exp(-max(-30.0, min(30.0, logit)))),
                    cube=pool.cubes[candidate.id],
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
        name = "cosine" if mode is Mode.DENSE else "bm25_score"
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
