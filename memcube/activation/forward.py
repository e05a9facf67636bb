"""One operation for prefill, chunked prefill, decode and selective recompute.

The tokens of all rows are packed into one call of shape (1, T). An attention function registered
with transformers writes each layer's new keys and values into the buffer of their row, at their
slots, and lets each query see the slots of its own row up to its own. So there is no padding, no
row sees another, and tokens in the middle of a buffer can be computed again.

It serves models whose attention goes through transformers' interface and is causal, whole or in a
sliding window, which ``PackedModel`` checks when it is made. Slot i of a buffer holds position i.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from memcube.activation.layout import KvLayout
from memcube.activation.lora import LoraAdapter, LoraGroup, LoraLayers
from memcube.activation.models import LoadedModel
from memcube.errors import BadRequest

_NAME = "memcube_packed"
_UNSUPPORTED = {"softcap": "soft-capped", "s_aux": "with sinks", "position_bias": "biased"}
_CHECKED_TOKENS = 5
_ROUND_SLOTS = 512


class KvBuffer:
    """One sequence's own keys and values on the device, keys rotated to their slots."""

    def __init__(self, layout: KvLayout, device: torch.device | str, capacity: int = 0) -> None:
        self.layout = layout
        self.device = torch.device(device)
        self.length = 0
        self._kv_L2HND = self._allocate(capacity)

    @property
    def capacity(self) -> int:
        """Slots that can be filled before the buffer must grow."""
        return self._kv_L2HND.shape[3]

    @property
    def num_bytes(self) -> int:
        """What the buffer takes, unused slots included."""
        return self.capacity * self.layout.bytes_per_token

    def view(self) -> Tensor:
        """The valid slots as kv_L2HND: a view, valid until the buffer grows."""
        return self._kv_L2HND[:, :, :, : self.length]

    def load(self, kv_L2HND: Tensor, start: int) -> None:
        """Copy keys (rotated to these slots) and values into the slots from ``start`` on.

        Raises:
            ValueError: a shape that doesn't fit, or a gap before ``start``.
        """
        num_tokens = kv_L2HND.shape[3]
        if kv_L2HND.shape != self.layout.shape(num_tokens):
            raise ValueError(f"KV of shape {tuple(kv_L2HND.shape)} for {self.layout}")
        if not 0 <= start <= self.length:
            raise ValueError(f"slot {start} leaves a gap: {self.length} are filled")
        self.reserve(start + num_tokens)
        self._kv_L2HND[:, :, :, start : start + num_tokens].copy_(kv_L2HND)
        self.length = max(self.length, start + num_tokens)

    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't cut {self.length} slots to {length}")
        self.length = length

    def reserve(self, num_slots: int) -> None:
        """Make room for so many slots, by doubling at least."""
        if num_slots <= self.capacity:
            return
        grown_L2HND = self._allocate(max(num_slots, 2 * self.capacity))
        grown_L2HND[:, :, :, : self.length].copy_(self.view())
        self._kv_L2HND = grown_L2HND

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, all slots: views of shape (H, capacity, D)."""
        kv_2HND = self._kv_L2HND[index]
        return kv_2HND[0], kv_2HND[1]

    def _allocate(self, capacity: int) -> Tensor:
        # An inference tensor could not be written outside of inference mode.
        with torch.inference_mode(False):
            shape = self.layout.shape(capacity)
            return torch.empty(shape, dtype=self.layout.torch_dtype, device=self.device)


class BufferPool:
    """Buffers that are used again, as new memory costs three times the copying into it.

    For one thread. What an earlier user left lies behind the length, where no token sees it.
    """

    def __init__(self, layout: KvLayout, device: torch.device | str, max_bytes: int) -> None:
        """``max_bytes`` bounds what is kept for later; any number may be in use."""
        self._layout = layout
        self._device = torch.device(device)
        self._max_bytes = max_bytes
        self._free: list[KvBuffer] = []

    @property
    def num_bytes(self) -> int:
        """What is kept for later."""
        return sum(buffer.num_bytes for buffer in self._free)

    def take(self, capacity: int) -> KvBuffer:
        """An empty buffer with room for so many slots: the smallest that is kept, or a new one."""
        fitting = [buffer for buffer in self._free if buffer.capacity >= capacity]
        if not fitting:
            return KvBuffer(self._layout, self._device, -(-capacity // _ROUND_SLOTS) * _ROUND_SLOTS)
        buffer = min(fitting, key=lambda buffer: buffer.capacity)
        self._free.remove(buffer)
        return buffer

    def give(self, buffer: KvBuffer) -> None:
        """Take a buffer back, which nobody uses any more. Those kept longest go first."""
        buffer.truncate(0)
        self._free.append(buffer)
        while self.num_bytes > self._max_bytes:
            del self._free[0]


@dataclass(slots=True)
class Row:
    """What one sequence contributes to one forward.

    ``positions`` None are the next slots. Given, they ascend; those that are filled already are
    overwritten, and those that are not follow on without a gap. ``logits`` says of which tokens
    the next-token logits are wanted. ``adapter`` changes this row alone; rows of one adapter stand
    side by side best.
    """

    buffer: KvBuffer
    token_ids: Sequence[int]
    positions: Sequence[int] | None = None
    logits: Literal["last", "all", "none"] = "last"
    adapter: LoraAdapter | None = None


class RowModel(Protocol):
    """What computes rows; see ``PackedModel``."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def device(self) -> torch.device: ...
    def forward(self, rows: Sequence[Row]) -> list[Tensor | None]: ...
    def taken(self, row: Row) -> Tensor: ...


class PackedModel:
    """A model that computes ragged rows, each over its own buffer. For one thread at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Takes the model over: its own attention is replaced.

        Raises:
            BadRequest: its attention can't be served in this way.
        """
        self.layout = loaded.layout
        self.model: PreTrainedModel = loaded.model
        self.device: torch.device = self.model.device
        self.lora = LoraLayers(self.model)
        if self.model.config._attn_implementation != _NAME:
            self._check(loaded.name)
            if self.device.type == "cpu":
                _lay_out(self.model)

    def forward(self, rows: Sequence[Row]) -> list[Tensor | None]:
        """Compute the rows' tokens; their keys and values are in the buffers afterwards.

        After an error the buffers keep their lengths, but slots below may be half overwritten.

        Returns:
            float32 logits of shape (1, V), (tokens, V) or None for each row, as it asked.

        Raises:
            ValueError: no tokens, or positions that leave a gap. Nothing was computed.
        """
        spans = _spans(rows)
        keep = [index for span in spans for index in span.wanted]
        output = self._run(spans, keep)
        logits_KV = output.logits[0].float()
        taken = 0
        answers: list[Tensor | None] = []
        for span in spans:
            span.row.buffer.length = max(span.row.buffer.length, span.num_keys)
            num_wanted = len(span.wanted)
            answers.append(logits_KV[taken : taken + num_wanted] if num_wanted else None)
            taken += num_wanted
        return answers

    def first_layers(self, row: Row, num_layers: int) -> None:
        """Compute keys and values of the first layers only, at the cost of one layer less.

        The buffer's layout may be cut to these layers.
        """
        spans = _spans([row])
        try:
            self._run(spans, [], last_layer=num_layers - 1)
        except _Enough:
            row.buffer.length = max(row.buffer.length, spans[0].num_keys)

    def taken(self, row: Row) -> Tensor:
        """What the row's tokens take from each filled slot: attention weight times the length of
        the value, summed over tokens, heads and layers. float32, of shape (filled slots,).

        The buffer keeps its length; what lies behind it is overwritten.
        """
        taken_N = torch.zeros(row.buffer.length, device=self.device)
        self._run(_spans([row]), [], taken_N=taken_N)
        return taken_N

    @torch.inference_mode()
    def _run(
        self,
        spans: "list[_Span]",
        keep: list[int],
        *,
        last_layer: int | None = None,
        taken_N: Tensor | None = None,
    ) -> Any:
        ids = [token for span in spans for token in span.row.token_ids]
        positions = [position for span in spans for position in span.positions]
        # One transfer to the device for both.
        ids_2T = torch.tensor([ids, positions], dtype=torch.long).to(self.device)
        with self.lora.applied(_groups(spans), len(ids)):
            return self.model(
                input_ids=ids_2T[:1],
                position_ids=ids_2T[1:],
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self.device),
                memcube_packed=_Packed(spans, last_layer, taken_N),
            )

    def _check(self, name: str) -> None:
        """That two packed rows give what each gives alone by the model's own attention."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        ids_2T = torch.arange(2 * _CHECKED_TOKENS).reshape(2, -1) * 7919 % vocabulary
        with torch.inference_mode():
            expected_2TV = self.model(input_ids=ids_2T.to(self.device), use_cache=False).logits
        AttentionInterface.register(_NAME, _attend)
        self.model.set_attn_implementation(_NAME)
        rows = [
            Row(KvBuffer(self.layout, self.device), ids, logits="all") for ids in ids_2T.tolist()
        ]
        found_2TV = torch.stack([cast(Tensor, logits_TV) for logits_TV in self.forward(rows)])
        expected_2TV = expected_2TV.float()
        off = (found_2TV - expected_2TV).abs().mean() / expected_2TV.abs().mean().clamp_min(1e-6)
        if off > (1e-3 if self.layout.dtype == "float32" else 5e-2):
            raise BadRequest(
                f"{name} computes its attention in a way of its own; it can't be served",
                "model.name",
            )


def _lay_out(model: PreTrainedModel) -> None:
    """Keep the linear layers' float32 weights transposed: their values and shapes stay.

    On a CPU a step of some tokens is then faster: of SmolLM2 over 500 slots, 8 rows of one token
    134 CPU-ms instead of 161, a row of 30 tokens 129 instead of 150; one token, or 256, as before.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.dtype is torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()


class _Enough(Exception):
    """The layers that were wanted are done. Never leaves this module."""


@dataclass(slots=True)
class _Span:
    """A row's place among the packed tokens. ``start`` is the first of its tokens there.

    ``num_keys`` slots are seen by its last token. ``slots`` is a slice where the row's positions
    are one run, as copying is then faster.
    """

    row: Row
    start: int
    positions: Sequence[int]
    wanted: Sequence[int]
    slots: "slice | Tensor"
    num_keys: int
    masks: dict[tuple[int, int | None, int], Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def is_run(self) -> bool:
        return isinstance(self.slots, slice)

    def mask(
        self, groups: int, window: int | None, dtype: torch.dtype, first_slot: int = 0
    ) -> Tensor:
        """0 at the slots that a token sees, -inf at others, from a first slot on; repeated for the
        query heads of a key head. Additive, as a boolean one is made so anew in each layer."""
        found = self.masks.get((groups, window, first_slot))
        if found is None:
            device = self.row.buffer.device
            query_T1 = torch.tensor(self.positions, device=device)[:, None]
            slot_1N = torch.arange(first_slot, self.num_keys, device=device)[None]
            hidden_TN = slot_1N > query_T1
            if window is not None:
                hidden_TN |= slot_1N <= query_T1 - window
            found = torch.zeros(hidden_TN.shape, dtype=dtype, device=device)
            found = found.masked_fill_(hidden_TN, -torch.inf).repeat(groups, 1)
            self.masks[groups, window, first_slot] = found
        return found


@dataclass(slots=True)
class _Packed:
    spans: list[_Span]
    last_layer: int | None
    taken_N: Tensor | None


def _spans(rows: Sequence[Row]) -> list[_Span]:
    spans: list[_Span] = []
    start = 0
    for row in rows:
        num_tokens, filled = len(row.token_ids), row.buffer.length
        positions = row.positions
        if positions is None:
            positions = range(filled, filled + num_tokens)
        if not num_tokens or len(positions) != num_tokens:
            raise ValueError(f"{num_tokens} tokens at {len(positions)} positions")
        num_new = sum(position >= filled for position in positions)
        ascends = all(a < b for a, b in pairwise(positions))
        if positions[0] < 0 or not ascends or (num_new and positions[-1] != filled + num_new - 1):
            raise ValueError(f"positions must ascend and fill on from slot {filled}")
        first, last = positions[0], positions[-1]
        row.buffer.reserve(last + 1)
        if last - first + 1 == num_tokens:
            slots = slice(first, last + 1)
        else:
            slots = torch.tensor(positions, device=row.buffer.device)
        end = start + num_tokens
        wanted = {"last": range(end - 1, end), "all": range(start, end), "none": range(0)}
        spans.append(_Span(row, start, positions, wanted[row.logits], slots, last + 1))
        start = end
    if not start:
        raise ValueError("nothing to compute")
    return spans


def _groups(spans: Sequence[_Span]) -> list[LoraGroup]:
    """The packed tokens by adapter: one group for neighbours of the same."""
    groups: list[LoraGroup] = []
    for span in spans:
        adapter = span.row.adapter
        if adapter is None:
            continue
        start, end = span.start, span.start + span.num_tokens
        if groups and groups[-1].adapter is adapter and groups[-1].tokens.stop == start:
            start = groups.pop().tokens.start
        groups.append(LoraGroup(slice(start, end), adapter))
    return groups


def _attend(
    module: torch.nn.Module,
    query_1ATD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    memcube_packed: _Packed | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows, as transformers calls it: A query heads, H key-value heads."""
    if memcube_packed is None:
        raise RuntimeError("this model was taken over by a PackedModel; call that one")
    for name, words in _UNSUPPORTED.items():
        if others.get(name) is not None:
            raise BadRequest(f"attention {words} can't be served", "model.name")
    layer = cast(int, module.layer_idx)
    value_dim = value_1HTD.shape[3]
    if value_dim < key_1HTD.shape[3]:  # latent attention; what is stored must not be left to chance
        value_1HTD = functional.pad(value_1HTD, (0, key_1HTD.shape[3] - value_dim))
    out_ATD = query_1ATD.new_empty(query_1ATD.shape[1], query_1ATD.shape[2], value_dim)
    for span in memcube_packed.spans:
        part = slice(span.start, span.start + span.num_tokens)
        key_HND, value_HND = span.row.buffer.layer(layer)
        _write(key_HND, span.slots, key_1HTD[0, :, part])
        _write(value_HND, span.slots, value_1HTD[0, :, part])
        if layer == memcube_packed.last_layer:
            continue
        first = 0
        if span.num_tokens == 1 and sliding_window is not None:
            first = max(0, span.num_keys - sliding_window)
        seen = slice(first, span.num_keys)
        out_ATD[:, part] = _attend_row(
            query_1ATD[:, :, part],
            key_HND[None, :, seen],
            value_HND[None, :, seen, :value_dim],
            span,
            scaling,
            sliding_window,
        )
        if memcube_packed.taken_N is not None:
            _add_taken(memcube_packed.taken_N, query_1ATD[0], key_HND, value_HND, span, scaling)
    if layer == memcube_packed.last_layer:
        raise _Enough
    return out_ATD.transpose(0, 1)[None], None


def _write(slots_HND: Tensor, slots: "slice | Tensor", new_HTD: Tensor) -> None:
    if isinstance(slots, slice):
        slots_HND[:, slots].copy_(new_HTD)
    else:
        slots_HND.index_copy_(1, slots, new_HTD.to(slots_HND.dtype))


def _attend_row(
    query_1ATD: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    span: _Span,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    _, num_queries, num_tokens, dim = query_1ATD.shape
    num_heads = key_1HND.shape[1]
    if window is not None and window >= span.num_keys:
        window = None
    if num_tokens == span.num_keys and num_tokens > 1 and window is None:
        return functional.scaled_dot_product_attention(
            query_1ATD, key_1HND, value_1HND, is_causal=True, scale=scaling, enable_gqa=True
        )[0]
    # The query heads of one key head become more queries of that head: nothing is repeated but the
    # mask, which all layers share. On a CPU 2.6 ms where repeated keys take 5.0 (30 tokens over
    # 3,000 slots, 9 heads on 3).
    groups = num_queries // num_heads
    query_1HQD = query_1ATD.reshape(1, num_heads, groups * num_tokens, dim)
    if num_tokens == 1:
        out_1HQD = functional.scaled_dot_product_attention(
            query_1HQD, key_1HND, value_1HND, scale=scaling
        )
    elif (
        window is None
        and span.is_run
        and dim == value_1HND.shape[3]
        and query_1ATD.device.type == "cpu"
    ):
        out_1HQD = _attend_in_two(query_1HQD, key_1HND, value_1HND, span, groups, scaling)
    else:
        mask_QN = span.mask(groups, window, query_1ATD.dtype)
        out_1HQD = functional.scaled_dot_product_attention(
            query_1HQD, key_1HND, value_1HND, attn_mask=mask_QN, scale=scaling
        )
    return out_1HQD.reshape(num_queries, num_tokens, -1)


def _attend_in_two(
    query_1HQD: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    span: _Span,
    groups: int,
    scaling: float | None,
) -> Tensor:
    """A run of tokens over what lies before it, unmasked, and over itself, joined by their sums.

    31 ms with a mask over all, 25 so (167 tokens over 6,000 slots, 9 heads on 3).
    """
    before = span.num_keys - span.num_tokens
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past_1HQD, past_1HQ = attend(
        query_1HQD, key_1HND[:, :, :before], value_1HND[:, :, :before], scale=scaling
    )
    mask_QT = span.mask(groups, None, query_1HQD.dtype, first_slot=before)
    own_1HQD, own_1HQ = attend(
        query_1HQD,
        key_1HND[:, :, before:],
        value_1HND[:, :, before:],
        attn_mask=mask_QT[None, None],
        scale=scaling,
    )
    share_1HQ1 = torch.sigmoid(past_1HQ - own_1HQ)[..., None].to(own_1HQD.dtype)
    return torch.lerp(own_1HQD, past_1HQD, share_1HQ1)


def _add_taken(
    taken_N: Tensor,
    query_ATD: Tensor,
    key_HND: Tensor,
    value_HND: Tensor,
    span: _Span,
    scaling: float | None,
) -> None:
    num_queries, num_tokens, dim = query_ATD.shape
    groups = num_queries // key_HND.shape[0]
    slots_N = torch.arange(span.num_keys, device=query_ATD.device)
    hidden_TN = slots_N > torch.tensor(span.positions, device=query_ATD.device)[:, None]
    hidden_QN = hidden_TN.repeat(groups, 1)
    query_HQD = query_ATD.reshape(-1, groups * num_tokens, dim)
    # Head by head, as the weights of all heads at once would be large.
    for query_QD, key_ND, value_ND in zip(query_HQD, key_HND, value_HND, strict=True):
        scores_QN = query_QD @ key_ND[: span.num_keys].T * (scaling or dim**-0.5)
        weights_QN = scores_QN.float().masked_fill(hidden_QN, -torch.inf).softmax(dim=-1)
        lengths_N = value_ND[: len(taken_N)].float().norm(dim=-1)
        taken_N += weights_QN[:, : len(taken_N)].sum(dim=0) * lengths_N
