"""The activation tier's actor: one engine, on one GPU or CPU slot, that answers chats."""

import asyncio
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from actors import NAMESPACE
from actors.calls import answer
from actors.kv_store import RemoteKvStore, open_objects, spawn_kv_store_actor
from memcube.activation.adapters import ResidentAdapters
from memcube.activation.contract import KvEngine, Usage
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.forward import PackedModel
from memcube.activation.gate import FidelityGate, GateStatus, machine_is_busy
from memcube.activation.lower import StoreBelow
from memcube.activation.models import load_model
from memcube.activation.stats import KvStats
from memcube.chat.contract import BuildRequest, ChatPiece, ChatPrompt, KvBytes
from memcube.chat.host import ChatHost
from memcube.chat.prompt import PromptBuilder
from memcube.config import Config
from memcube.errors import DeadlineExceeded, MemCubeError, Unavailable
from memcube.parametric.loading import FileLoader
from memcube.parametric.weights import AdapterLimits
from memcube.policies.retention import Retention

LOAD_DEADLINE_S = 300.0
CALL_DEADLINE_S = 60.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What an engine runs. ``why_not`` says why segments can't be composed, if they can't;
    ``composing`` which modes are composed now, with the fidelity gate's report."""

    name: str
    fingerprint: str
    max_positions: int
    device: str
    node: str
    why_not: str | None
    composing: GateStatus = field(default_factory=GateStatus)


@dataclass(frozen=True, slots=True)
class _Open:
    host: ChatHost
    engine: KvEngine
    store: Any
    info: ModelInfo
    gate: FidelityGate | None = None
    gating: asyncio.Task[None] | None = None


class KVCacheActor:
    """Owns a model, its KV pool and what runs on them. The model is loaded at the first call."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._opening: asyncio.Task[_Open] | None = None

    async def _opened(self) -> _Open:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except Exception:
            if self._opening is opening:
                self._opening = None
            raise

    async def _open(self) -> _Open:
        config = self._config
        wanted = config.activation
        if wanted.engine == "vllm":
            return await self._open_vllm()
        loaded = await asyncio.to_thread(load_model, config.model, config.model_folder())
        node = ray.get_runtime_context().get_node_id()
        store: Any = None
        lower = None
        if wanted.host_mb or wanted.disk_mb or wanted.object_mb:
            store = spawn_kv_store_actor(
                config, node=node, model=loaded.fingerprint, layout=loaded.layout
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
        return _Open(ChatHost(engine, prompts), engine, store, info, gate, gating)

    async def _open_vllm(self) -> _Open:
        from memcube.activation.vllm_engine import open_vllm

        opened = await asyncio.to_thread(open_vllm, self._config)
        info = ModelInfo(
            name=self._config.model.name,
            fingerprint=opened.fingerprint,
            max_positions=opened.engine.max_positions,
            device="cuda",
            node=ray.get_runtime_context().get_node_id(),
            why_not="vLLM attaches prefixes alone",
        )
        prompts = PromptBuilder(opened.tokenizer, system=self._config.chat.system)
        return _Open(ChatHost(opened.engine, prompts), opened.engine, None, info)

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

    async def build(self, wanted: BuildRequest) -> Usage:
        """Compute and store KV ahead of any question."""
        return await (await self._opened()).host.build(wanted)

    async def forget(self, cubes: Collection[str], tenant: str | None) -> int:
        """Make all KV unservable that holds one of these cubes, and all of a tenant."""
        return await (await self._opened()).engine.forget(cubes, tenant)

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
        return KvStats(engine=opened.engine.stats(), media=media, node=opened.info.node)

    async def close(self) -> None:
        """Take what is on the device down to the media, and end."""
        if self._opening is None:
            return
        opened = await self._opening
        await opened.engine.close(drain_s=5.0)
        if opened.gate is not None and opened.gating is not None:
            opened.gate.end()
            opened.gating.cancel()
        if opened.store is not None:
            await opened.store.close.remote()


class RemoteChatModel:
    """A ``ChatModel`` that asks the actor."""

    def __init__(self, handle: ActorHandle[Any], number: int) -> None:
        self._handle = handle
        self._name = f"engine {number}"

    async def describe(self) -> ModelInfo:
        call = self._handle.describe.remote()
        return await answer(call, of=self._name, deadline_s=LOAD_DEADLINE_S)

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The answer in pieces; closing the iterator ends the work there."""
        refs = self._handle.chat.options(num_returns="streaming").remote(prompt)
        # The engine keeps the deadline; this one is for an engine that is gone without a word.
        until = time.monotonic() + prompt.deadline_s + 10.0
        try:
            while True:
                try:
                    left_s = max(until - time.monotonic(), 0.1)
                    ref = await asyncio.wait_for(anext(refs), left_s)
                    piece = cast(ChatPiece, await ref)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineExceeded(f"{self._name} said nothing for too long") from None
                except RayTaskError as failed:
                    if isinstance(failed.cause, MemCubeError):
                        raise failed.cause from None
                    raise
                except RayActorError:
                    raise Unavailable(f"{self._name} is being restarted", 2.0) from None
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ray.cancel(refs)

    async def build(self, wanted: BuildRequest) -> Usage:
        call = self._handle.build.remote(wanted)
        return await answer(call, of=self._name, deadline_s=LOAD_DEADLINE_S)

    async def forget(self, cubes: Collection[str], tenant: str | None) -> int:
        call = self._handle.forget.remote(list(cubes), tenant)
        return await answer(call, of=self._name, deadline_s=CALL_DEADLINE_S)

    async def residency(self, cubes: Collection[str]) -> list[KvBytes]:
        call = self._handle.residency.remote(list(cubes))
        return await answer(call, of=self._name, deadline_s=CALL_DEADLINE_S)

    async def stats(self) -> KvStats:
        call = self._handle.stats.remote()
        return await answer(call, of=self._name, deadline_s=10.0)


def spawn_kv_cache_actor(config: Config, *, number: int) -> ActorHandle[Any]:
    """The one place that states this actor's Ray options: where there are GPUs, most of one each
    (vLLM: ``tensor_parallel`` of them).

    A chat is not repeated by Ray: what was said would be said again, and differently.
    """
    on_gpu = config.model.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    spawned = (
        ray.remote(KVCacheActor)
        .options(
            name=f"kv-cache-{number}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=_num_gpus(config) if on_gpu else 0,
            max_concurrency=512,
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(config)
    )
    return cast(ActorHandle[Any], spawned)


def _resident_adapters(config: Config, model: PackedModel, *, base: str) -> ResidentAdapters | None:
    wanted = config.adapters
    if not wanted.resident_mb:
        return None
    limits = AdapterLimits.of(wanted)
    load = FileLoader(lambda: open_objects(config), model, base=base, limits=limits)
    return ResidentAdapters(load, max_bytes=wanted.resident_mb * MIB)


def _num_gpus(config: Config) -> float:
    if config.activation.engine == "vllm":
        return float(config.activation.vllm.tensor_parallel)
    return 0.7
