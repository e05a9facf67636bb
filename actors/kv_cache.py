"""The activation tier's actor: one engine, on one GPU or CPU slot, that answers chats.

Ray imports this module in each process that gets a handle of the actor, gateways and the scheduler among them. So
the model's libraries are imported where the engine is opened (``kv_opening``): they take seconds.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.actor import ActorHandle

from actors import NAMESPACE
from actors.engines import ModelInfo
from actors.nodes import PLACED, on_head
from actors.placement import ENGINE_GPU, model_on_gpu
from memcube.activation.contract import Usage
from memcube.activation.stats import KvStats
from memcube.catalog import Catalog
from memcube.catalog.fence import LEASE
from memcube.chat.contract import BuildRequest, ChatPiece, ChatPrompt, EngineFacts, KvBytes
from memcube.config import Config
from memcube.scheduler.leader_fence import LeaderFence

if TYPE_CHECKING:
    from actors.kv_opening import OpenEngine


class KVCacheActor:
    """Owns a model, its KV pool and what runs on them. The model is loaded at the first call."""

    def __init__(self, config: Config) -> None:
        # Here and not at a call, which it would hold up for seconds.
        from actors.kv_opening import open_engine

        self._open = open_engine
        self._config = config
        self._opening: asyncio.Task[OpenEngine] | None = None
        self._fence: LeaderFence | None = None
        self._fencing = asyncio.Lock()

    async def _opened(self) -> "OpenEngine":
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(self._config))
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except Exception:
            if self._opening is opening:
                self._opening = None
            raise

    async def describe(self) -> ModelInfo:
        """What runs here; returns when it is loaded."""
        opened = await self._opened()
        if opened.gate is None:
            return opened.info
        return replace(opened.info, composing=opened.gate.status)

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The answer in pieces."""
        host = (await self._opened()).host
        async with aclosing(host.chat(prompt)) as pieces:
            async for piece in pieces:
                yield piece

    async def facts(self) -> EngineFacts | None:
        """What the scheduler reckons with; None where it leaves this engine alone."""
        return (await self._opened()).facts

    async def build(self, wanted: BuildRequest, leader: int | None = None) -> Usage:
        """Compute and store KV ahead of any question; for the scheduler under its ``leader``'s epoch.

        Raises:
            StaleEpoch: a later leader was heard of.
        """
        await self._check(leader)
        return await (await self._opened()).host.build(wanted)

    async def forget(
        self, cubes: Collection[str], tenant: str | None, leader: int | None = None
    ) -> int:
        """Make all KV unservable that holds one of these cubes, and all of a tenant.

        Raises:
            StaleEpoch: a later leader was heard of.
        """
        await self._check(leader)
        return await (await self._opened()).engine.forget(cubes, tenant)

    async def held(self, cubes: Collection[str], leader: int) -> set[str]:
        """Those of these cubes that KV holds, on the device or below it.

        Raises:
            StaleEpoch: a later leader was heard of.
        """
        await self._check(leader)
        opened = await self._opened()
        found = await opened.engine.cubes_held()
        if opened.store is not None:
            found |= await opened.store.members.remote()
        return found.intersection(cubes)

    async def _check(self, leader: int | None) -> None:
        if leader is None:
            return
        async with self._fencing:
            if self._fence is None:
                self._fence = LeaderFence(await asyncio.to_thread(self._led_by))
        self._fence.check(leader)

    def _led_by(self) -> int:
        catalog = Catalog.open(self._config.catalog_url())
        try:
            return catalog.leases.epoch(LEASE)
        finally:
            catalog.close()

    async def residency(self, cubes: Collection[str]) -> list[KvBytes]:
        """Bytes that hold any of these cubes, by medium."""
        opened = await self._opened()
        found = {"device": await opened.engine.resident_bytes(cubes)}
        if opened.store is not None:
            found |= await opened.store.residency.remote(cubes)
        node = opened.info.node
        return [
            KvBytes(medium=medium, node=node, num_bytes=num_bytes)
            for medium, num_bytes in found.items()
            if num_bytes
        ]

    async def stats(self) -> KvStats:
        """This moment."""
        opened = await self._opened()
        media = await opened.store.stats.remote() if opened.store is not None else []
        return KvStats(
            engine=opened.engine.stats(),
            media=media,
            node=opened.info.node,
            adapters=opened.engine.adapter_stats(),
        )

    async def close(self) -> None:
        """Take what is on the device down to the media, and end."""
        if self._opening is None:
            return
        opened = await self._opening
        if opened.sweeping is not None:
            opened.sweeping.cancel()
        await opened.engine.close(drain_s=5.0)
        if opened.gate is not None and opened.gating is not None:
            opened.gate.end()
            opened.gating.cancel()
        if opened.store is not None:
            await opened.store.close.remote()


def spawn_kv_cache_actor(config: Config, *, number: int) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options: where there are GPUs, most of one each
    (vLLM: ``tensor_parallel`` of them). Without, the first is on the head, whose end would end it anyway, and
    the others are spread over the nodes.

    A chat is not repeated by Ray: what was said would be said again, and differently.
    """
    on_gpu = model_on_gpu(config)
    spawned = (
        ray.remote(KVCacheActor)
        .options(
            name=f"kv-cache-{number}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=PLACED,
            num_gpus=_num_gpus(config) if on_gpu else 0,
            scheduling_strategy=on_head() if number == 0 and not on_gpu else "SPREAD",
            max_concurrency=512,
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(config)
    )
    return cast(ActorHandle[Any], spawned)


def _num_gpus(config: Config) -> float:
    if config.activation.engine == "vllm":
        return float(config.activation.vllm.tensor_parallel)
    return ENGINE_GPU
