"""Eight requests at once on four memories, against one at a time: tokens a second, same tokens.

Two requests ask about each of four memories of about 500 tokens, whose KV is stored, and get 32
greedy tokens each. Both ways are run by the same engine, in turns, on one thread. As the machine is
shared, the rates are by CPU time, and by the clock beside it.
"""

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Figure
from memcube.activation.contract import GenerateRequest
from memcube.activation.engine import Engine, EngineLimits
from memcube.activation.forward import PackedModel
from memcube.activation.models import LoadedModel, load_model
from memcube.config import ModelConfig
from memcube.policies.retention import Retention

_ROUNDS = 2
_ANSWER_TOKENS, _SHORT_ANSWER_TOKENS = 32, 8
_QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Name two things that happen here.",
)
_WORDS = [
    "the",
    "a",
    "my",
    "we",
    "they",
    "moved",
    "to",
    "Oslo",
    "in",
    "May",
    "and",
    "then",
    "again",
    "bought",
    "green",
    "tea",
    "for",
    "their",
    "old",
    "dog",
    "because",
    "it",
    "was",
    "cold",
    "outside",
    "yesterday",
    "she",
    "said",
    "that",
    "he",
    "likes",
    "music",
    "more",
    "than",
    "long",
    "walks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """What one way of asking took and gave."""

    cpu_s: float
    wall_s: float
    answers: list[tuple[int, ...]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))


def run(cache_dir: Path, *, short: bool = False) -> list[Figure]:
    """The figures, about two minutes on one core; in short, of shorter answers, one."""
    loaded = load_model(ModelConfig(dtype="float32", device="cpu", threads=1), cache_dir)
    answer_tokens = _SHORT_ANSWER_TOKENS if short else _ANSWER_TOKENS
    return asyncio.run(measure(loaded, answer_tokens=answer_tokens))


async def measure(loaded: LoadedModel, *, answer_tokens: int = _ANSWER_TOKENS) -> list[Figure]:
    """The figures of a model on the CPU."""
    requests = _requests(loaded, answer_tokens)
    engine = Engine(
        PackedModel(loaded),
        loaded,
        policy=Retention(1 << 30),
        limits=EngineLimits(max_running=len(requests)),
    )
    try:
        await _one_by_one(engine, requests)  # stores the memories' KV
        single, together = [], []
        for _ in range(_ROUNDS):
            single.append(await _one_by_one(engine, requests))
            together.append(await _at_once(engine, requests))
    finally:
        await engine.close()
    one, eight = (min(rounds, key=lambda found: found.cpu_s) for rounds in (single, together))
    same = all(found.answers == one.answers for found in (*single, *together))
    by_clock = min(r.wall_s for r in single) / min(r.wall_s for r in together)
    return [
        Figure(
            name="batch of 8 on 4 memories: speed-up in tokens per CPU-second",
            value=one.cpu_s / eight.cpu_s,
            unit="x",
            goal=">= 2.5",
            beside=f"{by_clock:.2f} x by the clock",
        ),
        Figure(
            name="batch of 8 on 4 memories: tokens per CPU-second",
            value=eight.num_tokens / eight.cpu_s,
            unit="/s",
            beside=f"one at a time {one.num_tokens / one.cpu_s:.1f} /s",
        ),
        Figure(
            name="batch of 8 on 4 memories: answers equal to those one at a time",
            value=float(same),
            unit="",
            goal=">= 1",
        ),
    ]


def _requests(loaded: LoadedModel, answer_tokens: int) -> list[GenerateRequest]:
    requests = []
    for number in range(4):
        words = random.Random(number).choices(_WORDS, k=470)
        for question in _QUESTIONS:
            messages = [
                {"role": "system", "content": " ".join(words)},
                {"role": "user", "content": question},
            ]
            text = loaded.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            requests.append(
                GenerateRequest(
                    prompt_ids=tuple(loaded.tokenizer.encode(str(text))),
                    tenant="bench",
                    salt="bench",
                    max_tokens=answer_tokens,
                    stop_ids=frozenset(),
                )
            )
    return requests


async def _one_by_one(engine: Engine, requests: list[GenerateRequest]) -> _Round:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    answers = [await _answer(engine, request) for request in requests]
    return _Round(
        cpu_s=time.process_time() - cpu_s, wall_s=time.perf_counter() - wall_s, answers=answers
    )


async def _at_once(engine: Engine, requests: list[GenerateRequest]) -> _Round:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    answers = await asyncio.gather(*(_answer(engine, request) for request in requests))
    return _Round(
        cpu_s=time.process_time() - cpu_s, wall_s=time.perf_counter() - wall_s, answers=answers
    )


async def _answer(engine: Engine, request: GenerateRequest) -> tuple[int, ...]:
    return tuple([token async for piece in engine.generate(request) for token in piece.token_ids])
