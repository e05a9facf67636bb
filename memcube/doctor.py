"""Looks whether the parts agree with the catalog, says what does not, and mends it if asked to.

Each check compares one part with the catalog in both directions. What may be on its way (changed within
the grace) is no finding. Repairing calls what the system itself uses: the indexer, the archive, the
registry of adapters. What no rule can mend is left as it is, and said.

The catalog is walked in pages. Of an index the ids and versions are held in memory at once, of the
archive the names; the archive's bytes are read ``limit`` objects at a time (``next_cursor``).
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from memcube.archive import PREFIX, Archive
from memcube.catalog import ArchiveRecord, Catalog
from memcube.errors import Corrupt, NotFound
from memcube.ids import CubeId, TenantId
from memcube.indexing import Indexer, Shards
from memcube.objects import ObjectStore, OpenObjects, opened
from memcube.parametric.registry import AdapterFiles, AdapterRegistry
from memcube.reconcile import note_strangers

MAX_EXAMPLES = 10
PAGE = 1_000
GRACE = timedelta(seconds=10)
Pause = Callable[[float], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Finding:
    """One sort of thing that is wrong: how often, some of it, and how much was mended."""

    check: str
    kind: str
    advice: str
    count: int = 0
    repaired: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, *, repaired: bool = False) -> None:
        self.count += 1
        self.repaired += repaired
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


@dataclass(slots=True, kw_only=True)
class Look:
    """What one check looked at and found."""

    check: str
    looked_at: int = 0
    next_cursor: str | None = None
    _findings: dict[str, Finding] = field(default_factory=dict)

    def found(self, kind: str, advice: str, example: str, *, repaired: bool = False) -> None:
        """Note one thing that is wrong."""
        finding = self._findings.setdefault(
            kind, Finding(check=self.check, kind=kind, advice=advice)
        )
        finding.add(example, repaired=repaired)

    @property
    def findings(self) -> list[Finding]:
        return list(self._findings.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings, and how many things each check looked at. ``next_cursor`` is None at the end."""

    looked_at: Mapping[str, int]
    findings: Sequence[Finding]
    next_cursor: str | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong that wasn't mended."""
        return all(finding.repaired == finding.count for finding in self.findings)


class Check(Protocol):
    """One part beside the catalog. ``paged`` ones go on at a cursor; the others run once."""

    name: str
    paged: bool

    async def look(
        self, now: datetime, *, repair: bool, cursor: str | None, limit: int
    ) -> Look: ...


class Doctor:
    """Runs checks one after the other."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks

    async def examine(
        self, now: datetime, *, repair: bool = False, cursor: str | None = None, limit: int = 1_000
    ) -> Diagnosis:
        """Go over everything; with a cursor go on with the paged check alone.

        Raises:
            Unavailable: a part did not answer: nothing can be said of it.
        """
        looks = [
            await check.look(now, repair=repair, cursor=cursor, limit=limit)
            for check in self._checks
            if cursor is None or check.paged
        ]
        return Diagnosis(
            looked_at={look.check: look.looked_at for look in looks},
            findings=[finding for look in looks for finding in look.findings],
            next_cursor=next((look.next_cursor for look in looks if look.next_cursor), None),
        )


_LEFT = "the tenant was moved to another shard; the scheduler removes what it left"


class IndexCheck:
    """Catalog against the plaintext index, shard by shard."""

    name, paged = "index", False

    def __init__(
        self, catalog: Catalog, indexer: Indexer, shards: Shards, *, num_shards: int
    ) -> None:
        self._catalog = catalog
        self._indexer = indexer
        self._shards = shards
        self._num_shards = num_shards

    async def look(self, now: datetime, *, repair: bool, cursor: str | None, limit: int) -> Look:
        look = Look(check=self.name)
        for shard in await asyncio.to_thread(self._catalog.shards.numbers, self._num_shards):
            await self._shard(shard, look, now, repair)
        return look

    async def _shard(self, shard: int, look: Look, now: datetime, repair: bool) -> None:
        # The index first: what is put or removed meanwhile was changed within the grace.
        held = {
            (tenant, id): version for tenant, id, version in await self._shards(shard).versions()
        }
        before, after = now - GRACE, ""
        while wanted := await asyncio.to_thread(
            self._catalog.index.wanted, shard=shard, after=after, limit=PAGE, now=now
        ):
            after = wanted[-1].id
            look.looked_at += len(wanted)
            wrong: dict[TenantId, list[tuple[CubeId, str]]] = defaultdict(list)
            for cube in wanted:
                version = held.pop((cube.tenant, cube.id), None)
                if cube.unexpired and cube.changed_at <= before and version != cube.version:
                    kind = "missing" if version is None else "stale"
                    wrong[cube.tenant].append((cube.id, kind))
            for tenant, cubes in wrong.items():
                done = repair and await self._put(tenant, [id for id, _ in cubes], shard, now)
                for id, kind in cubes:
                    look.found(kind, _PUT, f"{tenant}/{id}", repaired=done)
        await self._orphans(held, shard, look, now, repair)

    async def _put(
        self, tenant: TenantId, ids: Sequence[CubeId], shard: int, now: datetime
    ) -> bool:
        await asyncio.to_thread(self._catalog.index.unmark, tenant, ids, now=now)
        cubes = await asyncio.to_thread(self._catalog.cubes.get_many, tenant, ids, now=now)
        await self._indexer.index(cubes, shard=shard)
        return True

    async def _orphans(
        self,
        held: Mapping[tuple[TenantId, CubeId], int],
        shard: int,
        look: Look,
        now: datetime,
        repair: bool,
    ) -> None:
        look.looked_at += len(held)
        grouped: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
        for (tenant, id), version in held.items():
            grouped[tenant][id] = version
        for tenant in await note_strangers(self._catalog, self._shards(shard), shard, grouped):
            look.found("left behind", _LEFT, tenant, repaired=repair)
        for tenant, versions in grouped.items():
            on_their_way = await asyncio.to_thread(
                self._catalog.index.changed_since, tenant, list(versions), since=now - GRACE
            )
            orphans = {id: v for id, v in versions.items() if id not in on_their_way}
            if repair and orphans:
                await self._indexer.remove(tenant, orphans, shard=shard)
            for id in orphans:
                look.found("orphan", _REMOVE, f"{tenant}/{id}", repaired=repair)


OpenArchive = Callable[[ObjectStore], Archive]


class ArchiveCheck:
    """Copies of archived cubes: rows and objects in both directions, bytes, and the catalog's own."""

    name, paged = "archive", True

    def __init__(
        self,
        catalog: Catalog,
        open_objects: OpenObjects,
        open_archive: OpenArchive,
        *,
        pause: Pause = asyncio.sleep,
    ) -> None:
        self._catalog = catalog
        self._open_objects = open_objects
        self._open_archive = open_archive
        self._pause = pause

    async def look(self, now: datetime, *, repair: bool, cursor: str | None, limit: int) -> Look:
        look = Look(check=self.name)
        async with opened(self._open_objects) as objects:
            archive = self._open_archive(objects)
            if cursor is None:
                await self._objects_of(objects, look, repair)
                await self._doomed(archive, look, now, repair)
            records = await asyncio.to_thread(
                self._catalog.archives.page, after=cursor or "", limit=limit
            )
            for record in records:
                await self._copy(archive, record, look, now, repair)
        look.next_cursor = records[-1].cube if len(records) == limit else None
        return look

    async def _copy(
        self, archive: Archive, record: ArchiveRecord, look: Look, now: datetime, repair: bool
    ) -> None:
        look.looked_at += 1
        where = f"{record.tenant}/{record.cube}"
        kind = None
        try:
            await archive.read(record)
        except NotFound:
            kind = "missing"
        except Corrupt:
            kind = "damaged"
        agrees = await archive.agrees(record)
        if not agrees and kind is not None:
            look.found("lost", _LOST, where)
        elif not agrees:
            done = repair and await archive.put_back(record)
            look.found("catalog damaged", _PUT_BACK, where, repaired=done)
        elif kind is not None:
            done = repair and await archive.replace(record, now=now)
            look.found(kind, _COPY, where, repaired=done)

    async def _objects_of(self, objects: ObjectStore, look: Look, repair: bool) -> None:
        """Objects that no row names. One that is just being noted is named a moment later."""
        names = {found.name async for found in objects.list(PREFIX)}
        look.looked_at += len(names)
        unnamed = await self._unnamed(names)
        if repair and unnamed:
            await self._pause(GRACE.total_seconds())
            unnamed = await self._unnamed(unnamed)
        for name in sorted(unnamed):
            cube = name.rpartition("/")[2].partition(".")[0]
            if not await asyncio.to_thread(self._catalog.index.exists, cube):
                look.found("unknown object", _UNKNOWN, name)
                continue
            if repair:
                await objects.delete(name)
            look.found("orphan object", _DELETE, name, repaired=repair)

    async def _unnamed(self, names: set[str]) -> set[str]:
        by_sha = {name.rpartition(".")[2]: name for name in names}
        shas = list(by_sha)
        for start in range(0, len(shas), PAGE // 2):
            part = shas[start : start + PAGE // 2]
            for sha in await asyncio.to_thread(self._catalog.archives.known, part):
                del by_sha[sha]
        return set(by_sha.values())

    async def _doomed(self, archive: Archive, look: Look, now: datetime, repair: bool) -> None:
        """Objects of cubes that were restored or wiped: the sweep removes them, were it running."""
        for record in await asyncio.to_thread(self._catalog.archives.doomed, limit=PAGE):
            if repair:
                await archive.remove(record)
            look.found("not removed yet", _SWEEP, f"{record.tenant}/{record.cube}", repaired=repair)


class AdapterCheck:
    """Files of adapters: rows and files in both directions, and their bytes."""

    name, paged = "adapters", False

    def __init__(
        self, catalog: Catalog, open_objects: OpenObjects, *, pause: Pause = asyncio.sleep
    ) -> None:
        self._catalog = catalog
        self._open_objects = open_objects
        self._pause = pause

    async def look(self, now: datetime, *, repair: bool, cursor: str | None, limit: int) -> Look:
        look = Look(check=self.name)
        async with opened(self._open_objects) as objects:
            files = AdapterFiles(objects)
            left = {found.name async for found in objects.list("adapters/")}
            for tenant in await asyncio.to_thread(self._catalog.access.tenants):
                left -= await self._tenant(files, tenant.id, left, look, now, repair)
            look.looked_at += len(left)
            if repair and left:
                await self._pause(GRACE.total_seconds())
                for tenant in await asyncio.to_thread(self._catalog.access.tenants):
                    left -= {name for name in await self._named(files, tenant.id)}
            for name in sorted(left):
                if repair:
                    await objects.delete(name)
                look.found("orphan file", _DELETE, name, repaired=repair)
        return look

    async def _tenant(
        self,
        files: AdapterFiles,
        tenant: TenantId,
        there: set[str],
        look: Look,
        now: datetime,
        repair: bool,
    ) -> set[str]:
        """Look at a tenant's versions; the names that are theirs."""
        records = await asyncio.to_thread(self._catalog.adapters.versions, tenant)
        look.looked_at += len(records)
        kept = {record.sha256 for record in records if not record.stale}
        named: set[str] = set()
        stale: dict[str, str] = {}
        for record in records:
            where = f"{tenant}/{record.line.id}@{record.version}"
            names = files.names(tenant, record.sha256)
            named.update(names)
            if record.stale:
                if record.sha256 not in kept and there.intersection(names):
                    stale[record.sha256] = where
            elif names[0] not in there:
                look.found("missing", _TRAIN, where)
            elif not await files.whole(tenant, record.sha256):
                look.found("damaged", _TRAIN, where)
        if repair and stale:
            registry = AdapterRegistry(files, self._catalog.adapters)
            while await registry.erase_stale(now=now):
                continue
            for sha256 in stale:  # also of versions that were noted as erased already
                await files.erase(tenant, sha256)
        for where in stale.values():
            look.found("stale file", _ERASE, where, repaired=repair)
        return named

    async def _named(self, files: AdapterFiles, tenant: TenantId) -> set[str]:
        records = await asyncio.to_thread(self._catalog.adapters.versions, tenant)
        return {name for record in records for name in files.names(tenant, record.sha256)}


_PUT = "index it again"
_REMOVE = "remove it from the index"
_COPY = "copy it again from the catalog"
_PUT_BACK = "write the copy's content over the catalog's"
_LOST = "neither the catalog nor the copy has the content that was archived; look at your backups"
_UNKNOWN = "the catalog has never heard of this cube; was it restored from an older backup?"
_DELETE = "delete it: nothing names it"
_SWEEP = "remove it: its cube was restored or deleted"
_TRAIN = "train it anew, or roll back to another version"
_ERASE = "erase it: it holds what has changed or is gone"
