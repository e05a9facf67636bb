"""LoRA adapters in a packed forward: rows with different ones, and rows with none, in one step.

Rows of one adapter stand side by side, so that each linear layer gets two small products for each
adapter of the step, added to the rows that asked for it; the others' outputs aren't touched. The
model's own weights stay as they are: to go from one adapter to another costs nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memcube.errors import BadRequest
from memcube.parametric.weights import AdapterWeights

_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Factors(NamedTuple):
    """Both transposed, the scaling within B."""

    a_IR: Tensor
    b_RO: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """An adapter's factors on a model's device, by layer; see ``LoraLayers.ready``."""

    factors: dict[str, _Factors]
    num_bytes: int


class LoraGroup(NamedTuple):
    """Packed tokens of one adapter."""

    tokens: slice
    adapter: LoraAdapter


class LoraLayers:
    """The linear layers of a model that adapters change. For one thread, but for ``ready``."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear)
            and name.rpartition(".")[2] in _KINDS
            and ".experts." not in name  # these see the tokens that were sent to them alone
        }
        self._groups: Sequence[LoraGroup] = ()
        self._num_tokens = 0
        self._hooked = False

    @torch.inference_mode(False)
    def ready(self, weights: AdapterWeights) -> LoraAdapter:
        """The factors as the layers need them. Any thread may call it.

        Raises:
            BadRequest: they are for layers that this model doesn't have.
        """
        factors: dict[str, _Factors] = {}
        for name, (a_RI, b_OR) in weights.pairs.items():
            layer = self._layers.get(name)
            if layer is None:
                raise BadRequest(f"the adapter changes {name}, which can't be served", "adapter")
            if (a_RI.shape[1], b_OR.shape[0]) != (layer.in_features, layer.out_features):
                raise BadRequest(f"the adapter has another shape at {name}", "adapter")
            like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
            scaled_OR = b_OR.float() * (weights.alpha / weights.rank)
            factors[name] = _Factors(
                a_RI.t().contiguous().to(**like), scaled_OR.t().contiguous().to(**like)
            )
        num_bytes = sum(a_IR.nbytes + b_RO.nbytes for a_IR, b_RO in factors.values())
        return LoraAdapter(factors, num_bytes)

    @contextmanager
    def applied(self, groups: Sequence[LoraGroup], num_tokens: int) -> Iterator[None]:
        """Add these adapters to what the model computes, of so many packed tokens, meanwhile."""
        if groups and not self._hooked:
            # A model that never sees an adapter does without the hooks' microseconds.
            for name, layer in self._layers.items():
                layer.register_forward_hook(partial(self._add, name))
            self._hooked = True
        self._groups, self._num_tokens = groups, num_tokens
        try:
            yield
        finally:
            self._groups = ()

    def _add(self, name: str, layer: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        if not self._groups:
            return
        in_TI = given[0].reshape(-1, layer.in_features)
        if in_TI.shape[0] != self._num_tokens:
            raise RuntimeError(f"{name} computes {in_TI.shape[0]} of {self._num_tokens} tokens")
        out_TO = output.view(-1, layer.out_features)
        for tokens, adapter in self._groups:
            found = adapter.factors.get(name)
            if found is not None:
                out_TO[tokens].addmm_(in_TI[tokens] @ found.a_IR, found.b_RO)
