"""Makes or finds all actors of a system. Idempotent, and safe from several callers at once."""

from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from actors.embedder import spawn_embedder_actor
from actors.kv_cache import spawn_kv_cache_actor
from actors.qdrant import spawn_qdrant_actor
from actors.scheduler import spawn_scheduler_actor
from memcube.config import Config


@dataclass(frozen=True, slots=True)
class System:
    """Handles of one system's actors; ``shards`` and ``engines`` by number."""

    embedder: ActorHandle[Any]
    shards: list[ActorHandle[Any]]
    scheduler: ActorHandle[Any]
    engines: list[ActorHandle[Any]]


def ensure_system(config: Config) -> System:
    """The actors, made where they are missing. They open their stores on their own."""
    embedder = spawn_embedder_actor(config)
    shards = [
        spawn_qdrant_actor(config, shard=number, embedder=embedder)
        for number in range(config.plaintext.shards)
    ]
    scheduler = spawn_scheduler_actor(config, embedder=embedder, shards=shards)
    engines = [
        spawn_kv_cache_actor(config, number=number) for number in range(config.activation.actors)
    ]
    return System(embedder, shards, scheduler, engines)
