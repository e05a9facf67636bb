"""What the system does for one caller, apart from HTTP: add, search, read, change, forget.

Every method takes the caller's Principal first; the tenant comes from it and from nowhere else. A
write is answered after its catalog transaction is committed; ``indexed`` says whether a search
finds it already. Answers of a search are checked against the catalog before they leave, so a
deleted, expired or changed cube is not returned even while the index still holds it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeVar

from memcube.catalog import (
    UNSET,
    AddResult,
    Catalog,
    Change,
    Idempotency,
    KeyInfo,
    KvPlace,
    Lineage,
    Page,
    Principal,
    Role,
    Stats,
    Tenant,
)
from memcube.config import Limits
from memcube.context import ContextBlock, Passage, build_context
from memcube.cube import Draft, Kind, MemCube, Parent, Relation, Residency, Shape, Version
from memcube.errors import (
    BadRequest,
    Forbidden,
    LimitExceeded,
    MemCubeError,
)
from memcube.filters import Compare, Filter, Op, all_of, of_scope
from memcube.fusing import fused_draft
from memcube.ids import CubeId, TenantId, parse_cube_id
from memcube.indexing import Clock, Indexer, Shards, whereabouts
from memcube.lifecycle import SEARCHABLE, Event
from memcube.reader import Reader, Reading
from memcube.reader.messages import Header, Message
from memcube.retrieval.ranker import Hit, Mode
from memcube.settling import Changed, Settling
from memcube.window import Window

T = TypeVar("T")
Used = Callable[[TenantId, Mapping[CubeId, float]], None]
"""Told of cubes that a search found, each with how close it was to the query, from 0 to 1; 0: not known."""

CONTEXT_CANDIDATES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """Messages or text to remember, with the header that its cubes get.

    ``at`` is its place in what the caller sent, such as ``items[3].``, for errors.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    header: Header
    infer: bool = False
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddOutcome:
    """One request's cubes. ``fallback`` says why ``infer`` ended verbatim, if it did."""

    results: tuple[AddResult, ...]
    indexed: frozenset[CubeId]
    fallback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchScope:
    """Which of the tenant's cubes are looked at."""

    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    filters: Filter | None = None
    cube_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Hits, best first, and where the time went (milliseconds)."""

    hits: list[Hit]
    search_ms: float
    total_ms: float
    ids: list[CubeId] = field(default_factory=list)


class MemoryService:
    """The behaviour behind the routes."""

    def __init__(
        self,
        catalog: Catalog,
        reader: Reader,
        indexer: Indexer,
        shards: Shards,
        *,
        clock: Clock,
        limits: Limits,
        used: Used,
        changed: Changed | None = None,
    ) -> None:
        self._catalog = catalog
        self._reader = reader
        self._indexer = indexer
        self._shards = shards
        self._whereabouts = whereabouts(catalog)
        self._clock = clock
        self._limits = limits
        self._used = used
        self._settling = Settling(catalog, indexer, changed, clock=clock)

    async def authenticate(self, secret: str) -> Principal:
        """Who a key belongs to. Asked on every request, so a revoked key ends at once."""
        return await self._run(self._catalog.access.authenticate, secret, now=self._clock())

    async def ensure_tenant(self, name: str, *, shards: int) -> Tenant:
        """The tenant, made if it is new."""
        return await self._run(
            self._catalog.access.ensure_tenant, name, shards=shards, now=self._clock()
        )

    async def create_key(
        self, tenant: TenantId, name: str, role: Role, expires_at: datetime | None
    ) -> tuple[KeyInfo, str]:
        """A new key of a tenant, and its secret."""
        return await self._run(
            self._catalog.access.create_key,
            tenant=tenant,
            name=name,
            role=role,
            expires_at=expires_at,
            now=self._clock(),
        )

    async def keys(self, principal: Principal) -> list[KeyInfo]:
        """The tenant's keys."""
        return await self._run(self._catalog.access.keys, principal.tenant)

    async def revoke_key(self, principal: Principal, id: str) -> None:
        """End one of the tenant's keys.

        Raises:
            Forbidden: the key may do more than the caller may.
        """
        for info in await self.keys(principal):
            if info.id == id and not principal.role.allows(info.role):
                raise Forbidden(principal.role, info.role)
        await self._run(self._catalog.access.revoke_key, principal.tenant, id, now=self._clock())

    async def stats(self, principal: Principal) -> Stats:
        """Counts of the tenant's cubes and of its waiting work."""
        return await self._run(self._catalog.index.stats, principal.tenant)

    async def total_stats(self) -> Stats:
        """Counts over all tenants."""
        return await self._run(self._catalog.index.stats)

    # -- write ---------------------------------------------------------------------------------

    async def add(
        self,
        principal: Principal,
        requests: Sequence[AddRequest],
        *,
        wait_indexed: bool,
        idempotency: Idempotency | None = None,
    ) -> list[AddOutcome]:
        """Store one or more requests in one transaction: all or none.

        A repeated Idempotency-Key answers as the first time did, and the reader is not asked again.
        """
        now = self._clock()
        if idempotency is not None:
            before = await self._run(
                self._catalog.cubes.replayed, principal.tenant, idempotency, now=now
            )
            if before is not None:
                groups = before.groups
                indexed = await self._finish(principal, before.results, wait_indexed)
                return _outcomes(before.results, groups, indexed, [None] * len(groups))
        self._check_count(sum(1 if r.messages is None else len(r.messages) for r in requests))
        readings = [await self._read(request, now) for request in requests]
        drafts = [draft for reading in readings for draft in reading.drafts]
        self._check_count(len(drafts))
        added = await self._run(
            self._catalog.cubes.add,
            principal.tenant,
            drafts,
            author=principal.key_id,
            now=now,
            idempotency=idempotency,
            groups=[len(reading.drafts) for reading in readings],
        )
        indexed = await self._finish(principal, added.results, wait_indexed)
        fallbacks = [reading.fallback for reading in readings]
        return _outcomes(added.results, added.groups, indexed, fallbacks)

    def _check_count(self, given: int) -> None:
        if given > self._limits.batch_texts:
            raise LimitExceeded("cubes of one request", self._limits.batch_texts, given)

    async def _read(self, r: AddRequest, now: datetime) -> Reading:
        try:
            return await self._reader.read(r.messages, r.text, r.header, infer=r.infer, now=now)
        except BadRequest as wrong:
            if not r.at or wrong.field is None:
                raise
            raise BadRequest(wrong.what, r.at + wrong.field) from None

    async def update(
        self,
        principal: Principal,
        id: str,
        change: Change,
        *,
        expected_version: int | None,
        idempotency: Idempotency | None = None,
    ) -> MemCube:
        """Change a cube; a new version when its content changes.

        A repeated Idempotency-Key answers as the first time did, and changes nothing.
        """
        if idempotency is not None:
            before = await self._run(
                self._catalog.cubes.replayed, principal.tenant, idempotency, now=self._clock()
            )
            if before is not None:
                # The first try may have ended behind its commit. What isn't indexed is pending.
                cube = before.results[0].cube
                await self._forget_kv(principal, [cube.id])
                if change.text is not UNSET:
                    await self._take_back(principal, [cube.id])
                return cube
        cube = await self._run(
            self._catalog.cubes.update,
            principal.tenant,
            parse_cube_id(id),
            change,
            expected_version=expected_version,
            author=principal.key_id,
            reason="update",
            now=self._clock(),
            idempotency=idempotency,
        )
        await self._forget_kv(principal, [cube.id])
        if change.text is not UNSET:
            await self._take_back(principal, [cube.id])
        return await self._reindexed(principal, cube)

    async def delete(self, principal: Principal, id: str) -> CubeId:
        """Forget a cube: content and versions are wiped, and no answer holds it any more.

        So are the cubes that say what an adapter said of it. They go first, so that who tries again
        after a failure forgets the rest.
        """
        cube_id = parse_cube_id(id)
        await self._settling.delete(principal.tenant, cube_id, shard=principal.shard)
        return cube_id

    async def delete_scope(
        self,
        principal: Principal,
        *,
        user_id: str | None,
        agent_id: str | None,
        run_id: str | None,
    ) -> int:
        """Forget all cubes of a scope; returns how many."""
        if user_id is None and agent_id is None and run_id is None:
            raise BadRequest(
                "name at least one of user_id, agent_id, run_id; a whole tenant is not deleted this way"
            )
        versions = await self._run(
            self._catalog.cubes.delete_scope,
            principal.tenant,
            user_id=user_id,
            agent_id=agent_id,
            run_id=run_id,
            now=self._clock(),
        )
        await self._unindex(principal, versions)
        return len(versions)

    async def create_composite(
        self,
        principal: Principal,
        members: Sequence[str],
        header: Header,
        *,
        text: str,
        relation: Relation | None = None,
        idempotency: Idempotency | None = None,
    ) -> MemCube:
        """A cube that holds others, in order. With ``relation`` its lineage names them as parents."""
        if len(members) > self._limits.members:
            raise LimitExceeded("members of a cube", self._limits.members, len(members))
        now = self._clock()
        ids = tuple(parse_cube_id(member) for member in members)
        parents: tuple[Parent, ...] = ()
        if relation is not None:
            found = await self._run(self._catalog.cubes.get_many, principal.tenant, ids, now=now)
            edges = (Parent(id=c.id, version=c.version, relation=relation) for c in found)
            parents = tuple(dict.fromkeys(edges))
        draft = replace(
            _draft(text, header, kind=Kind.DOCUMENT),
            shape=Shape.COMPOSITE,
            members=ids,
            parents=parents,
        )
        added = await self._run(
            self._catalog.cubes.add,
            principal.tenant,
            [draft],
            author=principal.key_id,
            now=now,
            idempotency=idempotency,
        )
        return await self._reindexed(principal, added.results[0].cube)

    async def set_members(
        self,
        principal: Principal,
        id: str,
        members: Sequence[str],
        *,
        idempotency: Idempotency | None = None,
    ) -> MemCube:
        """Replace a composite's members, as a new version."""
        if len(members) > self._limits.members:
            raise LimitExceeded("members of a cube", self._limits.members, len(members))
        change = Change(members=tuple(parse_cube_id(member) for member in members))
        return await self.update(
            principal, id, change, expected_version=None, idempotency=idempotency
        )

    async def fuse(
        self,
        principal: Principal,
        ids: Sequence[str],
        *,
        text: str | None,
        idempotency: Idempotency | None = None,
    ) -> MemCube:
        """One leaf of several: its lineage names all parents, which become ``merged``.

        Without ``text`` the parents' texts are joined in order, each once.
        """
        now = self._clock()
        wanted = list(dict.fromkeys(parse_cube_id(id) for id in ids))
        if idempotency is not None:
            before = await self._run(
                self._catalog.cubes.replayed, principal.tenant, idempotency, now=now
            )
            if before is not None:
                return await self._reindexed(principal, before.results[0].cube)
        if len(wanted) < 2:
            raise BadRequest("fusing needs at least two different cubes", "ids")
        parents = [
            await self._run(self._catalog.cubes.get, principal.tenant, id, now=now) for id in wanted
        ]
        fused = (
            text
            if text is not None
            else "\n".join(dict.fromkeys(p.text for p in parents if p.text))
        )
        if not fused.strip():
            raise BadRequest("is empty, and so are the cubes'; give one", "text")
        if len(fused) > self._limits.text_chars:
            raise LimitExceeded("characters of the fused text", self._limits.text_chars, len(fused))
        cube = await self._run(
            self._catalog.cubes.fuse,
            principal.tenant,
            wanted,
            fused_draft(fused, parents),
            author=principal.key_id,
            now=now,
            idempotency=idempotency,
        )
        await self._unindex(principal, {p.id: p.version for p in parents})
        await self._take_back(principal, wanted)
        return await self._reindexed(principal, cube)

    async def rollback(self, principal: Principal, id: str, version: int) -> MemCube:
        """A new version with the content of an old one."""
        cube = await self._run(
            self._catalog.cubes.rollback,
            principal.tenant,
            parse_cube_id(id),
            version,
            author=principal.key_id,
            now=self._clock(),
        )
        await self._forget_kv(principal, [cube.id])
        await self._take_back(principal, [cube.id])
        return await self._reindexed(principal, cube)

    async def set_frozen(self, principal: Principal, id: str, frozen: bool) -> MemCube:
        """Freeze or unfreeze a cube."""
        return await self._run(
            self._catalog.cubes.set_frozen,
            principal.tenant,
            parse_cube_id(id),
            frozen,
            now=self._clock(),
        )

    async def archive(self, principal: Principal, id: str) -> MemCube:
        """Take a cube out of search; it stays readable by id."""
        cube = await self._settling.archive(
            principal.tenant, parse_cube_id(id), shard=principal.shard, author=principal.key_id
        )
        return replace(cube, indexed=False)

    async def restore(self, principal: Principal, id: str) -> MemCube:
        """Bring an archived or merged cube back into search, as a new version."""
        restored = await self._run(
            self._catalog.cubes.transition,
            principal.tenant,
            parse_cube_id(id),
            Event.RESTORE,
            author=principal.key_id,
            now=self._clock(),
        )
        return await self._reindexed(principal, restored)

    # -- read ----------------------------------------------------------------------------------

    async def get(
        self,
        principal: Principal,
        id: str,
        *,
        version: int | None = None,
        as_of: datetime | None = None,
    ) -> MemCube:
        """A cube, now, at a version, or at a point in time."""
        return await self._run(
            self._catalog.cubes.get,
            principal.tenant,
            parse_cube_id(id),
            now=self._clock(),
            version=version,
            as_of=as_of,
        )

    async def find(self, principal: Principal, **conditions) -> Page:
        """A page of cubes, newest first; the conditions are those of ``Catalog.find``."""
        return await self._run(
            self._catalog.cubes.find, principal.tenant, now=self._clock(), **conditions
        )

    async def history(self, principal: Principal, id: str) -> list[Version]:
        """All versions of a cube, oldest first."""
        return await self._run(
            self._catalog.cubes.history, principal.tenant, parse_cube_id(id), now=self._clock()
        )

    async def members(
        self, principal: Principal, id: str, *, limit: int, cursor: str | None
    ) -> Page:
        """A page of a composite's members, in their order."""
        return await self._run(
            self._catalog.cubes.members,
            principal.tenant,
            parse_cube_id(id),
            now=self._clock(),
            limit=limit,
            cursor=cursor,
        )

    async def lineage(self, principal: Principal, id: str) -> Lineage:
        """What a cube came from and what came from it."""
        return await self._run(
            self._catalog.cubes.lineage, principal.tenant, parse_cube_id(id), now=self._clock()
        )

    async def residency(self, principal: Principal, id: str) -> list[Residency]:
        """Where a cube's payloads lie."""
        return await self._run(
            self._catalog.cubes.residency, principal.tenant, parse_cube_id(id), now=self._clock()
        )

    async def mark_kv(
        self, principal: Principal, cube: MemCube, members: Iterable[MemCube], kv: Sequence[KvPlace]
    ) -> list[CubeId]:
        """Note where a cube's KV lies; returns those cubes of it that have moved on since they were
        read, and then notes nothing."""
        versions = {one.id: one.version for one in (*members, cube)}
        return await self._run(
            self._catalog.kv.mark, principal.tenant, cube.id, versions, kv, now=self._clock()
        )

    async def drop_kv(self, principal: Principal, ids: Sequence[CubeId]) -> None:
        """Note that no KV of these cubes lies anywhere."""
        await self._run(self._catalog.kv.drop, principal.tenant, ids, now=self._clock())

    async def search(
        self,
        principal: Principal,
        query: str,
        scope: SearchScope,
        *,
        top_k: int,
        mode: Mode = Mode.HYBRID,
        threshold: float | None = None,
        explain: bool = False,
    ) -> Found:
        """The best cubes for a query, best first.

        Raises:
            Unavailable: the shard did not answer.
        """
        started = time.perf_counter()
        now = self._clock()
        where = await self._where(principal, scope, now)
        hits, _ = await self._whereabouts.follow(
            principal.tenant,
            principal.shard,
            lambda shard: self._shards(shard).search(
                principal.tenant,
                query,
                where=where,
                now=now,
                limit=top_k,
                mode=mode,
                threshold=threshold,
                explain=explain,
            ),
        )
        searched = time.perf_counter()
        live = await self._run(
            self._catalog.cubes.live_versions, principal.tenant, [hit.id for hit in hits], now=now
        )
        hits = [hit for hit in hits if live.get(hit.id) == hit.cube.version]
        # A BM25 score has no bounds.
        near = mode is not Mode.SPARSE
        self._used(
            principal.tenant,
            {hit.id: min(max(hit.score, 0.0), 1.0) if near else 0.0 for hit in hits},
        )
        return Found(
            hits=hits,
            search_ms=(searched - started) * 1e3,
            total_ms=(time.perf_counter() - started) * 1e3,
        )

    async def context(
        self,
        principal: Principal,
        query: str,
        scope: SearchScope,
        *,
        token_budget: int,
        top_k: int | None,
    ) -> ContextBlock:
        """A block of memories for a prompt, of at most ``token_budget`` tokens."""
        found = await self.search(
            principal, query, scope, top_k=top_k or min(CONTEXT_CANDIDATES, self._limits.top_k)
        )
        return build_context([Passage.of(hit) for hit in found.hits], token_budget=token_budget)

    def now(self) -> datetime:
        """The time by which this service acts."""
        return self._clock()

    async def get_many(self, principal: Principal, ids: Sequence[CubeId]) -> list[MemCube]:
        """The cubes that are there, in the order of ``ids``."""
        return await self._run(
            self._catalog.cubes.get_many, principal.tenant, ids, now=self._clock()
        )

    async def members_of(self, principal: Principal, scope: SearchScope) -> list[MemCube]:
        """The searchable leaves that a scope names by ``cube_ids``, composites opened, in order."""
        now = self._clock()
        ids = await self._run(
            self._catalog.cubes.expand,
            principal.tenant,
            [parse_cube_id(id) for id in scope.cube_ids],
            now=now,
            limit=self._limits.members,
        )
        cubes = await self._run(self._catalog.cubes.get_many, principal.tenant, ids, now=now)
        return [c for c in cubes if c.text and c.state in SEARCHABLE and _lies_in(c, scope)]

    async def turns(
        self, principal: Principal, windows: Iterable[Window]
    ) -> dict[Window, list[MemCube]]:
        """The searchable turns of parts of threads, in order."""
        now = self._clock()
        wanted = list(windows)
        found = await asyncio.gather(
            *(
                self._run(
                    self._catalog.cubes.turns,
                    principal.tenant,
                    window.thread,
                    window.first,
                    window.last,
                    now=now,
                )
                for window in wanted
            )
        )
        return dict(zip(wanted, found, strict=True))

    # -- inside --------------------------------------------------------------------------------

    async def _where(
        self, principal: Principal, scope: SearchScope, now: datetime
    ) -> Filter | None:
        conditions: list[Filter | None] = [of_scope(scope.user_id, scope.agent_id, scope.run_id)]
        if scope.cube_ids:
            ids = await self._run(
                self._catalog.cubes.expand,
                principal.tenant,
                [parse_cube_id(id) for id in scope.cube_ids],
                now=now,
                limit=self._limits.members,
            )
            conditions.append(Compare("id", Op.IN, tuple(ids)))
        return all_of(*conditions, scope.filters)

    async def _finish(
        self, principal: Principal, results: Iterable[AddResult], wait_indexed: bool
    ) -> frozenset[CubeId]:
        cubes = {result.cube.id: result.cube for result in results}
        missing = [cube for cube in cubes.values() if not cube.indexed]
        if wait_indexed and missing:
            await self._index(principal, missing)
            missing = []
        elif missing:
            self._later(self._index(principal, missing))
        waiting = {cube.id for cube in missing}
        return frozenset(id for id in cubes if id not in waiting)

    async def _index(self, principal: Principal, cubes: Sequence[MemCube]) -> None:
        await self._indexer.index(cubes, shard=principal.shard)

    async def _reindexed(self, principal: Principal, cube: MemCube) -> MemCube:
        (settled,) = await self._settling.reindex([cube], shard=principal.shard)
        return settled

    async def _take_back(self, principal: Principal, ids: Sequence[CubeId]) -> None:
        await self._settling.take_back(principal.tenant, ids, shard=principal.shard)

    async def _forget_kv(self, principal: Principal, ids: Iterable[CubeId]) -> None:
        await self._settling.forget_kv(principal.tenant, ids)

    async def _unindex(self, principal: Principal, versions: dict[CubeId, int]) -> None:
        await self._settling.unindex(principal.tenant, versions, shard=principal.shard)

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        _background.add(task)
        task.add_done_callback(_finished)

    @staticmethod
    async def _run(call: Callable[..., T], *args: object, **kwargs: object) -> T:
        return await asyncio.to_thread(call, *args, **kwargs)


_background: set[asyncio.Future[None]] = set()


def _finished(task: asyncio.Future[None]) -> None:
    _background.discard(task)
    failed = None if task.cancelled() else task.exception()
    # What stays unindexed is pending in the catalog; only a mistake of ours is worth a traceback.
    if failed is not None and not isinstance(failed, MemCubeError):
        raise failed


def _outcomes(
    results: Sequence[AddResult],
    groups: Sequence[int],
    indexed: frozenset[CubeId],
    fallbacks: Sequence[str | None],
) -> list[AddOutcome]:
    outcomes: list[AddOutcome] = []
    start = 0
    for size, fallback in zip(groups, fallbacks, strict=True):
        part = tuple(results[start : start + size])
        ids = frozenset(result.cube.id for result in part)
        outcomes.append(AddOutcome(results=part, indexed=indexed & ids, fallback=fallback))
        start += size
    return outcomes


def _draft(text: str, header: Header, *, kind: Kind) -> Draft:
    return Draft(
        text=text,
        user_id=header.user_id,
        agent_id=header.agent_id,
        run_id=header.run_id,
        kind=header.kind or kind,
        origin=header.origin,
        tags=header.tags,
        metadata=header.metadata,
        sensitivity=header.sensitivity,
        priority=header.priority,
        expires_at=header.expires_at,
    )


def _lies_in(cube: MemCube, scope: SearchScope) -> bool:
    d = cube.descriptive
    return all(
        asked is None or asked == given
        for asked, given in (
            (scope.user_id, d.user_id),
            (scope.agent_id, d.agent_id),
            (scope.run_id, d.run_id),
        )
    )


__all__ = ["AddOutcome", "AddRequest", "Found", "MemoryService", "SearchScope"]
