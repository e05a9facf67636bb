"""Examples as rows of tokens, with nothing padded and the system prompt read once a row.

A row is the chat's prefix (all that stands before a question) and behind it several segments that see
the prefix and themselves alone, each at the positions it would have behind the prefix by itself. A
segment of plain text sees itself alone, from position 0. So each segment computes what it would
compute in a row of its own; 20 questions of 35 tokens save 19 times the prefix.

Shape suffixes: T tokens of a row, K of them whose next token is learned.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memcube.chat.prompt import PromptBuilder
from memcube.errors import BadRequest
from memcube.parametric.dataset import Example
from memcube.parametric.packed_attention import Blocks, Span, lay_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """``ids[first:]`` is what is learned. ``is_chat`` segments stand behind the prefix."""

    ids: tuple[int, ...]
    first: int
    is_chat: bool

    @property
    def num_learned(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """``keep_K`` are the places whose logits are wanted; ``targets_K`` what follows there. The mask
    and the blocks say the same: who sees whom."""

    ids_1T: Tensor
    positions_1T: Tensor
    mask_11TT: Tensor
    blocks: Blocks
    keep_K: Tensor
    targets_K: Tensor

    def bias_11TT(self, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores; given as booleans each layer would make it anew."""
        bias = torch.zeros(self.mask_11TT.shape, dtype=dtype, device=self.mask_11TT.device)
        return bias.masked_fill_(~self.mask_11TT, torch.finfo(dtype).min)


class Encoder:
    """Questions and answers as the model's tokens, laid out as the chat lays them out."""

    def __init__(self, tokenizer: Any, *, system: str) -> None:
        self._tokenizer = tokenizer
        self._builder = PromptBuilder(tokenizer, system=system)
        if tokenizer.eos_token_id is None:
            raise BadRequest("its tokenizer names no token that ends an answer", "model.name")
        self._end = int(tokenizer.eos_token_id)
        self.prefix = _common(self.prompt("a"), self.prompt("b"), self.prompt("("))

    def prompt(self, question: str) -> tuple[int, ...]:
        """All tokens up to where the answer begins."""
        return tuple(self._builder.question(question))

    def segment(self, example: Example) -> Segment:
        """The example as a segment; of a plain text all but the first token is learned."""
        answer = self._answer(example)
        if example.question is None:
            return Segment(ids=answer, first=1, is_chat=False)
        question = self.prompt(example.question)[len(self.prefix) :]
        ids = (*question, *answer, self._end)
        return Segment(ids=ids, first=len(question), is_chat=True)

    def told(self, example: Example) -> Segment | None:
        """The example with its memories in the prompt, which stands in the segment whole: what is
        learned is the same answer. None if it has no memories."""
        if example.question is None or not example.memories:
            return None
        prompt = self._builder.question(example.question, example.memories)
        ids = (*prompt, *self._answer(example), self._end)
        return Segment(ids=ids, first=len(prompt), is_chat=False)

    def _answer(self, example: Example) -> tuple[int, ...]:
        text = self._builder.inert(example.answer)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(*rows: Sequence[int]) -> tuple[int, ...]:
    shared: list[int] = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return tuple(shared)


def pack(prefix: Sequence[int], segments: Iterable[Segment], device: torch.device) -> PackedRow:
    """One row of segments; the prefix is left out if none stands behind it."""
    segments = list(segments)
    has_chat = any(segment.is_chat for segment in segments)
    ids: list[int] = list(prefix) if has_chat else []
    positions = list(range(len(ids)))
    owner, sees_prefix = [0] * len(ids), [True] * len(ids)
    spans: list[Span] = []
    keep: list[int] = []
    targets: list[int] = []
    for number, segment in enumerate(segments, 1):
        start = len(ids)
        spans.append(Span(start, len(segment.ids), segment.is_chat))
        offset = len(prefix) if segment.is_chat else 0
        ids += segment.ids
        positions += range(offset, offset + len(segment.ids))
        owner += [number] * len(segment.ids)
        sees_prefix += [segment.is_chat] * len(segment.ids)
        keep += range(start + segment.first - 1, start + len(segment.ids) - 1)
        targets += segment.ids[segment.first :]
    owner_T = torch.tensor(owner)
    behind_T = torch.tensor(sees_prefix)
    same_TT = owner_T[:, None] == owner_T[None, :]
    prefix_TT = behind_T[:, None] & (owner_T == 0)[None, :]
    mask_TT = (same_TT | prefix_TT) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return PackedRow(
        ids_1T=torch.tensor([ids], device=device),
        positions_1T=torch.tensor([positions], device=device),
        mask_11TT=mask_TT[None, None].to(device),
        blocks=lay_out(len(prefix) if has_chat else 0, spans, device),
        keep_K=torch.tensor(keep, device=device),
        targets_K=torch.tensor(targets, device=device),
    )
