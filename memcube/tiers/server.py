"""The plaintext store on a Qdrant server or cluster, through ``AsyncQdrantClient``.

Qdrant's own keys don't separate tenants inside a collection: every call here adds the tenant to the
filter. Needs a server of 1.20 or newer: it matches substrings (1.20, by case and by character, without
an index by reading the payload) and counts document frequencies within a filter (1.19). An older server
could ignore the latter and score by other tenants' cubes, so it is refused. The tests run
on the client's local mode, which evaluates the same requests in Python, and on a real server where
``QDRANT_URL`` names one; local mode is never used for users' data (it unpickles its files).
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import httpx
import numpy as np
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from memcube.errors import Conflict, StorageFull, Unavailable
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId
from memcube.tiers import bm25
from memcube.tiers.payload import (
    DENSE,
    INTEGERS,
    KEYWORDS,
    SPARSE,
    FilterTranslator,
    payload_of,
    point_id,
    stored_cube,
)
from memcube.tiers.plaintext import (
    IndexedCube,
    IndexSpec,
    Scored,
    SlotScore,
    StoredCube,
    Vector,
    check_vectors,
)

T = TypeVar("T")
SLICE = 64
SCROLL = 1_000
MAX_TOMBSTONES = 200_000
OLDEST = (1, 20)
_filters = FilterTranslator(models, positional=False)


class ServerStore:
    """One collection of a Qdrant server. Only one store may write it at a time."""

    def __init__(self, client: AsyncQdrantClient, spec: IndexSpec, *, name: str) -> None:
        self.spec = spec
        self._client = client
        self._name = name
        self._writing = asyncio.Lock()
        self._tombstones: OrderedDict[str, int] = OrderedDict()

    @classmethod
    async def open(
        cls, client: AsyncQdrantClient, spec: IndexSpec, *, name: str, local: bool = False
    ) -> "ServerStore":
        """Open a collection, made if it is not there. ``local``: the client has no payload indexes.

        Raises:
            Conflict: the collection was built with another embedder.
            Unavailable: the server does not answer, or is too old.
        """
        store = cls(client, spec, name=name)
        version = (await store._answer(client.info())).version
        if _release(version) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise Unavailable(f"the Qdrant server is {version}; {needed} or newer is needed")
        if not await store._answer(client.collection_exists(name)):
            await store._answer(store._create(local))
        found = await store._answer(client.get_collection(name))
        stated = found.config.metadata or {}
        held, wanted = (stated.get("embedder"), stated.get("dim")), (spec.embedder, spec.dim)
        if held != wanted:
            raise Conflict(f"collection {name} holds vectors of {held}, not of {wanted}")
        return store

    async def _create(self, local: bool) -> None:
        await self._client.create_collection(
            self._name,
            vectors_config={
                DENSE: models.VectorParams(size=self.spec.dim, distance=models.Distance.COSINE)
            },
            sparse_vectors_config={SPARSE: models.SparseVectorParams(modifier=models.Modifier.IDF)},
            metadata={"embedder": self.spec.embedder, "dim": self.spec.dim},
            # A graph per tenant large enough for one, none over all: every search is of one tenant.
            hnsw_config=models.HnswConfigDiff(m=0, payload_m=16),
        )
        if local:
            return
        tenant = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
        await self._client.create_payload_index(self._name, "tenant", tenant, wait=True)
        for field in KEYWORDS:
            keyword = models.KeywordIndexParams(
                type=models.KeywordIndexType.KEYWORD, enable_hnsw=False
            )
            await self._client.create_payload_index(self._name, field, keyword, wait=True)
        for field in INTEGERS:
            integer = models.IntegerIndexParams(
                type=models.IntegerIndexType.INTEGER, lookup=True, range=True, enable_hnsw=False
            )
            await self._client.create_payload_index(self._name, field, integer, wait=True)

    async def put(self, cubes: Sequence[IndexedCube]) -> None:
        check_vectors(cubes, self.spec.dim)
        for start in range(0, len(cubes), SLICE):
            async with self._writing:
                await self._put_slice(cubes[start : start + SLICE])

    async def _put_slice(self, cubes: Sequence[IndexedCube]) -> None:
        newest: dict[str, IndexedCube] = {}
        for cube in cubes:
            point = point_id(cube.tenant, cube.id)
            if point not in newest or newest[point].version <= cube.version:
                newest[point] = cube
        held = await self._versions_of(list(newest))
        points = []
        for point, cube in newest.items():
            if cube.version <= self._tombstones.get(point, 0) or cube.version < held.get(point, 0):
                continue
            terms = bm25.document(cube.text, cube.speaker)
            sparse = models.SparseVector(indices=terms.indices, values=terms.values)
            points.append(
                models.PointStruct(
                    id=point,
                    vector={DENSE: cube.vector.tolist(), SPARSE: sparse},
                    payload=payload_of(cube),
                )
            )
        if points:
            await self._answer(self._client.upsert(self._name, points, wait=True))

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int]) -> None:
        async with self._writing:
            wanted = {point_id(tenant, id): version for id, version in versions.items()}
            for point, version in wanted.items():
                self._tombstones[point] = max(version, self._tombstones.get(point, 0))
                self._tombstones.move_to_end(point)
            while len(self._tombstones) > MAX_TOMBSTONES:
                self._tombstones.popitem(last=False)
            held = await self._versions_of(list(wanted))
            gone: list[Any] = [point for point, version in held.items() if version <= wanted[point]]
            if gone:
                selector = models.PointIdsList(points=gone)
                await self._answer(self._client.delete(self._name, selector, wait=True))

    async def drop(self, tenant: TenantId) -> int:
        gone = [id async for _, id, _ in self.versions(tenant)]
        async with self._writing:
            selector = models.FilterSelector(filter=_filters.all_of_tenant(tenant))
            await self._answer(self._client.delete(self._name, selector, wait=True))
        return len(gone)

    async def set_state(self, tenant: TenantId, ids: Iterable[CubeId], state: str) -> None:
        async with self._writing:
            held = await self._versions_of([point_id(tenant, id) for id in ids])
            if held:
                await self._answer(
                    self._client.set_payload(self._name, {"state": state}, list(held), wait=True)
                )

    async def _versions_of(self, points: list[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for start in range(0, len(points), SCROLL):
            records = await self._answer(
                self._client.retrieve(
                    self._name, points[start : start + SCROLL], with_payload=["version"]
                )
            )
            found.update({str(r.id): r.payload["version"] for r in records if r.payload})
        return found

    async def get(
        self, tenant: TenantId, ids: Sequence[CubeId], *, with_vectors: bool = False
    ) -> list[StoredCube]:
        if not ids:
            return []
        points = [point_id(tenant, id) for id in ids]
        vectors = [DENSE] if with_vectors else False
        records = await self._answer(
            self._client.retrieve(self._name, points, with_payload=True, with_vectors=vectors)
        )
        found: dict[str, StoredCube] = {}
        for record in records:
            if record.payload is None or record.payload.get("tenant") != tenant:
                continue
            vector = None
            if with_vectors and isinstance(record.vector, dict):
                vector = np.asarray(record.vector[DENSE], dtype=np.float32)
            found[str(record.id)] = stored_cube(record.payload, vector)
        return [found[point] for point in points if point in found]

    async def search_dense(
        self,
        tenant: TenantId,
        vector: Vector,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> list[Scored]:
        found = await self._answer(
            self._client.query_points(
                self._name,
                query=vector.tolist(),
                using=DENSE,
                query_filter=_filters.scope(tenant, where, now),
                limit=limit,
                with_payload=["id"],
            )
        )
        return _scored(found.points)

    async def search_sparse(
        self,
        tenant: TenantId,
        text: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> list[Scored]:
        corpus = _filters.scope(tenant, where, now)
        found = await self._sparse(text, corpus, corpus, limit)
        return _scored(found)

    async def _sparse(
        self, text: str, wanted: models.Filter, corpus: models.Filter, limit: int
    ) -> list[models.ScoredPoint]:
        terms = bm25.query(text)
        if not terms.indices:
            return []
        found = await self._answer(
            self._client.query_points(
                self._name,
                query=models.SparseVector(indices=terms.indices, values=terms.values),
                using=SPARSE,
                query_filter=wanted,
                search_params=models.SearchParams(idf=models.IdfCorpusParams(corpus=corpus)),
                limit=limit,
                with_payload=["id"],
            )
        )
        return found.points

    async def score_slots(
        self,
        tenant: TenantId,
        slots: Sequence[int],
        *,
        vector: Vector,
        text: str,
        where: Filter | None,
        now: datetime,
    ) -> list[SlotScore]:
        if not slots:
            return []
        wanted = _filters.scope(tenant, where, now, _filters.any_of("slot", list(slots)))
        dense = await self._answer(
            self._client.query_points(
                self._name,
                query=vector.tolist(),
                using=DENSE,
                query_filter=wanted,
                search_params=models.SearchParams(exact=True),
                limit=len(slots),
                with_payload=["id", "slot"],
            )
        )
        corpus = _filters.scope(tenant, where, now)
        sparse = await self._sparse(text, wanted, corpus, len(slots))
        by_terms = {hit.id: hit.score for hit in sparse}
        return [
            SlotScore(
                id=CubeId(hit.payload["id"]),
                slot=hit.payload["slot"],
                cosine=hit.score,
                bm25=by_terms.get(hit.id, 0.0),
            )
            for hit in dense.points
            if hit.payload
        ]

    async def speakers(
        self, tenant: TenantId, *, where: Filter | None, now: datetime, limit: int
    ) -> list[str]:
        facets = await self._answer(
            self._client.facet(
                self._name,
                "speaker",
                facet_filter=_filters.scope(tenant, where, now),
                limit=limit,
                exact=True,
            )
        )
        counts = [(str(hit.value), hit.count) for hit in facets.hits]
        return [name for name, _ in sorted(counts, key=lambda pair: (-pair[1], pair[0]))]

    async def count(self, tenant: TenantId, *, where: Filter | None, now: datetime) -> int:
        counted = await self._answer(
            self._client.count(
                self._name, count_filter=_filters.scope(tenant, where, now), exact=True
            )
        )
        return counted.count

    async def versions(
        self, tenant: TenantId | None = None
    ) -> AsyncIterator[tuple[TenantId, CubeId, int]]:
        offset = None
        where = None if tenant is None else _filters.all_of_tenant(tenant)
        while True:
            records, offset = await self._answer(
                self._client.scroll(
                    self._name,
                    limit=SCROLL,
                    offset=offset,
                    scroll_filter=where,
                    with_payload=["tenant", "id", "version"],
                )
            )
            for record in records:
                payload = record.payload or {}
                yield TenantId(payload["tenant"]), CubeId(payload["id"]), payload["version"]
            if offset is None:
                return

    async def close(self) -> None:
        await self._client.close()

    async def _answer(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (ResponseHandlingException, httpx.TransportError) as failed:
            raise Unavailable(f"the Qdrant server did not answer ({failed})") from None
        except UnexpectedResponse as refused:
            if refused.status_code == 507 or b"No space left" in (refused.content or b""):
                raise StorageFull("the Qdrant server") from None
            if refused.status_code in (429, 500, 502, 503, 504):
                raise Unavailable(f"the Qdrant server answered {refused.status_code}") from None
            raise


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("-")[0].split(".")[:2])


def _scored(points: Sequence[models.ScoredPoint]) -> list[Scored]:
    hits = [Scored(id=CubeId(p.payload["id"]), score=p.score) for p in points if p.payload]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))
