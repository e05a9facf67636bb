"""Segments of memories whose KV is built apart and attached together, in any order.

A segment is built behind the prefix that all prompts share, which is then cut off: without it the
first token takes the attention that belongs to the prompt's beginning, and the KV is worse than
none (KL to a full prefill 0.18, and 0.05 with it). Its keys lose their positions. When it is
attached they are rotated to the slots that it takes.

What is missing then is what the later segments would have read in those before them. ``choose``
finds the tokens where that matters: those that the question takes most from, by one pass of the
question alone over what is attached, and the first few of each segment. They are computed again,
together with the question, with all before them in sight. The first segment stands where it was
built, so it is exact. Measured in ``benchmarks.kv_ladder``.

Models whose keys can't be moved are refused by ``rope.compose_refusal``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from memcube.activation.forward import KvBuffer, Row, RowModel
from memcube.activation.rope import Rope

BLEND_SHARE = 0.25
"""Of the attached tokens, how many are computed again. On 9 cases of other seeds than the benchmark's
SmolLM2 so recalls 95% of what it recalls after a full prefill, 90% at a share of 0.2; at 0.15 KL and top-1
still pass, and the facts don't always."""
FIRST_TOKENS = 4
"""Of each later segment, computed again in any case."""
QUERY_TOKENS = 64
"""Of what follows the memories, the last so many say which tokens matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """KV of these tokens, keys un-rotated, built behind a prefix of ``num_prefix`` tokens."""

    token_ids: tuple[int, ...]
    kv_L2HND: Tensor
    num_prefix: int


class Place(NamedTuple):
    """The slots of an attached segment, and whether its KV is what a full prefill gives."""

    start: int
    end: int
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What was attached to a buffer, one place after the other."""

    token_ids: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def start(self) -> int:
        return self.places[0].start

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def token_at(self, slot: int) -> int:
        return self.token_ids[slot - self.start]


class Composer:
    """Builds segments and composes them, for one model. For the thread that computes."""

    def __init__(self, model: RowModel, rope: Rope) -> None:
        self._model = model
        self._rope = rope

    def build(self, prefix: KvBuffer, token_ids: Sequence[int]) -> Segment:
        """A segment behind a prefix, which stays as it is."""
        buffer = KvBuffer(self._model.layout, self._model.device, prefix.length + len(token_ids))
        buffer.load(prefix.view(), 0)
        self._model.forward([Row(buffer, token_ids, logits="none")])
        return self.cut(buffer, prefix.length, token_ids)

    def cut(self, buffer: KvBuffer, start: int, token_ids: Sequence[int]) -> Segment:
        """The segment that these tokens make, computed by anyone at the slots from ``start`` on."""
        slots = range(start, start + len(token_ids))
        kv_L2HND = self._rope.unrotate(buffer.view()[:, :, :, slots.start : slots.stop], slots)
        return Segment(token_ids=tuple(token_ids), kv_L2HND=kv_L2HND, num_prefix=start)

    def attach(self, buffer: KvBuffer, segments: Sequence[Segment]) -> Composition:
        """Copy segments into the next slots. The buffer begins with the prefix they were built
        behind; the caller sees to that, by their keys.

        Raises:
            ValueError: no segments.
        """
        if not segments:
            raise ValueError("nothing to attach")
        token_ids: list[int] = []
        places: list[Place] = []
        for segment in segments:
            start = buffer.length
            end = start + len(segment.token_ids)
            buffer.load(self._rope.rotate(segment.kv_L2HND, range(start, end)), start)
            token_ids += segment.token_ids
            places.append(Place(start, end, start == segment.num_prefix))
        return Composition(token_ids=tuple(token_ids), places=tuple(places))

    def choose(
        self,
        buffer: KvBuffer,
        composition: Composition,
        query_ids: Sequence[int],
        share: float = BLEND_SHARE,
        *,
        num_first: int = FIRST_TOKENS,
    ) -> list[int]:
        """The slots to compute again, ascending: at most ``share`` of the attached tokens.

        One pass of the last ``QUERY_TOKENS`` of the query over the buffer, which must end with
        the composition; its length stays.
        """
        budget = int(share * composition.num_tokens)
        inexact = [place for place in composition.places if not place.exact]
        if not budget or not inexact:
            return []
        first = [s for place in inexact for s in range(place.start, place.end)[:num_first]][:budget]
        taken_N = self._model.taken(Row(buffer, query_ids[-QUERY_TOKENS:]))
        eligible_N = torch.zeros_like(taken_N, dtype=torch.bool)
        for place in inexact:
            eligible_N[place.start : place.end] = True
        eligible_N[first] = False
        worth_N = torch.where(eligible_N, taken_N, -1.0)
        most = min(budget - len(first), int(eligible_N.sum()))
        return sorted([*first, *worth_N.topk(most).indices.tolist()])

    def row(
        self,
        buffer: KvBuffer,
        composition: Composition,
        chosen: Sequence[int],
        query_ids: Sequence[int],
        logits: Literal["last", "all", "none"] = "last",
    ) -> Row:
        """One row that computes the chosen slots again and the query, which sees them, behind."""
        end = buffer.length
        return Row(
            buffer,
            [*(composition.token_at(slot) for slot in chosen), *query_ids],
            [*chosen, *range(end, end + len(query_ids))],
            logits,
        )
