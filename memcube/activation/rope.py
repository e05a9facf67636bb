"""Keys without their positions, and put to others.

RoPE turns each key by an angle that its position gives. Turned back, a key serves at any position.
The angles are those of the model's own rotary embedding, so its scaling (linear, llama3, yarn) is
in them. The factor that yarn puts on keys and queries alike is left on the keys: it is the same at
each position.

Dynamic and longrope scaling depend on the length of the sequence, so a key's angle isn't given by
its position alone: such models are refused, as are those whose attention is of another kind.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_SCALINGS = ("default", "linear", "llama3", "yarn")


class Rope:
    """Rotates keys as one model does."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ValueError: the model has no rotary embedding, or several.
        """
        found = [m for n, m in model.named_modules() if n.endswith("rotary_emb")]
        frequencies = getattr(found[0], "inv_freq", None) if len(found) == 1 else None
        if not isinstance(frequencies, Tensor):
            raise ValueError(f"{len(found)} rotary embeddings")
        self._rotary = found[0]
        self._dim = 2 * len(frequencies)
        """Of a head's dimensions, the first so many are rotated."""

    def rotate(self, kv_L2HND: Tensor, positions: Sequence[int]) -> Tensor:
        """A copy with un-rotated keys put to these positions. The values are the same."""
        return self._turn(kv_L2HND, positions, 1.0)

    def unrotate(self, kv_L2HND: Tensor, positions: Sequence[int]) -> Tensor:
        """A copy with the positions taken from keys that stand at these."""
        return self._turn(kv_L2HND, positions, -1.0)

    @torch.inference_mode()
    def _turn(self, kv_L2HND: Tensor, positions: Sequence[int], sign: float) -> Tensor:
        if len(positions) != kv_L2HND.shape[3]:
            raise ValueError(f"{len(positions)} positions for {kv_L2HND.shape[3]} tokens")
        cos_ND, sin_ND = self._angles(kv_L2HND.device, positions)
        sin_ND = sin_ND * sign
        with torch.inference_mode(False):
            out_L2HND = torch.empty_like(kv_L2HND, memory_format=torch.contiguous_format)
        # Layer by layer: the temporary float32 copies stay in the processor's cache.
        for old_2HND, new_2HND in zip(kv_L2HND, out_L2HND, strict=True):
            new_2HND[1] = old_2HND[1]
            key_HND = old_2HND[0, ..., : self._dim].float()
            half = self._dim // 2
            turned_HND = torch.cat((-key_HND[..., half:], key_HND[..., :half]), dim=-1)
            new_2HND[0, ..., : self._dim] = key_HND * cos_ND + turned_HND * sin_ND
            new_2HND[0, ..., self._dim :] = old_2HND[0, ..., self._dim :]
        return out_L2HND

    def _angles(self, device: torch.device, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        at_1N = torch.tensor([list(positions)], device=device)
        like = torch.empty(0, dtype=torch.float32, device=device)
        cos_1ND, sin_1ND = self._rotary(like, at_1N)
        scaling = float(getattr(self._rotary, "attention_scaling", 1.0))
        return cos_1ND[0] / scaling, sin_1ND[0] / scaling


def compose_refusal(model: PreTrainedModel) -> str | None:
    """Why this model's KV can't be put to other positions; None where it can.

    What the configuration doesn't tell is tried out: a token that stands alone must have the same
    keys at two positions but for the rotation. The model must still have its own attention.
    """
    config = model.config.get_text_config()
    if (why := _config_refusal(config)) is not None:
        return why
    try:
        rope = Rope(model)
    except ValueError as other:
        return f"its positions aren't of one rotary embedding: it has {other}"
    near, far = 3, min(1000, config.max_position_embeddings - 1)
    expected_L2HND = _lone_token(model, far)
    found_L2HND = rope.rotate(rope.unrotate(_lone_token(model, near), [near]), [far])
    off = (found_L2HND - expected_L2HND).float().abs().amax()
    limit = 1e-3 if expected_L2HND.dtype == torch.float32 else 5e-2
    if off > limit * expected_L2HND.float().abs().amax():
        return "its keys aren't rotated by position as Llama's and Qwen's are"
    return None


def _config_refusal(config: PreTrainedConfig) -> str | None:
    layers = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in layers or (window is not None and not layers):
        return (
            f"its layers see a sliding window of {window} tokens, which a segment's build doesn't"
        )
    if others := layers - {"full_attention"}:
        return f"it has layers of kind {', '.join(sorted(others))}"
    if getattr(config, "kv_lora_rank", None):
        return "its latent attention (MLA) keeps the positions in a part of the key of its own"
    parameters = getattr(config, "rope_parameters", None) or {}
    if not parameters:
        return "it has no rotary positions"
    scaling = parameters.get("rope_type")
    if scaling in ("dynamic", "longrope"):
        return f"its RoPE scaling ({scaling}) depends on the length of the sequence"
    if scaling not in _SCALINGS:
        return f"its RoPE is of kind {scaling!r}; built are {', '.join(_SCALINGS)}"
    return None


@torch.inference_mode()
def _lone_token(model: PreTrainedModel, position: int) -> Tensor:
    output = model(
        input_ids=torch.tensor([[7]], device=model.device),
        position_ids=torch.tensor([[position]], device=model.device),
        use_cache=True,
    )
    cache = getattr(output, "cache", None) or output.past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])
