"""The catalog of a simulation: the books' double, and what writers, readers and the feed ask of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from memcube.catalog.fence import LEASE
from memcube.cube import Kind, Sensitivity
from memcube.errors import Conflict, NotFound, StaleEpoch
from memcube.ids import CubeId, TenantId
from memcube.lifecycle import Event, State, move
from memcube.scheduler.actions import Medium, Place, Tier
from memcube.scheduler.world import NEVER, CubeFacts, Held
from memcube.testing.memory_books import (
    Key,
    MemoryActionBook,
    MemoryCube,
    MemoryLeases,
    MemoryStore,
    MemoryTaskQueue,
)


@dataclass(slots=True)
class About:
    """What policies ask of a cube, beside what the books know."""

    tokens: int
    num_bytes: int
    created_at: float
    changed_at: float
    kind: Kind = Kind.FACT
    sensitivity: Sensitivity = Sensitivity.NORMAL
    frozen: bool = False
    consents: bool = False
    session_bound: bool = False
    indexed_version: int = 0
    rate: float = 0.0
    used_at: float = 0.0
    expires_at: float = NEVER


class SimCatalog:
    """One catalog. Each method is one transaction."""

    def __init__(self, homes: Callable[[TenantId, CubeId], Place]) -> None:
        """``homes`` says where a cube's writes go for which no owner is noted."""
        self._made = 0
        self._homes = homes
        self.store = MemoryStore(lambda now: self._id())
        self.actions = MemoryActionBook(self.store)
        self.tasks = MemoryTaskQueue(self.store)
        self.leases = MemoryLeases(self.store)
        self.about: dict[Key, About] = {}
        self.acked_deletes: set[Key] = set()
        self.feeds: list[dict[Key, None]] = []

    def _id(self) -> CubeId:
        self._made += 1
        return CubeId(f"{self._made:08d}")

    # -- writers -------------------------------------------------------------------------------

    def add(self, tenant: TenantId, about: About) -> CubeId:
        id = self._id()
        self.store.cubes[tenant, id] = MemoryCube()
        self.about[tenant, id] = about
        self.store.changed[tenant, id] = None
        return id

    def change(self, tenant: TenantId, id: CubeId, now: float) -> int:
        """A new version of the content; its number."""
        cube, about = self._live(tenant, id)
        if about.frozen:
            raise Conflict("frozen")
        move(cube.state, Event.UPDATE)
        cube.version += 1
        about.changed_at = now
        self.store.drop_kv(tenant, id)
        return cube.version

    def remove(self, tenant: TenantId, id: CubeId, event: Event) -> int:
        """Delete, expire or archive; the version there was."""
        cube, about = self._live(tenant, id)
        if about.frozen and event is not Event.EXPIRE:
            raise Conflict("frozen")
        cube.state = move(cube.state, event)
        self.store.drop_kv(tenant, id)
        return cube.version

    def use(self, tenant: TenantId, id: CubeId, now: float) -> None:
        cube, about = self._live(tenant, id)
        cube.state = move(cube.state, Event.USE)
        about.rate = about.rate * 0.5 ** ((now - about.used_at) / 3_600) + 1.0
        about.used_at = now
        self.store.changed[tenant, id] = None

    def mark(self, tenant: TenantId, id: CubeId, version: int, place: Place, epoch: int) -> bool:
        """Note that the owner's index holds a version; whether it still is so."""
        cube = self.store.cubes[tenant, id]
        if not self.is_live(tenant, id) or cube.version != version:
            return False
        if self.owner(tenant, id) != (place, epoch):
            return False
        cube.listed[place] = version, self.about[tenant, id].num_bytes
        self.about[tenant, id].indexed_version = version
        self.store.changed[tenant, id] = None
        return True

    def mark_removed(self, tenant: TenantId, id: CubeId, place: Place) -> None:
        """Note that a place no longer has a cube that is out of search."""
        if not self.is_live(tenant, id):
            self.store.cubes[tenant, id].listed.pop(place, None)
            self.store.changed[tenant, id] = None

    def removals(self) -> list[tuple[TenantId, CubeId, int, Place]]:
        """Listed payloads of cubes that are out of search."""
        return [
            (tenant, id, cube.version, place)
            for (tenant, id), cube in self.store.cubes.items()
            if cube.listed and not self.is_live(tenant, id)
            for place in cube.listed
        ]

    # -- readers -------------------------------------------------------------------------------

    def is_live(self, tenant: TenantId, id: CubeId) -> bool:
        return self.store.cubes[tenant, id].state in (State.GENERATED, State.ACTIVATED)

    def live_version(self, tenant: TenantId, id: CubeId) -> int | None:
        """What the gateway checks hits against."""
        return self.store.cubes[tenant, id].version if self.is_live(tenant, id) else None

    def owner(self, tenant: TenantId, id: CubeId) -> tuple[Place, int]:
        """Who takes a cube's writes, and as of which epoch."""
        epoch, owner = self.actions.placement(tenant, id)
        return owner or self._home(tenant, id), epoch

    def _home(self, tenant: TenantId, id: CubeId) -> Place:
        listed = [p for p in self.store.cubes[tenant, id].listed if p.tier is Tier.PLAINTEXT]
        home = self._homes(tenant, id)
        return home if home in listed or not listed else min(listed)

    def listed(self, tenant: TenantId, id: CubeId, tier: Tier) -> list[tuple[Place, int]]:
        return self.actions.copies(tenant, id, tier)

    def text(self, tenant: TenantId, id: CubeId, version: int) -> tuple[TenantId, CubeId, int]:
        """The content of the present version, to build a payload of.

        Raises:
            Conflict: it is at another one, or gone.
        """
        if self.live_version(tenant, id) != version:
            raise Conflict("the cube has changed")
        return tenant, id, version

    def lead(self, leader: int) -> None:
        """Refuse who doesn't lead."""
        lease = self.store.leases.get(LEASE)
        if lease is None or lease.epoch != leader:
            raise StaleEpoch(leader, 0 if lease is None else lease.epoch)

    def _live(self, tenant: TenantId, id: CubeId) -> tuple[MemoryCube, About]:
        if not self.is_live(tenant, id):
            raise NotFound("cube", id)
        return self.store.cubes[tenant, id], self.about[tenant, id]

    def facts(self, key: Key) -> tuple[CubeFacts, list[Held]]:
        cube, about = self.store.cubes[key], self.about[key]
        placement = self.actions.placement(*key)
        facts = CubeFacts(
            id=key[1],
            tenant=key[0],
            version=cube.version,
            epoch=placement.epoch,
            owner=self.owner(*key)[0] if cube.listed else placement.owner,
            num_bytes=about.num_bytes,
            tokens=about.tokens,
            changed_at=about.changed_at,
            created_at=about.created_at,
            state=cube.state,
            kind=about.kind,
            sensitivity=about.sensitivity,
            scope=key[0],
            frozen=about.frozen,
            consents=about.consents,
            session_bound=about.session_bound,
            indexed_version=about.indexed_version,
            rate=about.rate,
            used_at=about.used_at,
            expires_at=about.expires_at,
        )
        return facts, [Held(p, version, size) for p, (version, size) in cube.listed.items()]


class SimFeed:
    """``Feed`` of one leader."""

    def __init__(self, catalog: SimCatalog) -> None:
        self._catalog = catalog
        self._told: dict[int, dict[Key, None]] = {}
        self.fresh: dict[Key, None] = dict.fromkeys(catalog.store.cubes)

    def changed(self, cursor: int) -> tuple[Sequence[Key], int]:
        found = self._told.pop(cursor, {}) | self.fresh
        self._told = {cursor: found}  # should the answer be lost
        self.fresh = {}
        return list(found), cursor + 1

    def read(self, keys: Sequence[Key]) -> list[tuple[CubeFacts, list[Held]]]:
        return [self._catalog.facts(key) for key in keys if key in self._catalog.store.cubes]


def plaintext(node: str) -> Place:
    return Place(Tier.PLAINTEXT, Medium.DISK, node)


def activation(node: str, medium: Medium) -> Place:
    return Place(Tier.ACTIVATION, medium, node)


def seconds(time: datetime) -> float:
    return time.timestamp()
