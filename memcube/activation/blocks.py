"""The device's pool of KV blocks, shared by all requests.

A block holds the KV of some tokens at fixed slots behind one fixed prefix: its key says which. Most
are links of a chain, of the same number of tokens each, and at its end a shorter one, its tail. As
no token sees those behind it, the beginning of a block serves as well as all of it: ``continuing``
finds the block that goes on as a prompt does for longest. A segment of memories is a block that
stands alone. Its tensor is a copy that is never written again: a request copies it into its own
buffer. What stays and what goes is the retention policy's choice; the pool counts the bytes and
hands on what was evicted. It belongs to one thread, the one that computes.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memcube.policies.retention import Decision, Item


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """KV of ``num_tokens`` tokens at slots from ``start`` on, keys rotated to them.

    ``parent`` is the block before it in its chain, or the chain's root; a segment has none.
    ``cubes`` are those whose text is in it or before it, and the adapter that it was built with, by
    name; ``saves_s`` is about what it takes to compute
    it again.
    """

    key: str
    start: int
    kv_L2HND: Tensor
    tenant: str
    group: str
    cubes: frozenset[str]
    saves_s: float
    parent: str | None = None
    token_ids: tuple[int, ...] = ()
    is_tail: bool = False

    @property
    def num_tokens(self) -> int:
        return self.kv_L2HND.shape[3]

    @property
    def is_segment(self) -> bool:
        """Whether it stands alone, so that it serves at any place behind its prefix."""
        return self.parent is None

    @property
    def num_bytes(self) -> int:
        return self.kv_L2HND.numel() * self.kv_L2HND.element_size()


class Place(NamedTuple):
    """A block that is wanted, and the slot of its first token."""

    key: str
    start: int


class Lower(Protocol):
    """The media below the device. All calls block, and come one at a time from one thread."""

    def offer(self, blocks: Sequence[Block]) -> None:
        """Blocks that left the device. What isn't worth its bytes may be dropped."""
        ...

    def fetch(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        """Of the blocks wanted those at hand, as kv_L2HND with keys rotated to their slots."""
        ...

    def forget(self, cubes: Collection[str], tenant: str | None) -> None:
        """Drop all that holds one of these cubes, and all of a tenant."""
        ...


class RetentionPolicy(Protocol):
    """Which blocks stay; see ``memcube.policies.retention``."""

    def hit(self, key: str, now: float) -> None: ...
    def admit(self, item: Item, now: float) -> Decision: ...
    def forget(self, key: str) -> None: ...
    def pin(self, key: str) -> None: ...
    def unpin(self, key: str) -> None: ...
    def hint(
        self, group: str, probability: float | None, now: float, expected_at: float | None = None
    ) -> None: ...


_MAX_LOOKED_AT = 64
"""Of the blocks behind one parent that begin with the same token, so many are compared."""


class BlockPool:
    """Blocks by key, within what the policy admits."""

    def __init__(
        self, policy: RetentionPolicy, evicted: Callable[[Block], None] = lambda block: None
    ) -> None:
        self._policy = policy
        self._evicted = evicted
        self._blocks: dict[str, Block] = {}
        self._followers: defaultdict[tuple[str, int], dict[str, None]] = defaultdict(dict)
        """Keys by parent and first token, those put last last."""
        self.bytes_by_tenant: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()
        """Blocks that left, or were not let in, by reason."""

    def __contains__(self, key: str) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        return sum(self.bytes_by_tenant.values())

    def put(self, block: Block, now: float) -> bool:
        """Take a copy of a block in, if the policy lets it; its tensor may be a view of a buffer.

        Idempotent: a key that is here stays as it is.
        """
        if block.key in self._blocks:
            return True
        item = Item(
            key=block.key,
            num_bytes=block.num_bytes,
            tenant=block.tenant,
            group=block.group,
            saves_s=block.saves_s,
            load_s=0.0,
            parent=block.parent,
        )
        decision = self._policy.admit(item, now)
        for key in decision.victims:
            victim = self._blocks[key]
            self._remove(victim, decision.reason)
            self._evicted(victim)
        if not decision.admitted:
            self.evictions[f"refused: {decision.reason}"] += 1
            return False
        try:
            copy_L2HND = block.kv_L2HND.clone(memory_format=torch.contiguous_format)
        except RuntimeError:  # no memory
            self._policy.forget(block.key)
            raise
        self._blocks[block.key] = replace(block, kv_L2HND=copy_L2HND)
        self.bytes_by_tenant[block.tenant] += block.num_bytes
        if block.parent is not None:
            followers = self._followers[block.parent, block.token_ids[0]]
            for key in [key for key in followers if self._is_part(self._blocks[key], block)]:
                self._drop(self._blocks[key], "superseded")
            followers[block.key] = None
            # What was dropped may have been the last: then the entry is gone.
            self._followers[block.parent, block.token_ids[0]] = followers
        return True

    def continuing(self, parent: str, token_ids: Sequence[int]) -> tuple[Block, int] | None:
        """The block behind a parent that begins as these tokens do, and how many it shares."""
        if not token_ids:
            return None
        best = None
        followers = self._followers.get((parent, token_ids[0]), {})
        for key in itertools.islice(reversed(followers), _MAX_LOOKED_AT):
            block = self._blocks[key]
            shared = _num_shared(block.token_ids, token_ids)
            if best is None or shared > best[1]:
                best = block, shared
        return best

    def hit(self, keys: Sequence[str], now: float) -> None:
        """Count a use of the blocks of one chain, first to last."""
        # The last first: a chain is of no use without its beginning, which so is the most recent.
        for key in reversed(keys):
            self._policy.hit(key, now)

    @contextmanager
    def held(self, keys: Iterable[str]) -> Iterator[list[Block]]:
        """The blocks of these keys up to the first that isn't here, kept from eviction meanwhile."""
        blocks: list[Block] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            self._policy.pin(key)
            blocks.append(block)
        try:
            yield blocks
        finally:
            for block in blocks:
                self._policy.unpin(block.key)

    def hint(
        self, group: str, probability: float | None, now: float, expected_at: float | None = None
    ) -> None:
        """How likely a group (a conversation) goes on, and when; None takes an earlier hint back."""
        self._policy.hint(group, probability, now, expected_at)

    def forget(self, cubes: Collection[str], tenant: str | None, reason: str) -> int:
        """Drop all blocks that hold one of these cubes, and all of a tenant. Nothing goes below."""
        gone = [
            block
            for block in self._blocks.values()
            if block.tenant == tenant or not block.cubes.isdisjoint(cubes)
        ]
        for block in gone:
            self._drop(block, reason)
        return len(gone)

    def blocks(self) -> list[Block]:
        """All blocks, those put first first."""
        return list(self._blocks.values())

    def _is_part(self, block: Block, other: Block) -> bool:
        return other.token_ids[: block.num_tokens] == block.token_ids

    def _drop(self, block: Block, reason: str) -> None:
        self._policy.forget(block.key)
        self._remove(block, reason)

    def _remove(self, block: Block, reason: str) -> None:
        del self._blocks[block.key]
        if block.parent is not None:
            followers = self._followers[block.parent, block.token_ids[0]]
            del followers[block.key]
            if not followers:
                del self._followers[block.parent, block.token_ids[0]]
        self.evictions[reason] += 1
        self.bytes_by_tenant[block.tenant] -= block.num_bytes
        if not self.bytes_by_tenant[block.tenant]:
            del self.bytes_by_tenant[block.tenant]


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
