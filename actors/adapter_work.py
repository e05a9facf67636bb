"""The actor that merges adapters and reads them back: a model of its own, for one job."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from actors.calls import answer
from actors.objects import open_objects
from actors.placement import model_on_gpu, worker_bundle
from memcube.activation.models import LoadedModel, load_model
from memcube.catalog import Catalog
from memcube.config import Config
from memcube.ids import TenantId
from memcube.objects import opened
from memcube.parametric.conversions import FusedAdapter, ProbedAdapter, fuse_adapters, probe_adapter
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import Thresholds
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.registry import AdapterFiles, AdapterRegistry
from memcube.parametric.replay import UNRELATED
from memcube.parametric.specs import AdapterVersion


class AdapterWorkActor:
    """Loads the model for one conversion, and is ended after it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        if not model_on_gpu(config):
            os.nice(config.training.nice)  # what serves goes first

    async def fuse(
        self, tenant: TenantId, adapters: Sequence[AdapterVersion], name: str, limits: Thresholds
    ) -> FusedAdapter:
        """See ``conversions.fuse_adapters``."""
        async with self._tools() as (loaded, registry, catalog, gate):
            return await fuse_adapters(
                loaded,
                registry,
                catalog,
                tenant,
                adapters,
                gate,
                name=name,
                thresholds=limits,
                now=_now(),
            )

    async def probe(self, tenant: TenantId, adapter: AdapterVersion, author: str) -> ProbedAdapter:
        """See ``conversions.probe_adapter``."""
        async with self._tools() as (loaded, registry, catalog, gate):
            return await probe_adapter(
                loaded,
                registry,
                catalog,
                tenant,
                adapter,
                gate,
                author=author,
                now=_now(),
                clock=_now,
            )

    @asynccontextmanager
    async def _tools(self) -> AsyncIterator[tuple[LoadedModel, AdapterRegistry, Catalog, Gate]]:
        config = self._config
        loaded = await asyncio.to_thread(load_model, config.model, config.model_folder())
        catalog = Catalog.open(config.catalog_url())
        with closing(catalog):
            async with opened(lambda: open_objects(config)) as objects:
                files = AdapterFiles(objects, AdapterLimits.of(config.adapters))
                gate = Gate(loaded, unrelated=UNRELATED, system=config.chat.system)
                yield loaded, AdapterRegistry(files, catalog.adapters), catalog, gate


class RemoteConversions:
    """``Converts`` by an actor that is made for each call, and killed when it ends or is cancelled."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def fuse(
        self, tenant: TenantId, adapters: Sequence[AdapterVersion], name: str, limits: Thresholds
    ) -> FusedAdapter:
        return await self._call("fuse", tenant, list(adapters), name, limits)

    async def probe(self, tenant: TenantId, adapter: AdapterVersion, author: str) -> ProbedAdapter:
        return await self._call("probe", tenant, adapter, author)

    async def _call(self, method: str, *given: Any) -> Any:
        actor = spawn_adapter_work_actor(self._config)
        try:
            call = getattr(actor, method).remote(*given)
            return await answer(call, of="the conversion's worker", deadline_s=None)
        finally:
            ray.kill(actor)


def spawn_adapter_work_actor(config: Config) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options: resources as a training worker has."""
    bundle = worker_bundle(config)
    spawned = (
        ray.remote(AdapterWorkActor)
        .options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0.0),
            max_restarts=0,
            max_task_retries=0,
        )
        .remote(config)
    )
    return cast(ActorHandle[Any], spawned)


def _now() -> datetime:
    return datetime.now(UTC)
