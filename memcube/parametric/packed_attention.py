"""Attention over packed rows, block by block.

In a packed row most pairs of tokens are hidden from each other. So each segment is attended to on its
own, over the prefix and itself: of SmolLM2 with 350 tokens in bfloat16 a layer, forward and back, takes
a quarter of what torch's attention with a mask takes.

Shape suffixes: T tokens of the row, S segments of a block, L and K their queries and keys, H query
heads, V heads of keys, G = H / V, D of one head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "memcube_blocks"
_HIDDEN = -1e9
# Segments shorter than this share of a block's longest go to the next block, as they'd be padded.
_SHORTER = 0.6


class Span(NamedTuple):
    """A segment's place in its row."""

    start: int
    length: int
    sees_prefix: bool


@dataclass(frozen=True, slots=True)
class _Block:
    """Segments of like length. Where one is shorter, its places point at token 0 and are hidden."""

    queries_SL: Tensor
    keys_SK: Tensor
    bias_S11LK: Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """A row's segments in blocks. ``back_T`` says where each token is among all blocks' queries."""

    blocks: tuple[_Block, ...]
    back_T: Tensor


def lay_out(prefix: int, spans: Sequence[Span], device: torch.device) -> Blocks:
    """The blocks of a row that begins with so many tokens of prefix."""
    own = [Span(0, prefix, sees_prefix=False)] if prefix else []
    left = sorted([*own, *spans], key=lambda span: -span.length)
    back = [0] * (prefix + sum(span.length for span in spans))
    blocks: list[_Block] = []
    place = 0
    while left:
        longest = left[0].length
        taken = [span for span in left if span.length >= _SHORTER * longest]
        left = left[len(taken) :]
        blocks.append(_block(prefix, taken, longest, device))
        for span in taken:
            back[span.start : span.start + span.length] = range(place, place + span.length)
            place += longest
    return Blocks(tuple(blocks), torch.tensor(back, device=device))


def _block(prefix: int, spans: Sequence[Span], longest: int, device: torch.device) -> _Block:
    queries_SL = torch.zeros(len(spans), longest, dtype=torch.long)
    keys_SK = torch.zeros(len(spans), prefix + longest, dtype=torch.long)
    seen_SLK = torch.zeros(len(spans), longest, prefix + longest, dtype=torch.bool)
    for row, (start, length, sees_prefix) in enumerate(spans):
        queries_SL[row, :length] = torch.arange(start, start + length)
        keys_SK[row, :prefix] = torch.arange(prefix)
        keys_SK[row, prefix : prefix + length] = queries_SL[row, :length]
        seen_SLK[row, :length, :prefix] = sees_prefix
        seen_SLK[row, :length, prefix : prefix + length] = torch.ones(
            length, length, dtype=torch.bool
        ).tril()
    bias_SLK = torch.zeros(seen_SLK.shape).masked_fill_(~seen_SLK, _HIDDEN)
    return _Block(queries_SL.to(device), keys_SK.to(device), bias_SLK[:, None, None].to(device))


@contextmanager
def attending(model: PreTrainedModel, *, in_blocks: bool) -> Iterator[None]:
    """Meanwhile the model attends in blocks where it is given ``memcube_blocks``, and else as before."""
    if not in_blocks:
        yield
        return
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "eager")


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    memcube_blocks: Blocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if memcube_blocks is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    num_heads, num_key_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    groups = num_heads // num_key_heads
    q_THD, k_TVD, v_TVD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = dim**-0.5 if scaling is None else scaling
    out: list[Tensor] = []
    for block in memcube_blocks.blocks:
        num, length = block.queries_SL.shape
        q_SLVGD = q_THD[block.queries_SL].view(num, length, num_key_heads, groups, dim)
        q_NQD = q_SLVGD.permute(0, 2, 3, 1, 4).reshape(num * num_key_heads, groups * length, dim)
        k_NKD, v_NKD = (
            x_TVD[block.keys_SK].transpose(1, 2).flatten(0, 1) for x_TVD in (k_TVD, v_TVD)
        )
        scores_NQK = torch.bmm(q_NQD, k_NKD.transpose(1, 2)).float() * scale
        scores_SVGLK = scores_NQK.view(num, num_key_heads, groups, length, -1) + block.bias_S11LK
        weights_NQK = scores_SVGLK.softmax(-1).to(value.dtype).view_as(scores_NQK)
        found_NQD = torch.bmm(weights_NQK, v_NKD)
        found_SVGLD = found_NQD.view(num, num_key_heads, groups, length, -1)
        out.append(found_SVGLD.permute(0, 3, 1, 2, 4).reshape(num * length, num_heads, -1))
    return torch.cat(out)[memcube_blocks.back_T][None], None
