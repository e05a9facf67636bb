"""The plaintext tier's contract: what a vector index of cubes must do.

A store holds, per cube, one dense vector, one BM25 sparse vector and the payload that filters and
answers need. Every read takes the tenant as its first argument and adds it to the filter inside
the index. A store holds cubes embedded by one embedder only (its ``IndexSpec``); another embedder
means another store.

Invariants (the contract suite in ``memcube.testing.plaintext_contract`` checks them on each store):
    * ``put`` is idempotent, and monotonic in ``version``: an older version never replaces a newer.
    * after ``delete(tenant, {id: v})`` a late ``put`` of a version <= v doesn't bring the cube back.
    * filters, tenant and expiry are evaluated inside the index, never after top-k.
    * no score depends on cubes of another tenant (document frequencies are the scope's own).
    * what ``put`` returned from survives ``kill -9`` of the process.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from memcube.filters import Filter
from memcube.ids import CubeId, TenantId

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSpec:
    """What an index was built with. A store refuses to open an index of another spec.

    ``embedder`` is name and revision, as ``Embedder.identity`` gives it.
    """

    embedder: str
    dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedCube:
    """What the index knows of one cube. ``vector`` has shape (dim,) and unit length."""

    id: CubeId
    tenant: TenantId
    version: int
    text: str
    vector: Vector
    kind: str
    state: str
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    role: str | None = None
    speaker: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime
    updated_at: datetime
    event_time: datetime | None = None
    expires_at: datetime | None = None
    slot: int | None = None
    """Place in the thread (``memcube.cube.slot``); equal to no other cube's of the tenant."""
    prev_slot: int | None = None
    next_slot: int | None = None
    thread: str | None = None
    seq: int | None = None


class StoredCube(NamedTuple):
    """A cube as read back from the index. ``vector`` is None unless it was asked for."""

    id: CubeId
    version: int
    text: str
    payload: Mapping[str, Any]
    vector: Vector | None = None


class Scored(NamedTuple):
    """One candidate: its id and its score (cosine for dense, BM25 for sparse)."""

    id: CubeId
    score: float


class SlotScore(NamedTuple):
    """Both scores of the cube at one place of a thread; ``bm25`` is 0 where no term is shared."""

    id: CubeId
    slot: int
    cosine: float
    bm25: float


class PlaintextStore(Protocol):
    """Reads and writes the plaintext payloads of one vector index."""

    spec: IndexSpec

    async def put(self, cubes: Sequence[IndexedCube]) -> None:
        """Insert or replace cubes; durable when it returns.

        Raises:
            ValueError: a vector is not of shape (dim,) or not finite. Nothing is written.
        """
        ...

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int]) -> None:
        """Remove cubes, up to and including the given versions. Unknown ids are passed over."""
        ...

    async def set_state(self, tenant: TenantId, ids: Iterable[CubeId], state: str) -> None:
        """Change the state that filters see, without a new version. Unknown ids are passed over."""
        ...

    async def get(
        self, tenant: TenantId, ids: Sequence[CubeId], *, with_vectors: bool = False
    ) -> list[StoredCube]:
        """The cubes of this tenant among ``ids``, in the order of ``ids``; missing ones left out."""
        ...

    async def search_dense(
        self,
        tenant: TenantId,
        vector: Vector,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> list[Scored]:
        """Best first by cosine, among the unexpired cubes of the tenant that match ``where``."""
        ...

    async def search_sparse(
        self,
        tenant: TenantId,
        text: str,
        *,
        where: Filter | None,
        now: datetime,
        limit: int,
    ) -> list[Scored]:
        """Best first by BM25, among the unexpired cubes of the tenant that match ``where``.

        Only cubes that share a term with ``text`` are returned.
        """
        ...

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
        """Scores of the unexpired cubes at these places that match ``where``, in any order.

        Document frequencies are counted among the tenant's cubes that match ``where``, as
        in ``search_sparse``: the scores are comparable with its.
        """
        ...

    async def speakers(
        self, tenant: TenantId, *, where: Filter | None, now: datetime, limit: int
    ) -> list[str]:
        """The most frequent speakers among the unexpired cubes that match, at most ``limit``."""
        ...

    async def count(self, tenant: TenantId, *, where: Filter | None, now: datetime) -> int:
        """How many unexpired cubes of the tenant match."""
        ...

    def versions(
        self, tenant: TenantId | None = None
    ) -> AsyncIterator[tuple[TenantId, CubeId, int]]:
        """Every cube of a tenant, or of all, with its version."""
        ...

    async def drop(self, tenant: TenantId) -> int:
        """Remove all that a tenant has here; unlike after ``delete``, it may be put again. How many cubes."""
        ...

    async def close(self) -> None:
        """Flush and release the index. No call may follow."""
        ...


def check_vectors(cubes: Sequence[IndexedCube], dim: int) -> None:
    """Refuse what can't be indexed, before anything is written.

    Raises:
        ValueError: a vector is not of shape (dim,), not finite, or not of unit length.
    """
    for cube in cubes:
        if cube.vector.shape != (dim,):
            raise ValueError(f"cube {cube.id}: vector of shape {cube.vector.shape}, not ({dim},)")
        length = float(np.linalg.norm(cube.vector))
        if not abs(length - 1.0) < 1e-2:
            raise ValueError(f"cube {cube.id}: vector of length {length}, not 1")
