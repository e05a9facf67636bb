"""The plaintext store on qdrant-edge: the Qdrant engine in this process, one folder, no server.

Durability: an update is in the engine's write-ahead log before ``put`` returns and survives
``kill -9``. It is fsynced by ``flush``, which runs every ``FLUSH_EVERY`` points and at close; what a
loss of power takes is put again from the catalog by the reconcile loop.

Every engine call holds the GIL, so each is kept small: points go in by slices, and a slice yields
to waiting searches before the next. The one call that can't be small, building the HNSW graph, runs
in another process on a copy (``optimise``); searches go on meanwhile.

What lies in the folder is ``memcube.tiers.layout``'s. Only one process opens a folder.
"""

import asyncio
import fcntl
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import qdrant_edge as qe

from memcube.errors import Corrupt, StorageFull, Unavailable
from memcube.filters import Filter
from memcube.ids import CubeId, TenantId
from memcube.tiers import bm25, layout, optimise
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

SLICE = 32
FLUSH_EVERY = 2_000
SCROLL = 250
MAX_TOMBSTONES = 200_000
MAX_PLACES = 200_000
MAX_READ, MAX_READ_CHARS = 8_192, 4_096
"""Cubes held as read, and how long the text of one may be: some 40 MiB at most."""
OPTIMISE_ABOVE = 20_000
"""Points without a graph that are worth one. Below, a tenant's filtered scan is faster anyway."""
FULL_SCAN_KIB = 10_000
"""A tenant whose vectors take more is searched by its graph: some 6,700 cubes of 384 dimensions."""

_filters = FilterTranslator(qe, positional=True)
_ID_SLOT = qe.PayloadSelector.Include(["id", "slot"])
_VERSION = qe.PayloadSelector.Include(["version"])


_V = TypeVar("_V")


class EdgeStore:
    """One folder of the embedded engine."""

    def __init__(
        self, path: Path, spec: IndexSpec, shard: qe.EdgeShard, name: str, lock: int
    ) -> None:
        self.spec = spec
        self._path = path
        self._shard = shard
        self._name = name
        self._lock = lock
        self._writing = asyncio.Lock()
        self._unflushed = 0
        self._tombstones: OrderedDict[str, int] = OrderedDict()
        self._closed = False
        self._optimising = False
        self._worker: asyncio.subprocess.Process | None = None
        self._touched: set[str] | None = None
        """Points written since the copy that is being optimised was taken; None when there is none."""
        self._places: dict[str, tuple[CubeId, int | None]] = {}
        """Id and slot of points lately seen: reading them from payloads is most of a search's time.
        A point's id never changes, its slot only by ``put``."""
        self._read: dict[str, StoredCube] = {}
        """Cubes lately read, as they are in the index now: ``_update`` forgets what it changes. Nobody
        may change a cube that was read."""
        self._left_out = 0
        """Points that the last optimisation left outside a graph, because it was not worth one."""

    @classmethod
    def open(cls, path: Path, spec: IndexSpec) -> "EdgeStore":
        """Open the store in a folder, made if it is not there.

        Raises:
            Unavailable: another process has it open.
            Conflict: it was built with another embedder.
            Corrupt: it holds something else, or damaged data; nothing is changed.
        """
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Unavailable(f"{path} is open in another process") from None
        try:
            return cls(path, spec, *_open_engine(path, spec), lock)
        except BaseException:
            os.close(lock)
            raise

    async def put(self, cubes: Sequence[IndexedCube]) -> None:
        check_vectors(cubes, self.spec.dim)
        for start in range(0, len(cubes), SLICE):
            async with self._writing:
                self._put_slice(cubes[start : start + SLICE])
            await asyncio.sleep(0)

    def _put_slice(self, cubes: Sequence[IndexedCube]) -> None:
        newest: dict[str, IndexedCube] = {}
        for cube in cubes:
            point = point_id(cube.tenant, cube.id)
            if point not in newest or newest[point].version <= cube.version:
                newest[point] = cube
        held = {
            str(record.id): record.payload["version"]
            for record in self._shard.retrieve([*newest], _VERSION, False)
            if record.payload
        }
        points = []
        for point, cube in newest.items():
            if cube.version <= self._tombstones.get(point, 0) or cube.version < held.get(point, 0):
                continue
            terms = bm25.document(cube.text, cube.speaker)
            points.append(
                qe.Point(
                    id=point,
                    vector={
                        DENSE: cube.vector.tolist(),
                        SPARSE: qe.SparseVector(indices=terms.indices, values=terms.values),
                    },
                    payload=payload_of(cube),
                )
            )
        if points:
            written = [str(p.id) for p in points]
            self._update(qe.UpdateOperation.upsert_points(points), written)
            for point in written:
                self._remember(point, newest[point].id, newest[point].slot)

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int]) -> None:
        async with self._writing:
            wanted = {point_id(tenant, id): version for id, version in versions.items()}
            for point, version in wanted.items():
                self._tombstones[point] = max(version, self._tombstones.get(point, 0))
                self._tombstones.move_to_end(point)
            while len(self._tombstones) > MAX_TOMBSTONES:
                self._tombstones.popitem(last=False)
            for start in range(0, len(wanted), SCROLL):
                part: list[Any] = list(wanted)[start : start + SCROLL]
                gone: list[Any] = [
                    str(record.id)
                    for record in self._shard.retrieve(part, _VERSION, False)
                    if record.payload and record.payload["version"] <= wanted[str(record.id)]
                ]
                if gone:
                    self._update(qe.UpdateOperation.delete_points(gone), gone)
                await asyncio.sleep(0)

    async def drop(self, tenant: TenantId) -> int:
        gone: list[Any] = [point_id(tenant, id) async for _, id, _ in self.versions(tenant)]
        for start in range(0, len(gone), SCROLL):
            part = gone[start : start + SCROLL]
            async with self._writing:
                self._update(qe.UpdateOperation.delete_points(part), part)
            await asyncio.sleep(0)
        return len(gone)

    async def set_state(self, tenant: TenantId, ids: Iterable[CubeId], state: str) -> None:
        async with self._writing:
            points: list[Any] = [point_id(tenant, id) for id in ids]
            for start in range(0, len(points), SCROLL):
                part = points[start : start + SCROLL]
                there: list[Any] = [str(r.id) for r in self._shard.retrieve(part, False, False)]
                if there:
                    self._update(qe.UpdateOperation.set_payload(there, {"state": state}), there)
                await asyncio.sleep(0)

    async def get(
        self, tenant: TenantId, ids: Sequence[CubeId], *, with_vectors: bool = False
    ) -> list[StoredCube]:
        if not ids:
            return []
        vectors = [DENSE] if with_vectors else False
        points = [point_id(tenant, id) for id in ids]
        found: dict[str, StoredCube] = {}
        if not with_vectors:
            found = {point: self._read[point] for point in points if point in self._read}
        unread: list[Any] = [point for point in points if point not in found]
        for start in range(0, len(unread), SCROLL):
            if start:
                await asyncio.sleep(0)
            for record in self._shard.retrieve(unread[start : start + SCROLL], True, vectors):
                payload = record.payload  # converted anew at each access
                if payload is None or payload.get("tenant") != tenant:
                    continue
                point, vector = str(record.id), None
                if with_vectors and isinstance(record.vector, dict):
                    vector = np.asarray(record.vector[DENSE], dtype=np.float32)
                found[point] = stored_cube(payload, vector)
                if vector is None and len(found[point].text) <= MAX_READ_CHARS:
                    _hold(self._read, point, found[point], MAX_READ)
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
        return self._scored(
            qe.QueryRequest(
                limit=limit,
                query=qe.Query.Nearest(vector.tolist(), using=DENSE),
                filter=_filters.scope(tenant, where, now),
            )
        )

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
        request = _sparse_request(text, corpus, corpus, limit)
        return [] if request is None else self._scored(request)

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
        dense = qe.QueryRequest(
            limit=len(slots),
            query=qe.Query.Nearest(vector.tolist(), using=DENSE),
            filter=wanted,
            params=qe.SearchParams(exact=True),
        )
        corpus = _filters.scope(tenant, where, now)
        sparse = _sparse_request(text, wanted, corpus, len(slots))
        found = self._shard.query_batch(
            qe.QueryBatchRequest([dense] if sparse is None else [dense, sparse])
        )
        by_terms = {} if sparse is None else {str(hit.id): hit.score for hit in found[1]}
        cosines = {str(hit.id): hit.score for hit in found[0]}
        return [
            SlotScore(id=id, slot=place, cosine=cosines[point], bm25=by_terms.get(point, 0.0))
            for point, id, place in self._places_of(list(cosines))
            if place is not None
        ]

    async def speakers(
        self, tenant: TenantId, *, where: Filter | None, now: datetime, limit: int
    ) -> list[str]:
        facets = self._shard.facet(
            qe.FacetRequest(
                key="speaker", limit=limit, exact=True, filter=_filters.scope(tenant, where, now)
            )
        )
        counts = [(str(hit.value), hit.count) for hit in facets]
        return [name for name, _ in sorted(counts, key=lambda pair: (-pair[1], pair[0]))]

    async def count(self, tenant: TenantId, *, where: Filter | None, now: datetime) -> int:
        return self._shard.count(
            qe.CountRequest(exact=True, filter=_filters.scope(tenant, where, now))
        )

    async def versions(
        self, tenant: TenantId | None = None
    ) -> AsyncIterator[tuple[TenantId, CubeId, int]]:
        offset = None
        selector = qe.PayloadSelector.Include(["tenant", "id", "version"])
        where = None if tenant is None else _filters.all_of_tenant(tenant)
        while True:
            records, offset = self._shard.scroll(
                qe.ScrollRequest(offset=offset, limit=SCROLL, with_payload=selector, filter=where)
            )
            for record in records:
                payload = record.payload or {}
                yield TenantId(payload["tenant"]), CubeId(payload["id"]), payload["version"]
            if offset is None:
                return
            await asyncio.sleep(0)

    async def close(self) -> None:
        self._closed = True
        if self._worker is not None and self._worker.returncode is None:
            self._worker.kill()
            await self._worker.wait()
        async with self._writing:
            self._flush()
            self._shard.close()
            os.close(self._lock)

    @property
    def needs_optimise(self) -> bool:
        """Whether many points came since the last optimisation that lie outside a graph."""
        return self._outside_graph() - self._left_out > OPTIMISE_ABOVE

    def _outside_graph(self) -> int:
        info = self._shard.info()
        # A sparse vector always counts as indexed, a dense one only once it is in a graph.
        return info.points_count - max(0, info.indexed_vectors_count - info.points_count)

    async def optimise(self) -> bool:
        """Merge segments and build graphs in another process on a copy, and switch to it.

        Searches go on all the time; writes wait while the folder is copied and while the copy
        catches up. A crash leaves the old folder or the new one, whole. Returns whether it
        switched; False when one is running already, or the store was closed meanwhile.

        Raises:
            Unavailable: the other process failed; the old folder stays in use.
        """
        if self._optimising or self._closed:
            return False
        self._optimising = True
        old, replaced = self._path / self._name, self._shard
        new = self._path / layout.next_name(self._path)
        try:
            async with self._writing:
                if self._closed:
                    return False
                self._flush()
                await asyncio.to_thread(shutil.copytree, old, new)
                self._touched = set()
            if not self._closed and await self._build(new):
                async with self._writing:
                    if not self._closed:
                        await self._switch(new)
        finally:
            self._optimising, self._touched = False, None
            if self._name != new.name:
                shutil.rmtree(new, ignore_errors=True)
        if self._name != new.name:
            return False
        replaced.close()
        await asyncio.to_thread(shutil.rmtree, old)
        return True

    async def _build(self, new: Path) -> bool:
        """Optimise the copy in a process of its own; False when the store was closed meanwhile."""
        self._worker = worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # this package's folder has modules of common names
            optimise.__file__,
            str(new),
            str(os.getpid()),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # While the worker lives, nobody else opens the folder, even if this process is gone.
            pass_fds=(self._lock,),
        )
        try:
            _, errors = await worker.communicate()
        finally:
            if worker.returncode is None:
                worker.kill()
        if self._closed:
            return False
        if worker.returncode != 0:
            reason = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise Unavailable(f"optimising {new} ended with {worker.returncode}: {reason}")
        return True

    async def _switch(self, new: Path) -> None:
        """Bring the copy up to date and use it from now on."""
        assert self._touched is not None
        fresh = await asyncio.to_thread(qe.EdgeShard.load, str(new))
        touched = list(self._touched)
        for start in range(0, len(touched), SLICE):
            part: list[Any] = touched[start : start + SLICE]
            points = [
                qe.Point(id=record.id, vector=record.vector or {}, payload=record.payload)
                for record in self._shard.retrieve(part, True, True)
            ]
            there = {str(point.id) for point in points}
            if points:
                fresh.update(qe.UpdateOperation.upsert_points(points))
            gone: list[Any] = [point for point in part if point not in there]
            if gone:
                fresh.update(qe.UpdateOperation.delete_points(gone))
            await asyncio.sleep(0)
        fresh.flush()
        # The engine fsyncs what it writes itself, not what was copied beside it.
        await asyncio.to_thread(layout.sync_tree, new)
        try:
            layout.mark(self._path, new.name)
        except OSError:
            layout.mark(self._path, self._name)  # it may have been written before it failed
            raise
        self._shard, self._name = fresh, new.name
        self._unflushed, self._left_out = 0, self._outside_graph()

    def _update(self, operation: qe.UpdateOperation, points: Sequence[str]) -> None:
        for point in points:
            self._read.pop(point, None)
        try:
            self._shard.update(operation)
        except Exception as failed:  # noqa: BLE001 - the engine raises bare Exception
            raise _translated(failed, self._path) from None
        if self._touched is not None:
            self._touched.update(points)
        self._unflushed += len(points)
        if self._unflushed >= FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        try:
            self._shard.flush()
        except Exception as failed:  # noqa: BLE001 - the engine raises bare Exception
            raise _translated(failed, self._path) from None
        layout.mark(self._path, self._name)
        self._unflushed = 0

    def _scored(self, request: qe.QueryRequest) -> list[Scored]:
        scores = {str(hit.id): hit.score for hit in self._shard.query(request)}
        hits = [
            Scored(id=id, score=scores[point]) for point, id, _ in self._places_of(list(scores))
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def _places_of(self, points: list[str]) -> list[tuple[str, CubeId, int | None]]:
        """Each point with its cube's id and slot."""
        found = {point: self._places.get(point) for point in points}
        unknown: list[Any] = [point for point, place in found.items() if place is None]
        if unknown:
            for record in self._shard.retrieve(unknown, _ID_SLOT, False):
                payload = record.payload or {}
                place = CubeId(payload["id"]), payload.get("slot")
                found[str(record.id)] = place
                self._remember(str(record.id), *place)
        return [(point, *place) for point, place in found.items() if place is not None]

    def _remember(self, point: str, id: CubeId, slot: int | None) -> None:
        _hold(self._places, point, (id, slot), MAX_PLACES)


def _hold(held: dict[str, _V], key: str, value: _V, most: int) -> None:
    """Keep a value; the one that came first goes where there is no room."""
    if len(held) >= most and key not in held:
        del held[next(iter(held))]
    held[key] = value


def _sparse_request(
    text: str, wanted: qe.Filter, corpus: qe.Filter, limit: int
) -> qe.QueryRequest | None:
    """None when the query has no terms. Frequencies are counted in ``corpus``."""
    terms = bm25.query(text)
    if not terms.indices:
        return None
    vector = qe.SparseVector(indices=terms.indices, values=terms.values)
    return qe.QueryRequest(
        limit=limit,
        query=qe.Query.Nearest(vector, using=SPARSE),
        filter=wanted,
        params=qe.SearchParams(idf=qe.IdfParams(corpus)),
    )


def _open_engine(path: Path, spec: IndexSpec) -> tuple[qe.EdgeShard, str]:
    layout.check_spec(path, spec)
    if not (path / layout.CURRENT).exists():
        _create(path, spec)
    name = layout.check(path)
    try:
        return qe.EdgeShard.load(str(path / name)), name
    except Exception as failed:  # noqa: BLE001 - the engine raises bare Exception
        raise Corrupt(str(path / name), f"can't be opened: {failed}") from None


def _create(path: Path, spec: IndexSpec) -> None:
    """An empty engine folder; a crash on the way leaves one that is begun anew."""
    begun = layout.begin(path)
    shard = qe.EdgeShard.create(
        str(begun),
        qe.EdgeConfig(
            vectors={DENSE: qe.EdgeVectorParams(size=spec.dim, distance=qe.Distance.Cosine)},
            payload_memory=qe.Memory.Cached,
            sparse_vectors={SPARSE: qe.EdgeSparseVectorParams(modifier=qe.Modifier.Idf)},
            # Every search is of one tenant: a graph per tenant that is large enough for one, and
            # none over all tenants, which nothing would walk.
            hnsw_config=qe.HnswIndexConfig(
                m=0, payload_m=16, ef_construct=100, full_scan_threshold=FULL_SCAN_KIB
            ),
            wal_enabled=True,
        ),
    )
    tenant = qe.KeywordIndexParams(is_tenant=True)
    shard.update(qe.UpdateOperation.create_field_index("tenant", tenant))
    for field in KEYWORDS:
        keyword = qe.KeywordIndexParams(enable_hnsw=False)
        shard.update(qe.UpdateOperation.create_field_index(field, keyword))
    for field in INTEGERS:
        integer = qe.IntegerIndexParams(enable_hnsw=False)
        shard.update(qe.UpdateOperation.create_field_index(field, integer))
    shard.flush()
    shard.close()
    layout.adopt(path, begun)


def _translated(failed: Exception, path: Path) -> Exception:
    if "No space left" in str(failed) or "os error 28" in str(failed):
        return StorageFull(str(path))
    return failed
