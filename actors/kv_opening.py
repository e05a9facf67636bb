"""Opens an engine: its model, the KV below it, and what runs beside it. It takes the model's libraries."""

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray

from actors.engines import ModelInfo
from actors.kv_store import RemoteKvStore, spawn_kv_store_actor
from actors.nodes import this_node
from actors.objects import open_objects
from memcube.activation.adapters import ResidentAdapters
from memcube.activation.contract import KvEngine
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.forward import PackedModel
from memcube.activation.gate import FidelityGate, machine_is_busy
from memcube.activation.lower import StoreBelow
from memcube.activation.models import load_model
from memcube.catalog import Catalog
from memcube.chat.contract import EngineFacts
from memcube.chat.forgetting import sweep
from memcube.chat.host import ChatHost
from memcube.chat.prompt import PromptBuilder
from memcube.config import Config
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.loading import FileLoader
from memcube.policies.retention import Retention

MIB = 1 << 20
log = logging.getLogger("memcube.kv_cache")


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine that runs, and what runs beside it."""

    host: ChatHost
    engine: KvEngine
    store: Any
    info: ModelInfo
    gate: FidelityGate | None = None
    gating: asyncio.Task[None] | None = None
    sweeping: asyncio.Task[None] | None = None
    facts: EngineFacts | None = None
    """None where the engine can't say what it holds: the scheduler leaves it alone."""


async def open_engine(config: Config) -> OpenEngine:
    """What a configuration asks for, loaded.

    Raises:
        MemCubeError: the model can't be loaded. RayError: the store of its KV could not be started.
    """
    wanted = config.activation
    if wanted.engine == "vllm":
        return await _open_vllm(config)
    loaded = await asyncio.to_thread(load_model, config.model, config.model_folder())
    node = await asyncio.to_thread(this_node)
    store: Any = None
    lower = None
    if wanted.host_mb or wanted.disk_mb or wanted.object_mb:
        store = spawn_kv_store_actor(
            config,
            node=ray.get_runtime_context().get_node_id(),
            model=loaded.fingerprint,
            layout=loaded.layout,
        )
        # A request waits a second for its blocks, a store takes some to open: not the first one's.
        await store.stats.remote()
        lower = StoreBelow(RemoteKvStore(store), loaded, codec=wanted.codec)
    model = PackedModel(loaded)
    engine = Engine(
        model,
        loaded,
        policy=Retention(wanted.device_mb * MIB),
        limits=EngineLimits(
            block_tokens=wanted.block_tokens,
            max_running=wanted.max_running,
            max_waiting=wanted.max_waiting,
            step_tokens=wanted.step_tokens,
            buffer_bytes=wanted.buffer_mb * MIB,
        ),
        lower=lower,
        adapters=_resident_adapters(config, model, base=loaded.fingerprint),
    )
    info = ModelInfo(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        max_positions=loaded.max_positions,
        device=str(loaded.model.device),
        node=node,
        why_not=loaded.why_not,
    )
    prompts = PromptBuilder(loaded.tokenizer, system=config.chat.system)
    gate = gating = None
    if wanted.composing == "auto":
        gate = FidelityGate(
            engine,
            config.model_folder(),
            num_cases=wanted.gate_cases,
            is_busy=machine_is_busy,
        )
        gating = asyncio.create_task(gate.run())
    sweeping = None
    if config.adapters.resident_mb:
        sweeping = asyncio.create_task(_sweep_on(engine, config))
    facts = EngineFacts(
        node=node,
        device_bytes=wanted.device_mb * MIB,
        bytes_per_token=loaded.layout.bytes_per_token,
        least_tokens=wanted.block_tokens,
        most_tokens=loaded.max_positions - 1,
    )
    return OpenEngine(ChatHost(engine, prompts), engine, store, info, gate, gating, sweeping, facts)


async def _sweep_on(engine: Engine, config: Config) -> None:
    """Forget, once in a while, the adapters that have stopped; the store sweeps its media itself."""
    catalog = await asyncio.to_thread(Catalog.open, config.catalog_url())
    try:
        while True:
            await asyncio.sleep(config.activation.sweep_s)
            try:
                if count := await sweep(engine, catalog, now=datetime.now(UTC)):
                    log.info("forgot %d adapters that have stopped", count)
            except Exception:
                log.exception("a sweep of adapters failed; the next one tries again")
    finally:
        catalog.close()


async def _open_vllm(config: Config) -> OpenEngine:
    from memcube.activation.vllm_engine import open_vllm

    opened = await asyncio.to_thread(open_vllm, config, lambda: open_objects(config))
    info = ModelInfo(
        name=config.model.name,
        fingerprint=opened.fingerprint,
        max_positions=opened.engine.max_positions,
        device="cuda",
        node=await asyncio.to_thread(this_node),
        why_not="vLLM attaches prefixes alone",
    )
    prompts = PromptBuilder(opened.tokenizer, system=config.chat.system)
    return OpenEngine(ChatHost(opened.engine, prompts), opened.engine, None, info)


def _resident_adapters(config: Config, model: PackedModel, *, base: str) -> ResidentAdapters | None:
    wanted = config.adapters
    if not wanted.resident_mb:
        return None
    limits = AdapterLimits.of(wanted)
    load = FileLoader(lambda: open_objects(config), model, base=base, limits=limits)
    return ResidentAdapters(load, max_bytes=wanted.resident_mb * MIB)
