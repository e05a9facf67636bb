"""The cubes themselves: add, read, change, fuse, forget. Each write is one transaction."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa

from memcube.catalog import schema
from memcube.catalog.adapters import retire_holders
from memcube.catalog.archives import doom_archives
from memcube.catalog.engine import Database
from memcube.catalog.index_book import STALE
from memcube.catalog.kv_book import drop_rows
from memcube.catalog.proposals import drop_proposals
from memcube.catalog.rows import cube_of, row_of, source_row, version_of, version_row
from memcube.catalog.schema import micros, micros_or_none
from memcube.catalog.snapshots import drop_snapshots, pinned
from memcube.catalog.state_log import (
    drop_log,
    note_forgotten,
    note_state,
    prune_forgotten,
    scope_is,
)
from memcube.cube import Draft, MemCube, Relation, Residency, Scope, Shape, Version, content_hash
from memcube.decay import RATE_HALF_LIFE, fraction_left
from memcube.errors import (
    BadRequest,
    Frozen,
    IdempotencyMismatch,
    LimitExceeded,
    NotFound,
    VersionMismatch,
)
from memcube.ids import CubeId, IdSource, TenantId, digest64
from memcube.lifecycle import READABLE, SEARCHABLE, Event, State, move

MAX_SOURCES = 32
MAX_LINEAGE = 1000
MAX_NESTING = 16
IDEMPOTENCY_KEPT_S = 48 * 3600
THREAD_LOCK, THREAD_LOCKS = 0x74687264, 64
_CHUNK = 500
_READABLE = tuple(str(state) for state in READABLE)
_SEARCHABLE = frozenset(str(state) for state in SEARCHABLE)
_cubes, _versions = schema.cubes, schema.versions


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET = _Unset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to change of a cube; what is UNSET stays. ``expires_at=None`` takes the expiry away."""

    text: str | _Unset = UNSET
    metadata: Mapping[str, Any] | _Unset = UNSET
    tags: tuple[str, ...] | _Unset = UNSET
    members: tuple[CubeId, ...] | _Unset = UNSET
    expires_at: datetime | _Unset | None = UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """A caller's retry key and the hash of the request it belongs to."""

    key: str
    body_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddResult:
    """What became of one draft, or of a change. ``version`` is the cube's at that time."""

    cube: MemCube
    event: Literal["added", "repeated", "updated"]
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What became of all drafts, in order; ``groups`` are the sizes the caller gave."""

    results: tuple[AddResult, ...]
    groups: tuple[int, ...]
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page; ``next_cursor`` is None at the end."""

    cubes: list[MemCube]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """``child`` came from version ``version`` of ``id``."""

    id: CubeId
    version: int
    relation: Relation
    child: CubeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """All edges above and below a cube; at most MAX_LINEAGE each."""

    ancestors: list[Edge] = field(default_factory=list)
    descendants: list[Edge] = field(default_factory=list)


class Cubes:
    """Cubes by tenant. A foreign, unknown, expired or deleted id is NotFound, all alike."""

    def __init__(self, database: Database, *, new_id: IdSource) -> None:
        self._database = database
        self._new_id = new_id

    # -- add -----------------------------------------------------------------------------------

    def add(
        self,
        tenant: TenantId,
        drafts: Sequence[Draft],
        *,
        author: str,
        now: datetime,
        idempotency: Idempotency | None = None,
        groups: Sequence[int] | None = None,
    ) -> Added:
        """Store drafts, all or none; durable when it returns.

        An exact repeat of a live cube of the same scope (also within this call) is no new cube:
        its count goes up, its sources grow (unless frozen), and the later expiry wins.

        Raises:
            NotFound: a composite's member is not there.
            LimitExceeded: a composite would nest deeper than MAX_NESTING.
            IdempotencyMismatch: the key belongs to another request.
        """
        sizes = tuple(groups) if groups is not None else (len(drafts),)

        def work(connection: sa.Connection) -> Added:
            if idempotency is not None:
                before = _replay(connection, tenant, idempotency)
                if before is not None:
                    return before
            results = self._store(connection, tenant, drafts, author=author, now=now)
            if idempotency is not None:
                _remember(connection, tenant, idempotency, results, sizes, now)
            return Added(results=results, groups=sizes, replayed=False)

        return self._database.write(work)

    def replayed(
        self, tenant: TenantId, idempotency: Idempotency, *, now: datetime
    ) -> Added | None:
        """What an earlier request with this key did; None when there was none.

        Raises:
            IdempotencyMismatch: the key belongs to another request.
        """
        with self._database.reading() as connection:
            return _replay(connection, tenant, idempotency)

    def fuse(
        self,
        tenant: TenantId,
        ids: Sequence[CubeId],
        draft: Draft,
        *,
        author: str,
        now: datetime,
        idempotency: Idempotency | None = None,
    ) -> MemCube:
        """Store ``draft`` as the fusion of cubes, which become ``merged``.

        It is a cube of its own even where one with the same text is there: its lineage differs.

        Raises:
            NotFound, Frozen, IllegalMove: of any of the parents. Nothing is changed.
        """

        def work(connection: sa.Connection) -> MemCube:
            if idempotency is not None:
                before = _replay(connection, tenant, idempotency)
                if before is not None:
                    return before.results[0].cube
            cube = self.fuse_in(connection, tenant, ids, draft, author=author, now=now)
            if idempotency is not None:
                made = AddResult(cube=cube, event="added", version=cube.version)
                _remember(connection, tenant, idempotency, [made], (1,), now)
            return cube

        return self._database.write(work)

    def fuse_in(
        self,
        connection: sa.Connection,
        tenant: TenantId,
        ids: Iterable[CubeId],
        draft: Draft,
        *,
        author: str,
        now: datetime,
        versions: Mapping[CubeId, int] | None = None,
    ) -> MemCube:
        """``fuse`` within the caller's transaction; with ``versions`` only of these."""
        # In the order of their ids, so that two fusions don't wait for each other.
        for id in sorted(set(ids)):
            parent = self._live(connection, tenant, id, now, lock=True)
            if versions is not None and parent["version"] != versions[id]:
                raise VersionMismatch(id, versions[id], parent["version"])
            self.take(connection, parent, Event.MERGE, now)
        (made,) = self._store(connection, tenant, [draft], author=author, now=now, repeats=False)
        return made.cube

    def _store(
        self,
        connection: sa.Connection,
        tenant: TenantId,
        drafts: Sequence[Draft],
        *,
        author: str,
        now: datetime,
        repeats: bool = True,
    ) -> tuple[AddResult, ...]:
        hashes = [
            content_hash(
                draft.scope(tenant),
                kind=draft.kind,
                role=draft.role,
                speaker=draft.speaker,
                text=draft.text,
            )
            if draft.shape is Shape.LEAF
            else None
            for draft in drafts
        ]
        known = self._repeated(connection, tenant, [h for h in hashes if h is not None], now)
        if not repeats:
            hashes = [None if hash in known else hash for hash in hashes]
        named = {member for draft in drafts for member in draft.members}
        named.update(parent.id for draft in drafts for parent in draft.parents)
        self._require(connection, tenant, named, now, lock=True)
        heads = _thread_heads(
            connection, {draft.scope(tenant).thread for draft in drafts if draft.threaded}
        )
        for draft in drafts:
            if draft.members:
                _check_nesting(connection, None, draft.members)
        # In order, so that a list has the turns of one request as they came.
        ids = iter(sorted(self._new_id(now) for _ in drafts))
        fresh: dict[str, dict[str, Any]] = {}
        rows: list[dict[str, Any]] = []
        again: dict[CubeId, list[Draft]] = {}
        places: list[tuple[dict[str, Any], Literal["added", "repeated"]]] = []
        for draft, hash in zip(drafts, hashes, strict=True):
            found = known.get(hash) or fresh.get(hash) if hash is not None else None
            if found is not None:
                again.setdefault(found["id"], []).append(draft)
                places.append((found, "repeated"))
                continue
            thread, seq = None, None
            if draft.threaded:
                thread = draft.scope(tenant).thread
                seq = heads[thread] = heads.get(thread, -1) + 1
            row = row_of(
                draft,
                id=next(ids),
                tenant=tenant,
                author=author,
                now=now,
                content_hash=hash,
                thread=thread,
                seq=seq,
            )
            if hash is not None:
                fresh[hash] = row
            rows.append(row)
            places.append((row, "added"))
        for row in rows:
            if row["id"] in again:
                _absorb(row, again.pop(row["id"]))
        if rows:
            connection.execute(sa.insert(_cubes), rows)
            reason = "add"
            connection.execute(
                sa.insert(_versions), [version_row(r, author=author, reason=reason) for r in rows]
            )
            _write_links(connection, rows)
        for row in known.values():
            if row["id"] in again:
                _absorb(row, again[row["id"]])
                connection.execute(
                    sa.update(_cubes)
                    .where(_cubes.c.id == row["id"])
                    .values(
                        repeats=row["repeats"],
                        sources=row["sources"],
                        expires_at=row["expires_at"],
                        indexed_version=row["indexed_version"],
                        changed_at=micros(now),
                    )
                )
        return tuple(
            AddResult(cube=cube_of(row), event=event, version=row["version"])
            for row, event in places
        )

    def _repeated(
        self, connection: sa.Connection, tenant: TenantId, hashes: Sequence[str], now: datetime
    ) -> dict[str, dict[str, Any]]:
        """Live cubes by content hash; one that has run out gives its hash back."""
        found: dict[str, dict[str, Any]] = {}
        over: list[str] = []
        for start in range(0, len(hashes), _CHUNK):
            query = sa.select(_cubes).where(
                _cubes.c.tenant == tenant,
                _cubes.c.content_hash.in_(hashes[start : start + _CHUNK]),
            )
            query = query.order_by(_cubes.c.id).with_for_update()
            for row in connection.execute(query).mappings():
                if row["expires_at"] is not None and row["expires_at"] <= micros(now):
                    over.append(row["id"])
                else:
                    found[row["content_hash"]] = dict(row)
        if over:
            connection.execute(
                sa.update(_cubes).where(_cubes.c.id.in_(over)).values(content_hash=None)
            )
        return found

    def _require(
        self,
        connection: sa.Connection,
        tenant: TenantId,
        ids: Iterable[CubeId],
        now: datetime,
        *,
        lock: bool = False,
    ) -> None:
        wanted = sorted(set(ids))
        there = self.present(connection, tenant, wanted, now, lock=lock)
        for id in wanted:
            if id not in there:
                raise NotFound("cube", id)

    @staticmethod
    def present(
        connection: sa.Connection,
        tenant: TenantId,
        ids: Sequence[CubeId],
        now: datetime,
        *,
        lock: bool,
    ) -> set[CubeId]:
        """Those of ``ids`` that are there; with ``lock`` they can't be deleted before the commit."""
        there: set[CubeId] = set()
        for start in range(0, len(ids), _CHUNK):
            query = sa.select(_cubes.c.id).where(
                *_alive(tenant, now), _cubes.c.id.in_(ids[start : start + _CHUNK])
            )
            if lock:
                query = query.order_by(_cubes.c.id).with_for_update(read=True)
            there.update(connection.execute(query).scalars())
        return there

    # -- read ----------------------------------------------------------------------------------

    def get(
        self,
        tenant: TenantId,
        id: CubeId,
        *,
        now: datetime,
        version: int | None = None,
        as_of: datetime | None = None,
    ) -> MemCube:
        """A cube as it is, or with the content of a version or of a point in time.

        Raises:
            NotFound: no such cube, no such version, or nothing yet at that time.
        """
        with self._database.reading() as connection:
            row = self._live(connection, tenant, id, now)
            if version is None and as_of is None:
                return cube_of(row)
            query = sa.select(_versions).where(_versions.c.cube == id)
            if version is not None:
                query = query.where(_versions.c.version == version)
            if as_of is not None:
                query = query.where(_versions.c.created_at <= micros(as_of))
            past = (
                connection.execute(query.order_by(_versions.c.version.desc()).limit(1))
                .mappings()
                .first()
            )
        if past is None:
            raise NotFound("version of cube", f"{id}@{version if version is not None else as_of}")
        return as_it_was(row, past)

    def get_many(self, tenant: TenantId, ids: Sequence[CubeId], *, now: datetime) -> list[MemCube]:
        """The cubes that are there, in the order of ``ids``."""
        found: dict[str, MemCube] = {}
        with self._database.reading() as connection:
            for start in range(0, len(ids), _CHUNK):
                query = sa.select(_cubes).where(
                    *_alive(tenant, now), _cubes.c.id.in_(ids[start : start + _CHUNK])
                )
                for row in connection.execute(query).mappings():
                    found[row["id"]] = cube_of(row)
        return [found[id] for id in ids if id in found]

    def turns(
        self, tenant: TenantId, thread: str, first: int, last: int, *, now: datetime
    ) -> list[MemCube]:
        """The searchable cubes at places ``first`` to ``last`` of a thread, in order."""
        query = (
            sa.select(_cubes)
            .where(
                *_alive(tenant, now),
                _cubes.c.searchable,
                _cubes.c.thread == thread,
                _cubes.c.seq.between(first, last),
            )
            .order_by(_cubes.c.seq)
        )
        with self._database.reading() as connection:
            return [cube_of(row) for row in connection.execute(query).mappings()]

    def live_versions(
        self, tenant: TenantId, ids: Sequence[CubeId], *, now: datetime
    ) -> dict[CubeId, int]:
        """The present versions of those cubes that a search may return."""
        if not ids:
            return {}
        found: dict[CubeId, int] = {}
        for start in range(0, len(ids), _CHUNK):
            part = list(ids[start : start + _CHUNK])
            asked = {"tenant": tenant, "ids": part, "now": micros(now)}
            found |= {
                CubeId(id): version for id, version in self._database.rows(_LIVE_VERSIONS, asked)
            }
        return found

    def find(
        self,
        tenant: TenantId,
        *,
        now: datetime,
        limit: int,
        cursor: str | None = None,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        state: str | None = None,
        tag: str | None = None,
    ) -> Page:
        """A page of cubes, newest first.

        Raises:
            BadRequest: a cursor that this method did not make.
        """
        query = sa.select(_cubes).where(*_alive(tenant, now))
        for column, value in (
            (_cubes.c.user_id, user_id),
            (_cubes.c.agent_id, agent_id),
            (_cubes.c.run_id, run_id),
            (_cubes.c.kind, kind),
            (_cubes.c.state, state),
        ):
            if value is not None:
                query = query.where(column == value)
        if tag is not None:
            tagged = sa.select(schema.cube_tags.c.cube).where(
                schema.cube_tags.c.tenant == tenant, schema.cube_tags.c.tag == tag
            )
            query = query.where(_cubes.c.id.in_(tagged))
        if cursor is not None:
            query = query.where(_cubes.c.id < cursor_id(cursor))
        query = query.order_by(_cubes.c.id.desc()).limit(limit + 1)
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        found = [cube_of(row) for row in rows[:limit]]
        return Page(cubes=found, next_cursor=cursor_of(found[-1].id) if len(rows) > limit else None)

    def history(self, tenant: TenantId, id: CubeId, *, now: datetime) -> list[Version]:
        """All versions, oldest first."""
        query = sa.select(_versions).where(_versions.c.cube == id).order_by(_versions.c.version)
        with self._database.reading() as connection:
            self._live(connection, tenant, id, now)
            return [version_of(row) for row in connection.execute(query).mappings()]

    def members(
        self, tenant: TenantId, id: CubeId, *, now: datetime, limit: int, cursor: str | None = None
    ) -> Page:
        """A page of a composite's members, in their order."""
        link = schema.members
        after = -1 if cursor is None else _cursor_position(cursor)
        query = (
            sa.select(_cubes, link.c.position)
            .join(link, link.c.member == _cubes.c.id)
            .where(link.c.composite == id, link.c.position > after, *_alive(tenant, now))
            .order_by(link.c.position)
            .limit(limit + 1)
        )
        with self._database.reading() as connection:
            self._live(connection, tenant, id, now)
            rows = connection.execute(query).mappings().all()
        more = len(rows) > limit
        return Page(
            cubes=[cube_of(row) for row in rows[:limit]],
            next_cursor=cursor_of(str(rows[limit - 1]["position"])) if more else None,
        )

    def expand(
        self, tenant: TenantId, ids: Sequence[CubeId], *, now: datetime, limit: int
    ) -> list[CubeId]:
        """The cubes, and all members of the composites among them, at every depth.

        Raises:
            NotFound: one of ``ids`` is not there.
            LimitExceeded: more than ``limit`` cubes.
        """
        with self._database.reading() as connection:
            self._require(connection, tenant, ids, now)
            seen = dict.fromkeys(ids)
            frontier = list(ids)
            while frontier:
                below = dict.fromkeys(_members_of(connection, frontier))
                frontier = [id for id in below if id not in seen]
                seen.update(dict.fromkeys(frontier))
                if len(seen) > limit:
                    raise LimitExceeded("cubes of the composites", limit)
        return list(seen)

    def lineage(self, tenant: TenantId, id: CubeId, *, now: datetime) -> Lineage:
        """All edges above and below a cube. Deleted ancestors are named by id: that proves them."""
        edge = schema.edges
        with self._database.reading() as connection:
            self._live(connection, tenant, id, now)
            up = _walk(connection, edge.c.child, edge.c.parent, id)
            down = _walk(connection, edge.c.parent, edge.c.child, id)
        return Lineage(ancestors=up, descendants=down)

    def residency(self, tenant: TenantId, id: CubeId, *, now: datetime) -> list[Residency]:
        """Where a cube's payloads lie."""
        table = schema.residency
        with self._database.reading() as connection:
            self._live(connection, tenant, id, now)
            rows = connection.execute(sa.select(table).where(table.c.cube == id)).mappings()
            return [
                Residency(
                    **{k: row[k] for k in ("tier", "medium", "location", "version")},
                    size_bytes=row["size_bytes"],
                    epoch=row["epoch"],
                    updated_at=schema.moment(row["updated_at"]),
                )
                for row in rows
            ]

    # -- change --------------------------------------------------------------------------------

    def update(
        self,
        tenant: TenantId,
        id: CubeId,
        change: Change,
        *,
        expected_version: int | None,
        author: str,
        reason: str,
        now: datetime,
        idempotency: Idempotency | None = None,
    ) -> MemCube:
        """Apply a change. New content is a new version; the same content again changes nothing.

        Raises:
            NotFound, Frozen, IllegalMove; VersionMismatch: the cube is not at ``expected_version``.
            IdempotencyMismatch: the key belongs to another request.
        """

        def work(connection: sa.Connection) -> MemCube:
            if idempotency is not None:
                before = _replay(connection, tenant, idempotency)
                if before is not None:
                    return before.results[0].cube
            row = self._live(connection, tenant, id, now, lock=True)
            if expected_version is not None and row["version"] != expected_version:
                raise VersionMismatch(id, expected_version, row["version"])
            cube = self.apply(connection, row, change, author=author, reason=reason, now=now)
            if idempotency is not None:
                done = AddResult(cube=cube, event="updated", version=cube.version)
                _remember(connection, tenant, idempotency, [done], (1,), now)
            return cube

        return self._database.write(work)

    def rollback(
        self, tenant: TenantId, id: CubeId, version: int, *, author: str, now: datetime
    ) -> MemCube:
        """A new version with the content of an old one; members that are gone by now are left out.

        Raises:
            NotFound: no such cube or version. Frozen, IllegalMove.
        """

        def work(connection: sa.Connection) -> MemCube:
            row = self._live(connection, tenant, id, now, lock=True)
            past = (
                connection.execute(
                    sa.select(_versions).where(
                        _versions.c.cube == id, _versions.c.version == version
                    )
                )
                .mappings()
                .first()
            )
            if past is None:
                raise NotFound("version of cube", f"{id}@{version}")
            held = self.present(connection, tenant, sorted(set(past["members"])), now, lock=True)
            change = Change(
                text=past["text"],
                metadata=past["metadata"],
                tags=tuple(past["tags"]),
                members=tuple(m for m in past["members"] if m in held)
                if row["shape"] == Shape.COMPOSITE
                else UNSET,
            )
            reason = f"rollback to {version}"
            return self.apply(connection, row, change, author=author, reason=reason, now=now)

        return self._database.write(work)

    def apply(
        self,
        connection: sa.Connection,
        row: dict[str, Any],
        change: Change,
        *,
        author: str,
        reason: str,
        now: datetime,
        deferred: bool = False,
    ) -> MemCube:
        """Change a locked row within the caller's transaction. See ``update``. With ``deferred`` the
        caller drops the rows of KV and retires the adapters that held it, of many cubes at once."""
        state = self._event(row, Event.UPDATE)
        content: dict[str, Any] = {}
        if not isinstance(change.text, _Unset):
            content["text"] = change.text
        if not isinstance(change.metadata, _Unset):
            content["metadata"] = dict(change.metadata)
        if not isinstance(change.tags, _Unset):
            content["tags"] = list(change.tags)
        if not isinstance(change.members, _Unset):
            if row["shape"] != Shape.COMPOSITE:
                raise BadRequest("a leaf has no members; create a composite", "members")
            self._check_members(connection, row, change.members, now)
            content["members"] = list(change.members)
        new = row | {name: value for name, value in content.items() if row[name] != value}
        changed = new != row
        if not isinstance(change.expires_at, _Unset):
            new["expires_at"] = micros_or_none(change.expires_at)
        if new == row:
            return cube_of(row)
        new["state"] = str(state)
        new["changed_at"] = micros(now)
        if changed:
            new["version"] += 1
            new["updated_at"] = max(micros(now), row["updated_at"])
        elif new["indexed_version"] > 0:
            new["indexed_version"] = STALE
        new["content_hash"] = self._free_hash(connection, new)
        self._save(connection, row, new)
        if changed:
            entry = version_row(new, author=author, reason=reason)
            connection.execute(sa.insert(_versions), entry)
            if (new["tags"], new["members"]) != (row["tags"], row["members"]):
                _delete_links(connection, row["id"])
                _write_links(connection, [new | {"parents": []}])
        if changed and not deferred:
            drop_rows(connection, [row["id"]])
            if new["text"] != row["text"] or new["members"] != row["members"]:
                retire_holders(connection, [row["id"]], now)
        return cube_of(new)

    def _check_members(
        self,
        connection: sa.Connection,
        row: Mapping[str, Any],
        ids: Sequence[CubeId],
        now: datetime,
    ) -> None:
        self._require(connection, row["tenant"], ids, now, lock=True)
        _check_nesting(connection, row["id"], ids)

    def transition(
        self,
        tenant: TenantId,
        id: CubeId,
        event: Event,
        *,
        author: str,
        now: datetime,
        expected_version: int | None = None,
    ) -> MemCube:
        """Archive, merge or restore a cube. A restored one is a new version (of the same content):
        the index refuses late writes of the version that was removed.

        Raises:
            NotFound, Frozen, IllegalMove. BadRequest: an event that has a method of its own.
        """
        if event not in (Event.ARCHIVE, Event.MERGE, Event.RESTORE):
            raise BadRequest(f"{str(event)!r} is no transition; archive, merge or restore", "event")

        def work(connection: sa.Connection) -> MemCube:
            row = self._live(connection, tenant, id, now, lock=True)
            if expected_version is not None and row["version"] != expected_version:
                raise VersionMismatch(id, expected_version, row["version"])
            new = self.take(connection, row, event, now)
            if event is Event.RESTORE:
                entry = version_row(new, author=author, reason="restore")
                connection.execute(sa.insert(_versions), entry)
            return cube_of(new)

        return self._database.write(work)

    def set_frozen(self, tenant: TenantId, id: CubeId, frozen: bool, *, now: datetime) -> MemCube:
        """Freeze or unfreeze. Idempotent."""

        def work(connection: sa.Connection) -> MemCube:
            row = self._live(connection, tenant, id, now, lock=True)
            new = row | {"frozen": frozen}
            self._save(connection, row, new)
            return cube_of(new)

        return self._database.write(work)

    def take(
        self,
        connection: sa.Connection,
        row: dict[str, Any],
        event: Event,
        now: datetime,
        *,
        deferred: bool = False,
    ) -> dict[str, Any]:
        """Let an event happen to a locked row; the row as it is then. A restored one is at a new
        version, whose entry the caller writes.

        Raises:
            Frozen, IllegalMove.
        """
        new = row | {"state": str(self._event(row, event)), "changed_at": micros(now)}
        new["searchable"] = new["state"] in _SEARCHABLE
        if event is Event.RESTORE:
            doom_archives(connection, [row["id"]])
            new["version"] += 1
            new["updated_at"] = max(micros(now), row["updated_at"])
        elif not new["searchable"]:
            new["indexed_version"] = STALE
        new["content_hash"] = self._free_hash(connection, new)
        self._save(connection, row, new)
        note_state(connection, row["id"], new["state"], now)
        if deferred:
            return new
        drop_rows(connection, [row["id"]])
        if not new["searchable"]:
            retire_holders(connection, [row["id"]], now)
        return new

    @staticmethod
    def _event(row: Mapping[str, Any], event: Event) -> State:
        if row["frozen"]:
            raise Frozen(row["id"])
        return move(State(row["state"]), event)

    def _free_hash(self, connection: sa.Connection, row: Mapping[str, Any]) -> str | None:
        """The cube's content hash, or None where a repeat must not find it: it is no longer
        searchable, or another cube has the same content already."""
        if row["shape"] != Shape.LEAF or not row["searchable"]:
            return None
        scope = Scope(
            tenant=row["tenant"],
            user_id=row["user_id"],
            agent_id=row["agent_id"],
            run_id=row["run_id"],
        )
        hash = content_hash(
            scope, kind=row["kind"], role=row["role"], speaker=row["speaker"], text=row["text"]
        )
        query = sa.select(_cubes.c.id).where(
            _cubes.c.tenant == row["tenant"],
            _cubes.c.content_hash == hash,
            _cubes.c.id != row["id"],
        )
        return None if connection.execute(query).first() else hash

    @staticmethod
    def _save(connection: sa.Connection, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        values = {name: value for name, value in new.items() if old[name] != value}
        if values:
            connection.execute(sa.update(_cubes).where(_cubes.c.id == old["id"]).values(**values))

    # -- forget --------------------------------------------------------------------------------

    def delete(
        self,
        tenant: TenantId,
        id: CubeId,
        *,
        now: datetime,
        expected_version: int | None = None,
    ) -> int:
        """Wipe a cube and its versions; returns the version it had.

        What stays is its id, its state and its place in the lineage.

        Raises:
            NotFound, Frozen.
        """

        def work(connection: sa.Connection) -> int:
            row = self._live(connection, tenant, id, now, lock=True)
            if expected_version is not None and row["version"] != expected_version:
                raise VersionMismatch(id, expected_version, row["version"])
            self._event(row, Event.DELETE)
            _wipe(connection, [row], State.DELETED, now)
            return row["version"]

        return self._database.write(work)

    def delete_scope(
        self,
        tenant: TenantId,
        *,
        user_id: str | None,
        agent_id: str | None,
        run_id: str | None,
        now: datetime,
    ) -> dict[CubeId, int]:
        """Wipe all cubes of a scope, and the snapshots of it or of a part, in one transaction; returns
        the cubes with their versions.

        Raises:
            Frozen: one of them is frozen. Nothing is changed.
        """
        scope = {"user_id": user_id, "agent_id": agent_id, "run_id": run_id}
        wanted = scope_is(_cubes, scope)

        def work(connection: sa.Connection) -> dict[CubeId, int]:
            query = sa.select(
                _cubes.c.id,
                _cubes.c.version,
                _cubes.c.frozen,
                sa.and_(*_alive(tenant, now)).label("alive"),
            ).where(
                _cubes.c.tenant == tenant,
                # What has run out is not read any more, but may be kept still.
                _cubes.c.state.in_((*_READABLE, str(State.EXPIRED))),
                *wanted,
            )
            query = query.order_by(_cubes.c.id).with_for_update()
            rows = [dict(row) for row in connection.execute(query).mappings()]
            for row in rows:
                if row["frozen"] and row["alive"]:
                    raise Frozen(row["id"])
            _wipe(connection, rows, State.DELETED, now)
            drop_snapshots(connection, tenant, scope)
            return {CubeId(row["id"]): row["version"] for row in rows if row["alive"]}

        return self._database.write(work)

    def expire_due(self, *, now: datetime, limit: int, retention: timedelta = timedelta(0)) -> int:
        """Note cubes whose time is over as expired, frozen ones too, and wipe those for which it has
        been so for ``retention``; returns how many became expired.

        Between the two nothing reads them: they are kept, not shown.
        """
        over = micros(now - retention)

        def work(connection: sa.Connection) -> int:
            query = (
                sa.select(_cubes.c.id, _cubes.c.version, _cubes.c.state, _cubes.c.expires_at)
                .where(
                    _cubes.c.expires_at <= micros(now),
                    sa.or_(
                        _cubes.c.state.in_(_READABLE),
                        sa.and_(_cubes.c.state == str(State.EXPIRED), _cubes.c.expires_at <= over),
                    ),
                )
                .limit(limit)
                .with_for_update()  # a repeat may be giving one of them more time
            )
            rows = [dict(row) for row in connection.execute(query).mappings()]
            _wipe(connection, [r for r in rows if r["expires_at"] <= over], State.EXPIRED, now)
            _expire(connection, [r for r in rows if r["expires_at"] > over], now)
            return sum(row["state"] != State.EXPIRED for row in rows)

        return self._database.write(work)

    def prune(self, *, now: datetime) -> int:
        """Forget retry keys older than IDEMPOTENCY_KEPT_S, and what was long ago wiped; returns how
        many keys."""
        table = schema.idempotency
        until = micros(now) - IDEMPOTENCY_KEPT_S * 1_000_000

        def work(connection: sa.Connection) -> int:
            prune_forgotten(connection, now)
            return connection.execute(sa.delete(table).where(table.c.created_at < until)).rowcount

        return self._database.write(work)

    # -- use -----------------------------------------------------------------------------------

    def record_uses(
        self, tenant: TenantId, counts: Mapping[CubeId, int], *, now: datetime
    ) -> dict[CubeId, int]:
        """Count uses; returns the cubes that this made ``activated``, with their versions.

        The rate is uses per day, decayed with a half-life of seven days.
        """
        at = micros(now)

        def work(connection: sa.Connection) -> dict[CubeId, int]:
            rows = []
            ids = list(counts)
            for start in range(0, len(ids), _CHUNK):
                query = sa.select(
                    _cubes.c.id,
                    _cubes.c.version,
                    _cubes.c.state,
                    _cubes.c.last_used_at,
                    _cubes.c.rate,
                ).where(_cubes.c.tenant == tenant, _cubes.c.id.in_(ids[start : start + _CHUNK]))
                # Locked: a cube that is deleted meanwhile must not come back as activated.
                query = query.where(_cubes.c.searchable).order_by(_cubes.c.id).with_for_update()
                rows.extend(connection.execute(query))
            if not rows:
                return {}
            connection.execute(
                _USE,
                [
                    {
                        "b_id": row.id,
                        "b_uses": counts[CubeId(row.id)],
                        "b_at": at,
                        "b_state": str(move(State(row.state), Event.USE)),
                        "b_rate": _decayed(row.rate, row.last_used_at, at)
                        + counts[CubeId(row.id)] * 0.6931 / 7,
                    }
                    for row in rows
                ],
            )
            return {CubeId(r.id): r.version for r in rows if r.state == State.GENERATED}

        return self._database.write(work)

    # -- over all tenants, for the sweep ---------------------------------------------------------

    def idle(
        self, *, since: datetime, after: str, limit: int, now: datetime
    ) -> tuple[CubeId | None, list[MemCube]]:
        """Look at the next ``limit`` searchable cubes behind an id: where that ended (None: at the
        end), and those that nobody has used or changed after ``since``, that are not frozen and that no
        snapshot shows."""
        looked = (
            sa.select(_cubes.c.id)
            .where(_cubes.c.id > after, _cubes.c.searchable)
            .order_by(_cubes.c.id)
            .limit(limit)
        )
        query = sa.select(_cubes).where(
            ~_cubes.c.frozen,
            _cubes.c.searchable,
            schema.unexpired(now),
            _cubes.c.updated_at <= micros(since),
            sa.or_(_cubes.c.last_used_at.is_(None), _cubes.c.last_used_at <= micros(since)),
            ~pinned(),
        )
        with self._database.reading() as connection:
            ids = list(connection.execute(looked).scalars())
            found = []
            for start in range(0, len(ids), _CHUNK):
                part = query.where(_cubes.c.id.in_(ids[start : start + _CHUNK]))
                found += [cube_of(row) for row in connection.execute(part).mappings()]
        return (CubeId(ids[-1]) if len(ids) == limit else None), found

    def added_between(self, after: str, before: str, *, limit: int, now: datetime) -> list[MemCube]:
        """The searchable leaves with text between two ids, in the order of their ids, that is, of the
        times at which they were added."""
        query = (
            sa.select(_cubes)
            .where(
                _cubes.c.id > after,
                _cubes.c.id < before,
                _cubes.c.searchable,
                _cubes.c.shape == str(Shape.LEAF),
                _cubes.c.text != "",
                schema.unexpired(now),
            )
            .order_by(_cubes.c.id)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [cube_of(row) for row in connection.execute(query).mappings()]

    @staticmethod
    def _live(
        connection: sa.Connection,
        tenant: TenantId,
        id: CubeId,
        now: datetime,
        *,
        lock: bool = False,
    ) -> dict[str, Any]:
        query = sa.select(_cubes).where(*_alive(tenant, now), _cubes.c.id == id)
        if lock:
            query = query.with_for_update()
        row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound("cube", id)
        return dict(row)


def _alive(tenant: TenantId, now: datetime) -> list[sa.ColumnElement[bool]]:
    return [
        _cubes.c.tenant == tenant,
        _cubes.c.state.in_(_READABLE),
        schema.unexpired(now),
    ]


_LIVE_VERSIONS = sa.select(_cubes.c.id, _cubes.c.version).where(
    _cubes.c.tenant == sa.bindparam("tenant"),
    _cubes.c.id.in_(sa.bindparam("ids", expanding=True)),
    _cubes.c.searchable,
    sa.or_(_cubes.c.expires_at.is_(None), _cubes.c.expires_at > sa.bindparam("now")),
)
_USE = (
    sa.update(_cubes)
    .where(_cubes.c.id == sa.bindparam("b_id"))
    .values(
        uses=_cubes.c.uses + sa.bindparam("b_uses"),
        last_used_at=sa.bindparam("b_at"),
        state=sa.bindparam("b_state"),
        rate=sa.bindparam("b_rate"),
    )
)


_NOTHING: dict[str, Any] = {
    "text": "",
    "user_id": None,
    "agent_id": None,
    "run_id": None,
    "role": None,
    "speaker": None,
    "tags": [],
    "metadata": {},
    "sources": [],
    "members": [],
    "event_time": None,
}
"""What a wiped cube holds."""


def as_it_was(row: Mapping[Any, Any], past: Mapping[Any, Any]) -> MemCube:
    """The cube with the content of one of its versions."""
    held = row["indexed_version"] if past["version"] == row["version"] else 0
    content = {name: past[name] for name in ("version", "text", "members", "tags", "metadata")}
    return cube_of({**row, **content, "updated_at": past["created_at"], "indexed_version": held})


def _decayed(rate: float, last_used_at: int | None, at: int) -> float:
    if last_used_at is None:
        return rate
    return rate * fraction_left(timedelta(microseconds=at - last_used_at), RATE_HALF_LIFE)


def _absorb(row: dict[str, Any], repeats: Sequence[Draft]) -> None:
    """Count repeats into a cube's row."""
    row["repeats"] += len(repeats)
    for draft in repeats:
        if not row["frozen"]:
            sources = [*row["sources"], *(source_row(source) for source in draft.sources)]
            row["sources"] = sources[:MAX_SOURCES]
        until = micros_or_none(draft.expires_at)
        if row["expires_at"] is not None and (until is None or until > row["expires_at"]):
            row["expires_at"] = until
            if row["indexed_version"] > 0:
                row["indexed_version"] = STALE


def _thread_heads(connection: sa.Connection, threads: Iterable[str]) -> dict[str, int]:
    """The last place taken in each thread; no other writer takes one in it before the commit."""
    wanted = sorted(threads)
    heads: dict[str, int] = {}
    if connection.dialect.name == "postgresql":
        # Without it the writers of one thread meet at its unique index, and one in ten gives up. Of
        # locks there are a few only: the server has room for some thousands in all.
        for lock in sorted({digest64("thread", thread) % THREAD_LOCKS for thread in wanted}):
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(THREAD_LOCK, lock)))
    for start in range(0, len(wanted), _CHUNK):
        query = (
            sa.select(_cubes.c.thread, sa.func.max(_cubes.c.seq))
            .where(_cubes.c.thread.in_(wanted[start : start + _CHUNK]))
            .group_by(_cubes.c.thread)
        )
        heads.update({thread: seq for thread, seq in connection.execute(query)})
    return heads


def _write_links(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    tags = [
        {"cube": row["id"], "tenant": row["tenant"], "tag": tag}
        for row in rows
        for tag in dict.fromkeys(row["tags"])
    ]
    members = [
        {"composite": row["id"], "position": i, "member": member}
        for row in rows
        for i, member in enumerate(row["members"])
    ]
    edges = [
        {"child": row["id"], "parent": id, "parent_version": version, "relation": relation}
        for row in rows
        for id, version, relation in row["parents"]
    ]
    for table, values in (
        (schema.cube_tags, tags),
        (schema.members, members),
        (schema.edges, edges),
    ):
        if values:
            connection.execute(sa.insert(table), values)


def _members_of(connection: sa.Connection, composites: Sequence[str]) -> list[CubeId]:
    """The direct members of composites, in order, as often as they are held."""
    link = schema.members
    found: list[CubeId] = []
    for start in range(0, len(composites), _CHUNK):
        part = composites[start : start + _CHUNK]
        query = sa.select(link.c.member).where(link.c.composite.in_(part))
        query = query.order_by(link.c.composite, link.c.position)
        found.extend(CubeId(id) for id in connection.execute(query).scalars())
    return found


def _holders_of(connection: sa.Connection, members: Sequence[str]) -> set[str]:
    """The composites that hold any of these directly."""
    link = schema.members
    found: set[str] = set()
    for start in range(0, len(members), _CHUNK):
        part = members[start : start + _CHUNK]
        query = sa.select(link.c.composite).where(link.c.member.in_(part))
        found.update(connection.execute(query).scalars())
    return found


def _check_nesting(connection: sa.Connection, id: str | None, members: Sequence[CubeId]) -> None:
    """Refuse members that would make a composite (None: a new one) hold itself, or nest too deep."""
    levels, above = 0, set() if id is None else _holders_of(connection, [id])
    below = set(members)
    while below:
        levels += 1
        if id in below:
            raise BadRequest("a composite can't hold itself, at any depth", "members")
        if levels > MAX_NESTING:
            raise LimitExceeded("depth of composites", MAX_NESTING)
        below = set(_members_of(connection, list(below)))
    while above:
        levels += 1
        if levels > MAX_NESTING:
            raise LimitExceeded("depth of composites", MAX_NESTING)
        above = _holders_of(connection, list(above))


def _delete_links(connection: sa.Connection, id: str) -> None:
    connection.execute(sa.delete(schema.cube_tags).where(schema.cube_tags.c.cube == id))
    connection.execute(sa.delete(schema.members).where(schema.members.c.composite == id))


def _wipe(
    connection: sa.Connection, rows: Sequence[Mapping[str, Any]], state: State, now: datetime
) -> None:
    """Take all content of cubes away, here and in their versions; their ids stay.

    ``indexed_version`` becomes STALE even where the index is not known to hold the cube: an
    acknowledgement of the index may still be on its way.
    """
    link = schema.members
    for start in range(0, len(rows), _CHUNK):
        ids = [row["id"] for row in rows[start : start + _CHUNK]]
        going = set(ids)
        note_forgotten(connection, ids, now)
        drop_log(connection, ids)
        drop_proposals(connection, ids)
        doom_archives(connection, ids)
        drop_rows(connection, ids)
        retire_holders(connection, ids, now)
        holders = sa.select(link.c.composite).where(link.c.member.in_(ids))
        query = sa.select(_cubes.c.id, _cubes.c.members).where(_cubes.c.id.in_(holders))
        query = query.order_by(_cubes.c.id).with_for_update()
        for composite, held in connection.execute(query).all():
            left = [id for id in held if id not in going]
            connection.execute(
                sa.update(_cubes).where(_cubes.c.id == composite).values(members=left)
            )
        connection.execute(
            sa.delete(link).where(sa.or_(link.c.member.in_(ids), link.c.composite.in_(ids)))
        )
        connection.execute(sa.delete(schema.cube_tags).where(schema.cube_tags.c.cube.in_(ids)))
        connection.execute(sa.delete(_versions).where(_versions.c.cube.in_(ids)))
        connection.execute(
            sa.update(_cubes)
            .where(_cubes.c.id.in_(ids))
            .values(
                **_NOTHING,
                content_hash=None,
                expires_at=None,
                state=str(state),
                searchable=False,
                indexed_version=STALE,
                indexed_as=None,
                updated_at=micros(now),
                changed_at=micros(now),
            )
        )


def _expire(connection: sa.Connection, rows: Sequence[Mapping[str, Any]], now: datetime) -> None:
    """Take cubes whose time is over out of everything but their own rows."""
    for start in range(0, len(rows), _CHUNK):
        ids = [row["id"] for row in rows[start : start + _CHUNK]]
        note_forgotten(connection, ids, now)
        drop_rows(connection, ids)
        retire_holders(connection, ids, now)
        connection.execute(
            sa.update(_cubes)
            .where(_cubes.c.id.in_(ids))
            .values(
                state=str(State.EXPIRED),
                content_hash=None,
                searchable=False,
                indexed_version=STALE,
                changed_at=micros(now),
            )
        )


def _walk(
    connection: sa.Connection, here: sa.Column[str], there: sa.Column[str], start: CubeId
) -> list[Edge]:
    edge = schema.edges
    found: list[Edge] = []
    seen = {start}
    frontier = [start]
    while frontier and len(found) < MAX_LINEAGE:
        query = sa.select(edge, there.label("next")).where(here.in_(frontier)).limit(MAX_LINEAGE)
        frontier = []
        for row in connection.execute(query.order_by(there)):
            found.append(
                Edge(
                    id=CubeId(row.parent),
                    version=row.parent_version,
                    relation=Relation(row.relation),
                    child=CubeId(row.child),
                )
            )
            if row.next not in seen:
                seen.add(row.next)
                frontier.append(row.next)
    return found[:MAX_LINEAGE]


def remembered(
    connection: sa.Connection, tenant: TenantId, idempotency: Idempotency
) -> dict[str, Any] | None:
    """The outcome of an earlier request with this key; None where there was none.

    Raises:
        IdempotencyMismatch: the key belongs to another request.
    """
    table = schema.idempotency
    row = connection.execute(
        sa.select(table).where(table.c.tenant == tenant, table.c.key == idempotency.key)
    ).first()
    if row is not None and row.body_hash != idempotency.body_hash:
        raise IdempotencyMismatch(idempotency.key)
    return None if row is None else row.outcome


def _replay(connection: sa.Connection, tenant: TenantId, idempotency: Idempotency) -> Added | None:
    outcome = remembered(connection, tenant, idempotency)
    if outcome is None:
        return None
    entries = outcome["results"]
    wanted = {id: version for id, _, version in entries}
    ids = sorted(wanted)
    cubes: dict[str, MemCube] = {}
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        # Deleted ones too: a retry answers as the first time did, whatever happened since. Nothing
        # is left of their content, though.
        query = sa.select(_cubes).where(_cubes.c.tenant == tenant, _cubes.c.id.in_(part))
        present = {found["id"]: dict(found) for found in connection.execute(query).mappings()}
        for found in present.values():
            if found["state"] == State.EXPIRED:
                found.update(_NOTHING)
        cubes |= {id: cube_of(found) for id, found in present.items()}
        changed = [
            id
            for id, found in present.items()
            if found["version"] != wanted[id] and found["state"] != State.EXPIRED
        ]
        query = sa.select(_versions).where(_versions.c.cube.in_(changed))
        for past in connection.execute(query).mappings() if changed else ():
            if past["version"] == wanted[past["cube"]]:
                cubes[past["cube"]] = as_it_was(present[past["cube"]], past)
    return Added(
        results=tuple(
            AddResult(cube=cubes[id], event=event, version=version)
            for id, event, version in entries
        ),
        groups=tuple(outcome["groups"]),
        replayed=True,
    )


def _remember(
    connection: sa.Connection,
    tenant: TenantId,
    idempotency: Idempotency,
    results: Sequence[AddResult],
    groups: Sequence[int],
    now: datetime,
) -> None:
    outcome = {
        "results": [[r.cube.id, r.event, r.version] for r in results],
        "groups": list(groups),
    }
    remember(connection, tenant, idempotency, outcome, now)


def remember(
    connection: sa.Connection,
    tenant: TenantId,
    idempotency: Idempotency,
    outcome: Mapping[str, Any],
    now: datetime,
) -> None:
    """Keep a request's outcome, without any text, for its retries."""
    connection.execute(
        sa.insert(schema.idempotency),
        {
            "tenant": tenant,
            "key": idempotency.key,
            "body_hash": idempotency.body_hash,
            "outcome": dict(outcome),
            "created_at": micros(now),
        },
    )


def cursor_of(value: str) -> str:
    """The cursor of a list that goes on behind a value."""
    return base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")


def _cursor_value(cursor: str) -> str:
    padded = cursor + "=" * (-len(cursor) % 4)
    return base64.b64decode(padded, altchars=b"-_", validate=True).decode()


def cursor_id(cursor: str) -> str:
    """The id behind which a list goes on.

    Raises:
        BadRequest: no cursor of such a list.
    """
    try:
        return str(UUID(_cursor_value(cursor)))
    except ValueError:
        raise BadRequest("not a cursor of this list", "cursor") from None


def _cursor_position(cursor: str) -> int:
    try:
        value = _cursor_value(cursor)
        if len(value) > 9:
            raise ValueError
        return int(value)
    except ValueError:
        raise BadRequest("not a cursor of this list", "cursor") from None
