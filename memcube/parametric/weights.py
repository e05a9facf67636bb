"""The weights of a LoRA adapter: what they are, and their file.

A file is a safetensors file whose tensors are named as PEFT names them, so that PEFT reads it too. Its
metadata says which base model it is for, its rank and its alpha, so that the file's SHA-256, by which
it is asked for, covers all that its answers depend on. Nothing is unpickled.

Shapes: A of (rank, in), B of (out, rank); a linear layer's output gets (alpha / rank) · B · A · x.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from memcube.errors import BadRequest, Conflict, Corrupt, LimitExceeded
from memcube.parametric.limits import AdapterLimits

FORMAT = "memcube-lora-1"
MAX_HEADER_BYTES = 1 << 20
_NAMED = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight", re.ASCII)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LoraPair(NamedTuple):
    """The two factors of one linear layer's change."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """An adapter's factors by the names of the linear layers in the base model.

    Raises ValueError where the factors don't fit together.
    """

    base: str
    rank: int
    alpha: float
    pairs: Mapping[str, LoraPair]

    def __post_init__(self) -> None:
        if not self.pairs or self.rank < 1 or not self.alpha > 0:
            raise ValueError("an adapter has layers, a rank and an alpha above 0")
        for name, (a_RI, b_OR) in self.pairs.items():
            if a_RI.ndim != 2 or b_OR.ndim != 2:
                raise ValueError(f"{name}: factors are matrices")
            if not a_RI.shape[0] == b_OR.shape[1] == self.rank:
                raise ValueError(f"{name}: factors of rank {self.rank} in another shape")
            if a_RI.dtype not in _DTYPES or b_OR.dtype not in _DTYPES:
                raise ValueError(f"{name}: factors of type {a_RI.dtype}")

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of layers that are changed: ``q_proj`` and so on."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.pairs}))

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], *, base: str, rank: int, alpha: float
    ) -> "AdapterWeights":
        """The weights of tensors that are named as PEFT names them.

        Raises:
            ValueError: a name that is none of LoRA's, a factor without the other, or of another shape.
        """
        sides: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            named = _NAMED.fullmatch(name)
            if named is None:
                raise ValueError(f"tensor {name[:80]!r} is none of LoRA's")
            sides.setdefault(named[1], {})[named[2]] = tensor
        if halves := [name for name, pair in sides.items() if len(pair) != 2]:
            raise ValueError(f"{halves[0]}: a factor is missing")
        pairs = {name: LoraPair(pair["A"], pair["B"]) for name, pair in sorted(sides.items())}
        return cls(base=base, rank=rank, alpha=alpha, pairs=pairs)

    def tensors(self) -> dict[str, Tensor]:
        """The factors by PEFT's names."""
        named: dict[str, Tensor] = {}
        for name, (a_RI, b_OR) in self.pairs.items():
            named[f"base_model.model.{name}.lora_A.weight"] = a_RI.contiguous()
            named[f"base_model.model.{name}.lora_B.weight"] = b_OR.contiguous()
        return named


def encode(weights: AdapterWeights, limits: AdapterLimits) -> bytes:
    """The file of these weights: the same weights give the same bytes.

    Raises:
        BadRequest: a weight is no finite number.
        LimitExceeded: too large.
    """
    if weights.rank > limits.max_rank:
        raise LimitExceeded("an adapter's rank", limits.max_rank, weights.rank)
    for name, pair in weights.pairs.items():
        if not all(bool(torch.isfinite(factor).all()) for factor in pair):
            raise BadRequest(f"{name} holds numbers that aren't finite; training went astray")
    about = {
        "format": FORMAT,
        "base": weights.base,
        "rank": str(weights.rank),
        "alpha": repr(float(weights.alpha)),
    }
    # safetensors writes a metadata of several keys in any order: one key keeps the bytes the same.
    data = save(weights.tensors(), metadata={"memcube": json.dumps(about)})
    if len(data) > limits.max_bytes:
        raise LimitExceeded("bytes of an adapter", limits.max_bytes, len(data))
    return data


def decode(
    data: bytes, *, where: str, sha256: str, base: str, limits: AdapterLimits
) -> AdapterWeights:
    """The weights of a file, if it is the one whose hash this is and fits the base model.

    Raises:
        Corrupt: other bytes, or no adapter.
        Conflict: it was trained on another base model.
        LimitExceeded: too large.
    """
    if len(data) > limits.max_bytes:
        raise LimitExceeded("bytes of an adapter", limits.max_bytes)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Corrupt(where, "its bytes are not those that were published; train it anew")
    try:
        about = _about(data)
        rank, alpha = int(about["rank"]), float(about["alpha"])
        if about["base"] != base:
            raise Conflict(
                f"{where} was trained on model {about['base'][:12]}…, not on {base[:12]}…"
            )
        if rank > limits.max_rank:
            raise LimitExceeded("an adapter's rank", limits.max_rank, rank)
        return AdapterWeights.of_tensors(load(data), base=base, rank=rank, alpha=alpha)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as broken:
        raise Corrupt(where, f"is no adapter ({type(broken).__name__}: {broken})") from None


def _about(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES:
        raise ValueError("no header of safetensors")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["memcube"])
    if about["format"] != FORMAT:
        raise ValueError(f"of format {str(about['format'])[:40]!r}")
    return about
