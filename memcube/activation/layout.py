"""The shape of a model's KV, and the legend of the tensors' suffixes.

L layers, 2 = (key, value), H key-value heads, N tokens, D head dimension: ``kv_L2HND``. T packed
tokens, V vocabulary, B rows of a batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Element types that KV may have, by the name that torch gives them."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What all KV of one model has in common. ``dtype`` is a name such as ``bfloat16``."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV is of {', '.join(ITEM_BYTES)}, not of {self.dtype!r}")
        if min(self.num_layers, self.num_heads, self.head_dim) < 1:
            raise ValueError(f"a layout's sizes are 1 or more: {self}")

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values of all layers, as the model computes them."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * ITEM_BYTES[self.dtype]

    def shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """The shape of ``kv_L2HND`` for so many tokens."""
        return self.num_layers, 2, self.num_heads, num_tokens, self.head_dim

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)
