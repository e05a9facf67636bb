"""Makes or finds all actors of a system. Idempotent, and safe from several callers at once."""

from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from actors.embedder import spawn_embedder_actor
from actors.jobs import spawn_jobs_actor
from actors.kv_cache import spawn_kv_cache_actor
from actors.qdrant import Homes, RemoteShards
from actors.scheduler import spawn_scheduler_actor
from memcube.config import Config


@dataclass(frozen=True, slots=True)
class System:
    """Handles of one system's actors; ``engines`` by number. ``jobs`` runs queued work; a system without
    engines has none, as nothing could serve what it makes."""

    embedder: ActorHandle[Any]
    shards: RemoteShards
    scheduler: ActorHandle[Any]
    engines: list[ActorHandle[Any]]
    jobs: ActorHandle[Any] | None


def ensure_system(config: Config, homes: Homes) -> System:
    """The actors, made where they are missing; ``homes`` says which nodes shards belong on
    (``memcube.catalog.ShardBook.homes``). They open their stores on their own."""
    embedder = spawn_embedder_actor(config)
    shards = RemoteShards(config, embedder, homes)
    for number in sorted({*range(config.plaintext.shards), *homes()}):
        shards(number)
    engines = [
        spawn_kv_cache_actor(config, number=number) for number in range(config.activation.actors)
    ]
    scheduler = spawn_scheduler_actor(config, embedder=embedder, engines=engines)
    jobs = spawn_jobs_actor(config) if config.activation.actors else None
    return System(embedder, shards, scheduler, engines, jobs)
