import hashlib
import random

import pytest
import torch

from memcube.activation.batching import Batcher
from memcube.activation.blocks import BlockPool
from memcube.activation.contract import (
    AdapterRef,
    FinishReason,
    GenerateRequest,
    Member,
    Mode,
    Sampling,
)
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.runs import BatchLimits
from memcube.errors import (
    BadRequest,
    DeadlineExceeded,
    LimitExceeded,
    MemCubeError,
    Unavailable,
)
from memcube.testing.kv import TinyLru
from memcube.testing.tiny_lm import END, tiny_model

BLOCK = 16
LOADED = tiny_model()
MODEL = PackedModel(LOADED)
TOKEN_BYTES = LOADED.layout.bytes_per_token


class Watched:
    """The real model, with the rows of each step noted, and an error on demand."""

    device = MODEL.device
    taken = staticmethod(MODEL.taken)

    def __init__(self):
        self.steps = []
        self.fails = None

    def forward(self, rows):
        self.steps.append([len(row.token_ids) for row in rows])
        if self.fails:
            failed, self.fails = self.fails, None
            raise failed
        return MODEL.forward(rows)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class House:
    """A batcher with a manual clock, driven step by step, and what came out of it."""

    def __init__(self, *, pool_bytes=1 << 30, **limits):
        self.clock = Clock()
        self.model = Watched()
        self.evicted = []
        self.pool = BlockPool(TinyLru(pool_bytes), self.evicted.append)
        limits = {"block_tokens": BLOCK, "step_tokens": 64, "background_tokens": 32} | limits
        self.batcher = Batcher(self.model, LOADED, self.pool, BatchLimits(**limits), self.clock)
        self.pieces = {}
        self.errors = {}
        self.ended = []

    def submit(self, token_ids, *, background=False, **options):
        options = {"tenant": "a", "salt": "a", "max_tokens": 8, "stop_ids": frozenset()} | options
        request = GenerateRequest(prompt_ids=tuple(token_ids), **options)
        run = self.batcher.prepare(request, background=background)
        self.pieces[run] = []
        self.batcher.submit(run)
        return run

    def step(self):
        step = self.batcher.step()
        for run, what in step.events:
            if isinstance(what, MemCubeError):
                self.errors[run] = what
            else:
                self.pieces[run].append(what)
            if run.done:
                self.ended.append(run)
        self.batcher.settle()
        return step

    def finish(self):
        while self.batcher.has_runs:
            step = self.step()
            assert not step.is_idle, "nothing moves"

    def ask(self, token_ids, **options):
        run = self.submit(token_ids, **options)
        self.finish()
        return self.answer(run)

    def answer(self, run):
        if run in self.errors:
            raise self.errors[run]
        return Answer(self.pieces[run])


class Answer:
    def __init__(self, pieces):
        assert [piece.finish is not None for piece in pieces] == [False] * (len(pieces) - 1) + [
            True
        ]
        self.text = "".join(piece.text for piece in pieces)
        self.tokens = [token for piece in pieces for token in piece.token_ids]
        self.finish = pieces[-1].finish
        self.usage = pieces[-1].usage


def prompt(length, seed=0):
    numbers = random.Random(seed)
    return [numbers.randrange(256) for _ in range(length)]


def ids(text):
    return LOADED.tokenizer.encode(text)


def alone(token_ids, **options):
    """The answer where nothing is shared and nothing else runs."""
    return House().ask(token_ids, mode=Mode.OFF, **options)


def fingerprint(pool):
    return {
        block.key: hashlib.sha256(block.kv_L2HND.numpy().tobytes()).hexdigest()
        for block in pool.blocks()
    }


# -- answers


def test_greedy_tokens_are_those_of_the_model_recomputed_whole_for_each_token():
    tokens = prompt(50)
    for _ in range(12):
        row = Row(KvBuffer(LOADED.layout, "cpu"), tokens)
        (logits_1V,) = MODEL.forward([row])
        tokens.append(int(logits_1V[0].argmax()))
    assert alone(prompt(50), max_tokens=12).tokens == tokens[50:]


def test_runs_in_one_batch_get_what_each_gets_alone():
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 200, 17, 64, 90, 33, 1, 150))]
    house = House()
    runs = [house.submit(tokens, max_tokens=4 + i) for i, tokens in enumerate(prompts)]
    house.finish()
    for i, (run, tokens) in enumerate(zip(runs, prompts, strict=True)):
        assert house.answer(run).tokens == alone(tokens, max_tokens=4 + i).tokens
    assert max(map(len, house.model.steps)) == 8


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch():
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=5)
    single = alone(prompt(40), sampling=sampling, max_tokens=20)
    house = House()
    others = [
        house.submit(prompt(30, i), sampling=Sampling(temperature=1.5, seed=i)) for i in range(1, 4)
    ]
    run = house.submit(prompt(40), sampling=sampling, max_tokens=20)
    house.finish()
    assert house.answer(run).tokens == single.tokens
    assert all(house.answer(other).tokens for other in others)


def test_an_answer_ends_at_max_tokens_or_with_the_models_own_end():
    full = alone(prompt(40), max_tokens=30)
    assert (len(full.tokens), full.finish) == (30, FinishReason.LENGTH)
    stopped = alone(prompt(40), max_tokens=30, stop_ids=frozenset({full.tokens[9]}))
    first = full.tokens.index(full.tokens[9])
    assert stopped.tokens == full.tokens[: first + 1]
    assert stopped.finish is FinishReason.STOP
    assert LOADED.eos_ids == {END}


def test_an_answer_ends_before_a_stop_string():
    full = alone(prompt(40), max_tokens=30).text
    stop = full[10:13]
    answer = alone(prompt(40), max_tokens=30, stop=(stop, "never there"))
    assert answer.text == full[: full.index(stop)]
    assert answer.finish is FinishReason.STOP
    assert len(answer.tokens) < 30


def test_text_comes_whole_though_pieces_end_between_characters():
    tokens = alone(prompt(40), max_tokens=60).tokens
    text = LOADED.tokenizer.decode(tokens)
    assert alone(prompt(40), max_tokens=60).text == text


# -- reuse


def test_attached_blocks_give_the_tokens_of_a_full_prefill():
    house = House()
    shared = prompt(100)
    house.ask(shared)
    tokens = shared + prompt(23, seed=7)
    answer = house.ask(tokens, max_tokens=20)
    assert answer.tokens == alone(tokens, max_tokens=20).tokens
    assert answer.usage.attached_exact == 100
    assert answer.usage.prefilled == 23
    assert answer.usage.attached_exact + answer.usage.prefilled == answer.usage.prompt_tokens


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK, 2 * BLOCK + 1])
def test_the_last_token_of_a_prompt_is_always_computed(length):
    house = House()
    first = house.ask(prompt(length))
    again = house.ask(prompt(length))
    assert again.tokens == first.tokens
    assert again.usage.attached_exact == length - 1
    assert again.usage.prefilled == 1


def test_the_next_turn_attaches_the_answer_too():
    house = House()
    first = house.ask(prompt(50), max_tokens=40)
    following = [*prompt(50), *first.tokens, *prompt(10, seed=3)]
    answer = house.ask(following)
    assert answer.usage.attached_exact == 50 + 39  # the last token was never computed
    assert answer.tokens == alone(following).tokens


def test_a_short_prompts_answer_is_stored_as_well():
    house = House()
    first = house.ask(prompt(5), max_tokens=30)
    assert house.ask([*prompt(5), *first.tokens]).usage.attached_exact == 34


def test_prompts_share_what_they_begin_with_to_the_token():
    house = House()
    house.ask(prompt(100))
    for shared in (3, 20, 75):
        tokens = [*prompt(100)[:shared], *prompt(30, seed=shared)]
        answer = house.ask(tokens)
        assert answer.usage.attached_exact == shared
        assert answer.tokens == alone(tokens).tokens


def test_a_tail_gives_way_to_a_longer_one():
    house = House()
    tokens = prompt(20)
    for _ in range(4):
        tokens += house.ask(tokens, max_tokens=3).tokens
    assert [b.num_tokens for b in house.pool.blocks() if b.is_tail] == [len(tokens) - 1 - BLOCK]
    assert house.pool.evictions["superseded"] == 3


def test_buffers_are_used_again_within_their_budget():
    house = House(buffer_bytes=1000 * TOKEN_BYTES)
    run = house.submit(prompt(300), max_tokens=1)
    house.step()
    first = run.buffer
    house.finish()
    again = house.submit(prompt(200, seed=1), max_tokens=1)
    small = house.submit(prompt(100, seed=2), max_tokens=1)
    house.step()
    assert again.buffer is first
    assert small.buffer is not first
    house.finish()
    large = house.submit(prompt(950, seed=3), max_tokens=1)
    house.step()
    assert large.buffer.num_bytes == 950 * TOKEN_BYTES
    assert house.batcher._buffers.spare_bytes <= 50 * TOKEN_BYTES
    house.finish()
    assert house.answer(large).tokens == alone(prompt(950, seed=3), max_tokens=1).tokens


def test_two_runs_on_one_prefix_cant_see_each_other():
    house = House()
    shared = prompt(64)
    house.ask(shared)
    before = fingerprint(house.pool)
    one, two = shared + prompt(9, seed=1), shared + prompt(30, seed=2)
    runs = [house.submit(tokens, max_tokens=20) for tokens in (one, two)]
    house.finish()
    for run, tokens in zip(runs, (one, two), strict=True):
        assert house.answer(run).usage.attached_exact == 64
        assert house.answer(run).tokens == alone(tokens, max_tokens=20).tokens
    after = fingerprint(house.pool)
    assert {key: after[key] for key in before} == before


def test_stored_blocks_share_no_memory_with_a_buffer():
    house = House()
    run = house.submit(prompt(70))
    while not house.pool.blocks():
        house.step()
    memory = run.buffer.view().untyped_storage().data_ptr()
    assert all(b.kv_L2HND.untyped_storage().data_ptr() != memory for b in house.pool.blocks())


def test_tenants_share_no_block():
    house = House()
    house.ask(prompt(80), tenant="a", salt="one")
    other = house.ask(prompt(80), tenant="b", salt="two")
    assert other.usage.attached_exact == 0
    assert set(house.pool.bytes_by_tenant) == {"a", "b"}


def test_with_reuse_off_nothing_is_attached_and_nothing_stored():
    house = House()
    house.ask(prompt(80))
    stored = len(house.pool)
    answer = house.ask(prompt(80), mode=Mode.OFF)
    assert answer.usage.attached_exact == 0
    house.ask(prompt(80, seed=1), mode=Mode.OFF)
    assert len(house.pool) == stored


def test_a_full_pool_evicts_and_answers_stay_right():
    house = House(pool_bytes=10 * BLOCK * TOKEN_BYTES)
    prompts = [prompt(100, seed) for seed in range(6)]
    first = [house.ask(tokens).tokens for tokens in prompts]
    assert house.evicted
    assert house.pool.used_bytes <= 10 * BLOCK * TOKEN_BYTES
    assert [house.ask(tokens).tokens for tokens in reversed(prompts)] == first[::-1]


# -- one build at a time


def test_a_prefix_that_two_runs_share_is_computed_once():
    house = House()
    shared = prompt(320)
    one = house.submit(shared + prompt(5, seed=1))
    two = house.submit(shared + prompt(5, seed=2))
    house.finish()
    assert house.answer(one).usage.prefilled == 325
    assert house.answer(two).usage.prefilled == 5
    assert house.answer(two).tokens == alone(shared + prompt(5, seed=2)).tokens


def test_a_run_goes_on_by_itself_when_the_one_it_waits_for_is_cancelled():
    house = House()
    one, two = house.submit(prompt(320)), house.submit(prompt(320))
    house.step()
    house.batcher.cancel(one)
    house.finish()
    usage = house.answer(two).usage
    assert usage.attached_exact == 64  # what the other had computed in its step
    assert usage.prefilled == 256


def test_a_run_waits_for_another_only_so_long():
    house = House(build_wait_s=5.0)
    house.submit(prompt(640))
    two = house.submit(prompt(640))
    house.step()
    house.step()
    assert [len(rows) for rows in house.model.steps] == [1, 1]
    house.batcher._pool.forget((), "a", "test")  # the builder's blocks come and go
    house.clock.now += 5.0
    house.step()
    assert len(house.model.steps[-1]) == 2
    house.finish()
    assert house.answer(two).tokens == alone(prompt(640)).tokens


# -- coming and going


def test_a_cancelled_run_frees_its_place_for_the_next_step():
    house = House(max_running=1)
    one, two = house.submit(prompt(20), max_tokens=500), house.submit(prompt(20, seed=1))
    house.step()
    house.batcher.cancel(one)
    house.batcher.cancel(one)
    house.step()
    assert two.buffer is not None
    house.finish()
    assert house.answer(two).finish is FinishReason.LENGTH
    assert house.batcher.stats().buffer_bytes == 0
    assert house.batcher.stats().finished == {"cancelled": 1, "length": 1}


def test_a_waiting_run_can_be_cancelled():
    house = House(max_running=1)
    house.submit(prompt(20))
    two = house.submit(prompt(20))
    house.step()
    house.batcher.cancel(two)
    assert house.batcher.stats().waiting == 0
    house.finish()


def test_a_run_starts_only_when_its_buffer_fits_and_nobody_overtakes():
    house = House(buffer_bytes=100 * TOKEN_BYTES)
    one = house.submit(prompt(60), max_tokens=11)
    two = house.submit(prompt(60), max_tokens=11)
    small = house.submit(prompt(4), max_tokens=2)
    house.step()
    assert one.buffer is not None
    assert two.buffer is None
    assert small.buffer is None
    house.finish()
    assert house.answer(two).tokens == house.answer(one).tokens


def test_tenants_take_turns():
    house = House(max_running=1)
    order = [house.submit(prompt(5), tenant="a", salt="a", max_tokens=1) for _ in range(3)]
    order.insert(1, house.submit(prompt(5), tenant="b", salt="b", max_tokens=1))
    house.finish()
    assert house.ended == order


def test_no_first_token_before_the_deadline_is_an_error():
    house = House(max_running=1)
    running, waiting = house.submit(prompt(300)), house.submit(prompt(3), deadline_s=2.0)
    house.step()
    house.clock.now += 2.0
    house.step()
    with pytest.raises(DeadlineExceeded, match="no token came within 2 s"):
        house.answer(waiting)
    house.finish()
    assert house.answer(running)


def test_an_answer_ends_at_its_deadline_with_what_it_has():
    house = House()
    run = house.submit(prompt(5), max_tokens=100, deadline_s=2.0)
    for _ in range(4):
        house.step()
    house.clock.now += 2.0
    house.finish()
    answer = house.answer(run)
    assert answer.finish is FinishReason.DEADLINE
    assert len(answer.tokens) == 4


def test_what_can_never_run_is_refused():
    house = House(buffer_bytes=1000 * TOKEN_BYTES)
    with pytest.raises(LimitExceeded, match="KV memory: at most 1,000, given 1,001"):
        house.submit(prompt(1000), max_tokens=1)
    with pytest.raises(LimitExceeded, match="the model's window: at most 4,096, given 5,001"):
        House().submit(prompt(5000), max_tokens=1)
    with pytest.raises(BadRequest, match="an id that is none of 257"):
        house.submit([1, 257])


def test_a_run_without_the_adapter_that_it_names_is_not_taken():
    with pytest.raises(ValueError, match="comes with the adapter"):
        House().submit(prompt(5), adapter=AdapterRef("a", "1"))


def test_without_max_tokens_an_answer_takes_what_the_window_leaves():
    assert House().submit(prompt(4090), max_tokens=None).max_tokens == 6
    assert House(default_max_tokens=11).submit(prompt(9), max_tokens=None).max_tokens == 11


def test_a_failed_step_ends_its_runs_and_no_others():
    house = House(max_running=2)
    runs = [house.submit(prompt(20, seed)) for seed in range(3)]
    house.model.fails = RuntimeError("out of registers")
    house.finish()
    for run in runs[:2]:
        with pytest.raises(Unavailable, match="out of registers"):
            house.answer(run)
    assert house.answer(runs[2]).tokens == alone(prompt(20, 2)).tokens
    assert house.batcher.stats().failed_steps == 1
    assert house.batcher.stats().buffer_bytes == 0


def test_a_long_prompt_does_not_stall_a_decoding_run():
    house = House(step_tokens=64)
    decoding = house.submit(prompt(5), max_tokens=12)
    house.step()
    house.submit(prompt(600, seed=1))
    house.finish()
    assert all(rows[0] == 1 and sum(rows) <= 64 for rows in house.model.steps[1:12])
    assert len(house.answer(decoding).tokens) == 12


# -- what is forgotten


def test_what_is_forgotten_is_attached_no_more_and_stored_no_more():
    house = House()
    members = (Member("cube-1", 20), Member("cube-2", 70))
    house.ask(prompt(100), members=members)
    running = house.submit(prompt(100) + prompt(300, seed=1), members=members)
    house.step()
    assert running.num_attached == 100
    assert house.batcher.forget({"cube-2"}, None) >= 2
    house.finish()
    assert house.answer(running)
    assert {block.start for block in house.pool.blocks()} == {0, 16, 32, 48}
    assert house.ask(prompt(100), members=members).usage.attached_exact == 64


def test_a_tenants_blocks_can_be_forgotten_together():
    house = House()
    house.ask(prompt(40), tenant="a", salt="a")
    house.ask(prompt(40), tenant="b", salt="b")
    running = house.submit(prompt(90, seed=2), tenant="a", salt="a")
    house.step()
    house.batcher.forget((), "a")
    house.finish()
    assert house.answer(running)
    assert set(house.pool.bytes_by_tenant) == {"b"}


# -- work that nobody waits for


def test_background_work_is_done_when_nothing_else_is_and_yields():
    house = House(max_running=1)
    build = house.submit(prompt(200), background=True)
    house.step()
    asked = house.submit(prompt(30, seed=1), max_tokens=3)
    house.step()
    assert build.buffer is None
    house.finish()
    assert house.answer(asked).tokens == alone(prompt(30, seed=1), max_tokens=3).tokens
    done = house.answer(build)
    assert done.usage.completion_tokens == 0
    assert done.usage.attached_exact + done.usage.prefilled == 200
    assert house.ask(prompt(200)).usage.attached_exact == 199


def test_a_request_does_not_wait_for_background_work_on_its_prefix():
    house = House()
    house.submit(prompt(300), background=True)
    house.step()
    asked = house.submit(prompt(300))
    house.step()
    assert house.model.steps[-1] == [64]
    house.finish()
    assert house.answer(asked).usage.attached_exact == 32


# -- what is counted


def test_stats_say_what_was_done():
    house = House()
    house.ask(prompt(64))
    house.ask([*prompt(64), 1, 2, 3])
    stats = house.batcher.stats()
    assert stats.attached_tokens == {"exact": 64}
    assert stats.prefilled_tokens == 64 + 3
    assert stats.generated_tokens == 16
    assert {kind: found.count for kind, found in stats.ttft_s.items()} == {"none": 1, "exact": 1}
    assert stats.pool_bytes == stats.bytes_by_tenant["a"] == house.pool.used_bytes > 0
    assert stats.finished == {"length": 2}
    assert (stats.running, stats.waiting, stats.background) == (0, 0, 0)
    assert stats.queue_s.count == 2


def test_inference_leaves_no_gradient_graph():
    house = House()
    house.ask(prompt(40))
    assert not any(block.kv_L2HND.requires_grad for block in house.pool.blocks())
    assert torch.is_grad_enabled()
