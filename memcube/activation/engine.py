"""The engine: a batcher on a thread of its own, behind an asynchronous front.

Requests may come from several event loops. What the front tells the batcher is done between two
steps, in order; pieces go back to the loop that asked.
"""

import asyncio
import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from memcube.activation.adapters import ResidentAdapters
from memcube.activation.batching import Batcher
from memcube.activation.below import Below
from memcube.activation.blocks import Block, BlockPool, Lower, RetentionPolicy
from memcube.activation.contract import GenerateRequest, Mode, Piece, Usage, names_adapter
from memcube.activation.forward import PackedModel
from memcube.activation.idle import IdleModel
from memcube.activation.models import LoadedModel
from memcube.activation.runs import BatchLimits, Event, Run
from memcube.activation.stats import AdapterStats, EngineStats
from memcube.errors import (
    AdapterUnusable,
    BadRequest,
    MemCubeError,
    TooBusy,
    Unavailable,
    UnknownBackend,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits(BatchLimits):
    """``max_waiting`` bounds the requests that don't run yet. ``load_wait_s`` is how long one may
    wait for blocks from below the device, ``down_bytes`` how much that was evicted may wait for its
    way down."""

    max_waiting: int = 64
    load_wait_s: float = 1.0
    down_bytes: int = 256 << 20


@dataclass(slots=True, eq=False)
class _Stream:
    """Where the pieces of one request go."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Piece | MemCubeError] = field(default_factory=asyncio.Queue)


class _IdleCall(NamedTuple):
    """A call that waits for idle time, and who waits for it."""

    call: Callable[[], Any]
    done: Future[Any]


class _Delivery(NamedTuple):
    stream: _Stream
    item: Piece | MemCubeError


class Engine:
    """Serves many requests at once on one model. Made ready to use; ``close`` ends its threads."""

    def __init__(
        self,
        model: PackedModel,
        loaded: LoadedModel,
        *,
        policy: RetentionPolicy,
        limits: EngineLimits | None = None,
        lower: Lower | None = None,
        adapters: ResidentAdapters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loaded = loaded
        self.limits = limits or EngineLimits()
        self._clock = clock
        self._below = (
            Below(lower, waiting_bytes=self.limits.down_bytes, clock=clock) if lower else None
        )
        self._pool = BlockPool(policy, self._take_down)
        self._model = model
        self._adapters = adapters
        self._batcher = Batcher(model, loaded, self._pool, self.limits, clock)
        self._streams: dict[Run, _Stream] = {}
        self._wake = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._idle_calls: deque[_IdleCall] = deque()
        self._num_open = {False: 0, True: 0}  # by whether in the background
        self._close_at: float | None = None
        self._thread = threading.Thread(target=self._serve, name="compute", daemon=True)
        self._thread.start()

    # -- what the actor calls

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece]:
        """The answer in pieces; see ``contract.Generator``.

        A request that could never be served is refused here, one that can't be now with the first
        piece.
        """
        return self._run(self._prepare(request))

    async def build(self, request: GenerateRequest) -> Usage:
        """Compute and store the blocks of a prompt when nothing else is to be done; or, in a mode
        that composes, those segments of it that aren't stored.

        Where the caller gives up, what was computed so far is stored.

        Raises:
            BadRequest: it could never run.
            Unavailable: too much is to be built already, the engine was closed or the model failed.
        """
        run = self._prepare(request, background=True)
        if not run.segment_keys:
            return await self._built(run)
        cold = await self._ask(lambda: self._batcher.cold_segments(run))
        found = [await self._built(self._batcher.segment_run(run, index)) for index in cold]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in found),
            completion_tokens=0,
            attached_exact=sum(usage.attached_exact for usage in found),
            attached_composed=0,
            recomputed=0,
            prefilled=sum(usage.prefilled for usage in found),
            queue_s=sum(usage.queue_s for usage in found),
            ttft_s=sum(usage.ttft_s for usage in found),
        )

    async def prefetch(self, request: GenerateRequest, wait_s: float) -> int:
        """Bring the stored blocks of a prompt up to the device; how many tokens lie there then."""
        run = self._batcher.prepare(request, background=True)
        if self._below is not None:
            num_forgets = self._batcher.num_forgets
            fetched = await self._fetch(self._below, run, wait_s)
            if fetched:
                await self._ask(
                    lambda: self._batcher.install(run, fetched, num_forgets=num_forgets)
                )
        return self.num_resident(run.keys)

    async def forget(self, cubes: Collection[str] = (), tenant: str | None = None) -> int:
        """Make all KV unservable that holds one of these cubes or adapters, and all of a tenant; here and
        below; see ``contract.KvEngine``.

        Returns the number of blocks that were on the device. When it returns no request attaches
        them, and none on its way stores such KV any more.
        """
        cubes = frozenset(cubes)
        num_blocks = await self._ask(lambda: self._batcher.forget(cubes, tenant))
        if self._below is not None:
            await self._below.forget(cubes, tenant)
        if self._adapters is not None:
            self._adapters.forget(cubes, tenant)
        return num_blocks

    async def adapters_held(self) -> dict[str, set[str]]:
        """The names of the adapters whose weights, or KV built with them, lie on the device, by
        tenant."""
        found = {} if self._adapters is None else self._adapters.names()
        for block in await self._ask(self._pool.blocks):
            found.setdefault(block.tenant, set()).update(filter(names_adapter, block.cubes))
        return found

    async def hint(
        self, group: str, probability: float | None, expected_in_s: float | None = None
    ) -> None:
        """Say how likely a group (a conversation) goes on, and when if known; None takes it back."""

        def tell() -> None:
            now = self._clock()
            expected_at = None if expected_in_s is None else now + expected_in_s
            self._pool.hint(group, probability, now, expected_at)

        await self._ask(tell)

    def allow_composing(self, modes: Collection[Mode]) -> None:
        """Compose in these modes from now on: those that the model's fidelity gate passed. In other
        modes requests are served exactly.

        Raises:
            BadRequest: the model can't be composed.
        """
        composing = self._batcher.composing
        if composing is not None:
            composing.modes = frozenset(modes)
        elif modes:
            raise BadRequest(f"{self.loaded.name} can't be composed: {self.loaded.why_not}", "mode")

    async def between_steps(self, call: Callable[[], _T]) -> _T:
        """What a call on the compute thread gives, which has the model to itself meanwhile."""
        return await self._ask(call)

    def idle_model(self, pause: Callable[[], None] = lambda: None) -> IdleModel:
        """The model for another thread, where it computes when there is nothing else to do here and
        ``pause`` has returned."""
        return IdleModel(
            self._model, self._post_idle, piece_tokens=self.limits.background_tokens, pause=pause
        )

    def keys(self, request: GenerateRequest) -> tuple[str, ...]:
        """The keys of a prompt's full blocks."""
        return self._batcher.keys(request, request.prompt_ids)

    def num_resident(self, keys: Sequence[str]) -> int:
        """How many leading tokens of a chain of blocks lie on the device."""
        num_blocks = next((i for i, key in enumerate(keys) if key not in self._pool), len(keys))
        return num_blocks * self.limits.block_tokens

    async def resident_bytes(self, cubes: Collection[str]) -> int:
        """The bytes on the device whose KV holds any of these cubes."""
        wanted = frozenset(cubes)
        return await self._ask(
            lambda: sum(b.num_bytes for b in self._pool.blocks() if not wanted.isdisjoint(b.cubes))
        )

    async def cubes_held(self) -> set[str]:
        """The cubes that KV on the device holds."""
        blocks = await self._ask(self._pool.blocks)
        return {id for block in blocks for id in block.cubes if not names_adapter(id)}

    def stats(self) -> EngineStats:
        """This moment, from any thread."""
        return self._batcher.stats()

    def adapter_stats(self) -> AdapterStats | None:
        """The adapters of this moment; None where it serves none."""
        return None if self._adapters is None else self._adapters.stats()

    @property
    def is_alive(self) -> bool:
        """Whether it still computes."""
        return self._thread.is_alive()

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give the others this time to end, and take down what is on the
        device to the media below. Idempotent."""
        with self._wake:
            if self._close_at is None:
                self._close_at = self._clock() + drain_s
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        if self._adapters is not None:
            await asyncio.to_thread(self._adapters.close)
        if self._below is not None:
            last = [block for block in self._pool.blocks() if not block.is_tail]
            await asyncio.to_thread(self._below.close, last)

    # -- the front

    def _prepare(self, request: GenerateRequest, *, background: bool = False) -> Run:
        if request.adapter is not None and self._adapters is None:
            raise UnknownBackend("adapter", request.adapter.id, ())
        return self._batcher.prepare(request, background=background)

    async def _run(self, run: Run) -> AsyncGenerator[Piece]:
        async with AsyncExitStack() as held:
            if run.request.adapter is not None and self._adapters is not None:
                adapter = self._adapters.held(run.request.tenant, run.request.adapter)
                try:
                    run.lora = await held.enter_async_context(adapter)
                except MemCubeError as why:
                    raise AdapterUnusable(run.request.adapter.id, why) from None
            stream = _Stream(asyncio.get_running_loop())
            run.loading = self._below is not None and self._batcher.misses(run)
            self._enter(run, stream)
            ended = False
            try:
                if run.loading and self._below is not None:
                    fetched = await self._fetch(self._below, run, self.limits.load_wait_s)
                    self._post(lambda: self._batcher.loaded(run, fetched))
                while not ended:
                    item = await stream.items.get()
                    ended = isinstance(item, MemCubeError) or item.finish is not None
                    if isinstance(item, MemCubeError):
                        raise item
                    yield item
            finally:
                with self._wake:
                    self._num_open[run.background] -= 1
                if not ended:
                    self._post(lambda: self._cancel(run))

    async def _built(self, run: Run) -> Usage:
        async with aclosing(self._run(run)) as pieces:
            async for piece in pieces:
                if piece.usage is not None:
                    return piece.usage
        raise AssertionError("a run ends with its usage or an error")

    async def _fetch(self, below: Below, run: Run, wait_s: float) -> dict[str, Tensor]:
        """What of a run's blocks and segments comes up in time."""
        until = self._clock() + wait_s
        found = await below.fetch(self._batcher.missing_blocks(run), wait_s, is_chain=True)
        segments = self._batcher.missing_segments(run, found)
        left_s = max(0.0, until - self._clock())
        return found | await below.fetch(segments, left_s, is_chain=False)

    def _enter(self, run: Run, stream: _Stream) -> None:
        with self._wake:
            if self._close_at is not None:
                raise _closed()
            waiting = self._num_open[run.background]
            if not run.background:
                waiting = max(0, waiting - self.limits.max_running)
            if waiting >= self.limits.max_waiting:
                raise TooBusy(f"{waiting:,} requests wait for the model", self._retry_after_s())
            self._num_open[run.background] += 1
            self._calls.append(lambda: self._submit(run, stream))
            self._wake.notify()

    def _retry_after_s(self) -> float:
        """About when the next request ends."""
        ended_per_s = self._batcher.counters.ended.at(self._clock())
        return float(min(60, max(1, math.ceil(1 / ended_per_s)))) if ended_per_s > 0 else 5.0

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append(call)
            self._wake.notify()

    def _post_idle(self, call: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        with self._wake:
            if self._close_at is not None:
                raise _closed()
            self._idle_calls.append(_IdleCall(call, done))
            self._wake.notify()
        return done

    async def _ask(self, call: Callable[[], _T]) -> _T:
        done: Future[_T] = Future()

        with self._wake:
            if self._close_at is not None:
                raise _closed()
            self._calls.append(lambda: _settle(done, call))
            self._wake.notify()
        return await asyncio.wrap_future(done)

    # -- the compute thread

    def _serve(self) -> None:
        idle = False
        with torch.inference_mode():
            while True:
                calls, close_at = self._next_calls(idle)
                for call in calls:
                    call()
                if close_at is not None and (
                    not self._batcher.has_runs or self._clock() >= close_at
                ):
                    self._send(self._batcher.fail_all(_closed()))
                    self._batcher.settle()
                    self._refuse_idle_calls()
                    return
                try:
                    step = self._batcher.step()
                    self._send(step.events)
                    self._batcher.settle()
                except Exception as failed:
                    # The runs' state is unknown; the stored blocks are whole.
                    log.exception("the engine ends all its requests")
                    why = Unavailable(f"the engine failed: {type(failed).__name__}: {failed}")
                    self._send(self._batcher.abandon(why))
                else:
                    idle = step.is_idle and not self._make_idle_call()

    def _make_idle_call(self) -> bool:
        """Make one of the calls that wait for idle time. False: there is none."""
        with self._wake:
            if not self._idle_calls:
                return False
            call, done = self._idle_calls.popleft()
        _settle(done, call)
        return True

    def _refuse_idle_calls(self) -> None:
        with self._wake:
            for _, done in self._idle_calls:
                done.set_exception(_closed())
            self._idle_calls.clear()

    def _next_calls(self, idle: bool) -> tuple[list[Callable[[], None]], float | None]:
        """What was posted; after an idle step wait for something to come, or for the time to."""
        with self._wake:
            if idle and not self._calls and not self._idle_calls:
                times = [at for at in (self._batcher.wake_at(), self._close_at) if at is not None]
                wait_s = max(0.0, min(times) - self._clock()) if times else None
                if not (self._close_at is not None and not self._batcher.has_runs):
                    self._wake.wait(wait_s)
            calls, self._calls = self._calls, []
            return calls, self._close_at

    def _take_down(self, block: Block) -> None:
        # A tail is looked for by its tokens, not by its key: below, nobody would find it.
        if self._below is not None and not block.is_tail:
            self._below.offer(block)

    def _submit(self, run: Run, stream: _Stream) -> None:
        self._streams[run] = stream
        self._batcher.submit(run)

    def _cancel(self, run: Run) -> None:
        self._streams.pop(run, None)
        self._batcher.cancel(run)

    def _send(self, events: Sequence[Event]) -> None:
        """One call a loop and step, however many runs have pieces."""
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
        for run, what in events:
            ends = isinstance(what, MemCubeError) or what.finish is not None
            stream = self._streams.pop(run) if ends else self._streams[run]
            by_loop[stream.loop].append(_Delivery(stream, what))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop was closed under its requests
                gone = {delivery.stream for delivery in deliveries}
                for run in [run for run, stream in self._streams.items() if stream in gone]:
                    self._cancel(run)


def _deliver(deliveries: Sequence[_Delivery]) -> None:
    for stream, item in deliveries:
        stream.items.put_nowait(item)


def _settle(done: "Future[_T]", call: Callable[[], _T]) -> None:
    try:
        done.set_result(call())
    except Exception as failed:  # noqa: BLE001 - handed to the caller, whose it is
        done.set_exception(failed)


def _closed() -> Unavailable:
    return Unavailable("the engine is shutting down")
