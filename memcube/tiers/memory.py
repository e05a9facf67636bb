"""A plaintext store in memory: the reference that the other stores are compared with. For tests."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from memcube.filters import And, Compare, FieldType, Filter, Not, Op, Or, field_type
from memcube.ids import CubeId, TenantId
from memcube.tiers import bm25
from memcube.tiers.payload import as_float, as_time, micros, payload_of, stored_cube
from memcube.tiers.plaintext import (
    IndexedCube,
    IndexSpec,
    Scored,
    SlotScore,
    StoredCube,
    Vector,
    check_vectors,
)


class MemoryStore:
    """Brute force over a dict."""

    def __init__(self, spec: IndexSpec) -> None:
        self.spec = spec
        self._cubes: dict[TenantId, dict[CubeId, IndexedCube]] = defaultdict(dict)
        self._terms: dict[tuple[TenantId, CubeId], bm25.Sparse] = {}
        self._tombstones: dict[tuple[TenantId, CubeId], int] = {}

    async def put(self, cubes: Sequence[IndexedCube]) -> None:
        check_vectors(cubes, self.spec.dim)
        for cube in cubes:
            held = self._cubes[cube.tenant].get(cube.id)
            floor = self._tombstones.get((cube.tenant, cube.id), 0)
            if cube.version > floor and (held is None or cube.version >= held.version):
                self._cubes[cube.tenant][cube.id] = cube
                self._terms[cube.tenant, cube.id] = bm25.document(cube.text, cube.speaker)

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int]) -> None:
        for id, version in versions.items():
            key = tenant, id
            self._tombstones[key] = max(version, self._tombstones.get(key, 0))
            held = self._cubes[tenant].get(id)
            if held is not None and held.version <= version:
                del self._cubes[tenant][id]
                del self._terms[key]

    async def drop(self, tenant: TenantId) -> int:
        held = self._cubes.pop(tenant, {})
        for id in held:
            del self._terms[tenant, id]
        return len(held)

    async def set_state(self, tenant: TenantId, ids: Iterable[CubeId], state: str) -> None:
        for id in ids:
            if id in self._cubes[tenant]:
                self._cubes[tenant][id] = replace(self._cubes[tenant][id], state=state)

    async def get(
        self, tenant: TenantId, ids: Sequence[CubeId], *, with_vectors: bool = False
    ) -> list[StoredCube]:
        held = self._cubes[tenant]
        return [
            stored_cube(payload_of(held[id]), held[id].vector if with_vectors else None)
            for id in ids
            if id in held
        ]

    async def search_dense(
        self,
        tenant: TenantId,
        vector: Vector,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> list[Scored]:
        found = [
            Scored(id=cube.id, score=float(np.dot(cube.vector, vector)))
            for cube in self._matching(tenant, where, now)
        ]
        return _best(found, limit)

    async def search_sparse(
        self,
        tenant: TenantId,
        text: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> list[Scored]:
        cubes = list(self._matching(tenant, where, now))
        score = self._bm25(text, cubes)
        found = [Scored(id=cube.id, score=score(cube)) for cube in cubes]
        return _best([hit for hit in found if hit.score > 0], limit)

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
        wanted = set(slots)
        cubes = list(self._matching(tenant, where, now))
        score = self._bm25(text, cubes)
        return [
            SlotScore(
                id=cube.id,
                slot=cube.slot,
                cosine=float(np.dot(cube.vector, vector)),
                bm25=score(cube),
            )
            for cube in cubes
            if cube.slot is not None and cube.slot in wanted
        ]

    async def speakers(
        self, tenant: TenantId, *, where: Filter | None, now: datetime, limit: int
    ) -> list[str]:
        counts: dict[str, int] = defaultdict(int)
        for cube in self._matching(tenant, where, now):
            if cube.speaker is not None:
                counts[cube.speaker] += 1
        return sorted(counts, key=lambda name: (-counts[name], name))[:limit]

    async def count(self, tenant: TenantId, *, where: Filter | None, now: datetime) -> int:
        return sum(1 for _ in self._matching(tenant, where, now))

    async def versions(
        self, tenant: TenantId | None = None
    ) -> AsyncIterator[tuple[TenantId, CubeId, int]]:
        for one, cubes in self._cubes.items():
            for cube in list(cubes.values()) if tenant in (None, one) else ():
                yield one, cube.id, cube.version

    async def close(self) -> None:
        self._cubes.clear()

    def _matching(
        self, tenant: TenantId, where: Filter | None, now: datetime
    ) -> Iterable[IndexedCube]:
        for cube in self._cubes[tenant].values():
            if cube.expires_at is not None and cube.expires_at <= now:
                continue
            if where is None or matches(cube, where):
                yield cube

    def _bm25(self, text: str, corpus: Sequence[IndexedCube]) -> Callable[[IndexedCube], float]:
        wanted = bm25.query(text).indices
        vectors = {
            cube.id: dict(zip(*self._terms[cube.tenant, cube.id], strict=True)) for cube in corpus
        }
        idf = {
            term: bm25.idf(len(corpus), sum(term in vector for vector in vectors.values()))
            for term in wanted
        }
        return lambda cube: sum(idf[t] * vectors[cube.id].get(t, 0.0) for t in wanted)


def _best(found: list[Scored], limit: int) -> list[Scored]:
    return sorted(found, key=lambda hit: (-hit.score, hit.id))[:limit]


def matches(cube: IndexedCube, where: Filter) -> bool:
    """Whether a cube satisfies a filter: the meaning that every store must agree with."""
    match where:
        case And(parts):
            return all(matches(cube, part) for part in parts)
        case Or(parts):
            return any(matches(cube, part) for part in parts)
        case Not(part):
            return not matches(cube, part)
        case Compare(field, Op.NE, value):
            return not matches(cube, Compare(field, Op.EQ, value))
        case Compare(field, Op.NIN, value):
            return not matches(cube, Compare(field, Op.IN, value))
        case Compare(field, op, value):
            return any(_holds(element, op, value, field) for element in _elements(cube, field))


def _elements(cube: IndexedCube, field: str) -> Sequence[Any]:
    if field_type(field) is FieldType.ANY:
        value = cube.metadata.get(field.removeprefix("metadata."))
    else:
        value = getattr(cube, field)
    if isinstance(value, list | tuple):
        return [v for v in value if isinstance(v, bool | int | float | str)]
    return [] if value is None or isinstance(value, dict) else [value]


def _holds(element: Any, op: Op, value: Any, field: str) -> bool:
    if op is Op.IN:
        return any(_holds(element, Op.EQ, one, field) for one in value)
    if op is Op.EQ:
        if isinstance(element, datetime):
            return _ordered(element) == _ordered(value)
        return _kind(element) == _kind(value) and element == value
    if op is Op.CONTAINS:
        if isinstance(element, str) and isinstance(value, str):
            return value in element
        return _kind(element) == _kind(value) and element == value
    if isinstance(value, datetime) and isinstance(element, str):
        element = as_time(element)
    if element is None or _kind(element) != _kind(value) or element != element:
        return False
    given, bound = _ordered(element), _ordered(value)
    return {
        Op.GT: given > bound,
        Op.GTE: given >= bound,
        Op.LT: given < bound,
        Op.LTE: given <= bound,
    }[op]


def _ordered(value: Any) -> float:
    return as_float(micros(value) if isinstance(value, datetime) else value)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "time" if isinstance(value, datetime) else "text"
