"""What the routes stand on: the service, and what else the gateway shows of the system."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from memcube.activation.contract import Mode
from memcube.activation.stats import KvStats
from memcube.catalog import Catalog
from memcube.chat.adapters import AdapterChoice
from memcube.chat.contract import KvModel, in_time
from memcube.chat.migration import ActivationTier
from memcube.chat.router import Router
from memcube.chat.service import ChatService
from memcube.config import Config
from memcube.embedding.contract import Embedder
from memcube.errors import MemCubeError
from memcube.ids import CubeId, TenantId
from memcube.indexing import Clock, Indexer
from memcube.objects import ObjectStore
from memcube.reader import LlmReader, Reader
from memcube.service import MemoryService

STATS_DEADLINE_S = 2.0
KvMoments = Callable[[], Awaitable[list[KvStats | None]]]
Status = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Backend:
    """One open system, as one gateway process sees it."""

    service: MemoryService
    catalog: Catalog
    config: Config
    clock: Clock
    status: Status
    """Asks every part; raises Unavailable when one does not answer."""

    close: Callable[[], Awaitable[None]]
    embedder: Embedder
    chat: ChatService | None = None
    tier: ActivationTier | None = None
    kv_stats: KvMoments | None = None
    """What each engine says of itself; None for one that doesn't answer in time."""

    open_objects: Callable[[], Awaitable[ObjectStore]] | None = None
    """A new connection to the object store, for its caller to close."""

    chat_model: str | None = None
    started_at: int = 0
    """Seconds since 1970; what OpenAI's shape wants of a model."""


def moments_of(models: Sequence[KvModel]) -> KvMoments:
    """Asks engines, each with a deadline: a dead one takes no scrape along."""

    async def all_of_them() -> list[KvStats | None]:
        asked = (in_time(model.stats(), STATS_DEADLINE_S) for model in models)
        return list(await asyncio.gather(*asked))

    return all_of_them


class UsageBuffer:
    """Counts uses and hands them over once in a while, never in the way of a search."""

    def __init__(
        self, send: Callable[[dict[TenantId, dict[CubeId, int]]], None], *, every_s: float
    ) -> None:
        self._send = send
        self._every_s = every_s
        self._counts: dict[TenantId, dict[CubeId, int]] = defaultdict(dict)
        self._flusher: asyncio.Task[None] | None = None

    def add(self, tenant: TenantId, ids: Sequence[CubeId]) -> None:
        counts = self._counts[tenant]
        for id in ids:
            counts[id] = counts.get(id, 0) + 1
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        await asyncio.sleep(self._every_s)
        self.flush()

    def flush(self) -> None:
        counts, self._counts = self._counts, defaultdict(dict)
        if counts:
            self._send(dict(counts))


def _now() -> datetime:
    return datetime.now(UTC)


async def open_backend(config: Config) -> Backend:
    """Connect to the actors (made if they are missing) and to the catalog."""
    import httpx

    from actors.embedder import RemoteEmbedder
    from actors.kv_cache import RemoteChatModel
    from actors.kv_store import open_objects
    from actors.qdrant import RemoteShard
    from actors.system import ensure_system

    system = ensure_system(config)
    embedder = await RemoteEmbedder.connect(system.embedder)
    remote = [RemoteShard(handle, number) for number, handle in enumerate(system.shards)]
    shards = remote.__getitem__
    catalog = await asyncio.to_thread(Catalog.open, config.catalog_url())
    http = httpx.AsyncClient()
    llm = None
    if config.reader.llm is not None:
        key = os.environ.get(config.reader.llm.api_key_env)
        llm = LlmReader(config.reader.llm, api_key=key, http=http)
    uses = UsageBuffer(
        lambda counts: _fire(system.scheduler.record_uses.remote(counts)),
        every_s=config.scheduler.usage_flush_s,
    )
    engines = [RemoteChatModel(handle, number) for number, handle in enumerate(system.engines)]

    async def forget(tenant: TenantId, ids: Sequence[CubeId]) -> None:
        # KV is found by the tokens of a prompt, and these cubes are in none any more: an engine that
        # doesn't answer now serves nothing of them either; the sweep drops bytes of cubes that are gone.
        told = await asyncio.gather(
            *(engine.forget(ids, None) for engine in engines), return_exceptions=True
        )
        for failed in told:
            if isinstance(failed, BaseException) and not isinstance(failed, MemCubeError):
                raise failed

    service = MemoryService(
        catalog,
        Reader(config.reader, llm),
        Indexer(catalog, embedder, shards, clock=_now),
        shards,
        clock=_now,
        limits=config.limits,
        used=uses.add,
        changed=forget if engines else None,
    )
    about = await engines[0].describe() if engines else None
    adapters = None
    if about is not None and config.activation.engine != "vllm" and config.adapters.resident_mb:
        adapters = AdapterChoice(catalog.adapters, base=about.fingerprint, clock=_now)
    router = Router(len(engines)) if engines else None

    async def status() -> dict[str, Any]:
        from actors.calls import answer

        await asyncio.to_thread(catalog.ping)
        infos = await asyncio.gather(*(shard.info() for shard in remote))
        scheduler = answer(system.scheduler.status.remote(), of="the scheduler", deadline_s=10.0)
        load, scheduling = await asyncio.gather(embedder.load(), scheduler)
        return {
            "shards": [
                {"shard": i.shard, "epoch": i.epoch, "index": i.index, "location": i.location}
                for i in infos
            ],
            "embedder": {"identity": embedder.identity, "dim": embedder.dim, **load},
            "scheduler": scheduling,
            "engines": [asdict(await engine.describe()) for engine in engines],
        }

    async def close() -> None:
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
        tier=ActivationTier(service, engines, router, mode=Mode(config.chat.mode))
        if router is not None
        else None,
        kv_stats=moments_of(engines) if engines else None,
        open_objects=lambda: open_objects(config),
        chat_model=about.name if about is not None else None,
        started_at=int(_now().timestamp()),
    )


def _fire(ref: object) -> None:
    """Let a call go without waiting: uses that are lost with an actor cost a count, nothing more."""
    del ref
