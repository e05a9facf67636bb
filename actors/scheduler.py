"""The control plane's actor: one leads, by a lease in the catalog, and runs the reconcile loop."""

import asyncio
import logging
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.embedder import RemoteEmbedder
from actors.qdrant import RemoteShard
from memcube.catalog import Catalog, Lease
from memcube.config import Config
from memcube.errors import Conflict, MemCubeError, StaleEpoch
from memcube.ids import CubeId, TenantId
from memcube.indexing import Indexer
from memcube.reconcile import Reconciler

NAME = "scheduler"
LEASE_TTL_S = 15.0
log = logging.getLogger("memcube.scheduler")


class SchedulerActor:
    """Leads under one lease epoch at a time; without the lease it acts on nothing.

    The loop runs in a thread with a loop of its own, so that calls are answered while a round is
    long. A restarted actor is the same holder, takes the lease at once, and gets a new epoch.
    """

    def __init__(
        self, config: Config, embedder: ActorHandle[Any], shards: list[ActorHandle[Any]]
    ) -> None:
        self._config = config
        self._embedder = embedder
        self._shards = [RemoteShard(handle, i) for i, handle in enumerate(shards)]
        self._holder = ray.get_runtime_context().get_actor_id() or "scheduler"
        self._lease: Lease | None = None
        self._rounds = 0
        self._failures = 0
        self._last: dict[str, Any] = {}
        self._uses: list[Mapping[TenantId, Mapping[CubeId, int]]] = []
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def record_uses(self, uses: Mapping[TenantId, Mapping[CubeId, int]]) -> None:
        """Take a batch of uses; counted in the next round. A crash loses those not yet counted."""
        with self._guard:
            self._uses.append(uses)

    def status(self) -> dict[str, Any]:
        """Epoch of the lease (None: not leading), rounds, failures and the last round's report."""
        return {
            "epoch": self._lease.epoch if self._lease else None,
            "rounds": self._rounds,
            "failures": self._failures,
            "last": self._last,
        }

    def stop(self) -> None:
        """End the loop after its round, and give the lease back."""
        self._stopping.set()
        self._thread.join(timeout=30)

    async def _run(self) -> None:
        catalog = Catalog.open(self._config.catalog_url())
        embedder = await RemoteEmbedder.connect(self._embedder)
        shards = self._shards.__getitem__
        indexer = Indexer(catalog, embedder, shards, clock=_now)
        reconciler = Reconciler(
            catalog, indexer, shards, self._config.scheduler, num_shards=len(self._shards)
        )
        while not self._stopping.is_set():
            try:
                if self._lead(catalog):
                    await self._round(reconciler)
            except MemCubeError as failed:
                self._failures += 1
                log.warning("a round ended early: %s", failed)
            except Exception:
                self._failures += 1
                log.exception("a round failed")
            await asyncio.to_thread(self._stopping.wait, self._config.scheduler.interval_s)
        if self._lease is not None:
            catalog.leases.release(self._lease)
        catalog.close()

    def _lead(self, catalog: Catalog) -> bool:
        try:
            if self._lease is None:
                self._lease = catalog.leases.acquire(
                    NAME, self._holder, now=_now(), ttl_s=LEASE_TTL_S
                )
            else:
                self._lease = catalog.leases.renew(self._lease, now=_now(), ttl_s=LEASE_TTL_S)
        except (Conflict, StaleEpoch):
            self._lease = None
        return self._lease is not None

    async def _round(self, reconciler: Reconciler) -> None:
        with self._guard:
            uses, self._uses = self._uses, []
        merged: dict[TenantId, dict[CubeId, int]] = {}
        for batch in uses:
            for tenant, counts in batch.items():
                total = merged.setdefault(tenant, {})
                for id, count in counts.items():
                    total[id] = total.get(id, 0) + count
        now = _now()
        await reconciler.record_uses(merged, now)
        report = await reconciler.step(now)
        self._rounds += 1
        done = {name: getattr(report, name) for name in report.__slots__}
        self._last = {"at": now.isoformat(), **done}
        if report.total:
            log.info("reconciled: %s", done)


def _now() -> datetime:
    return datetime.now(UTC)


def spawn_scheduler_actor(
    config: Config, *, embedder: ActorHandle[Any], shards: list[ActorHandle[Any]]
) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options."""
    spawned = (
        ray.remote(SchedulerActor)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=8,
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(config, embedder, shards)
    )
    return cast(ActorHandle[Any], spawned)
