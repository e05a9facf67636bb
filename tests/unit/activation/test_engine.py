import asyncio
import threading
from dataclasses import replace

import pytest

from memcube.activation.contract import (
    AdapterRef,
    FinishReason,
    GenerateRequest,
    Member,
    Mode,
    SegmentRef,
)
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.forward import PackedModel
from memcube.errors import BadRequest, TooBusy, Unavailable, UnknownBackend
from memcube.testing.kv import TinyLru
from memcube.testing.tiny_lm import tiny_model

BLOCK = 16
LOADED = tiny_model()
MODEL = PackedModel(LOADED)


class Gated:
    """The real model, which waits for the test before each step."""

    device = MODEL.device

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.steps = []

    def forward(self, rows):
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        self.steps.append([len(row.token_ids) for row in rows])
        return MODEL.forward(rows)


class Shelf:
    """Media below the device, in a dict."""

    def __init__(self):
        self.blocks = {}
        self.fails = False
        self.calls = []

    def offer(self, blocks):
        if self.fails:
            raise OSError("the shelf is broken")
        for block in blocks:
            self.blocks[block.key] = block

    def fetch(self, places):
        self.calls.append(len(places))
        if self.fails:
            raise OSError("the shelf is broken")
        return {p.key: self.blocks[p.key].kv_L2HND for p in places if p.key in self.blocks}

    def forget(self, cubes, tenant):
        self.blocks = {
            key: block
            for key, block in self.blocks.items()
            if block.tenant != tenant and block.cubes.isdisjoint(cubes)
        }


def make(model=MODEL, lower=None, pool_bytes=1 << 30, **limits):
    limits = {"block_tokens": BLOCK, "step_tokens": 64, "background_tokens": 32} | limits
    return Engine(
        model, LOADED, policy=TinyLru(pool_bytes), limits=EngineLimits(**limits), lower=lower
    )


@pytest.fixture
async def engine():
    engine = make()
    yield engine
    await engine.close()


def request(length=40, seed=1, **options):
    options = {"tenant": "a", "salt": "a", "max_tokens": 6, "stop_ids": frozenset()} | options
    return GenerateRequest(prompt_ids=tuple((seed * i * i) % 251 for i in range(length)), **options)


async def ask(engine, asked):
    return [piece async for piece in engine.generate(asked)]


async def entered(model):
    assert await asyncio.to_thread(model.entered.acquire, timeout=30)


async def test_an_answer_comes_in_pieces_and_ends_with_its_usage(engine):
    pieces = await ask(engine, request(max_tokens=20))
    assert sum(len(piece.token_ids) for piece in pieces) == 20
    assert [piece.usage is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]
    assert last.finish is FinishReason.LENGTH
    assert last.usage.prompt_tokens == last.usage.prefilled == 40
    assert 0 <= last.usage.queue_s <= last.usage.ttft_s


async def test_many_at_once_get_what_each_gets_alone(engine):
    asked = [request(length, seed) for seed, length in enumerate((20, 90, 33, 150, 64, 5), 1)]
    together = await asyncio.gather(*(ask(engine, one) for one in asked))
    for one, pieces in zip(asked, together, strict=True):
        again = await ask(engine, one)
        assert [p.token_ids for p in again] == [p.token_ids for p in pieces]


async def test_requests_from_several_loops_are_served(engine):
    def elsewhere():
        return asyncio.run(ask(engine, request(seed=2)))

    here, there = await asyncio.gather(ask(engine, request()), asyncio.to_thread(elsewhere))
    assert here[-1].finish is there[-1].finish is FinishReason.LENGTH


async def test_over_the_bound_a_request_is_refused_with_a_time_to_come_back():
    model = Gated()
    engine = make(model, max_running=1, max_waiting=1)
    first = asyncio.create_task(ask(engine, request()))
    await entered(model)
    second = asyncio.create_task(ask(engine, request()))
    await asyncio.sleep(0)
    with pytest.raises(TooBusy) as refused:
        await ask(engine, request())
    assert refused.value.status == 429
    assert refused.value.retry_after_s >= 1
    model.gate.release(100)
    await asyncio.gather(first, second)
    assert (await ask(engine, request()))[-1].finish is FinishReason.LENGTH
    await engine.close()


async def test_a_reader_that_goes_away_ends_the_work():
    model = Gated()
    engine = make(model, max_running=1)
    pieces = engine.generate(request(max_tokens=1000))
    model.gate.release(30)
    await anext(pieces)
    await pieces.aclose()
    model.gate.release(2)
    other = asyncio.create_task(ask(engine, request(seed=2)))
    model.gate.release(100)
    assert (await other)[-1].finish is FinishReason.LENGTH
    assert len(model.steps) < 60
    assert engine.stats().finished == {"cancelled": 1, "length": 1}
    await engine.close()


async def test_a_cancelled_task_ends_the_work():
    model = Gated()
    engine = make(model, max_running=1)
    first = asyncio.create_task(ask(engine, request(max_tokens=1000)))
    await entered(model)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    model.gate.release(100)
    assert (await ask(engine, request(seed=2)))[-1].usage.completion_tokens == 6
    assert engine.stats().finished["cancelled"] == 1
    await engine.close()


async def test_what_can_never_be_served_is_refused_at_once(engine):
    with pytest.raises(BadRequest, match="model's window"):
        engine.generate(request(5000))
    with pytest.raises(UnknownBackend, match="adapter"):
        engine.generate(request(adapter=AdapterRef("a", "1")))


async def test_a_closed_engine_fails_what_runs_and_refuses_the_rest():
    model = Gated()
    engine = make(model)
    running = asyncio.create_task(ask(engine, request(max_tokens=1000)))
    await entered(model)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    model.gate.release(100)
    await closing
    with pytest.raises(Unavailable, match="shutting down"):
        await running
    with pytest.raises(Unavailable, match="shutting down"):
        await ask(engine, request())
    with pytest.raises(Unavailable, match="shutting down"):
        await engine.forget(["cube"])
    assert not engine.is_alive
    await engine.close()


async def test_a_drained_engine_finishes_what_runs():
    model = Gated()
    engine = make(model)
    running = asyncio.create_task(ask(engine, request()))
    await entered(model)
    closing = asyncio.create_task(engine.close(drain_s=60))
    model.gate.release(100)
    assert (await running)[-1].finish is FinishReason.LENGTH
    await closing


async def test_a_built_prompt_is_attached(engine):
    built = await engine.build(request(100))
    assert built.prefilled == 100
    assert engine.num_resident(engine.keys(request(100))) == 96
    assert (await ask(engine, request(100)))[-1].usage.attached_exact == 99


async def test_a_failed_step_reaches_the_reader_and_the_engine_goes_on():
    class Failing(Gated):
        def forward(self, rows):
            if not self.steps:
                self.steps.append([])
                raise RuntimeError("no such kernel")
            return MODEL.forward(rows)

    engine = make(Failing())
    with pytest.raises(Unavailable, match="no such kernel"):
        await ask(engine, request())
    assert (await ask(engine, request()))[-1].finish is FinishReason.LENGTH
    await engine.close()


async def test_a_fault_of_the_engine_itself_reaches_the_readers_and_it_goes_on():
    class Broken(TinyLru):
        breaks = True

        def admit(self, item, now):
            if self.breaks:
                raise KeyError("lost count")
            return super().admit(item, now)

    policy = Broken(1 << 30)
    engine = Engine(MODEL, LOADED, policy=policy, limits=EngineLimits(block_tokens=BLOCK))
    with pytest.raises(Unavailable, match="lost count"):
        await ask(engine, request(max_tokens=40))
    policy.breaks = False
    assert (await ask(engine, request()))[-1].finish is FinishReason.LENGTH
    assert (await engine.between_steps(engine.stats)).buffer_bytes == 0
    await engine.close()


# -- below the device


async def test_evicted_blocks_go_below_and_come_up_again():
    shelf = Shelf()
    few = 8 * BLOCK * LOADED.layout.bytes_per_token
    engine = make(lower=shelf, pool_bytes=few, load_wait_s=30.0)
    first = await ask(engine, request(100))
    await ask(engine, request(100, seed=2))
    again = await ask(engine, request(100))
    assert again[-1].usage.attached_exact > 0
    assert [p.token_ids for p in again] == [p.token_ids for p in first]
    assert shelf.blocks
    await engine.close()


async def test_what_is_on_the_device_goes_below_when_the_engine_is_closed():
    shelf = Shelf()
    engine = make(lower=shelf)
    first = await ask(engine, request(100))
    await engine.close()
    engine = make(lower=shelf, load_wait_s=30.0)
    again = await ask(engine, request(100))
    assert again[-1].usage.attached_exact == 96
    assert [p.token_ids for p in again] == [p.token_ids for p in first]
    await engine.close()


async def test_a_prefetch_brings_blocks_to_the_device():
    shelf = Shelf()
    engine = make(lower=shelf)
    await ask(engine, request(100))
    await engine.close()
    engine = make(lower=shelf)
    assert engine.num_resident(engine.keys(request(100))) == 0
    assert await engine.prefetch(request(100), 30.0) == 96
    assert shelf.calls
    shelf.calls.clear()
    assert (await ask(engine, request(100)))[-1].usage.attached_exact == 96
    assert not shelf.calls
    await engine.close()


async def test_broken_media_are_a_miss():
    shelf = Shelf()
    engine = make(lower=shelf, load_wait_s=30.0)
    shelf.fails = True
    assert (await ask(engine, request(100)))[-1].usage.prefilled == 100
    await engine.close()


async def test_a_request_waits_for_the_media_only_so_long():
    class Stuck(Shelf):
        def __init__(self):
            super().__init__()
            self.gate = threading.Event()

        def fetch(self, places):
            self.gate.wait(30)
            return {}

    shelf = Stuck()
    engine = make(lower=shelf, load_wait_s=0.01)
    assert (await ask(engine, request(100)))[-1].usage.prefilled == 100
    shelf.gate.set()
    await engine.close()


async def test_what_is_forgotten_is_nowhere_when_the_call_returns():
    shelf = Shelf()
    members = (Member("cube", 0),)
    engine = make(lower=shelf, load_wait_s=30.0)
    await ask(engine, request(100, members=members))
    await engine.close()
    engine = make(lower=shelf, load_wait_s=30.0)
    assert await engine.prefetch(request(100, members=members), 30.0) == 96
    assert await engine.forget(["cube"]) == 6
    assert not shelf.blocks
    assert (await ask(engine, request(100, members=members)))[-1].usage.attached_exact == 0
    await engine.close()


async def test_a_prefetch_does_not_bring_back_what_was_forgotten_meanwhile():
    class Slow(Shelf):
        def __init__(self):
            super().__init__()
            self.asked, self.gate = threading.Event(), threading.Event()

        def fetch(self, places):
            self.asked.set()
            assert self.gate.wait(30)
            return super().fetch(places)

    shelf = Slow()
    shelf.gate.set()
    engine = make(lower=shelf, load_wait_s=30.0)
    await ask(engine, request(100, members=(Member("cube", 0),)))
    await engine.close()
    shelf.gate.clear()
    shelf.asked.clear()
    engine = make(lower=shelf)
    prefetch = asyncio.create_task(engine.prefetch(request(100), 30.0))
    assert await asyncio.to_thread(shelf.asked.wait, 30)
    forget = asyncio.create_task(engine.forget(["cube"]))
    await asyncio.sleep(0)
    await engine.hint("any", 1.0)  # comes behind it on the compute thread
    shelf.gate.set()
    await forget
    assert await prefetch == 0
    await engine.close()


# -- composing


def composed(*order, **options):
    ids, segments, members = list(range(20)), [], []
    for number in order:
        start = len(ids)
        ids += [(number * i * i + i) % 251 for i in range(60 + number)]
        segments.append(SegmentRef(start, len(ids)))
        members.append(Member(f"cube-{number}", start))
    options = {"tenant": "a", "salt": "a", "max_tokens": 6, "stop_ids": frozenset()} | options
    return GenerateRequest(
        prompt_ids=(*ids, 1, 2, 3),
        segments=tuple(segments),
        members=tuple(members),
        mode=Mode.FAST,
        **options,
    )


async def test_segments_built_ahead_are_composed(engine):
    engine.allow_composing({Mode.FAST})
    built = await engine.build(composed(1, 2, 3))
    assert built.prefilled >= 61 + 62 + 63
    assert (await engine.build(composed(3, 2, 1))).prefilled == 0
    usage = (await ask(engine, composed(3, 2, 1)))[-1].usage
    assert usage.attached_composed == 62 + 61
    assert usage.prefilled == 20 - 16 + 3


async def test_segments_come_up_from_below():
    shelf = Shelf()
    engine = make(lower=shelf)
    engine.allow_composing({Mode.FAST})
    await engine.build(composed(1, 2, 3))
    first = await ask(engine, composed(3, 1))
    await engine.close()
    engine = make(lower=shelf, load_wait_s=30.0)
    engine.allow_composing({Mode.FAST})
    again = await ask(engine, composed(3, 1))
    assert again[-1].usage.attached_composed == 61
    assert [p.token_ids for p in again] == [p.token_ids for p in first]
    await engine.prefetch(composed(2, 3), 30.0)
    shelf.calls.clear()
    assert (await ask(engine, composed(2, 3)))[-1].usage.attached_composed == 63
    await engine.close()


async def test_a_model_that_cant_be_composed_serves_exactly():
    loaded = replace(LOADED, why_not="it is of another kind")
    engine = Engine(MODEL, loaded, policy=TinyLru(1 << 30), limits=EngineLimits())
    with pytest.raises(BadRequest, match="it is of another kind"):
        engine.allow_composing({Mode.FAST})
    assert (await ask(engine, composed(1, 2)))[-1].usage.composed == ()
    await engine.close()


async def test_a_call_between_steps_has_the_model_to_itself(engine):
    asked = asyncio.create_task(ask(engine, request(max_tokens=30)))
    names = await engine.between_steps(lambda: threading.current_thread().name)
    assert names == "compute"
    assert (await asked)[-1].finish is FinishReason.LENGTH
