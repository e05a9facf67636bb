"""Requests, cancellations and deletions in random order, on a pool that is always too small."""

import random
from functools import cache

import pytest

from memcube.activation.blocks import BlockPool
from memcube.activation.contract import Member, Mode
from memcube.policies.retention import Retention
from tests.unit.activation.test_batcher import BLOCK, TOKEN_BYTES, alone, prompt
from tests.unit.activation.test_composed_runs import QUESTION, Composed, laid_out

TREE = [prompt(length, seed=80 + i) for i, length in enumerate((37, 64, 150))]


@cache
def expected(token_ids, max_tokens):
    return alone(token_ids, max_tokens=max_tokens).tokens


class Life:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.house = Composed(
            max_running=4, buffer_bytes=1200 * TOKEN_BYTES, step_tokens=48, build_wait_s=3.0
        )
        self.house.pool = self.house.batcher._pool = BlockPool(
            Retention(24 * BLOCK * TOKEN_BYTES), self.house.evicted.append
        )
        self.exact = {}
        self.gone = set()

    def ask(self):
        tokens = []
        for _ in range(self.random.randint(1, 2)):
            tokens += self.random.choice(TREE)
        tokens += prompt(self.random.choice((1, 2, 9)), seed=self.random.randint(0, 3))
        tenant = self.random.choice("ab")
        max_tokens = self.random.choice((1, 4, 20))
        members = (Member("cube", self.random.choice((0, 40))),)
        run = self.house.submit(
            tokens,
            tenant=tenant,
            salt=tenant,
            max_tokens=max_tokens,
            members=members,
            background=self.random.random() < 0.1,
        )
        self.exact[run] = (tuple(tokens), max_tokens)

    def compose(self):
        order = self.random.sample(range(3), self.random.randint(1, 3))
        self.house.start(order, mode=self.random.choice((Mode.BLEND, Mode.FAST)), group="talk")

    def follow_up(self):
        finished = [run for run in self.exact if run.done and run not in self.gone]
        if finished:
            run = self.random.choice(finished)
            tokens = (*run.tokens, 5, 6, 7)
            if len(tokens) < 500:
                tenant = run.request.tenant
                new = self.house.submit(tokens, tenant=tenant, salt=tenant, max_tokens=3)
                self.exact[new] = (tokens, 3)

    def cancel(self):
        runs = [run for run in self.house.pieces if not run.done]
        if runs:
            run = self.random.choice(runs)
            self.house.batcher.cancel(run)
            self.gone.add(run)

    def forget(self):
        cubes, tenant = self.random.choice(((("cube",), None), ((), "a"), (("cube-1",), None)))
        self.house.batcher.forget(cubes, tenant)
        blocks = self.house.pool.blocks()
        assert all(b.tenant != tenant and b.cubes.isdisjoint(cubes) for b in blocks)

    def step(self):
        self.house.step()
        self.house.clock.now += 0.5
        stats = self.house.batcher.stats()
        assert stats.buffer_bytes <= 1200 * TOKEN_BYTES
        assert stats.pool_bytes <= 24 * BLOCK * TOKEN_BYTES
        assert stats.running <= 4


@pytest.mark.parametrize("seed", range(4))
def test_exact_answers_are_right_whatever_else_happens(seed):
    life = Life(seed)
    acts = [life.ask] * 4 + [life.compose, life.follow_up, life.cancel] + [life.step] * 8
    for number in range(160):
        life.random.choice(acts)() if number % 40 != 39 else life.forget()
    life.house.finish()
    assert not life.house.errors
    answered = 0
    for run, (tokens, max_tokens) in life.exact.items():
        if run not in life.gone and not run.background:
            assert life.house.answer(run).tokens == expected(tokens, max_tokens)
            answered += 1
    assert answered > 10
    stats = life.house.batcher.stats()
    assert stats.buffer_bytes == 0
    assert stats.attached_tokens["exact"] > 0
    assert not life.house.batcher._builders
    ids, _, _ = laid_out([0])
    assert life.house.ask([*ids, *QUESTION]).tokens == list(expected((*ids, *QUESTION), 8))
