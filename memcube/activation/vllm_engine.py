"""vLLM behind the actor's seam: its scheduler, its prefix cache, its LoRA.

Written against vLLM's V1 API (``AsyncLLM``, ``SamplingParams``, ``TokensPrompt``, ``LoRARequest``) and
covered by tests with a double; it was run on no GPU. What vLLM does in its own way:

* Reuse is exact, by prefix, on the device. Segments are not composed; ``blend`` and ``fast`` are served
  as ``exact``. There are no media of ours below the device.
* Its cache knows tokens, not cubes, and can't drop some of them. So ``cache_salt`` is a name that changes:
  to forget a cube is to give its tenant's salts that read it a new name. No request finds the KV under
  the old one; the bytes stay on the device until vLLM needs their room. All else that was kept under the
  name is read again.
* It does not say which bytes hold what: ``resident_bytes`` is 0.
"""

import asyncio
import contextlib
import importlib
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memcube.activation.contract import (
    AdapterRef,
    FinishReason,
    GenerateRequest,
    Mode,
    Piece,
    Usage,
)
from memcube.activation.stats import AdapterStats, EngineStats, Histogram, Rate
from memcube.config import Config
from memcube.errors import (
    AdapterUnusable,
    BadRequest,
    DeadlineExceeded,
    LimitExceeded,
    MemCubeError,
    TooBusy,
    Unavailable,
    UnknownBackend,
)
from memcube.ids import digest
from memcube.objects import OpenObjects
from memcube.parametric.limits import AdapterLimits
from memcube.parametric.loading import PeftFolders

MAX_CUBES = 100_000
"""Cubes remembered of one salt; beyond it the salt gets a new name and an empty memory."""
RETRY_AFTER_S = 5.0
AdapterFolder = Callable[[str, AdapterRef], Awaitable[Path]]
"""Where the files of a tenant's adapter lie, as PEFT reads them: ``parametric.loading.PeftFolders``."""


@dataclass(frozen=True, slots=True)
class OpenedVllm:
    """An engine with what the actor shows of it and lays prompts out by."""

    engine: "VllmEngine"
    tokenizer: Any
    fingerprint: str


@dataclass(slots=True)
class _Name:
    """What a salt is called at present, and the cubes that were read under that name."""

    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    cubes: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Open:
    """One request on its way."""

    started: float
    first: float | None = None
    num_tokens: int = 0
    attached: int = 0
    queue_s: float = 0.0
    lora: "_Lora | None" = None


@dataclass(slots=True, eq=False)
class _Lora:
    """An adapter that vLLM may have loaded, and whether it is to go when nobody uses it."""

    request: Any
    stopped: bool = False


class VllmEngine:
    """Serves on one ``AsyncLLM``. It belongs to one event loop."""

    def __init__(
        self,
        llm: Any,
        *,
        max_positions: int,
        max_running: int,
        max_waiting: int,
        default_max_tokens: int = 512,
        adapters: AdapterFolder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_positions = max_positions
        self._llm = llm
        self._vllm = importlib.import_module("vllm")
        self._delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self._lora_request = importlib.import_module("vllm.lora.request").LoRARequest
        self._dead = importlib.import_module("vllm.v1.engine.exceptions")
        self._refused = importlib.import_module("vllm.exceptions").VLLMClientError
        self._max_open = max_running + max_waiting
        self._default_max_tokens = default_max_tokens
        self._adapters = adapters
        self._clock = clock
        self._names: dict[tuple[str, str], _Name] = {}
        self._loras: dict[tuple[str, AdapterRef], _Lora] = {}
        self._num_loras = 0
        self._open: set[_Open] = set()
        self._closed = False
        self._drained: asyncio.Event | None = None
        self._attached: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._ttft: dict[str, Histogram] = {}
        self._queue = Histogram()
        self._generated = Rate()
        self._num_generated = 0
        self._num_prefilled = 0

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece]:
        """The answer in pieces; see ``contract.Generator``."""
        num_prompt = len(request.prompt_ids)
        if num_prompt + (request.max_tokens or 1) > self.max_positions:
            raise LimitExceeded(
                "prompt and answer, in tokens of the model's window",
                self.max_positions,
                num_prompt + (request.max_tokens or 1),
            )
        most = request.max_tokens or min(self._default_max_tokens, self.max_positions - num_prompt)
        self._check_adapter(request)
        return self._run(request, most)

    async def build(self, request: GenerateRequest) -> Usage:
        """Read a prompt, so that its KV is in vLLM's cache. It waits in line as any other request."""
        self._check_adapter(request)
        async with aclosing(self._run(request, 1)) as pieces:
            async for piece in pieces:
                if piece.usage is not None:
                    return replace(piece.usage, completion_tokens=0)
        raise AssertionError("a run ends with its usage or an error")

    async def forget(self, cubes: Collection[str] = (), tenant: str | None = None) -> int:
        """Give new names to the salts under which one of these cubes was read, and to a tenant's; take
        adapters off vLLM as soon as no request uses them.

        Returns how many salts; vLLM doesn't tell of how many blocks. KV built with an adapter that
        serves no more is asked for by nobody, so its salt stays.
        """
        wanted = frozenset(cubes)
        gone = [
            key
            for key, name in self._names.items()
            if key[0] == tenant or not wanted.isdisjoint(name.cubes)
        ]
        for key in gone:
            del self._names[key]
        for (owner, ref), lora in self._loras.items():
            lora.stopped = lora.stopped or owner == tenant or ref.name in wanted
        await self._drop_stopped()
        return len(gone)

    async def resident_bytes(self, cubes: Collection[str]) -> int:
        """0: vLLM doesn't say."""
        return 0

    async def cubes_held(self) -> set[str]:
        """None: vLLM doesn't say."""
        return set()

    def stats(self) -> EngineStats:
        """What went through here. vLLM's own metrics tell of its blocks."""
        waiting = sum(run.first is None for run in self._open)
        return EngineStats(
            running=len(self._open) - waiting,
            waiting=waiting,
            background=0,
            tokens_per_s=self._generated.at(self._clock()),
            prefill_tokens_per_s=0.0,
            steps=0,
            step_s=0.0,
            failed_steps=0,
            prefilled_tokens=self._num_prefilled,
            generated_tokens=self._num_generated,
            attached_tokens=dict(self._attached),
            buffer_bytes=0,
            pool_bytes=0,
            pool_blocks=0,
            bytes_by_tenant={},
            evictions={},
            finished=dict(self._finished),
            ttft_s={kind: found.shown() for kind, found in self._ttft.items()},
            queue_s=self._queue.shown(),
        )

    def adapter_stats(self) -> AdapterStats | None:
        """None: vLLM loads them by itself, and its own metrics tell of them."""
        return None

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give the others this time to end, and stop vLLM. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._open and drain_s > 0:
            self._drained = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_s)
        await asyncio.to_thread(self._llm.shutdown)

    # -- one request

    async def _run(self, request: GenerateRequest, most: int) -> AsyncGenerator[Piece]:
        if self._closed:
            raise Unavailable("the engine is shutting down")
        if len(self._open) >= self._max_open:
            raise TooBusy(f"{len(self._open):,} requests wait for the model", RETRY_AFTER_S)
        run = _Open(self._clock())
        self._open.add(run)
        reason = "cancelled"
        try:
            if request.adapter is not None:
                run.lora = await self._lora(request.tenant, request.adapter)
            async with aclosing(self._pieces(run, request, most)) as pieces:
                async for piece in pieces:
                    if piece.finish is not None:
                        reason = piece.finish.value
                    yield piece
        except MemCubeError as failed:
            reason = failed.code
            raise
        finally:
            self._open.discard(run)
            if self._drained is not None and not self._open:
                self._drained.set()
            self._finished[reason] += 1
            if run.lora is not None and run.lora.stopped:
                await self._drop_stopped()

    async def _pieces(
        self, run: _Open, request: GenerateRequest, most: int
    ) -> AsyncGenerator[Piece]:
        prompt = self._vllm.TokensPrompt(
            prompt_token_ids=list(request.prompt_ids), cache_salt=self._salt(request)
        )
        answers = self._llm.generate(
            prompt,
            self._sampling(request, most),
            f"memcube-{secrets.token_hex(12)}",
            lora_request=None if run.lora is None else run.lora.request,
        )
        until = None if request.deadline_s is None else run.started + request.deadline_s
        # To close the iterator is how vLLM learns that nobody waits.
        async with aclosing(answers):
            while True:
                try:
                    left_s = None if until is None else max(until - self._clock(), 0.0)
                    answer = await asyncio.wait_for(anext(answers), left_s)
                except TimeoutError:
                    if run.first is None:
                        what = f"no token came within {request.deadline_s:g} s"
                        raise DeadlineExceeded(what) from None
                    usage = self._usage(run, request)
                    yield Piece(text="", token_ids=(), finish=FinishReason.DEADLINE, usage=usage)
                    return
                except StopAsyncIteration:
                    raise Unavailable("vLLM left the answer unfinished") from None
                except (ValueError, self._refused) as refused:
                    raise BadRequest(f"vLLM refuses it: {refused}", "prompt") from None
                except (self._dead.EngineDeadError, self._dead.EngineGenerateError) as failed:
                    raise Unavailable(f"vLLM failed: {type(failed).__name__}", 5.0) from None
                (output,) = answer.outputs
                self._count(run, request, answer, len(output.token_ids))
                if not answer.finished:
                    yield Piece(text=output.text, token_ids=tuple(output.token_ids))
                    continue
                if output.finish_reason not in ("stop", "length"):
                    raise Unavailable(f"vLLM ended the request: {output.finish_reason}", 1.0)
                yield Piece(
                    text=output.text,
                    token_ids=tuple(output.token_ids),
                    finish=FinishReason(output.finish_reason),
                    usage=self._usage(run, request),
                )
                return

    def _count(self, run: _Open, request: GenerateRequest, answer: Any, num_tokens: int) -> None:
        now = self._clock()
        run.num_tokens += num_tokens
        self._num_generated += num_tokens
        self._generated.add(num_tokens, now)
        if run.first is not None or not (num_tokens or answer.finished):
            return
        run.first = now
        run.attached = answer.num_cached_tokens or 0
        metrics = answer.metrics
        if metrics is not None and metrics.scheduled_ts:
            run.queue_s = max(0.0, metrics.scheduled_ts - metrics.queued_ts)
        self._num_prefilled += len(request.prompt_ids) - run.attached
        self._attached["exact"] += run.attached
        kind = "exact" if run.attached else "none"
        self._ttft.setdefault(kind, Histogram()).observe(now - run.started)
        self._queue.observe(run.queue_s)

    def _usage(self, run: _Open, request: GenerateRequest) -> Usage:
        return Usage(
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=run.num_tokens,
            attached_exact=run.attached,
            attached_composed=0,
            recomputed=0,
            prefilled=len(request.prompt_ids) - run.attached,
            queue_s=run.queue_s,
            ttft_s=(self._clock() if run.first is None else run.first) - run.started,
        )

    def _salt(self, request: GenerateRequest) -> str:
        """The name under which this request's KV is found, and by nobody else's.

        The adapter is part of it: names and salts that were joined collided in vLLM.
        """
        if request.mode is Mode.OFF:
            return digest("unshared", secrets.token_hex(16))
        key = (request.tenant, request.salt)
        name = self._names.get(key)
        if name is None or len(name.cubes) > MAX_CUBES:
            name = self._names[key] = _Name()
        name.cubes.update(member.cube for member in request.members)
        adapter_id, version = request.adapter or (None, None)
        return digest("vllm", request.tenant, request.salt, adapter_id, version, name.secret)

    def _sampling(self, request: GenerateRequest, most: int) -> Any:
        sampling = request.sampling
        own_stops = request.stop_ids is not None
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=most,
            stop=list(request.stop),
            stop_token_ids=sorted(request.stop_ids or ()),
            ignore_eos=own_stops,
            output_kind=self._delta,
        )

    def _check_adapter(self, request: GenerateRequest) -> None:
        if request.adapter is not None and self._adapters is None:
            raise UnknownBackend("adapter", request.adapter.id, ())

    async def _lora(self, tenant: str, adapter: AdapterRef) -> _Lora:
        """What vLLM is asked for an adapter in this version by. Its number is never given to another."""
        assert self._adapters is not None
        try:
            folder = await self._adapters(tenant, adapter)
        except MemCubeError as why:
            raise AdapterUnusable(adapter.id, why) from None
        key = tenant, adapter
        if key not in self._loras:
            self._num_loras += 1
            request = self._lora_request(
                lora_name=digest("adapter", tenant, *adapter),
                lora_int_id=self._num_loras,
                lora_path=str(folder),
            )
            self._loras[key] = _Lora(request)
        return self._loras[key]

    async def _drop_stopped(self) -> None:
        """Take off vLLM what has stopped. Not under a request: vLLM would read the folder again."""
        used = {run.lora for run in self._open}
        unused = {k: lora for k, lora in self._loras.items() if lora.stopped and lora not in used}
        for key, lora in unused.items():
            # Entry and folder at once: the next request for it begins anew.
            del self._loras[key]
            shutil.rmtree(lora.request.lora_path, ignore_errors=True)
        for lora in unused.values():
            await self._llm.remove_lora(lora.request.lora_int_id)


def open_vllm(config: Config, open_objects: OpenObjects) -> OpenedVllm:
    """vLLM with the model of a configuration, and its adapters from the object store. Blocks for minutes while it loads and compiles.

    Raises:
        BadRequest: the package is not installed.
        UnknownBackend: no such model here.
    """
    try:
        importlib.import_module("vllm")
    except ImportError as missing:
        raise BadRequest(
            f"vllm can't be imported ({missing}): pip install 'memcube[vllm]' on a machine with CUDA",
            "activation.engine",
        ) from None
    from transformers import AutoTokenizer

    from memcube.activation.models import local_folder, weights_fingerprint

    wanted, model = config.activation.vllm, config.model
    folder = local_folder(model, config.model_folder())
    fingerprint = weights_fingerprint(folder, config.model_folder())
    adapters = None
    if wanted.lora_rank:
        limits = AdapterLimits.of(config.adapters)
        adapters = PeftFolders(
            open_objects,
            Path(config.data_dir) / "activation" / f"adapters-{os.getpid()}",
            base=fingerprint,
            limits=replace(limits, max_rank=min(limits.max_rank, wanted.lora_rank)),
        )
    arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs(
        model=str(folder),
        dtype=model.dtype,
        max_model_len=wanted.max_positions,
        max_num_seqs=config.activation.max_running,
        gpu_memory_utilization=wanted.gpu_memory_fraction,
        tensor_parallel_size=wanted.tensor_parallel,
        enable_prefix_caching=True,
        trust_remote_code=False,
        **(
            {
                "enable_lora": True,
                "max_loras": wanted.max_loras,
                "max_lora_rank": wanted.lora_rank,
            }
            if wanted.lora_rank
            else {}
        ),
    )
    llm = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(arguments)
    engine = VllmEngine(
        llm,
        max_positions=llm.model_config.max_model_len,
        max_running=config.activation.max_running,
        max_waiting=config.activation.max_waiting,
        adapters=adapters,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return OpenedVllm(engine, tokenizer, fingerprint)
