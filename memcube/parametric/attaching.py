"""Adapters on a model for a while: attached by PEFT, and the model afterwards as it was before.

For what asks or merges adapters beside the engine that serves (which has ``activation.lora``). The
model's own layers are put back by hand rather than by PEFT's ``unload``, which can't undo a wrapping
that failed half-way and leaves ``requires_grad`` changed.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from memcube.activation.models import LoadedModel
from memcube.errors import BadRequest, Conflict
from memcube.parametric.weights import AdapterWeights, LoraPair


@contextmanager
def attached(loaded: LoadedModel, adapters: Mapping[str, AdapterWeights]) -> Iterator[PeftModel]:
    """The model with these adapters by name, the first one active, in evaluation mode.

    Behind it, also behind an error, the model has its own layers again, with their modes and
    gradients; no random number is drawn from the caller's generators. Not for two threads at once.

    Raises:
        Conflict: an adapter is for another base, or the model has one attached already.
        BadRequest: an adapter is for layers that the model doesn't have.
    """
    model = loaded.model
    layers = _layers(loaded, adapters)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with forked_random(model):
            wrapped = _wrapped(model, adapters)
        yield wrapped.eval()
    finally:
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
        vars(model).pop("peft_config", None)
        for module, is_training in modes:
            module.training = is_training
        for parameter, is_learned in gradients:
            parameter.requires_grad_(is_learned)


@contextmanager
def forked_random(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Random numbers that follow from the seed meanwhile; afterwards the generators are as before."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def factors_of(wrapped: PeftModel, name: str) -> dict[str, LoraPair]:
    """Copies of an attached adapter's factors, by the names of the model's layers, on the host."""
    found: dict[str, LoraPair] = {}
    for layer, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            factors: list[Any] = [module.lora_A[name], module.lora_B[name]]
            a_RI, b_OR = (factor.weight.detach().cpu().clone() for factor in factors)
            found[layer] = LoraPair(a_RI, b_OR)
    return found


def _layers(loaded: LoadedModel, adapters: Mapping[str, AdapterWeights]) -> dict[str, nn.Linear]:
    """The layers that adapters change, once all that PEFT would pass over is checked."""
    modules = dict(loaded.model.named_modules())
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        raise Conflict("the model has an adapter attached already; give one of its own")
    if not adapters:
        raise BadRequest("is empty", "adapters")
    layers: dict[str, nn.Linear] = {}
    for weights in adapters.values():
        if weights.base != loaded.fingerprint:
            raise Conflict(
                f"the adapter was trained on model {weights.base[:12]}…, "
                f"not on {loaded.fingerprint[:12]}…"
            )
        for name, (a_RI, b_OR) in weights.pairs.items():
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear):
                raise BadRequest(f"the adapter changes {name}, which is no linear layer", "adapter")
            if (a_RI.shape[1], b_OR.shape[0]) != (layer.in_features, layer.out_features):
                raise BadRequest(f"the adapter has another shape at {name}", "adapter")
            layers[name] = layer
    return layers


def _wrapped(model: nn.Module, adapters: Mapping[str, AdapterWeights]) -> PeftModel:
    first, *others = adapters
    wrapped = get_peft_model(model, _config(adapters[first]), adapter_name=first)
    assert isinstance(wrapped, PeftModel)
    for name in others:
        wrapped.add_adapter(name, _config(adapters[name]))
    base = wrapped.get_base_model()
    with torch.no_grad():
        for name, weights in adapters.items():
            for layer, (a_RI, b_OR) in weights.pairs.items():
                module: Any = base.get_submodule(layer)
                module.lora_A[name].weight.copy_(a_RI)
                module.lora_B[name].weight.copy_(b_OR)
    wrapped.set_adapter(first)
    return wrapped


def _config(weights: AdapterWeights) -> LoraConfig:
    return LoraConfig(
        r=weights.rank,
        lora_alpha=weights.alpha,  # pyright: ignore[reportArgumentType] - a float does as well
        # One pattern of whole names: of a list PEFT would take each name as an ending.
        target_modules="|".join(map(re.escape, weights.pairs)),
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
