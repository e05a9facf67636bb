"""Many requests on one model, a step at a time.

A request becomes a run: a buffer of its own and a list of operations that fill it. Each step takes
what every run needs next, packs it into one forward, and samples where a prompt is complete. Runs
start, end and are cancelled between two steps.

Prompts and answers are cut into blocks. At each block's end a run looks whether the next block is
stored, and attaches it; or whether another run is about to compute it, and waits for that one; only
else it computes the block itself, and stores it. So a prefix that two requests share is computed
once even if they come together, and what was attached is what would have been computed.

Where the request and the model allow it, segments that were built apart are composed, so that they
serve in any order. What they lack goes on in idle time: segments that were not stored are built, and
after a composed answer the exact chain is, where the next turn is likely to repay it.

Synchronous, without I/O, and for one thread: ``engine`` hosts it. Events come out of ``step``; the
blocks that became complete are stored by ``settle``, so that no one waits for the copying.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from memcube.activation import blocks
from memcube.activation.blocks import Block, BlockPool
from memcube.activation.buffers import Buffers
from memcube.activation.composing import Composing
from memcube.activation.contract import (
    FinishReason,
    GenerateRequest,
    Member,
    Mode,
    Piece,
    SegmentRef,
    Usage,
)
from memcube.activation.detokenise import TextStream
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.keys import KvIdentity, block_keys, tail_key
from memcube.activation.line import WaitingLine
from memcube.activation.models import LoadedModel
from memcube.activation.operations import (
    Choose,
    Decode,
    Extend,
    Load,
    Plan,
    Recompute,
    plan_composed,
    plan_exact,
)
from memcube.activation.plan import Kind, Need, plan_step
from memcube.activation.runs import BatchLimits, Event, Run, Step
from memcube.activation.sampling import Sampler, choose
from memcube.activation.stats import Counters, EngineStats, Histogram
from memcube.activation.stops import StopStrings
from memcube.errors import (
    BadRequest,
    DeadlineExceeded,
    LimitExceeded,
    MemCubeError,
    Unavailable,
)
from memcube.policies.turns import Turns, exact_chain_pays

log = logging.getLogger(__name__)

_MEASURED_TOKENS = 16
"""Steps that compute fewer tokens of prompts say little about how long a prompt takes."""
_MAX_IDLE_WORK = 64
"""Builds of one's own accord that may wait for idle time; beyond, the oldest are dropped."""


class Batcher:
    """Serves runs on one model. All methods but ``prepare`` are for the thread that computes."""

    def __init__(
        self,
        model: PackedModel,
        loaded: LoadedModel,
        pool: BlockPool,
        limits: BatchLimits,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._loaded = loaded
        self._pool = pool
        self._limits = limits
        self._size = limits.block_tokens
        self._clock = clock
        self._identity = KvIdentity(
            model=loaded.fingerprint,
            tokenizer=loaded.tokenizer_fingerprint,
            dtype=loaded.layout.dtype,
        )
        embeddings = cast(torch.nn.Embedding, loaded.model.get_input_embeddings())
        self._vocabulary = embeddings.num_embeddings
        self._line = WaitingLine()
        self._idle_work: deque[Run] = deque()
        self._running: list[Run] = []  # the oldest first
        self._builders: dict[str, Run] = {}
        self._turns = Turns()
        self.composing = (
            Composing(model, loaded, self._identity) if loaded.supports_compose else None
        )
        self._to_settle: list[Run] = []
        self._buffers = Buffers(
            loaded.layout,
            model.device,
            budget_bytes=limits.buffer_bytes,
            max_spare=limits.max_running,
        )
        self.counters = Counters()
        self.num_forgets = 0

    # -- runs come and go

    def prepare(self, request: GenerateRequest, *, background: bool = False) -> Run:
        """A run of this request, not yet submitted. Changes nothing: any thread may call it.

        Raises:
            BadRequest: it could never run.
        """
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._vocabulary:
            raise BadRequest(f"holds an id that is none of {self._vocabulary:,}", "prompt_ids")
        now = self._clock()
        shares = request.mode is not Mode.OFF
        composes = self.composing is not None and self.composing.applies(request)
        return Run(
            request=request,
            background=background,
            shares=shares,
            root=self._identity.root(request.salt, request.adapter, "block"),
            keys=self.keys(request, request.prompt_ids) if shares else (),
            segment_keys=self.composing.keys(request) if self.composing and composes else (),
            max_tokens=self._max_tokens(request, background=background),
            submitted_at=now,
            deadline_at=None if request.deadline_s is None else now + request.deadline_s,
            sampler=Sampler(request.sampling),
            text=TextStream(self._loaded.tokenizer),
            stops=StopStrings(request.stop),
            tokens=list(request.prompt_ids),
        )

    def submit(self, run: Run) -> None:
        """Put a run in line: behind its tenant's others, or for when there is nothing else.

        Raises:
            ValueError: its adapter is not loaded. The base model would answer in its name.
        """
        if (run.request.adapter is None) != (run.lora is None):
            raise ValueError("a run comes with the adapter that its request names")
        if run.request.group and not run.background:
            self._turns.add(run.request.group)
        if run.background:
            self._idle_work.append(run)
        else:
            self._line.add(run)

    def loaded(self, run: Run, fetched: Mapping[str, Tensor]) -> None:
        """Hand a run that is ``loading`` the blocks that came up for it."""
        run.loading = False
        if not run.done:
            run.fetched.update(fetched)

    def cancel(self, run: Run) -> None:
        """End a run whose answer nobody wants. What it computed so far is stored. Idempotent."""
        if not run.done:
            self._end(run, "cancelled")

    def fail_all(self, error: MemCubeError) -> list[Event]:
        """End all runs by this error."""
        return _heard([self._fail(run, error) for run in self._all_runs()])

    def abandon(self, error: MemCubeError) -> list[Event]:
        """End all runs by this error, whatever state they are in, and let go of what they hold."""
        self.counters.failed_steps += 1
        events = self.fail_all(error)
        self._to_settle.clear()
        self._builders.clear()
        self._buffers.clear()
        return events

    def forget(self, cubes: Collection[str], tenant: str | None) -> int:
        """Drop the blocks that hold one of these cubes, and all of a tenant.

        Runs on their way end as they would, but store nothing of the kind any more.
        """
        self.settle()
        self.num_forgets += 1
        for run in self._all_runs():
            run.forgotten.update(cubes)
            if run.request.tenant == tenant:
                self._stop_sharing(run)
        return self._pool.forget(cubes, tenant, "forgotten")

    def install(self, run: Run, fetched: Mapping[str, Tensor], *, num_forgets: int) -> None:
        """Put blocks that came up ahead of a request into the pool. The run is not submitted.

        Nothing is done where something was forgotten since ``num_forgets`` was read: it might be
        among them.
        """
        if num_forgets != self.num_forgets:
            return
        now = self._clock()
        for index, key in enumerate(run.keys):
            if key in fetched and key not in self._pool:
                self._pool.put(self._block(run, run.keys, index, fetched[key]), now)
        for index, key in enumerate(run.segment_keys):
            if key in fetched and key not in self._pool:
                self._pool.put(self._segment(run, index, fetched[key]), now)

    def misses(self, run: Run) -> bool:
        """Whether something that it could attach is not on the device. Any thread may call it."""
        return bool(self.missing_blocks(run) or self.missing_segments(run, {}))

    def missing_blocks(self, run: Run) -> list[blocks.Place]:
        """The blocks of its chain that are not on the device. Any thread may call it."""
        return [
            blocks.Place(key, index * self._size)
            for index, key in enumerate(run.keys)
            if key not in self._pool
        ]

    def missing_segments(self, run: Run, fetched: Mapping[str, Tensor]) -> list[blocks.Place]:
        """The segments that are not on the device, and not reached by its chain with the blocks
        fetched. Any thread may call it."""
        num_exact = self._num_exact(run, fetched)
        return [
            blocks.Place(key, run.request.segments[0].start)
            for key, segment in zip(run.segment_keys, run.request.segments, strict=False)
            if key not in self._pool and segment.end - num_exact >= self._size
        ]

    def stats(self) -> EngineStats:
        """This moment. Any thread may call it: each dict is copied in one go."""
        counters = self.counters
        running = list(self._running)
        by_tenant = dict(self._pool.bytes_by_tenant)
        return EngineStats(
            running=sum(not run.background for run in running),
            waiting=len(self._line),
            background=len(self._idle_work) + sum(run.background for run in running),
            tokens_per_s=counters.generated.at(self._clock()),
            prefill_tokens_per_s=counters.prefill.per_s,
            steps=counters.steps,
            step_s=counters.step_s,
            failed_steps=counters.failed_steps,
            prefilled_tokens=counters.prefilled_tokens,
            generated_tokens=counters.generated_tokens,
            attached_tokens=dict(counters.attached_tokens),
            buffer_bytes=self._buffers.used_bytes,
            pool_bytes=sum(by_tenant.values()),
            pool_blocks=len(self._pool),
            bytes_by_tenant=by_tenant,
            evictions=dict(self._pool.evictions),
            finished=dict(counters.finished),
            ttft_s={kind: found.shown() for kind, found in dict(counters.ttft).items()},
            queue_s=counters.queue.shown(),
        )

    @property
    def has_runs(self) -> bool:
        return bool(self._running or self._line or self._idle_work)

    def wake_at(self) -> float | None:
        """When a step can give something though nothing happened since an idle one."""
        times = [run.deadline_at for run in self._all_runs() if run.deadline_at is not None]
        times += [run.waits_until for run in self._running if run.waits_until is not None]
        return min(times, default=None)

    # -- a step

    def step(self) -> Step:
        """Admit, compute one packed forward, sample. Call ``settle`` when the events are sent."""
        self.settle()
        now = self._clock()
        events = self._expire(now)
        self._admit(now)
        needs = []
        for index, run in enumerate(running := list(self._running)):
            try:
                need = self._need(index, run, now)
            except Exception as failed:
                log.exception("a run could not go on")
                events += self._failed([run], failed)
            else:
                needs += [need] if need is not None else []
        shares = plan_step(
            needs,
            budget_tokens=self._limits.step_tokens,
            background_tokens=self._limits.background_tokens,
            block_tokens=self._size,
        )
        work = [(running[share.run], share.tokens) for share in shares]
        if work:
            events += self._compute(work, now)
        events += [self._built(run) for run in list(self._running) if not run.operations]
        return Step(_heard(events), not work and not events)

    def settle(self) -> None:
        """Store the blocks that the last step completed, and free what ended runs held."""
        now = self._clock()
        runs, self._to_settle = self._to_settle, []
        for run in runs:
            if run.buffer is None:
                continue
            self._store(run, run.buffer, now)
            if run.done:
                self._free(run)

    def _compute(self, work: Sequence[tuple[Run, int]], began: float) -> list[Event]:
        try:
            rows = [self._row(run, num_tokens) for run, num_tokens in work]
            logits = self._model.forward(rows)
            sampled = [
                (run, last_TV[-1])
                for (run, _), last_TV in zip(work, logits, strict=True)
                if last_TV is not None
            ]
            tokens = self._choose(sampled)
        except Exception as failed:
            # The rows' buffers may be half written, so none of them can go on.
            log.exception("a step of %d rows failed", len(work))
            return self._failed([run for run, _ in work], failed)
        if self._model.device.type == "cuda" and not tokens:
            torch.cuda.synchronize()  # else it would not be known how long the step took
        now = self._clock()
        self._count(work, now - began)
        for run, num_tokens in work:
            self._advance(run, num_tokens)
        self.counters.generated.add(len(tokens), now)
        self.counters.generated_tokens += len(tokens)
        return [
            event
            for (run, _), token in zip(sampled, tokens, strict=True)
            if (event := self._take(run, token, now)) is not None
        ]

    def _choose(self, sampled: Sequence[tuple[Run, Tensor]]) -> list[int]:
        if not sampled:
            return []
        draws = [run.sampler.draw() for run, _ in sampled]
        return choose(torch.stack([last_V for _, last_V in sampled]), draws)

    def _count(self, work: Sequence[tuple[Run, int]], took_s: float) -> None:
        self.counters.steps += 1
        self.counters.step_s += took_s
        prefilled = sum(n for run, n in work if not isinstance(run.operations[0], Decode))
        self.counters.prefilled_tokens += prefilled
        if prefilled >= _MEASURED_TOKENS:
            self.counters.prefill.add(prefilled, took_s)

    # -- operations

    def _plan(self, run: Run) -> Plan:
        request = run.request
        num_prompt = len(request.prompt_ids)
        if run.background and run.to_cut is not None:
            segment = request.segments[run.to_cut]
            is_here = self._is_at_hand(run.segment_keys[run.to_cut], run.fetched)
            # What is behind the prefix is a segment, and no chain's.
            return Plan([] if is_here else [Extend(segment.end)], segment.start, [])
        if run.background:
            return Plan([Extend(num_prompt)], None, [])
        if not run.segment_keys or not run.shares:
            return plan_exact(num_prompt)
        return plan_composed(
            num_prompt,
            request.segments,
            [self._is_at_hand(key, run.fetched) for key in run.segment_keys],
            num_exact=self._num_exact(run, run.fetched),
            block_tokens=self._size,
            recompute=request.mode is Mode.BLEND,
        )

    def _need(self, index: int, run: Run, now: float) -> Need | None:
        """What the run can compute next. None: it waits for another's block, or has all it wants."""
        buffer = run.buffer
        assert buffer is not None
        kind = Kind.BACKGROUND if run.background else Kind.PROMPT
        adapter = None if run.request.adapter is None else "@".join(run.request.adapter)
        while run.operations:
            match operation := run.operations[0]:
                case Decode():
                    return Need(index, Kind.DECODE, 1, adapter=adapter)
                case Extend():
                    if not self._attach(run, buffer, operation, now):
                        return None
                    if left := operation.end - buffer.length:
                        align = self._size - buffer.length % self._size
                        return Need(index, kind, left, align, adapter)
                    run.operations.popleft()
                case Load():
                    if self._load_segment(run, buffer, operation, now):
                        run.operations.popleft()
                    else:
                        run.operations[0] = Extend(operation.segment.end)
                case Choose():
                    run.operations[0] = self._chosen(run, buffer)
                case Recompute():
                    left = len(operation.slots) - operation.done
                    return Need(index, kind, left, adapter=adapter)
        return None

    def _row(self, run: Run, num_tokens: int) -> Row:
        assert run.buffer is not None
        start = run.buffer.length
        match operation := run.operations[0]:
            case Recompute():
                slots = operation.next(num_tokens)
                ends = operation.done + num_tokens == len(operation.slots)
                return Row(
                    run.buffer,
                    [run.tokens[slot] for slot in slots],
                    slots,
                    "last" if ends else "none",
                    run.lora,
                )
            case Extend():
                ends = start + num_tokens == len(run.request.prompt_ids) and not run.background
            case _:
                ends = True
        ids = run.tokens[start : start + num_tokens]
        return Row(run.buffer, ids, None, "last" if ends else "none", run.lora)

    def _advance(self, run: Run, num_tokens: int) -> None:
        assert run.buffer is not None
        self._to_settle.append(run)
        match operation := run.operations[0]:
            case Extend():
                run.num_prefilled += num_tokens
                if run.buffer.length == operation.end:
                    run.operations.popleft()
            case Recompute():
                num_new = sum(s >= operation.first_new for s in operation.next(num_tokens))
                run.num_prefilled += num_new
                run.num_recomputed += num_tokens - num_new
                operation.done += num_tokens
                if operation.done == len(operation.slots):
                    run.operations.popleft()
            case _:
                pass

    def _load_segment(self, run: Run, buffer: KvBuffer, load: Load, now: float) -> bool:
        """Attach a stored segment. False: it is here no more."""
        assert self.composing is not None
        key = run.segment_keys[load.index]
        fetched = run.fetched.pop(key, None)
        if fetched is not None:
            self._pool.put(self._segment(run, load.index, fetched), now)
        with self._pool.held([key]) as found:
            if found:
                block = found[0]
                self._pool.hit([key], now)
            elif fetched is not None:
                block = self._segment(run, load.index, fetched)
            else:
                return False
            place = self.composing.attach(buffer, block, load.segment)
        run.places.append(place)
        num_tokens = place.end - place.start
        if place.exact:
            run.num_attached += num_tokens
        else:
            run.num_composed += num_tokens
        self.counters.attached_tokens["exact" if place.exact else "composed"] += num_tokens
        return True

    def _chosen(self, run: Run, buffer: KvBuffer) -> Recompute:
        assert self.composing is not None
        chosen = self.composing.choose(buffer, run.request, run.places)
        end = buffer.length
        return Recompute([*chosen, *range(end, len(run.request.prompt_ids))], first_new=end)

    def _num_exact(self, run: Run, fetched: Mapping[str, Tensor]) -> int:
        """How many tokens of the prompt can be attached exactly, from the beginning on."""
        missing = (i for i, key in enumerate(run.keys) if not self._is_at_hand(key, fetched))
        return next(missing, len(run.keys)) * self._size

    def _is_at_hand(self, key: str, fetched: Mapping[str, Tensor]) -> bool:
        return key in self._pool or key in fetched

    def _attach(self, run: Run, buffer: KvBuffer, operation: Extend, now: float) -> bool:
        """Load the stored blocks that come next. False: the next one is about to be computed."""
        size = self._size
        end = operation.end
        if end == len(run.request.prompt_ids) and not run.background:
            end -= 1  # the last token is computed in any case, as its logits are wanted
        while buffer.length % size == 0 and buffer.length < end:
            first = buffer.length // size
            wanted = run.keys[first : -(-end // size)]
            if self._load_blocks(run, buffer, wanted, end, now):
                run.waits_until = None
                continue
            if wanted and self._waits(run, wanted[0], now):
                return False
            # From here on this run computes, up to where another one already does.
            for key in run.keys[first:]:
                builder = self._builders.setdefault(key, run)
                if builder.background and not run.background:
                    self._builders[key] = run
            self._load_part(run, buffer, end, now)
            return True
        return True

    def _waits(self, run: Run, key: str, now: float) -> bool:
        """Whether another run is about to compute this block, and is worth waiting for still."""
        builder = self._builders.get(key)
        if builder is None or builder is run or (builder.background and not run.background):
            run.waits_until = None
            return False
        if run.waits_until is None:
            run.waits_until = now + self._limits.build_wait_s
        return now < run.waits_until

    def _load_part(self, run: Run, buffer: KvBuffer, end: int, now: float) -> None:
        """Copy as much of a stored block as begins like what comes next."""
        start = buffer.length
        index = start // self._size
        if not run.shares or (run.plan.exact_end is not None and start >= run.plan.exact_end):
            return
        parent = run.keys[index - 1] if index else run.root
        found = self._pool.continuing(parent, run.tokens[start : min(end, start + self._size)])
        if found is None:
            return
        block, num_tokens = found
        with self._pool.held([block.key]):
            buffer.load(block.kv_L2HND[:, :, :, :num_tokens], start)
        self._pool.hit([block.key], now)
        run.num_attached += num_tokens
        self.counters.attached_tokens["exact"] += num_tokens

    def _load_blocks(
        self, run: Run, buffer: KvBuffer, wanted: Sequence[str], end: int, now: float
    ) -> int:
        """Copy the leading ones of these blocks that are at hand into the next slots."""
        start = buffer.length
        with self._pool.held(wanted) as found:
            for block in found:
                buffer.load(block.kv_L2HND[:, :, :, : end - buffer.length], buffer.length)
        self._pool.hit([block.key for block in found], now)
        num_loaded = len(found)
        for key in wanted[num_loaded:]:
            kv_L2HND = run.fetched.pop(key, None)
            if kv_L2HND is None:
                break
            buffer.load(kv_L2HND[:, :, :, : end - buffer.length], buffer.length)
            num_loaded += 1
        run.num_attached += buffer.length - start
        self.counters.attached_tokens["exact"] += buffer.length - start
        return num_loaded

    def _store(self, run: Run, buffer: KvBuffer, now: float) -> None:
        """Offer the run's complete blocks to the pool, as far as they are exact."""
        size = self._size
        num_full = buffer.length // size
        keys = run.keys
        is_whole = run.done and run.shares and run.plan.exact_end is None
        if is_whole:
            keys = self.keys(run.request, run.tokens[: buffer.length])
        for index in range(run.num_stored, min(num_full, len(keys))):
            key, start = keys[index], index * size
            held = _cubes_before(run.request, start + size)
            if key not in self._pool and run.forgotten.isdisjoint(held):
                kv_L2HND = buffer.view()[:, :, :, start : start + size]
                self._pool.put(self._block(run, keys, index, kv_L2HND), now)
            if self._builders.get(key) is run:
                del self._builders[key]
            run.num_stored = index + 1
        if is_whole and buffer.length % size:
            self._store_tail(run, buffer, keys[-1] if keys else run.root, now)
        self._cut(run, buffer, now)

    def _store_tail(self, run: Run, buffer: KvBuffer, parent: str, now: float) -> None:
        """Offer the tokens behind the last block, so that the next turn begins where this one ends."""
        start = buffer.length - buffer.length % self._size
        token_ids = tuple(run.tokens[start : buffer.length])
        held = _cubes_before(run.request, buffer.length)
        found = self._pool.continuing(parent, token_ids)
        if (found and found[1] == len(token_ids)) or not run.forgotten.isdisjoint(held):
            return
        self._pool.put(
            Block(
                key=tail_key(parent, token_ids),
                start=start,
                kv_L2HND=buffer.view()[:, :, :, start:],
                tenant=run.request.tenant,
                group=run.request.group,
                cubes=held,
                saves_s=len(token_ids) / self.counters.prefill.per_s,
                parent=parent,
                token_ids=token_ids,
                is_tail=True,
            ),
            now,
        )

    def _cut(self, run: Run, buffer: KvBuffer, now: float) -> None:
        """Store the segment behind the prefix by itself, once it is complete."""
        if run.to_cut is None or not run.shares:
            return
        segment = run.request.segments[run.to_cut]
        if buffer.length < segment.end:
            return
        block = self._segment(run, run.to_cut, buffer.view()[:, :, :, segment.start : segment.end])
        if run.forgotten.isdisjoint(block.cubes):
            self._pool.put(block, now)
        run.to_cut = None

    def _block(self, run: Run, keys: Sequence[str], index: int, kv_L2HND: Tensor) -> Block:
        start, end = index * self._size, (index + 1) * self._size
        return Block(
            key=keys[index],
            start=start,
            kv_L2HND=kv_L2HND,
            tenant=run.request.tenant,
            group=run.request.group,
            cubes=_cubes_before(run.request, end),
            saves_s=self._size / self.counters.prefill.per_s,
            parent=keys[index - 1] if index else run.root,
            token_ids=tuple(run.tokens[start:end]),
        )

    def _segment(self, run: Run, index: int, kv_L2HND: Tensor) -> Block:
        """A segment as it stands behind the prefix, where it was built."""
        request, segment = run.request, run.request.segments[index]
        prefix = _cubes_before(request, request.segments[0].start)
        own = {m.cube for m in request.members if segment.start <= m.start < segment.end}
        return Block(
            key=run.segment_keys[index],
            start=request.segments[0].start,
            kv_L2HND=kv_L2HND,
            tenant=request.tenant,
            group="",  # it serves any conversation
            cubes=prefix | own,
            saves_s=(segment.end - segment.start) / self.counters.prefill.per_s,
        )

    # -- what is built in idle time

    def segment_run(self, run: Run, index: int) -> Run:
        """A background run that builds one of a run's segments behind the prefix."""
        request = run.request
        segment, start = request.segments[index], request.segments[0].start
        shift = segment.start - start
        end = segment.end - shift
        prefix = [member for member in request.members if member.start < start]
        own = [
            Member(member.cube, member.start - shift)
            for member in request.members
            if segment.start <= member.start < segment.end
        ]
        ids = (*request.prompt_ids[:start], *request.prompt_ids[segment.start : segment.end])
        # A segment ends before its prompt does: the token behind it is not computed.
        built = self.prepare(
            replace(
                request,
                prompt_ids=(*ids, ids[-1]),
                segments=(SegmentRef(start, end),),
                members=(*prefix, *own),
                deadline_s=None,
                group="",
            ),
            background=True,
        )
        built.to_cut = 0
        return built

    def cold_segments(self, run: Run) -> list[int]:
        """The segments of a run that composes which are nowhere on the device or on their way."""
        due = {key for other in self._all_runs() if other.background for key in other.segment_keys}
        return [
            index
            for index, key in enumerate(run.segment_keys)
            if key not in self._pool and key not in due
        ]

    def _build_later(self, run: Run) -> None:
        """After an answer: what the next ones would have found useful."""
        if not run.segment_keys or not run.shares or run.forgotten:
            return
        cold = {*run.plan.cold}
        builds = [self.segment_run(run, i) for i in self.cold_segments(run) if i in cold]
        if run.plan.exact_end is not None and self._chain_pays(run):
            request = replace(
                run.request,
                prompt_ids=tuple(run.tokens),
                mode=Mode.EXACT,
                segments=(),
                deadline_s=None,
            )
            builds.append(self.prepare(request, background=True))
        for build in builds:
            build.internal = True
            self._idle_work.append(build)
        own = [build for build in self._idle_work if build.internal]
        for build in own[: max(0, len(own) - _MAX_IDLE_WORK)]:
            self._idle_work.remove(build)

    def _chain_pays(self, run: Run) -> bool:
        """Whether the next turn is likely to repay the exact chain of this one.

        It would attach all of this turn, where a composed one computes what was chosen again, and
        all behind the memories.
        """
        behind = len(run.tokens) - run.request.segments[-1].end
        return exact_chain_pays(
            build_tokens=len(run.tokens) - self._num_exact(run, {}),
            saved_tokens=run.num_recomputed + behind,
            probability=self._turns.probability(run.request.group),
        )

    # -- what comes of a token

    def _take(self, run: Run, token: int, now: float) -> Event | None:
        request = run.request
        if not run.num_sampled:
            run.first_at = now
            kind = "composed" if run.num_composed else "exact" if run.num_attached else "none"
            self.counters.ttft.setdefault(kind, Histogram()).observe(now - run.submitted_at)
        run.num_sampled += 1
        run.tokens.append(token)
        run.unsent.append(token)
        stop_ids = self._loaded.eos_ids if request.stop_ids is None else request.stop_ids
        if token in stop_ids:
            return self._finish(run, FinishReason.STOP, self._rest(run), now)
        text = run.stops.push(run.text.push(token))
        if run.stops.stopped:
            return self._finish(run, FinishReason.STOP, text, now)
        if run.num_sampled == run.max_tokens:
            return self._finish(run, FinishReason.LENGTH, text + self._rest(run), now)
        if not text:
            return None
        return Event(run, Piece(text=text, token_ids=self._unsent(run)))

    def _rest(self, run: Run) -> str:
        """The text that was held back, up to a stop string that it may complete."""
        text = run.stops.push(run.text.flush())
        return text if run.stops.stopped else text + run.stops.flush()

    def _unsent(self, run: Run) -> tuple[int, ...]:
        unsent, run.unsent = run.unsent, []
        return tuple(unsent)

    def _finish(self, run: Run, reason: FinishReason, text: str, now: float) -> Event:
        usage = Usage(
            prompt_tokens=len(run.request.prompt_ids),
            completion_tokens=run.num_sampled,
            attached_exact=run.num_attached,
            attached_composed=run.num_composed,
            recomputed=run.num_recomputed,
            prefilled=run.num_prefilled,
            queue_s=run.admitted_at - run.submitted_at,
            ttft_s=(run.first_at if run.num_sampled else now) - run.submitted_at,
            composed=tuple(SegmentRef(p.start, p.end) for p in run.places if not p.exact),
        )
        self._end(run, reason.value)
        self._build_later(run)
        return Event(run, Piece(text=text, token_ids=self._unsent(run), finish=reason, usage=usage))

    def _built(self, run: Run) -> Event:
        assert run.buffer is not None
        now = self._clock()
        self._store(run, run.buffer, now)  # it says that they are stored
        return self._finish(run, FinishReason.LENGTH, "", now)

    def _failed(self, runs: Sequence[Run], failed: Exception) -> list[Event]:
        self.counters.failed_steps += 1
        why = Unavailable(f"the model failed: {type(failed).__name__}: {failed}")
        return [self._fail(run, why) for run in runs]

    def _fail(self, run: Run, error: MemCubeError) -> Event:
        self._stop_sharing(run)
        self._end(run, error.code)
        return Event(run, error)

    # -- coming and going

    def _expire(self, now: float) -> list[Event]:
        events = []
        for run in self._all_runs():
            if run.deadline_at is None or now < run.deadline_at:
                continue
            if run.num_sampled:
                events.append(self._finish(run, FinishReason.DEADLINE, self._rest(run), now))
            else:
                what = f"no token came within {run.request.deadline_s:g} s"
                events.append(self._fail(run, DeadlineExceeded(what)))
        return events

    def _admit(self, now: float) -> None:
        while (run := self._line.next()) is not None:
            if not self._fits(run):
                # Nobody overtakes: else a long prompt would wait as long as short ones come.
                if not self._put_off_background():
                    break
                continue
            self._line.take(run)
            self._start(run, now)
            self.counters.queue.observe(now - run.submitted_at)
        if not self._running and not self._line:
            ready = (run for run in self._idle_work if not run.loading)
            if (run := next(ready, None)) is not None:
                self._idle_work.remove(run)
                self._start(run, now)

    def _fits(self, run: Run) -> bool:
        fits = self._buffers.fit(_capacity(run))
        return fits and len(self._running) < self._limits.max_running

    def _put_off_background(self) -> bool:
        """Take the buffer of a run that nobody waits for. Its blocks so far are stored already."""
        for run in self._running:
            if run.background:
                self._running.remove(run)
                self._give_up_builds(run)
                self._free(run)
                run.num_attached = run.num_prefilled = run.num_stored = 0
                self._idle_work.appendleft(run)
                return True
        return False

    def _start(self, run: Run, now: float) -> None:
        run.admitted_at = now
        run.plan = self._plan(run)
        run.operations = deque(run.plan.operations)
        if run.plan.exact_end is not None:
            run.keys = run.keys[: run.plan.exact_end // self._size]
        if (
            run.segment_keys
            and not run.background
            and not self._is_at_hand(run.segment_keys[0], run.fetched)
        ):
            run.to_cut = 0
        self._running.append(run)
        run.buffer = self._buffers.take(_capacity(run))

    def _end(self, run: Run, reason: str) -> None:
        run.done = True
        run.fetched.clear()
        self.counters.finished[reason] += 1
        self.counters.ended.add(1, self._clock())
        self._give_up_builds(run)
        if run in self._running:
            self._running.remove(run)
            self._to_settle.append(run)
        elif run in self._idle_work:
            self._idle_work.remove(run)
        else:
            self._line.remove(run)

    def _stop_sharing(self, run: Run) -> None:
        run.shares = False
        run.keys = ()
        run.fetched.clear()
        self._give_up_builds(run)

    def _free(self, run: Run) -> None:
        assert run.buffer is not None
        self._buffers.give_back(run.buffer)
        run.buffer = None

    def _give_up_builds(self, run: Run) -> None:
        for key in [key for key, builder in self._builders.items() if builder is run]:
            del self._builders[key]

    def _all_runs(self) -> list[Run]:
        return [*self._running, *self._line, *self._idle_work]

    # -- keys and sizes

    def keys(self, request: GenerateRequest, token_ids: Sequence[int]) -> tuple[str, ...]:
        """The keys of the full blocks of these tokens. Any thread may call it."""
        return block_keys(
            self._identity,
            salt=request.salt,
            adapter=request.adapter,
            token_ids=token_ids,
            block_tokens=self._size,
        )

    def _max_tokens(self, request: GenerateRequest, *, background: bool) -> int:
        """How many tokens may be sampled; none in the background.

        Raises:
            LimitExceeded: the prompt, or it with what is asked for, is more than the model's window
                or the memory for one run.
        """
        num_prompt = len(request.prompt_ids)
        window = self._loaded.max_positions
        budget = self._limits.buffer_bytes // self._loaded.layout.bytes_per_token
        what = "tokens of the model's window" if window <= budget else "tokens of KV memory"
        most = min(window, budget)
        asked = 0 if background else request.max_tokens or 1
        if num_prompt + asked > most:
            raise LimitExceeded(f"prompt and answer, in {what}", most, num_prompt + asked)
        if background:
            return 0
        return request.max_tokens or min(self._limits.default_max_tokens, most - num_prompt)


def _capacity(run: Run) -> int:
    # The last sampled token is never computed.
    return len(run.request.prompt_ids) + max(run.max_tokens - 1, 0)


def _heard(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if not event.run.internal]


def _cubes_before(request: GenerateRequest, end: int) -> frozenset[str]:
    """What KV up to this token holds something of: the cubes whose text begins before it, and the
    request's adapter."""
    cubes = frozenset(member.cube for member in request.members if member.start < end)
    return cubes if request.adapter is None else cubes | {request.adapter.name}
