"""What the routes stand on: the service, and what else the gateway shows of the system."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from memcube.activation.contract import Mode
from memcube.activation.stats import KvStats
from memcube.catalog import Catalog
from memcube.chat.adapters import AdapterChoice
from memcube.chat.contract import KvModel, in_time
from memcube.chat.draining import DrainWatch
from memcube.chat.forgetting import Forgetting
from memcube.chat.migration import ActivationTier
from memcube.chat.router import Router
from memcube.chat.service import ChatService
from memcube.config import Config
from memcube.embedding.contract import Embedder
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock, Indexer
from memcube.lifecycle_parts import LifecycleParts, lifecycle_parts
from memcube.objects import OpenObjects
from memcube.reader import LlmReader, Reader
from memcube.service import MemoryService
from memcube.tiers.shard import look_at

STATS_DEADLINE_S = 2.0
DRAIN_LOOK_S = 2.0
SILENT = f"does not answer within {STATS_DEADLINE_S:g} s"
KvMoments = Callable[[], Awaitable[list[KvStats | None]]]
Status = Callable[[], Awaitable[dict[str, Any]]]


class Scheduler(Protocol):
    """The scheduler that leads, as the gateway sees it; see ``memcube.scheduler.host.SchedulerHost``."""

    async def details(self) -> dict[str, Any]: ...
    async def plan(self, *, limit: int) -> dict[str, Any]: ...
    async def round_now(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One open system, as one gateway process sees it."""

    service: MemoryService
    catalog: Catalog
    config: Config
    clock: Clock
    status: Status
    """Asks every part, and tells of each that doesn't answer its ``error``.

    Raises:
        Unavailable: the catalog or the embedder does not answer.
    """

    close: Callable[[], Awaitable[None]]
    embedder: Embedder
    chat: ChatService | None = None
    adapters: AdapterChoice | None = None
    """None where the chat's engines serve none."""

    tier: ActivationTier | None = None
    kv_stats: KvMoments | None = None
    """What each engine says of itself; None for one that doesn't answer in time."""

    forgetting: Forgetting | None = None
    """Tells the engines what has changed; None where there are none."""

    open_objects: OpenObjects | None = None
    """A new connection to the object store, for its caller to close."""

    lifecycle: LifecycleParts | None = None
    scheduler: Scheduler | None = None
    chat_model: str | None = None
    started_at: int = 0
    """Seconds since 1970; what OpenAI's shape wants of a model."""


def moments_of(models: Sequence[KvModel]) -> KvMoments:
    """Asks engines, each with a deadline: a dead one takes no scrape along."""

    async def all_of_them() -> list[KvStats | None]:
        asked = (in_time(model.stats(), STATS_DEADLINE_S) for model in models)
        return list(await asyncio.gather(*asked))

    return all_of_them


def scheduler_status(told: dict[str, Any] | None) -> dict[str, Any]:
    """The scheduler in the status; None is one that does not answer."""
    if told is None:
        return {"epoch": None, "rounds": 0, "failures": 0, "last": {}, "error": SILENT}
    return {**told, "error": None}


class UsageBuffer:
    """Counts uses and hands them over once in a while, with the latest score of each, never in the way of a
    search."""

    def __init__(
        self,
        send: Callable[
            [dict[TenantId, dict[CubeId, int]], dict[TenantId, dict[CubeId, float]]], None
        ],
        *,
        every_s: float,
    ) -> None:
        self._send = send
        self._every_s = every_s
        self._counts: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
        self._scores: dict[TenantId, dict[CubeId, float]] = defaultdict(dict)
        self._flusher: asyncio.Task[None] | None = None

    def add(self, tenant: TenantId, found: Mapping[CubeId, float]) -> None:
        counts, scores = self._counts[tenant], self._scores[tenant]
        for id, score in found.items():
            counts[id] = counts.get(id, 0) + 1
            if score > 0:
                scores[id] = score
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        await asyncio.sleep(self._every_s)
        self.flush()

    def flush(self) -> None:
        counts, self._counts = self._counts, defaultdict(dict)
        scores, self._scores = self._scores, defaultdict(dict)
        if counts:
            self._send(dict(counts), dict(scores))


def _now() -> datetime:
    return datetime.now(UTC)


async def open_backend(config: Config) -> Backend:
    """Connect to the actors (made if they are missing) and to the catalog."""
    import httpx

    from actors.embedder import RemoteEmbedder
    from actors.engines import ModelInfo, RemoteChatModel
    from actors.objects import open_objects
    from actors.scheduler import RemoteScheduler
    from actors.system import ensure_system

    catalog = await asyncio.to_thread(Catalog.open, config.catalog_url())
    system = ensure_system(config, catalog.shards.homes)
    embedder = await RemoteEmbedder.connect(system.embedder)
    shards = system.shards
    http = httpx.AsyncClient()
    llm = None
    if config.reader.llm is not None:
        key = os.environ.get(config.reader.llm.api_key_env)
        llm = LlmReader(config.reader.llm, api_key=key, http=http)
    uses = UsageBuffer(
        lambda counts, scores: _fire(system.scheduler.record_uses.remote(counts, scores)),
        every_s=config.scheduler.usage_flush_s,
    )
    engines = [RemoteChatModel(handle, number) for number, handle in enumerate(system.engines)]

    forgetting = Forgetting(engines, catalog.adapters, clock=_now) if engines else None
    indexer = Indexer(catalog, embedder, shards, clock=_now)
    service = MemoryService(
        catalog,
        Reader(config.reader, llm),
        indexer,
        shards,
        clock=_now,
        limits=config.limits,
        used=uses.add,
        changed=forgetting,
    )
    about = await engines[0].describe() if engines else None
    adapters = None
    if about is not None and config.serves_adapters():
        adapters = AdapterChoice(catalog.adapters, base=about.fingerprint, clock=_now)
    router = Router(len(engines)) if engines else None

    async def described() -> list[ModelInfo | None]:
        asked = (in_time(engine.describe(), STATS_DEADLINE_S) for engine in engines)
        return list(await asyncio.gather(*asked))

    async def engine_nodes() -> list[str | None]:
        return [None if one is None else one.node for one in await described()]

    watching = None
    if router is not None and len(engines) > 1:
        watch = DrainWatch(
            router,
            draining=lambda: {one.name for one in catalog.shards.nodes() if one.draining},
            nodes=engine_nodes,
        )
        watching = asyncio.create_task(watch.run(every_s=DRAIN_LOOK_S))

    async def status() -> dict[str, Any]:
        from actors.calls import answer

        await asyncio.to_thread(catalog.ping)
        numbers = await asyncio.to_thread(catalog.shards.numbers, config.plaintext.shards)
        leads = answer(
            system.scheduler.status.remote(), of="the scheduler", deadline_s=STATS_DEADLINE_S
        )
        load, scheduling, states, models = await asyncio.gather(
            embedder.load(),
            in_time(leads, STATS_DEADLINE_S),
            asyncio.gather(*(look_at(number, shards(number)) for number in numbers)),
            described(),
        )
        return {
            "shards": [asdict(state) for state in states],
            "embedder": {"identity": embedder.identity, "dim": embedder.dim, **load},
            "scheduler": scheduler_status(scheduling),
            "engines": [{"error": SILENT} if one is None else asdict(one) for one in models],
        }

    async def close() -> None:
        if watching is not None:
            watching.cancel()
        uses.flush()
        await http.aclose()
        await asyncio.to_thread(catalog.close)

    return Backend(
        service,
        catalog,
        config,
        _now,
        status,
        close,
        embedder,
        chat=ChatService(service, engines, config.chat, router, adapters) if engines else None,
        adapters=adapters,
        tier=ActivationTier(
            service, engines, router, mode=Mode(config.chat.mode), adapters=adapters
        )
        if router is not None
        else None,
        kv_stats=moments_of(engines) if engines else None,
        forgetting=forgetting,
        open_objects=lambda: open_objects(config),
        lifecycle=lifecycle_parts(
            catalog,
            indexer,
            shards,
            config,
            clock=_now,
            open_objects=lambda: open_objects(config),
            changed=forgetting,
        ),
        scheduler=RemoteScheduler(system.scheduler),
        chat_model=about.name if about is not None else None,
        started_at=int(_now().timestamp()),
    )


def _fire(ref: object) -> None:
    """Let a call go without waiting: uses that are lost with an actor cost a count, nothing more."""
    del ref
