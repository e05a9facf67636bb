"""The plaintext store on qdrant-edge: the Qdrant engine in this process, one folder, no server.

Durability: an update is in the engine's write-ahead log before ``put`` returns and survives
``kill -9``. It is fsynced by ``flush``, which runs every ``FLUSH_EVERY`` points and at close; what a
loss of power takes is put again from the catalog by the reconcile loop.

Every engine call holds the GIL, so each is kept small: points go in by slices, and a slice yields
to waiting searches before the next. The one call that can't be small, building the HNSW graph, runs
in another process on a copy (``optimise``); searches go on meanwhile.

A folder holds ``spec.json``, ``lock``, ``current`` (the name of the live engine folder) and engine
folders. Only one process opens a folder.
"""

import asyncio
import fcntl
import json
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import qdrant_edge as qe

from memcube.errors import Conflict, Corrupt, StorageFull, Unavailable
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

SLICE = 32
FLUSH_EVERY = 2_000
SCROLL = 1_000
MAX_TOMBSTONES = 200_000
OPTIMISE_ABOVE = 20_000
"""Points without a graph that are worth one. Below, a tenant's filtered scan is faster anyway."""

_filters = FilterTranslator(qe, positional=True)
_ID = qe.PayloadSelector.Include(["id"])
_ID_SLOT = qe.PayloadSelector.Include(["id", "slot"])
_VERSION = qe.PayloadSelector.Include(["version"])


class EdgeStore:
    """One folder of the embedded engine."""

    def __init__(self, path: Path, spec: IndexSpec, shard: qe.EdgeShard, lock: int) -> None:
        self.spec = spec
        self._path = path
        self._shard = shard
        self._lock = lock
        self._writing = asyncio.Lock()
        self._unflushed = 0
        self._tombstones: OrderedDict[str, int] = OrderedDict()
        self._touched: set[str] | None = None
        """Points written while an optimisation runs on a copy; None when none runs."""

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
            return cls(path, spec, _open_engine(path, spec), lock)
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
            for record in self._shard.retrieve(list(newest), _VERSION, False)
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
            self._update(qe.UpdateOperation.upsert_points(points), [str(p.id) for p in points])

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int]) -> None:
        async with self._writing:
            wanted = {point_id(tenant, id): version for id, version in versions.items()}
            for point, version in wanted.items():
                self._tombstones[point] = max(version, self._tombstones.get(point, 0))
                self._tombstones.move_to_end(point)
            while len(self._tombstones) > MAX_TOMBSTONES:
                self._tombstones.popitem(last=False)
            for start in range(0, len(wanted), SCROLL):
                part = list(wanted)[start : start + SCROLL]
                gone = [
                    str(record.id)
                    for record in self._shard.retrieve(part, _VERSION, False)
                    if record.payload and record.payload["version"] <= wanted[str(record.id)]
                ]
                if gone:
                    self._update(qe.UpdateOperation.delete_points(gone), gone)
                await asyncio.sleep(0)

    async def set_state(self, tenant: TenantId, ids: Iterable[CubeId], state: str) -> None:
        async with self._writing:
            points = [point_id(tenant, id) for id in ids]
            there = [str(record.id) for record in self._shard.retrieve(points, False, False)]
            if there:
                self._update(qe.UpdateOperation.set_payload(there, {"state": state}), there)

    async def get(
        self, tenant: TenantId, ids: Sequence[CubeId], *, with_vectors: bool = False
    ) -> list[StoredCube]:
        if not ids:
            return []
        vectors = [DENSE] if with_vectors else False
        found: dict[str, StoredCube] = {}
        points = [point_id(tenant, id) for id in ids]
        for record in self._shard.retrieve(points, True, vectors):
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
        return self._scored(
            qe.QueryRequest(
                limit=limit,
                query=qe.Query.Nearest(vector.tolist(), using=DENSE),
                filter=_filters.scope(tenant, where, now),
                with_payload=_ID,
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
        request = _sparse_request(text, corpus, corpus, limit, _ID)
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
            with_payload=_ID_SLOT,
            params=qe.SearchParams(exact=True),
        )
        corpus = _filters.scope(tenant, where, now)
        sparse = _sparse_request(text, wanted, corpus, len(slots), False)
        found = self._shard.query_batch(
            qe.QueryBatchRequest([dense] if sparse is None else [dense, sparse])
        )
        by_terms = {} if sparse is None else {hit.id: hit.score for hit in found[1]}
        return [
            SlotScore(
                id=CubeId(hit.payload["id"]),
                slot=hit.payload["slot"],
                cosine=hit.score,
                bm25=by_terms.get(hit.id, 0.0),
            )
            for hit in found[0]
            if hit.payload
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

    async def versions(self) -> AsyncIterator[tuple[TenantId, CubeId, int]]:
        offset = None
        selector = qe.PayloadSelector.Include(["tenant", "id", "version"])
        while True:
            records, offset = self._shard.scroll(
                qe.ScrollRequest(offset=offset, limit=SCROLL, with_payload=selector)
            )
            for record in records:
                payload = record.payload or {}
                yield TenantId(payload["tenant"]), CubeId(payload["id"]), payload["version"]
            if offset is None:
                return
            await asyncio.sleep(0)

    async def close(self) -> None:
        async with self._writing:
            self._shard.flush()
            self._shard.close()
            os.close(self._lock)

    @property
    def needs_optimise(self) -> bool:
        """Whether enough points lie outside a graph."""
        info = self._shard.info()
        return info.points_count - info.indexed_vectors_count // 2 > OPTIMISE_ABOVE

    async def optimise(self) -> bool:
        """Build the graph in another process on a copy, and switch to it.

        Searches go on all the time; writes wait while the folder is copied and while the copy
        catches up. A crash leaves the old folder or the new one, whole. Returns whether it switched.

        Raises:
            Unavailable: the other process failed; the old folder stays in use.
        """
        if self._touched is not None:
            return False
        old = self._path / _current(self._path)
        new = self._path / _next_name(old.name)
        async with self._writing:
            self._shard.flush()
            self._unflushed = 0
            await asyncio.to_thread(shutil.copytree, old, new)
            self._touched = set()
        try:
            worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "memcube.tiers.optimise",
                str(new),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            _, errors = await worker.communicate()
            if worker.returncode != 0:
                reason = errors.decode(errors="replace").strip().splitlines()[-1:]
                raise Unavailable(f"optimising {new} ended with {worker.returncode}: {reason}")
            async with self._writing:
                await self._catch_up(new)
        except BaseException:
            self._touched = None
            shutil.rmtree(new, ignore_errors=True)
            raise
        await asyncio.to_thread(shutil.rmtree, old)
        return True

    async def _catch_up(self, new: Path) -> None:
        assert self._touched is not None
        fresh = await asyncio.to_thread(qe.EdgeShard.load, str(new))
        touched = list(self._touched)
        for start in range(0, len(touched), SLICE):
            part = touched[start : start + SLICE]
            points = [
                qe.Point(id=record.id, vector=record.vector or {}, payload=record.payload)
                for record in self._shard.retrieve(part, True, True)
            ]
            there = {str(point.id) for point in points}
            if points:
                fresh.update(qe.UpdateOperation.upsert_points(points))
            gone = [point for point in part if point not in there]
            if gone:
                fresh.update(qe.UpdateOperation.delete_points(gone))
            await asyncio.sleep(0)
        fresh.flush()
        _write(self._path / "current", new.name)
        old, self._shard, self._touched = self._shard, fresh, None
        old.close()

    def _update(self, operation: qe.UpdateOperation, points: Sequence[str]) -> None:
        try:
            self._shard.update(operation)
        except Exception as failed:  # noqa: BLE001 - the engine raises bare Exception
            raise _translated(failed, self._path) from None
        if self._touched is not None:
            self._touched.update(points)
        self._unflushed += len(points)
        if self._unflushed >= FLUSH_EVERY:
            self._shard.flush()
            self._unflushed = 0

    def _scored(self, request: qe.QueryRequest) -> list[Scored]:
        hits = [
            Scored(id=CubeId(hit.payload["id"]), score=hit.score)
            for hit in self._shard.query(request)
            if hit.payload
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))


def _sparse_request(
    text: str, wanted: qe.Filter, corpus: qe.Filter, limit: int, payload: object
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
        with_payload=payload,  # type: ignore[arg-type]
        params=qe.SearchParams(idf=qe.IdfParams(corpus)),
    )


def _open_engine(path: Path, spec: IndexSpec) -> qe.EdgeShard:
    written = path / "spec.json"
    stated = json.dumps({"embedder": spec.embedder, "dim": spec.dim}, sort_keys=True)
    if not written.exists():
        if (path / "current").exists():
            raise Corrupt(str(written), "is missing, while the index is there")
        _write(written, stated)
    held = written.read_text()
    if held != stated:
        raise Conflict(f"{path} holds an index of {held}, not of {stated}; use another folder")
    if not (path / "current").exists():
        name = _next_name(None)
        # A folder without a name in `current` was never used: a crash came before the first write.
        shutil.rmtree(path / name, ignore_errors=True)
        (path / name).mkdir()
        shard = _create(path / name, spec)
        shard.flush()
        _write(path / "current", name)
        return shard
    name = _current(path)
    for leftover in path.glob("engine-*"):
        if leftover.name != name:
            shutil.rmtree(leftover)
    if not (path / name).is_dir():
        raise Corrupt(
            str(path / name), "is missing; remove the folder to rebuild it from the catalog"
        )
    try:
        return qe.EdgeShard.load(str(path / name))
    except Exception as failed:  # noqa: BLE001 - the engine raises bare Exception
        raise Corrupt(str(path / name), f"can't be opened: {failed}") from None


def _create(path: Path, spec: IndexSpec) -> qe.EdgeShard:
    shard = qe.EdgeShard.create(
        str(path),
        qe.EdgeConfig(
            vectors={DENSE: qe.EdgeVectorParams(size=spec.dim, distance=qe.Distance.Cosine)},
            sparse_vectors={SPARSE: qe.EdgeSparseVectorParams(modifier=qe.Modifier.Idf)},
            wal_enabled=True,
        ),
    )
    shard.update(
        qe.UpdateOperation.create_field_index("tenant", qe.KeywordIndexParams(is_tenant=True))
    )
    for field in KEYWORDS:
        shard.update(qe.UpdateOperation.create_field_index(field, qe.KeywordIndexParams()))
    for field in INTEGERS:
        shard.update(qe.UpdateOperation.create_field_index(field, qe.IntegerIndexParams()))
    return shard


def _current(path: Path) -> str:
    name = (path / "current").read_text().strip()
    if not name.startswith("engine-") or "/" in name:
        raise Corrupt(str(path / "current"), f"names no engine folder: {name[:40]!r}")
    return name


def _next_name(name: str | None) -> str:
    number = 0 if name is None else int(name.removeprefix("engine-")) + 1
    return f"engine-{number:06d}"


def _write(path: Path, text: str) -> None:
    """Replace a small file: whole or not at all, also at a loss of power."""
    temporary = path.with_suffix(".new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _translated(failed: Exception, path: Path) -> Exception:
    if "No space left" in str(failed) or "os error 28" in str(failed):
        return StorageFull(str(path))
    return failed
