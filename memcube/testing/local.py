"""A whole system in one process, without Ray or HTTP: SQLite, stores in memory, a manual clock."""

import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import event

from memcube.catalog import Catalog, Database, Principal, Role
from memcube.chat.forgetting import Forgetting
from memcube.config import Config
from memcube.errors import Unavailable
from memcube.ids import CubeId, TenantId
from memcube.indexing import Indexer
from memcube.objects.folder import FolderStore
from memcube.reader import LlmReader, Reader
from memcube.reconcile import Reconciler, Report
from memcube.retrieval.ranker import Hit, Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.scheduler.host import SchedulerHost
from memcube.scheduler.leader_fence import LeaderFence
from memcube.scheduler.lease import LeaseKeeper
from memcube.scheduler.parts import scheduler_host
from memcube.service import MemoryService
from memcube.sweep import lifecycle_sweep
from memcube.testing.chat import ScriptedModel
from memcube.testing.embedding import HashEmbedder
from memcube.tiers.memory import MemoryStore
from memcube.tiers.moving import Standing
from memcube.tiers.plaintext import IndexedCube, IndexSpec, Scored
from memcube.tiers.shard import PlaintextShard, ShardInfo, look_at

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, start: datetime = START) -> None:
        self.now = start

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class LocalShard:
    """A shard in this process that can be down, restart, and come back without some of its cubes.

    ``on_put`` is called before each put: what happens there happens while a put is on its way.
    """

    def __init__(
        self,
        number: int,
        embedder: HashEmbedder,
        look_up: Callable[[TenantId, int], Standing],
        moving: Callable[[], set[TenantId]],
    ) -> None:
        """``look_up``: how a tenant stands to a shard, ``moving``: which are on their way, as the catalog has
        it."""
        self.embedder = embedder
        self._look_up = look_up
        self._moving = moving
        self.fence = LeaderFence()
        self.down = False
        self.puts: list[list[tuple[CubeId, int]]] = []
        self.on_put: Callable[[], None] | None = None
        self._number = number
        self._epoch = 0
        self.restart(empty=True)

    def restart(self, *, empty: bool = False) -> None:
        """Come back under the next epoch; the store keeps its cubes unless ``empty``, never its
        tombstones of the time before."""
        self._epoch += 1
        if empty:
            self.store = MemoryStore(
                IndexSpec(embedder=self.embedder.identity, dim=self.embedder.dim)
            )
        self.store._tombstones.clear()
        self._shard = PlaintextShard(
            self.store,
            Retriever(self.store, self.embedder, RankerWeights.load()),
            shard=self._number,
            epoch=self._epoch,
            location=f"memory:{self._number}",
            look_up=self._standing,
            moving=self._moving(),
            leader_fence=self.fence.check,
        )

    def held(self) -> dict[CubeId, int]:
        """What the store holds, by id, with its version."""
        return {id: c.version for cubes in self.store._cubes.values() for id, c in cubes.items()}

    async def info(self) -> ShardInfo:
        return await self._reached().info()

    async def put(self, cubes: Sequence[IndexedCube], *, epoch: int) -> None:
        if self.on_put is not None:
            before, self.on_put = self.on_put, None
            before()
        await self._reached().put(cubes, epoch=epoch)
        self.puts.append([(cube.id, cube.version) for cube in cubes])

    async def delete(self, tenant: TenantId, versions: Mapping[CubeId, int], *, epoch: int) -> None:
        await self._reached().delete(tenant, versions, epoch=epoch)

    async def set_state(
        self, tenant: TenantId, ids: Sequence[CubeId], state: str, *, epoch: int
    ) -> None:
        await self._reached().set_state(tenant, ids, state, epoch=epoch)

    async def search(self, tenant: TenantId, query: str, **how: Any) -> list[Hit]:
        return await self._reached().search(tenant, query, **how)

    async def nearest(
        self, tenant: TenantId, ids: Sequence[CubeId], **how: Any
    ) -> dict[CubeId, list[Scored]]:
        return await self._reached().nearest(tenant, ids, **how)

    async def versions(self) -> list[tuple[TenantId, CubeId, int]]:
        return await self._reached().versions()

    async def note_left(self, tenants: Sequence[TenantId]) -> None:
        await self._reached().note_left(tenants)

    @property
    def moving(self) -> PlaintextShard:
        """The shard for the steps of a tenant's move."""
        return self._reached()

    async def _standing(self, tenant: TenantId) -> Standing:
        return self._look_up(tenant, self._number)

    def _reached(self) -> PlaintextShard:
        if self.down:
            raise Unavailable(f"shard {self._number} of the plaintext tier is not there now")
        return self._shard


def _do_not_wait(connection: sqlite3.Connection, _record: object) -> None:
    """What is written here need not survive a loss of power: no commit waits for the disk."""
    connection.execute("PRAGMA synchronous=OFF")


@dataclass(slots=True)
class LocalSystem:
    """The parts, wired as the gateway and the scheduler wire them.

    ``engines`` may be replaced before they are used; ``uses`` holds what searches told of their use, until ``reconcile`` counts it.
    """

    clock: ManualClock
    catalog: Catalog
    embedder: HashEmbedder
    shards: list[LocalShard]
    indexer: Indexer
    service: MemoryService
    reconciler: Reconciler
    config: Config
    engines: list[ScriptedModel]
    forgetting: Forgetting
    uses: dict[TenantId, dict[CubeId, int]] = field(default_factory=dict)
    _scheduler: "LocalScheduler | None" = None

    @property
    def scheduler(self) -> "LocalScheduler":
        """The scheduler's host over these parts, made when it is first asked for."""
        if self._scheduler is None:
            self._scheduler = LocalScheduler(self)
        return self._scheduler

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        config: Config | None = None,
        template: Path | None = None,
        llm: LlmReader | None = None,
    ) -> "LocalSystem":
        """A system over a folder. ``template``, a migrated catalog, saves the migration's time."""
        config = config or Config(data_dir=folder)
        url = f"sqlite:///{folder / 'catalog.db'}"
        if template is not None:
            shutil.copy(template, folder / "catalog.db")
        database = Database(url)
        event.listen(database._engine, "connect", _do_not_wait)
        if template is None:
            database.migrate()
        catalog = Catalog(database)
        clock = ManualClock()
        embedder = HashEmbedder()
        shards = [
            LocalShard(n, embedder, catalog.shards.standing, catalog.shards.moving)
            for n in range(config.plaintext.shards)
        ]
        indexer = Indexer(catalog, embedder, shards.__getitem__, clock=clock)
        uses: dict[TenantId, dict[CubeId, int]] = {}

        def used(tenant: TenantId, found: Mapping[CubeId, float]) -> None:
            counts = uses.setdefault(tenant, {})
            for id in found:
                counts[id] = counts.get(id, 0) + 1

        engines = [ScriptedModel()]

        forgetting = Forgetting(engines, catalog.adapters, clock=clock)
        service = MemoryService(
            catalog,
            Reader(config.reader, llm),
            indexer,
            shards.__getitem__,
            clock=clock,
            limits=config.limits,
            used=used,
            changed=forgetting,
        )
        # The scheduler is another process with an indexer of its own.
        reconciler = Reconciler(
            catalog,
            Indexer(catalog, embedder, shards.__getitem__, clock=clock),
            shards.__getitem__,
            config.scheduler,
            num_shards=len(shards),
        )
        return cls(
            clock,
            catalog,
            embedder,
            shards,
            indexer,
            service,
            reconciler,
            config,
            engines,
            forgetting,
            uses,
        )

    def close(self) -> None:
        """Release the catalog, whose folder is thrown away: its log is not folded in."""
        self.catalog._database._engine.dispose()

    def principal(self, tenant: str = "acme", role: Role = Role.WRITER) -> Principal:
        """A caller of a tenant, which is made if it is new."""
        return self.catalog.access.authenticate(self.key(tenant, role), now=self.clock())

    def key(
        self, tenant: str = "acme", role: Role = Role.WRITER, *, expires_at: datetime | None = None
    ) -> str:
        """A new key's secret."""
        made = self.catalog.access.ensure_tenant(tenant, shards=len(self.shards), now=self.clock())
        _, secret = self.catalog.access.create_key(
            tenant=made.id, name="test", role=role, expires_at=expires_at, now=self.clock()
        )
        return secret

    async def reconcile(self, *, after_s: float = 3600.0) -> Report:
        """One round of the reconcile loop, by default after every grace has passed."""
        self.clock.advance(after_s)
        counts = dict(self.uses)
        self.uses.clear()
        await self.reconciler.record_uses(counts, self.clock())
        return await self.reconciler.step(self.clock())

    async def status(self) -> dict[str, Any]:
        """What the gateway's backend tells of the parts."""
        return {
            "shards": [asdict(await look_at(n, shard)) for n, shard in enumerate(self.shards)],
            "embedder": {
                "identity": self.embedder.identity,
                "dim": self.embedder.dim,
                "waiting": 0,
                "texts": 0,
                "batches": 0,
            },
            "scheduler": {"epoch": 1, "rounds": 0, "failures": 0, "last": {}, "error": None},
        }


class LocalScheduler:
    """A real host over a system's doubles. It runs when it is asked to."""

    def __init__(self, system: LocalSystem, *, holder: str = "scheduler") -> None:
        async def open_objects() -> FolderStore:
            file = Path(system.catalog._database.url.database or "")
            return FolderStore.open(file.parent / "objects")

        self.keeper = LeaseKeeper(system.catalog.leases, holder=holder, clock=system.clock)
        self.host: SchedulerHost = scheduler_host(
            system.catalog,
            system.config,
            self.keeper,
            reconciler=system.reconciler,
            indexer=system.indexer,
            sweep=lifecycle_sweep(
                system.catalog,
                system.indexer,
                system.shards.__getitem__,
                system.config,
                clock=system.clock,
                open_objects=open_objects,
            ),
            engines=system.engines,
            plaintext=None,
            clock=system.clock,
        )

    async def step(self) -> None:
        """One round of every part, and wait for the moves that it started."""
        self.keeper.step()
        await self.host.step()
        await self.host.settled()

    async def details(self) -> dict[str, Any]:
        return self.host.details()

    async def plan(self, *, limit: int) -> dict[str, Any]:
        await self.round_now()
        return self.host.plan(limit=limit)

    async def round_now(self) -> dict[str, Any]:
        self.keeper.step()
        return await self.host.round_now()


def migrated_catalog(folder: Path) -> Path:
    """An empty catalog at the newest schema, for ``LocalSystem.open`` to copy."""
    file = folder / "template.db"
    Catalog.open(f"sqlite:///{file}").close()
    return file
