"""Traces made up, one for each way in which blocks are used again. Each is the same for the same seed."""

import heapq
import random
from bisect import bisect
from collections.abc import Callable
from itertools import accumulate, count

from memcube.policies.replay import Request


def zipf(num: int, *, num_keys: int = 20_000, skew: float = 0.9, seed: int = 0) -> list[Request]:
    """Single blocks, some far more popular than others, and always the same."""
    rng = random.Random(seed)
    pick = _popular(rng, num_keys, skew)
    return [_single(n, f"z{pick()}") for n in range(num)]


def drift(num: int, *, num_keys: int = 5_000, every: int = 20, seed: int = 0) -> list[Request]:
    """As ``zipf``, but what is popular is replaced bit by bit: what was used often is soon worthless."""
    rng = random.Random(seed)
    pick = _popular(rng, num_keys, 0.8)
    return [_single(n, f"d{pick() + n // every}") for n in range(num)]


def loop(num: int, *, length: int = 8_000) -> list[Request]:
    """The same blocks in the same order, again and again: where they don't fit, LRU has no hit."""
    return [_single(n, f"l{n % length}") for n in range(num)]


def scans(num: int, *, seed: int = 0) -> list[Request]:
    """As ``zipf``, with long stretches of blocks between that are used once."""
    rng = random.Random(seed)
    popular = zipf(num, seed=seed)
    once = count()
    out: list[Request] = []
    while len(out) < num:
        out += popular[len(out) : len(out) + rng.randrange(200, 4_000)]
        out += [_single(0, f"o{next(once)}") for _ in range(rng.randrange(200, 4_000))]
    return _retimed(out[:num])


def recent(
    num: int, *, mean_depth: float = 1_500, p_new: float = 0.3, seed: int = 0
) -> list[Request]:
    """The more recent the likelier to be used again, and nothing else: LRU is best."""
    rng = random.Random(seed)
    history: list[str] = []
    for n in range(num):
        depth = int(rng.expovariate(1 / mean_depth)) + 1
        is_new = rng.random() < p_new or depth > len(history)
        history.append(f"r{n}" if is_new else history[-depth])
    return [_single(n, key) for n, key in enumerate(history)]


def chats(
    num: int,
    *,
    per_s: float = 1.0,
    think_s: float = 120.0,
    spread: float = 1.0,
    goes_on: float = 0.7,
    num_systems: int = 3,
    seed: int = 0,
) -> list[Request]:
    """Conversations of several turns behind a few system prompts.

    The time between two turns is lognormal: ``think_s`` is its median, ``spread`` its sigma.
    """
    rng = random.Random(seed)
    waiting: list[tuple[float, int, list[str]]] = []
    system = _popular(rng, num_systems, 1.0)
    names = count()
    out: list[Request] = []
    start_s = 0.0
    while len(out) < num:
        start_s += rng.expovariate(per_s)
        prompt = [f"s{system()}"]
        heapq.heappush(waiting, (start_s, next(names), prompt))
        while waiting and waiting[0][0] <= start_s:
            at_s, name, blocks = heapq.heappop(waiting)
            # The last block of a turn isn't full, and is another one in the next.
            full = [*blocks, *(f"c{next(names)}" for _ in range(_size(rng)))]
            out.append(Request(at_s=at_s, blocks=(*full, f"c{next(names)}")))
            if rng.random() < goes_on:
                again_s = at_s + think_s * rng.lognormvariate(0.0, spread)
                heapq.heappush(waiting, (again_s, name, full))
    return out[:num]


def tools(num: int, *, num_tools: int = 400, seed: int = 0) -> list[Request]:
    """Long instructions, of which some are far more popular, and before each question one of them."""
    rng = random.Random(seed)
    pick = _popular(rng, num_tools, 1.0)
    lengths = [2 + _size(rng) for _ in range(num_tools)]
    names = count()
    out = []
    for n in range(num):
        tool = pick()
        blocks = [f"t{tool}.{at}" for at in range(lengths[tool])]
        blocks += [f"q{next(names)}" for _ in range(_size(rng))]
        out.append(Request(at_s=float(n), blocks=tuple(blocks)))
    return out


def phases(num: int, *, seed: int = 0) -> list[Request]:
    """Three of the above, one after the other: what was learnt is wrong twice."""
    part = num // 3
    return _retimed(
        [
            *loop(part, length=3_000),
            *recent(part, seed=seed),
            *zipf(num - 2 * part, num_keys=5_000, seed=seed),
        ]
    )


SHAPES: dict[str, Callable[[int], list[Request]]] = {
    "zipf": zipf,
    "drift": drift,
    "loop": loop,
    "scans": scans,
    "recent": recent,
    "chats": lambda num: chats(num // 20),
    "chats, long thinking": lambda num: chats(num // 20, think_s=600, spread=1.5),
    "chats, prompt": lambda num: chats(num // 20, think_s=30, spread=0.3, goes_on=0.85),
    "tools": lambda num: tools(num // 12),
    "phases": phases,
}
"""Traces of about so many blocks, by name."""


def _single(n: int, key: str) -> Request:
    return Request(at_s=float(n), blocks=(key,))


def _retimed(requests: list[Request]) -> list[Request]:
    return [Request(at_s=float(n), blocks=one.blocks) for n, one in enumerate(requests)]


def _size(rng: random.Random) -> int:
    """How many blocks a turn adds."""
    return min(1 + int(rng.lognormvariate(1.0, 1.0)), 100)


def _popular(rng: random.Random, num: int, skew: float) -> Callable[[], int]:
    """Picks numbers up to ``num``, the n-th as often as n to the power of ``-skew``."""
    totals = list(accumulate((n + 1) ** -skew for n in range(num)))
    return lambda: bisect(totals, rng.random() * totals[-1], hi=num - 1)
