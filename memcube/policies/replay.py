"""What a retention policy makes of a trace of requests.

The policy is driven as a medium drives it: the blocks at the beginning of a prompt that are here are hits,
up to the first that is missing; they are used last to first, and what is missing is offered first to last.
A block counts as hit only if all before it are: what the block hit ratio counts is prefill not done.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from memcube.policies.retention import Decision, Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt by the keys of its blocks, each of which stands for all text up to its end.

    ``conversation`` is empty where it isn't known. ``next_at_s`` is for an oracle's hint: when its next
    turn comes, None if none does.
    """

    at_s: float
    blocks: tuple[str, ...]
    conversation: str = ""
    next_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many blocks were asked for, and how many were there."""

    num_blocks: int
    num_hits: int

    @property
    def hit_ratio(self) -> float:
        return self.num_hits / self.num_blocks if self.num_blocks else 0.0


class Policy(Protocol):
    """What of a retention policy a replay needs."""

    def __contains__(self, key: str, /) -> bool: ...
    def hit(self, key: str, now: float) -> None: ...
    def admit(self, item: Item, now: float) -> Decision: ...
    def hint(
        self, group: str, probability: float | None, now: float, expected_at: float | None = None
    ) -> None: ...


def read_mooncake(path: Path) -> list[Request]:
    """The requests of a trace of Mooncake's form: lines of JSON with ``timestamp`` and ``hash_ids``.

    Conversations are found by ``with_conversations``.

    Raises:
        ValueError: a line is not of that form.
    """
    requests = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                blocks = tuple(map(str, row["hash_ids"]))
                requests.append(Request(at_s=row["timestamp"] / 1000, blocks=blocks))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no request of a trace: {error}"
                ) from error
    return with_conversations(requests)


def with_conversations(requests: Sequence[Request]) -> list[Request]:
    """Requests with the conversations that their blocks tell of.

    A request goes on with an earlier one that it contains, but for the last block, which need not have
    been full: the latest such. What others begin with too, such as a system prompt, doesn't count.
    """
    ends: dict[str, int] = {}
    """By the last full block of a request: the latest request that ends so."""
    found: list[Request] = []
    for number, request in enumerate(requests):
        earlier = next((ends[key] for key in reversed(request.blocks) if key in ends), None)
        if earlier is None:
            conversation = str(number)
        else:
            conversation = found[earlier].conversation
            found[earlier] = replace(found[earlier], next_at_s=request.at_s)
        found.append(replace(request, conversation=conversation, next_at_s=None))
        if len(request.blocks) > 2:
            ends[request.blocks[-2]] = number
    return found


Hints = Literal["none", "whether", "when"]
"""What an oracle tells a policy of a conversation's next turn."""


def replay(requests: Iterable[Request], policy: Policy, *, hints: Hints = "none") -> Replayed:
    """Drive a policy with a trace, whose blocks are all of one size, 1 byte.

    ``hints``: the policy is told at each request whether the conversation has a next turn, and when.
    """
    num_blocks = num_hits = 0
    for request, found in hits(requests, policy, hints=hints):
        num_blocks += len(request.blocks)
        num_hits += found
    return Replayed(num_blocks, num_hits)


def hits(
    requests: Iterable[Request], policy: Policy, *, hints: Hints = "none"
) -> Iterator[tuple[Request, int]]:
    """Each request of a trace, and how many of its first blocks a policy that it drives has."""
    for now, request in _timed(requests):
        blocks = request.blocks
        found = next((n for n, key in enumerate(blocks) if key not in policy), len(blocks))
        for key in reversed(blocks[:found]):
            policy.hit(key, now)
        if hints != "none" and request.conversation:
            next_at = request.next_at_s
            expected_at = next_at if hints == "when" else None
            policy.hint(request.conversation, float(next_at is not None), now, expected_at)
        parent = blocks[found - 1] if found else None
        for key in blocks[found:]:
            item = Item(
                key=key,
                num_bytes=1,
                tenant="",
                group=request.conversation,
                saves_s=1.0,
                load_s=0.0,
                parent=parent,
            )
            policy.admit(item, now)
            parent = key
        yield request, found


def _timed(requests: Iterable[Request]) -> Iterator[tuple[float, Request]]:
    """Each request with a time of its own."""
    now = -math.inf
    for request in requests:
        now = max(request.at_s, math.nextafter(now, math.inf))
        yield now, request
