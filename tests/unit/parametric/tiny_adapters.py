"""Random adapters for tiny models."""

import torch
from torch import nn

from memcube.parametric.weights import AdapterWeights, LoraPair


def random_adapter(model, *, seed=0, rank=4, alpha=8.0, base="tiny", kinds=None, scale=0.3):
    """Factors for all linear layers of a model but its head, large enough to change its answers."""
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape):
        return torch.randn(*shape, generator=generator) * scale

    pairs = {
        name: LoraPair(factor(rank, layer.in_features), factor(layer.out_features, rank))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
        if kinds is None or name.rpartition(".")[2] in kinds
    }
    return AdapterWeights(base=base, rank=rank, alpha=alpha, pairs=pairs)
